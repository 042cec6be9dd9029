"""The decoder of Qwen2.5-VL and Qwen3-VL as an ONNX graph, written straight from its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.graph import FLOAT, INT32, INT64, MICROSOFT, Form, GraphBuilder, Progress, Shape, silent
from gog_edge.policy.manifest import TextSpec

Weights = Callable[[str], Array]  # name within the decoder, such as "layers.0.mlp.up_proj.weight" -> float32


class DecoderWriter:
    """By ONNX Runtime's own operators: cache in place, rotary inside, sum and norm in one."""

    name = "decoder"
    builder: type[GraphBuilder] = GraphBuilder
    cache_type = FLOAT
    logits = True
    takes_last = True  # index of the newest token, besides how many there are

    def __init__(
        self, path: Path, spec: TextSpec, weights: Weights, *, form: Form = "fp32", head: Form | None = None,
        progress: Progress = silent,
    ) -> None:
        """`form` is how weights are stored, `head` how those of the head are (as the others when None)."""
        self.spec = spec
        self.weights = weights
        self.graph = self.builder("decoder", path, form)
        self._head = head
        self._progress = progress

    def begin(self) -> str:
        """Declare the inputs; returns the embeddings [1, T, hidden].

        Rotary tables stand by token index, one row a cached token.
        """
        for name in ("cos", "sin"):
            self.graph.input(name, FLOAT, ["capacity", self.spec.head_dim // 2])
        if self.takes_last:
            self.graph.input("last", INT32, [1])
        self.graph.input("total", INT32, [])
        if self.logits:
            self._keep = self.graph.input("keep", INT64, [1])
        if self.spec.deepstack:
            self._deepstack = self.graph.input("deepstack", FLOAT, [self.spec.deepstack, "tokens", self.spec.hidden])
        return self.graph.input("inputs_embeds", FLOAT, [1, "tokens", self.spec.hidden])

    def attention(self, qkv: str, layer: int) -> str:
        """Packed projections [1, T, (heads + 2 kv_heads) * head_dim] -> [1, T, heads * head_dim]; updates the cache."""
        past_key, key = self.state(f"key_{layer}")
        past_value, value = self.state(f"value_{layer}")
        projections = self.split(qkv, layer) if self.spec.qk_norm else [qkv, "", ""]
        return self.graph.ops(
            "GroupQueryAttention", *projections, past_key, past_value, "last", "total", "cos", "sin",
            names=(key, value), domain=MICROSOFT, num_heads=self.spec.heads, kv_num_heads=self.spec.kv_heads,
            do_rotary=1, rotary_interleaved=0, scale=self.spec.head_dim**-0.5,
        )[0]

    def split(self, qkv: str, layer: int) -> list[str]:
        """Packed projections -> query, key and value [1, T, heads * head_dim], heads of the first two normalised."""
        graph, spec = self.graph, self.spec
        widths = graph.ints(spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        parts = graph.ops("Split", qkv, widths, count=3, axis=-1)
        for at, (kind, heads) in enumerate((("q", spec.heads), ("k", spec.kv_heads))):
            split = graph.op("Reshape", parts[at], graph.ints(1, -1, heads, spec.head_dim))
            normed = self.norm(split, f"layers.{layer}.self_attn.{kind}_norm.weight")
            parts[at] = graph.op("Reshape", normed, graph.ints(1, -1, heads * spec.head_dim))
        return parts

    def add_norm(self, stream: str, update: str, weight: str) -> tuple[str, str]:
        """(sum of the two, its RMS norm), both [1, T, hidden]: outputs are the norm, two unused ones, and the sum."""
        scale = self.graph.weight(self.weights(weight), "norm")
        total = f"{weight}.sum"
        normed = self.graph.ops(
            "SkipSimplifiedLayerNormalization", stream, update, scale, names=("", "", total), domain=MICROSOFT,
            epsilon=self.spec.norm_eps,
        )[0]
        return total, normed

    def norm(self, value: str, weight: str) -> str:
        """RMS norm over the last axis."""
        scale = self.graph.weight(self.weights(weight), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def state(self, name: str) -> tuple[str, str]:
        """Declare one cache as input and as output; returns both names."""
        shape: Shape = [1, self.spec.kv_heads, "capacity", self.spec.head_dim]
        self.graph.declare_output(f"present_{name}", self.cache_type, shape)
        return self.graph.input(f"past_{name}", self.cache_type, shape), f"present_{name}"

    def write(self) -> None:
        """Write the whole decoder: embeddings in, logits [keep, vocab] of the last positions out, if there are any.

        CheckpointError where the operators cannot take the decoder's shape.
        """
        if self.spec.head_dim % 16:
            raise CheckpointError(
                f"the decoder's heads are {self.spec.head_dim} wide; ONNX Runtime's GroupQueryAttention wants a "
                "multiple of 16: train the model with such heads"
            )
        stream = self.begin()
        normed = self.norm(stream, "layers.0.input_layernorm.weight")
        for layer in self._progress(range(self.spec.layers), self.name):
            attended = self.attention(self._projected(normed, layer), layer)
            if layer + 1 < self.spec.layers:
                stream, normed = self._rest(stream, attended, layer, f"layers.{layer + 1}.input_layernorm.weight")
            elif self.logits:
                _, normed = self._rest(stream, attended, layer, "norm.weight")
                self._head_of(normed)
        self.graph.save()

    def _projected(self, normed: str, layer: int) -> str:
        parts = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        weight = np.concatenate([self.weights(f"{part}.weight") for part in parts])
        bias = np.concatenate([self.weights(f"{part}.bias") for part in parts]) if self.spec.qkv_bias else None
        return self.graph.linear(normed, weight, bias, name="qkv")

    def _rest(self, stream: str, attended: str, layer: int, following: str) -> tuple[str, str]:
        """A layer from its attention on; the stream, and its norm of the name `following`."""
        graph = self.graph
        attended = graph.linear(attended, self.weights(f"layers.{layer}.self_attn.o_proj.weight"), name="o")
        stream, normed = self.add_norm(stream, attended, f"layers.{layer}.post_attention_layernorm.weight")
        fed = self._feed_forward(normed, layer)
        if layer < self.spec.deepstack:
            fed = graph.op("Add", fed, graph.op("Gather", self._deepstack, graph.scalar(layer), axis=0))
        if layer + 1 == self.spec.layers:  # only the newest tokens' logits are ever asked for
            stream, fed = self._newest(stream), self._newest(fed)
        return self.add_norm(stream, fed, following)

    def _newest(self, value: str) -> str:
        """The last `keep` tokens [1, keep, width] of [1, T, width]."""
        start, end, axis = self.graph.op("Neg", self._keep), self.graph.ints(np.iinfo(np.int64).max), self.graph.ints(1)
        return self.graph.op("Slice", value, start, end, axis)

    def _head_of(self, normed: str) -> None:
        flat = self.graph.op("Reshape", normed, self.graph.ints(-1, self.spec.hidden))
        head = self.weights("embed_tokens.weight" if self.spec.tied else "lm_head.weight")
        logits = self.graph.linear(flat, head, name="head", form=self._head)
        self.graph.output(logits, "logits", FLOAT, ["keep", self.spec.vocab])

    def _feed_forward(self, normed: str, layer: int) -> str:
        gate, up, down = (self.weights(f"layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        return self.graph.linear(self.graph.swiglu(normed, (gate, None), (up, None)), down, name="down")


class PrefillWriter(DecoderWriter):
    """Writes many tokens into the cache and says nothing: it ends where the last layer's keys and values are known."""

    name = "prefill"
    logits = False


def write_decoder(
    path: Path, spec: TextSpec, weights: Weights, *, prefill: bool = False, form: Form = "fp32",
    head: Form | None = None, progress: Progress = silent,
) -> None:
    """Write the decoder graph, its weights stored as `form`, the head's as `head`; `prefill`: to only fill caches."""
    writer = PrefillWriter if prefill else DecoderWriter
    writer(path, spec, weights, form=form, head=head, progress=progress).write()
