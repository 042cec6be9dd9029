"""The decoder of Qwen2.5-VL and Qwen3-VL as an ONNX graph, written directly from its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.graph import (
    FLOAT,
    INT32,
    INT64,
    MICROSOFT,
    GraphBuilder,
    Progress,
    Shape,
    WeightFormat,
    silent,
)
from gog_edge.policy.manifest import TextSpec

Weights = Callable[[str], Array]  # name within the decoder, such as "layers.0.mlp.up_proj.weight" -> float32


class DecoderWriter:
    """A writer of the decoder with ONNX Runtime's own operators.

    GroupQueryAttention applies rotary embeddings and updates the KV cache in place; SkipSimplifiedLayerNormalization
    adds and normalizes in one pass. On ONNX Runtime 1.31 CPU this is 1.7 to 1.9 times as fast as TensorScatter and
    Attention of opset 24, in prefill and in decode.
    """

    name = "decoder"  # as shown in progress
    builder: type[GraphBuilder] = GraphBuilder
    cache_dtype = FLOAT
    has_logits = True
    takes_last = True  # has the input `last`, the index of the newest token, besides `total`

    def __init__(
        self, path: Path, spec: TextSpec, weights: Weights, *, weight_format: WeightFormat = "fp32",
        head_format: WeightFormat | None = None, progress: Progress = silent,
    ) -> None:
        """Prepare a graph; `head_format` is how the head's weights are stored, None for `weight_format`."""
        self.spec = spec
        self.weights = weights
        self.graph = self.builder("decoder", path, weight_format)
        self._head_format = head_format
        self._progress = progress

    def write(self) -> None:
        """Write the whole decoder: embeddings -> logits [keep, vocab] of the last positions, if it has any.

        Raises CheckpointError if the attention operator does not support the head width.
        """
        if self.spec.head_dim % 16:
            raise CheckpointError(
                f"the decoder's heads have a width of {self.spec.head_dim}; ONNX Runtime's GroupQueryAttention needs a "
                "multiple of 16: train the model with such heads"
            )
        stream = self.declare_inputs()
        normed = self.norm(stream, "layers.0.input_layernorm.weight")
        for layer in self._progress(range(self.spec.layers), self.name):
            attended = self.attention(self._qkv(normed, layer), layer)
            if layer + 1 < self.spec.layers:
                next_norm = f"layers.{layer + 1}.input_layernorm.weight"
                stream, normed = self._after_attention(stream, attended, layer, next_norm)
            elif self.has_logits:
                _, normed = self._after_attention(stream, attended, layer, "norm.weight")
                self._head(normed)
        self.graph.save()

    def declare_inputs(self) -> str:
        """Declare the inputs and return the embeddings [1, T, hidden].

        The rotary tables have one row per cached token, by token index.
        """
        for name in ("cos", "sin"):
            self.graph.input(name, FLOAT, ["capacity", self.spec.head_dim // 2])
        if self.takes_last:
            self.graph.input("last", INT32, [1])
        self.graph.input("total", INT32, [])
        if self.has_logits:
            self._keep = self.graph.input("keep", INT64, [1])
        if self.spec.deepstack:
            self._deepstack = self.graph.input("deepstack", FLOAT, [self.spec.deepstack, "tokens", self.spec.hidden])
        return self.graph.input("inputs_embeds", FLOAT, [1, "tokens", self.spec.hidden])

    def declare_cache(self, name: str) -> tuple[str, str]:
        """Declare a cache [1, kv_heads, capacity, head_dim] as input and output; return both names."""
        shape: Shape = [1, self.spec.kv_heads, "capacity", self.spec.head_dim]
        self.graph.declare_output(f"present_{name}", self.cache_dtype, shape)
        return self.graph.input(f"past_{name}", self.cache_dtype, shape), f"present_{name}"

    def attention(self, qkv: str, layer: int) -> str:
        """Compute attention and update the cache.

        Args:
            qkv: concatenated projections [1, T, (heads + 2 kv_heads) * head_dim].
            layer: index of the layer.

        Returns:
            [1, T, heads * head_dim].
        """
        past_key, key = self.declare_cache(f"key_{layer}")
        past_value, value = self.declare_cache(f"value_{layer}")
        projections = self._normalized_projections(qkv, layer) if self.spec.qk_norm else [qkv, "", ""]
        return self.graph.ops(
            "GroupQueryAttention", *projections, past_key, past_value, "last", "total", "cos", "sin",
            names=(key, value), domain=MICROSOFT, num_heads=self.spec.heads, kv_num_heads=self.spec.kv_heads,
            do_rotary=1, rotary_interleaved=0, scale=self.spec.head_dim**-0.5,
        )[0]

    def _normalized_projections(self, qkv: str, layer: int) -> list[str]:
        """Split into query, key and value [1, T, heads * head_dim]; normalize each head of query and key."""
        graph, spec = self.graph, self.spec
        widths = graph.ints(spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        parts = graph.ops("Split", qkv, widths, count=3, axis=-1)
        for index, (part, heads) in enumerate((("q", spec.heads), ("k", spec.kv_heads))):
            split = graph.op("Reshape", parts[index], graph.ints(1, -1, heads, spec.head_dim))
            normed = self.norm(split, f"layers.{layer}.self_attn.{part}_norm.weight")
            parts[index] = graph.op("Reshape", normed, graph.ints(1, -1, heads * spec.head_dim))
        return parts

    def norm(self, value: str, weight: str) -> str:
        """Apply an RMS norm over the last axis."""
        scale = self.graph.weight(self.weights(weight), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def add_norm(self, stream: str, update: str, weight: str) -> tuple[str, str]:
        """Return the sum of two values [1, T, hidden], and its RMS norm."""
        scale = self.graph.weight(self.weights(weight), "norm")
        total = f"{weight}.sum"  # the operator's fourth output; the second and third are not used
        normed = self.graph.ops(
            "SkipSimplifiedLayerNormalization", stream, update, scale, names=("", "", total), domain=MICROSOFT,
            epsilon=self.spec.norm_eps,
        )[0]
        return total, normed

    def _qkv(self, normed: str, layer: int) -> str:
        parts = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        weight = np.concatenate([self.weights(f"{part}.weight") for part in parts])
        bias = np.concatenate([self.weights(f"{part}.bias") for part in parts]) if self.spec.qkv_bias else None
        return self.graph.linear(normed, weight, bias, name="qkv")

    def _after_attention(self, stream: str, attended: str, layer: int, next_norm: str) -> tuple[str, str]:
        """Apply the part of a layer after attention; return the residual stream and its norm `next_norm`."""
        graph = self.graph
        attended = graph.linear(attended, self.weights(f"layers.{layer}.self_attn.o_proj.weight"), name="o")
        stream, normed = self.add_norm(stream, attended, f"layers.{layer}.post_attention_layernorm.weight")
        update = self._feed_forward(normed, layer)
        if layer < self.spec.deepstack:
            update = graph.op("Add", update, graph.op("Gather", self._deepstack, graph.scalar(layer), axis=0))
        if layer + 1 == self.spec.layers:  # logits are computed for the newest tokens only
            stream, update = self._newest(stream), self._newest(update)
        return self.add_norm(stream, update, next_norm)

    def _feed_forward(self, normed: str, layer: int) -> str:
        gate, up, down = (self.weights(f"layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        return self.graph.linear(self.graph.swiglu(normed, (gate, None), (up, None)), down, name="down")

    def _newest(self, value: str) -> str:
        """Return the last `keep` tokens [1, keep, width] of [1, T, width]."""
        start, end, axis = self.graph.op("Neg", self._keep), self.graph.ints(np.iinfo(np.int64).max), self.graph.ints(1)
        return self.graph.op("Slice", value, start, end, axis)

    def _head(self, normed: str) -> None:
        flat = self.graph.op("Reshape", normed, self.graph.ints(-1, self.spec.hidden))
        head = self.weights("embed_tokens.weight" if self.spec.tied else "lm_head.weight")
        logits = self.graph.linear(flat, head, name="head", weight_format=self._head_format)
        self.graph.output(logits, "logits", FLOAT, ["keep", self.spec.vocab])


class PrefillWriter(DecoderWriter):
    """A writer of the graph that only fills the cache: it ends at the last layer's keys and values."""

    name = "prefill"
    has_logits = False


def write_decoder(
    path: Path, spec: TextSpec, weights: Weights, *, prefill: bool = False, weight_format: WeightFormat = "fp32",
    head_format: WeightFormat | None = None, progress: Progress = silent,
) -> None:
    """Write the decoder graph.

    Args:
        path: the .onnx file to write.
        spec: shapes of the decoder.
        weights: its tensors by name.
        prefill: write the graph that only fills the cache.
        weight_format: how the weights of linear layers are stored.
        head_format: how the head's weights are stored; None for `weight_format`.
        progress: shows progress over the layers.
    """
    writer = PrefillWriter if prefill else DecoderWriter
    writer(path, spec, weights, weight_format=weight_format, head_format=head_format, progress=progress).write()
