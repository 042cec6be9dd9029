"""A decoder's keys and values: how attention over them is written, and what becomes of the new ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gog_edge.exporting.conversion.values import Rewriter
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64

LAST = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of one layer's keys, and of its values."""

    heads: int  # of queries
    kv_heads: int
    head_dim: int
    context: int  # tokens that fit


class StandardCache:
    """Updated in place by TensorScatter; outputs are the whole cache."""

    prefix, whole = "present", True  # how outputs are called; whether they hold all tokens, or only the new ones

    def __init__(self, operators: StandardOperators, embeds: str, shape: CacheShape) -> None:
        """Declare the input `past` [1], how many tokens there are already, beside the new ones `embeds` [1, T, ...]."""
        self.operators, self.graph, self.op = operators, operators.graph, operators.op
        self.shape, self.scale = shape, shape.head_dim**-0.5
        self.past = self.graph.input("past", INT64, [1])
        self.tokens = operators.length(embeds, 1)
        self.columns = self.graph.weight(np.arange(shape.context, dtype=np.int64), "columns")
        self.make_masks()

    def make_masks(self) -> None:
        """Truths, the same in all layers: each new token sees itself and all before it."""
        rows = self.op("Add", self.operators.span(self.tokens), self.past, kind=0)
        self._mask = self.op("LessOrEqual", self.columns, self.operators.column(rows), kind=0)

    def attend(self, query: str, new: tuple[str, str], past: tuple[str, str], names: tuple[str, str]) -> str:
        """Query [1, heads, T, head_dim] over keys and values [1, kv_heads, T or context, head_dim], new and past.

        The outputs `names` are written.
        """
        for update, before, after in zip(new, past, names, strict=True):
            self.graph.ops("TensorScatter", before, update, self.past, count=0, names=(after,), axis=-2)
        return self.op("Attention", query, *names, self._mask, scale=self.scale)


class DecomposedCache(StandardCache):
    """Read where it lies, and left as it is; outputs are the new tokens' rows."""

    prefix, whole = "new", False

    def make_masks(self) -> None:
        """All see what was there before; of the new tokens each sees itself and those before it."""
        self._before = self.op("Less", self.columns, self.past, kind=0)
        # Query heads of one key head stand one after the other, each with all its rows.
        triangle, group = self.operators.triangle(self.tokens), self.shape.heads // self.shape.kv_heads
        self._among = self.op("Concat", *[triangle] * group, kind=0, axis=0)

    def attend(self, query: str, new: tuple[str, str], past: tuple[str, str], names: tuple[str, str]) -> str:
        """One softmax over scores of both parts: neither is copied."""
        op, shape, ints, scores = self.op, self.shape, self.graph.ints, self.operators.scores
        for rows, name in zip(new, names, strict=True):
            self.graph.ops("Identity", rows, count=0, names=(name,))
        rows = op("Reshape", query, ints(0, shape.kv_heads, -1, shape.head_dim))
        both = scores(rows, past[0], self.scale, self._before), scores(rows, new[0], self.scale, self._among)
        weights = self.operators.softmax(op("Concat", *both, kind=FLOAT, axis=-1))
        bounds = ((0, shape.context), (shape.context, LAST))
        parts = (op("Slice", weights, ints(start), ints(stop), ints(3)) for start, stop in bounds)
        seen = [op("MatMul", part, values) for part, values in zip(parts, (past[1], new[1]), strict=True)]
        return op("Reshape", op("Add", *seen), ints(0, shape.heads, -1, shape.head_dim))


HIDDEN = np.finfo(np.float32).min  # the score of what is not to be seen


