"""The operators that converted graphs are written with, and how a decoder's attention reads and updates its KV cache.

`StandardOperators` uses those of opset 24; `DecomposedOperators` replaces the newer ones by matmuls and softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gog_edge.exporting.conversion.values import ValueMap
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64

INT64_MAX = int(np.iinfo(np.int64).max)
MASKED_SCORE = np.finfo(np.float32).min


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shape of one layer's keys, and of its values: [1, kv_heads, context, head_dim]."""

    heads: int  # of queries
    kv_heads: int
    head_dim: int
    context: int  # tokens


class StandardOperators:
    """Operators of opset 24."""

    @property
    def cache_type(self) -> type[StandardCache]:
        """Return the KV cache that these operators are used with."""
        return StandardCache

    def __init__(self, values: ValueMap) -> None:
        self.values, self.graph, self.op = values, values.graph, values.op

    def rms_norm(self, value: str, scale: str, epsilon: float) -> str:
        """Normalize fp32 [..., width] over its last axis, with an fp32 scale; the result is fp32."""
        return self.op("RMSNormalization", value, scale, precision=FLOAT, axis=-1, epsilon=epsilon)

    def rotate(self, value: str, cos: str, sin: str, heads: int) -> str:
        """Apply rotary embeddings cos, sin [1, T, head_dim / 2] to [1, T, heads * head_dim]."""
        return self.op("RotaryEmbedding", value, cos, sin, num_heads=heads)

    def attend(self, query: str, key: str, value: str, *, mask: str, scale: float | None, causal: bool = False) -> str:
        """Compute attention of query, key and value [n, heads, T, head_dim].

        Args:
            query, key, value: names of values.
            mask: boolean mask that broadcasts to [n, heads, T, T], or ''.
            scale: factor of the scores; None is 1 / sqrt(head_dim).
            causal: whether each token attends only to itself and earlier ones.
        """
        inputs = [query, key, value, *([mask] if mask else [])]
        if scale is None:
            return self.op("Attention", *inputs, is_causal=int(causal))
        return self.op("Attention", *inputs, is_causal=int(causal), scale=scale)

    def split_heads(self, value: str, heads: int) -> str:
        """Reshape [n, T, heads * head_dim] to [n, heads, T, head_dim]."""
        split = self.op("Reshape", value, self.graph.ints(0, 0, heads, -1))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def join_heads(self, value: str) -> str:
        """Reshape [n, heads, T, head_dim] to [n, T, heads * head_dim]."""
        return self.op("Reshape", self.op("Transpose", value, perm=[0, 2, 1, 3]), self.graph.ints(0, 0, -1))

    def length(self, value: str, axis: int) -> str:
        """Return the size of an axis as an int64 scalar."""
        return self.op("Squeeze", self.op("Shape", value, precision=0, start=axis, end=axis + 1), precision=0)

    def arange(self, count: str) -> str:
        """Return 0, 1, ... count - 1."""
        return self.op("Range", self.graph.scalar(0), count, self.graph.scalar(1), precision=0)

    def column(self, row: str) -> str:
        """Reshape [n] to [n, 1]."""
        return self.op("Unsqueeze", row, self.graph.ints(1), precision=0)

    def causal_mask(self, count: str) -> str:
        """Return a boolean mask [count, count] that is true on and below the diagonal."""
        indices = self.arange(count)
        return self.op("LessOrEqual", indices, self.column(indices), precision=0)

    def scores(self, query: str, key: str, scale: float | None, mask: str) -> str:
        """Return fp32 scores [n, heads, T, S] of queries [n, heads, T, head_dim] and keys [n, heads, S, head_dim].

        Where the mask is false, the score is the lowest fp32 value.
        """
        scaled = self.op("Mul", query, self._scale(query, scale))
        product = self.op("MatMul", scaled, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.values.cast(product, FLOAT)
        if not mask:
            return scores
        return self.op("Where", mask, scores, self.graph.weight(np.asarray(MASKED_SCORE)), precision=FLOAT)

    def softmax(self, scores: str) -> str:
        """Return the softmax of fp32 scores over the last axis, in fp16."""
        return self.values.cast(self.op("Softmax", scores, precision=FLOAT, axis=-1), FLOAT16)

    def _scale(self, query: str, scale: float | None) -> str:
        if scale is not None:
            return self.values.fp16_weight(np.asarray(scale, np.float32), "scale")
        width = self.op("Cast", self.op("Shape", query, precision=0, start=3, end=4), precision=FLOAT, to=FLOAT)
        root = self.op("Sqrt", width, precision=FLOAT)
        return self.values.cast(self.op("Reciprocal", root, precision=FLOAT), FLOAT16)


class DecomposedOperators(StandardOperators):
    """Operators of opset 21, with norms, rotary embeddings and attention decomposed."""

    @property
    def cache_type(self) -> type[StandardCache]:
        """Return the KV cache that these operators are used with."""
        return DecomposedCache

    def rms_norm(self, value: str, scale: str, epsilon: float) -> str:
        """Normalize as the ONNX standard defines RMSNormalization."""
        squares = self.op("Mul", value, value, precision=FLOAT)
        mean = self.op("ReduceMean", squares, self.graph.ints(-1), precision=FLOAT)
        raised = self.op("Add", mean, self.graph.weight(np.asarray(epsilon, np.float32)), precision=FLOAT)
        unit = self.op("Div", value, self.op("Sqrt", raised, precision=FLOAT), precision=FLOAT)
        return self.op("Mul", unit, scale, precision=FLOAT)

    def rotate(self, value: str, cos: str, sin: str, heads: int) -> str:
        """Rotate the first half of each head against its second half."""
        op = self.op
        split = op("Reshape", value, self.graph.ints(0, 0, heads, -1))
        first, second = self.graph.ops("Split", split, count=2, axis=-1, num_outputs=2)
        cos, sin = (op("Unsqueeze", part, self.graph.ints(2)) for part in (cos, sin))
        left = op("Sub", op("Mul", first, cos), op("Mul", second, sin))
        right = op("Add", op("Mul", second, cos), op("Mul", first, sin))
        return op("Reshape", op("Concat", left, right, axis=-1), self.graph.ints(0, 0, -1))

    def attend(self, query: str, key: str, value: str, *, mask: str, scale: float | None, causal: bool = False) -> str:
        """Compute attention with two matmuls and a softmax."""
        mask = self.causal_mask(self.length(query, 2)) if causal else mask
        return self.op("MatMul", self.softmax(self.scores(query, key, scale, mask)), value)


class StandardCache:
    """A KV cache that TensorScatter updates in place; the graph's outputs are the whole caches."""

    output_prefix = "present"
    whole_output = True  # the outputs have `context` rows; otherwise only the new tokens' rows

    def __init__(self, operators: StandardOperators, embeds: str, shape: CacheShape) -> None:
        """Declare the graph input `past` [1], the number of cached tokens; `embeds` [1, T, ...] are the new ones."""
        self.operators, self.graph, self.op = operators, operators.graph, operators.op
        self.shape, self.scale = shape, shape.head_dim**-0.5
        self.past = self.graph.input("past", INT64, [1])
        self.tokens = operators.length(embeds, 1)
        self.columns = self.graph.weight(np.arange(shape.context, dtype=np.int64), "columns")
        self.make_masks()

    def make_masks(self) -> None:
        """Create the causal mask [T, context], which all layers share."""
        rows = self.op("Add", self.operators.arange(self.tokens), self.past, precision=0)
        self._mask = self.op("LessOrEqual", self.columns, self.operators.column(rows), precision=0)

    def attend(self, query: str, new: tuple[str, str], past: tuple[str, str], outputs: tuple[str, str]) -> str:
        """Append the new keys and values to the cache and compute attention over all of them.

        Args:
            query: [1, heads, T, head_dim].
            new: keys and values of the new tokens, [1, kv_heads, T, head_dim].
            past: caches of keys and values, [1, kv_heads, context, head_dim].
            outputs: names of the graph outputs to write.
        """
        for update, before, after in zip(new, past, outputs, strict=True):
            self.graph.ops("TensorScatter", before, update, self.past, count=0, names=(after,), axis=-2)
        return self.op("Attention", query, *outputs, self._mask, scale=self.scale)


class DecomposedCache(StandardCache):
    """A KV cache that is only read; the graph's outputs are the rows of the new tokens."""

    output_prefix = "new"
    whole_output = False

    def make_masks(self) -> None:
        """Create a mask over the cached tokens [context], and a causal mask over the new ones."""
        self._past_mask = self.op("Less", self.columns, self.past, precision=0)
        # The query heads that share a key head are stacked, each with its T rows.
        causal, group = self.operators.causal_mask(self.tokens), self.shape.heads // self.shape.kv_heads
        self._new_mask = self.op("Concat", *[causal] * group, precision=0, axis=0)

    def attend(self, query: str, new: tuple[str, str], past: tuple[str, str], outputs: tuple[str, str]) -> str:
        """Compute one softmax over the scores of cached and new tokens, so that neither has to be copied."""
        op, shape, ints, scores = self.op, self.shape, self.graph.ints, self.operators.scores
        for rows, name in zip(new, outputs, strict=True):
            self.graph.ops("Identity", rows, count=0, names=(name,))
        rows = op("Reshape", query, ints(0, shape.kv_heads, -1, shape.head_dim))
        both = scores(rows, past[0], self.scale, self._past_mask), scores(rows, new[0], self.scale, self._new_mask)
        weights = self.operators.softmax(op("Concat", *both, precision=FLOAT, axis=-1))
        bounds = ((0, shape.context), (shape.context, INT64_MAX))
        parts = (op("Slice", weights, ints(start), ints(stop), ints(3)) for start, stop in bounds)
        attended = [op("MatMul", part, values) for part, values in zip(parts, (past[1], new[1]), strict=True)]
        return op("Reshape", op("Add", *attended), ints(0, shape.heads, -1, shape.head_dim))
