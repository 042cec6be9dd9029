"""The decoder of Qwen2.5-VL and Qwen3-VL as an ONNX graph, written straight from its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.graph import FLOAT, INT32, INT64, MICROSOFT, Form, GraphBuilder, Progress, Shape, silent
from gog_edge.policy.manifest import TextSpec

Lowering = Literal["gqa", "gqa-prefill", "standard"]
Weights = Callable[[str], Array]  # name within the decoder, such as "layers.0.mlp.up_proj.weight" -> float32


class DecoderWriter:
    """Layers common to all lowerings; a lowering says how the norm after a sum and the attention are written."""

    logits = True

    def __init__(
        self, path: Path, spec: TextSpec, weights: Weights, *, form: Form = "fp32", head: Form | None = None,
        progress: Progress = silent,
    ) -> None:
        """`form` is how weights are stored, `head` how those of the head are (as the others when None)."""
        self.spec = spec
        self.weights = weights
        self.graph = GraphBuilder("decoder", path, form)
        self._head = head
        self._progress = progress

    def begin(self) -> str:
        """Declare the inputs; returns the embeddings [1, T, hidden]."""
        if self.logits:
            self._keep = self.graph.input("keep", INT64, [1])
        if self.spec.deepstack:
            self._deepstack = self.graph.input("deepstack", FLOAT, [self.spec.deepstack, "tokens", self.spec.hidden])
        return self.graph.input("inputs_embeds", FLOAT, [1, "tokens", self.spec.hidden])

    def attention(self, qkv: str, layer: int) -> str:
        """Packed projections [1, T, (heads + 2 kv_heads) * head_dim] -> [1, T, heads * head_dim]; updates the cache."""
        raise NotImplementedError

    def split(self, qkv: str, layer: int) -> list[str]:
        """Packed projections -> query, key and value [1, T, heads * head_dim], the first two normalised if need be."""
        graph, spec = self.graph, self.spec
        widths = graph.ints(spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        parts = graph.ops("Split", qkv, widths, count=3, axis=-1)
        if spec.qk_norm:
            for at, (kind, heads) in enumerate((("q", spec.heads), ("k", spec.kv_heads))):
                split = graph.op("Reshape", parts[at], graph.ints(1, -1, heads, spec.head_dim))
                normed = self.norm(split, f"layers.{layer}.self_attn.{kind}_norm.weight")
                parts[at] = graph.op("Reshape", normed, graph.ints(1, -1, heads * spec.head_dim))
        return parts

    def add_norm(self, stream: str, update: str, weight: str) -> tuple[str, str]:
        """(sum of the two, its RMS norm), both [1, T, hidden]."""
        total = self.graph.op("Add", stream, update)
        return total, self.norm(total, weight)

    def norm(self, value: str, weight: str) -> str:
        """RMS norm over the last axis."""
        scale = self.graph.weight(self.weights(weight), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def state(self, name: str) -> tuple[str, str]:
        """Declare one cache as input and as output; returns both names."""
        shape: Shape = [1, self.spec.kv_heads, "capacity", self.spec.head_dim]
        self.graph.declare_output(f"present_{name}", FLOAT, shape)
        return self.graph.input(f"past_{name}", FLOAT, shape), f"present_{name}"

    def write(self) -> None:
        """Write the whole decoder: embeddings in, logits [keep, vocab] of the last positions out, if there are any."""
        stream = self.begin()
        normed = self.norm(stream, "layers.0.input_layernorm.weight")
        for layer in self._progress(range(self.spec.layers), "decoder" if self.logits else "prefill"):
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
            end = [graph.op("Neg", self._keep), graph.ints(np.iinfo(np.int64).max), graph.ints(1)]
            stream, fed = graph.op("Slice", stream, *end), graph.op("Slice", fed, *end)
        return self.add_norm(stream, fed, following)

    def _head_of(self, normed: str) -> None:
        flat = self.graph.op("Reshape", normed, self.graph.ints(-1, self.spec.hidden))
        head = self.weights("embed_tokens.weight" if self.spec.tied else "lm_head.weight")
        logits = self.graph.linear(flat, head, name="head", form=self._head)
        self.graph.output(logits, "logits", FLOAT, ["keep", self.spec.vocab])

    def _feed_forward(self, normed: str, layer: int) -> str:
        gate, up, down = (self.weights(f"layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        return self.graph.linear(self.graph.swiglu(normed, (gate, None), (up, None)), down, name="down")


class GroupQueryDecoder(DecoderWriter):
    """ONNX Runtime's own operators: cache in place, rotary inside, sum and norm in one."""

    def write(self) -> None:
        """Write it. CheckpointError where the operators cannot take the decoder's shape."""
        if self.spec.head_dim % 16:
            raise CheckpointError(
                f"the decoder's heads are {self.spec.head_dim} wide; ONNX Runtime's GroupQueryAttention wants a "
                "multiple of 16: train the model with such heads"
            )
        super().write()

    def begin(self) -> str:
        """Rotary tables stand by token index, one row a cached token."""
        for name in ("cos", "sin"):
            self.graph.input(name, FLOAT, ["capacity", self.spec.head_dim // 2])
        self.graph.input("last", INT32, [1])
        self.graph.input("total", INT32, [])
        return super().begin()

    def attention(self, qkv: str, layer: int) -> str:
        """One GroupQueryAttention."""
        past_key, key = self.state(f"key_{layer}")
        past_value, value = self.state(f"value_{layer}")
        projections = self.split(qkv, layer) if self.spec.qk_norm else [qkv, "", ""]
        return self.graph.ops(
            "GroupQueryAttention", *projections, past_key, past_value, "last", "total", "cos", "sin",
            names=(key, value), domain=MICROSOFT, num_heads=self.spec.heads, kv_num_heads=self.spec.kv_heads,
            do_rotary=1, rotary_interleaved=0, scale=self.spec.head_dim**-0.5,
        )[0]

    def add_norm(self, stream: str, update: str, weight: str) -> tuple[str, str]:
        """One SkipSimplifiedLayerNormalization: outputs the norm, two unused, and the sum."""
        scale = self.graph.weight(self.weights(weight), "norm")
        total = f"{weight}.sum"
        normed = self.graph.ops(
            "SkipSimplifiedLayerNormalization", stream, update, scale, names=("", "", total), domain=MICROSOFT,
            epsilon=self.spec.norm_eps,
        )[0]
        return total, normed


class PrefillDecoder(GroupQueryDecoder):
    """Writes many tokens into the cache and says nothing: it ends where the last layer's keys and values are known."""

    logits = False


class StandardDecoder(DecoderWriter):
    """The portable form: TensorScatter into the cache, Attention over all of it under a mask."""

    def begin(self) -> str:
        """Rotary rows of the new tokens only, and how many tokens the cache holds."""
        graph = self.graph
        for name in ("cos", "sin"):
            graph.input(name, FLOAT, [1, "tokens", self.spec.head_dim // 2])
        past = graph.input("past", INT64, [1])
        embeds = super().begin()
        self._caches = [(self.state(f"key_{i}"), self.state(f"value_{i}")) for i in range(self.spec.layers)]
        tokens = graph.op("Gather", graph.op("Shape", embeds), graph.scalar(1), axis=0)
        capacity = graph.op("Gather", graph.op("Shape", self._caches[0][0][0]), graph.scalar(2), axis=0)
        zero, one = graph.scalar(0), graph.scalar(1)
        rows = graph.op("Add", graph.op("Range", zero, tokens, one), past)
        columns = graph.op("Range", zero, capacity, one)
        self._mask = graph.op("LessOrEqual", columns, graph.op("Unsqueeze", rows, graph.ints(1)))
        return embeds

    def attention(self, qkv: str, layer: int) -> str:
        """RotaryEmbedding, TensorScatter, Attention."""
        graph, spec = self.graph, self.spec
        query, key, value = self.split(qkv, layer)
        heads = [self._heads(query, spec.heads), self._heads(key, spec.kv_heads), self._heads(value, spec.kv_heads)]
        query, key = (graph.op("RotaryEmbedding", part, "cos", "sin") for part in heads[:2])
        updates = zip(self._caches[layer], (key, heads[2]), strict=True)
        for (past, present), update in updates:
            graph.ops("TensorScatter", past, update, "past", count=0, names=(present,), axis=-2)
        (_, keys), (_, values) = self._caches[layer]
        attended = graph.op("Attention", query, keys, values, self._mask, scale=spec.head_dim**-0.5)
        swapped = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
        return graph.op("Reshape", swapped, graph.ints(1, -1, spec.heads * spec.head_dim))

    def _heads(self, value: str, count: int) -> str:
        split = self.graph.op("Reshape", value, self.graph.ints(1, -1, count, self.spec.head_dim))
        return self.graph.op("Transpose", split, perm=[0, 2, 1, 3])


_WRITERS: dict[Lowering, type[DecoderWriter]] = {
    "gqa": GroupQueryDecoder, "gqa-prefill": PrefillDecoder, "standard": StandardDecoder
}  # fmt: skip


def write_decoder(
    path: Path, spec: TextSpec, weights: Weights, lowering: Lowering = "gqa", *, form: Form = "fp32",
    head: Form | None = None, progress: Progress = silent,
) -> None:
    """Write the decoder graph in one of its lowerings, its weights stored as `form`, the head's as `head`."""
    _WRITERS[lowering](path, spec, weights, form=form, head=head, progress=progress).write()

