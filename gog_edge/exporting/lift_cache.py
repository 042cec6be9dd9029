"""A decoder's keys and values: how attention over them is written, and what becomes of the new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gog_edge.exporting.graph import FLOAT, INT64

if TYPE_CHECKING:
    from gog_edge.exporting.lift_operators import StandardOperators

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