class StandardOperators:
    """The standard's own, of opset 24."""

    cache_kind: type[StandardCache] = StandardCache

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter, self.graph, self.op = rewriter, rewriter.graph, rewriter.op

    def rms_norm(self, value: str, scale: str, epsilon: float) -> str:
        """Wide [..., width] over its last axis, by a wide scale -> wide."""
        return self.op("RMSNormalization", value, scale, kind=FLOAT, axis=-1, epsilon=epsilon)

    def rotate(self, value: str, cos: str, sin: str, heads: int) -> str:
        """[1, T, heads * head_dim], turned by cos, sin [1, T, head_dim / 2]."""
        return self.op("RotaryEmbedding", value, cos, sin, num_heads=heads)

    def attend(self, query: str, key: str, value: str, *, mask: str, scale: float | None, causal: bool = False) -> str:
        """[n, heads, T, head_dim] each; `mask`: truths that broadcast to [n, heads, T, T], or none.

        `scale` of the scores: one over the root of head_dim where it is None.
        """
        inputs = [query, key, value, *([mask] if mask else [])]
        if scale is None:
            return self.op("Attention", *inputs, is_causal=int(causal))
        return self.op("Attention", *inputs, is_causal=int(causal), scale=scale)

    def split_heads(self, value: str, heads: int) -> str:
        """[n, T, heads * head_dim] -> [n, heads, T, head_dim]."""
        split = self.op("Reshape", value, self.graph.ints(0, 0, heads, -1))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def join_heads(self, value: str) -> str:
        """Inverse of `split_heads`."""
        return self.op("Reshape", self.op("Transpose", value, perm=[0, 2, 1, 3]), self.graph.ints(0, 0, -1))

    def length(self, value: str, axis: int) -> str:
        """How long an axis is: int64 without dimensions."""
        return self.op("Squeeze", self.op("Shape", value, kind=0, start=axis, end=axis + 1), kind=0)

    def span(self, count: str) -> str:
        """0, 1, ... count - 1."""
        return self.op("Range", self.graph.scalar(0), count, self.graph.scalar(1), kind=0)

    def column(self, row: str) -> str:
        """[n] -> [n, 1]."""
        return self.op("Unsqueeze", row, self.graph.ints(1), kind=0)

    def triangle(self, count: str) -> str:
        """Truths [count, count]: each row, and those before it."""
        places = self.span(count)
        return self.op("LessOrEqual", places, self.column(places), kind=0)

    def scores(self, query: str, key: str, scale: float | None, mask: str) -> str:
        """Wide products of [n, heads, T, head_dim] and [n, heads, S, head_dim], least where the mask hides them."""
        scaled = self.op("Mul", query, self._factor(query, scale))
        product = self.op("MatMul", scaled, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        wide = self.rewriter.cast(product, FLOAT)
        return self.op("Where", mask, wide, self.graph.weight(np.asarray(HIDDEN)), kind=FLOAT) if mask else wide

    def softmax(self, scores: str) -> str:
        """Of wide scores, over the last axis."""
        return self.rewriter.cast(self.op("Softmax", scores, kind=FLOAT, axis=-1), FLOAT16)

    def _factor(self, query: str, scale: float | None) -> str:
        if scale is not None:
            return self.rewriter.written(np.asarray(scale, np.float32), "scale")
        width = self.op("Cast", self.op("Shape", query, kind=0, start=3, end=4), kind=FLOAT, to=FLOAT)
        return self.rewriter.cast(self.op("Reciprocal", self.op("Sqrt", width, kind=FLOAT), kind=FLOAT), FLOAT16)


class DecomposedOperators(StandardOperators):
    """Products, sums and softmax alone."""

    cache_kind = DecomposedCache

    def rms_norm(self, value: str, scale: str, epsilon: float) -> str:
        """As the standard defines it."""
        squares = self.op("Mul", value, value, kind=FLOAT)
        mean = self.op("ReduceMean", squares, self.graph.ints(-1), kind=FLOAT)
        raised = self.op("Add", mean, self.graph.weight(np.asarray(epsilon, np.float32)), kind=FLOAT)
        unit = self.op("Div", value, self.op("Sqrt", raised, kind=FLOAT), kind=FLOAT)
        return self.op("Mul", unit, scale, kind=FLOAT)

    def rotate(self, value: str, cos: str, sin: str, heads: int) -> str:
        """The two halves of each head turn about each other."""
        op = self.op
        split = op("Reshape", value, self.graph.ints(0, 0, heads, -1))
        first, second = self.graph.ops("Split", split, count=2, axis=-1, num_outputs=2)
        cos, sin = (op("Unsqueeze", part, self.graph.ints(2)) for part in (cos, sin))
        left = op("Sub", op("Mul", first, cos), op("Mul", second, sin))
        right = op("Add", op("Mul", second, cos), op("Mul", first, sin))
        return op("Reshape", op("Concat", left, right, axis=-1), self.graph.ints(0, 0, -1))

    def attend(self, query: str, key: str, value: str, *, mask: str, scale: float | None, causal: bool = False) -> str:
        """Two products and a softmax."""
        mask = self.triangle(self.length(query, 2)) if causal else mask
        return self.op("MatMul", self.softmax(self.scores(query, key, scale, mask)), value)
