"""The two towers of a CLIP as ONNX graphs, written straight from their weights.

The rows of all pictures or texts lie one under the other, [n * length, width]: a product of whole numbers has one scale
for each row. Of the last block, only what the pooled row needs is computed; of causal texts, only what stands before
the last pooled token. Both are exact: the rest is never looked at.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gog_edge.exporting.clip.blocks import Block, ImageTower, Linear, Norm, TextTower, Transformer
from gog_edge.exporting.graph import FLOAT, INT32, INT64, MICROSOFT, Form, GraphBuilder
from gog_edge.exporting.quantization import quantise
from gog_edge.policy.manifest import Blocks

BYTES = Blocks(8, None)


def write_image_tower(path: Path, tower: ImageTower, form: Form) -> None:
    """Write `pixels` [n, 3, height, width] float32 -> `embedding` [n, dim] of unit length."""
    graph = GraphBuilder("image", path, form)
    (height, width), rows = tower.side, len(tower.positions)
    pixels = graph.input("pixels", FLOAT, ["n", 3, height, width])
    writer = _Writer(graph, tower.body, graph.ints(rows))
    writer.count = graph.op("Shape", pixels, start=0, end=1)
    stream = writer.flat(_with_token(writer, tower, _patches(writer, tower, pixels)))
    if tower.before:
        stream = writer.norm(stream, tower.before)
    if tower.mean:
        stream = writer.norm(writer.blocks(stream), tower.after)
        patches = graph.op("Slice", writer.deep(stream), graph.ints(1), graph.ints(rows), graph.ints(1))
        pooled = graph.op("ReduceMean", patches, graph.ints(1), keepdims=0)
    else:
        first = graph.op("Expand", graph.ints(0), writer.count)
        pooled = writer.norm(writer.blocks(stream, first), tower.after)
    writer.finish(pooled, tower.projection)


def write_text_tower(path: Path, tower: TextTower, form: Form) -> None:
    """Write `tokens` [n, context] int64 -> `embedding` [n, dim] of unit length."""
    graph = GraphBuilder("text", path, form)
    context = len(tower.positions)
    tokens = graph.input("tokens", INT64, ["n", context])
    count = graph.op("Shape", tokens, start=0, end=1)
    place = _place(graph, tower, tokens, count)
    positions = graph.weight(tower.positions, "positions")
    if not tower.causal:
        length = graph.ints(context)
    else:
        length = graph.op("Add", graph.op("ReduceMax", place, keepdims=1), graph.ints(1))
        tokens = graph.op("Slice", tokens, graph.ints(0), length, graph.ints(1))
        positions = graph.op("Slice", positions, graph.ints(0), length, graph.ints(0))
    writer = _Writer(graph, tower.body, length, causal=tower.causal)
    writer.count = count
    stream = writer.flat(graph.op("Add", _looked_up(graph, tower, tokens), positions))
    writer.finish(writer.norm(writer.blocks(stream, place), tower.after), tower.projection)


class _Writer:
    """What both towers have in common. `length` names the rows of one picture or text [1], `count` how many [1]."""

    def __init__(self, graph: GraphBuilder, body: Transformer, length: str, *, causal: bool = False) -> None:
        self.graph, self.body, self.length, self.causal = graph, body, length, causal
        self.count = ""
        self._shape = graph.op("Concat", graph.ints(-1), length, graph.ints(body.width), axis=0)

    def flat(self, value: str) -> str:
        """[n, length, width] -> [n * length, width]."""
        return self.graph.op("Reshape", value, self.graph.ints(-1, self.body.width))

    def deep(self, rows: str) -> str:
        """Inverse of `flat`."""
        return self.graph.op("Reshape", rows, self._shape)

    def norm(self, value: str, norm: Norm) -> str:
        """Layer norm of each row."""
        scale, bias = (self.graph.weight(array, "norm") for array in (norm.scale, norm.bias))
        return self.graph.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=norm.epsilon)

    def linear(self, value: str, linear: Linear) -> str:
        """A product in the graph's own form."""
        return self.graph.linear(value, linear.weight, linear.bias, name="linear")

    def blocks(self, stream: str, place: str = "") -> str:
        """All blocks; with `place` [n] int64, only the row at that place of each picture or text comes out [n, width].
        """
        for block in self.body.blocks[: -1 if place else None]:
            normed = self.norm(stream, block.first)
            parts = self.graph.ops("Split", self.linear(normed, block.inward), count=3, axis=-1, num_outputs=3)
            query, key, value = (self.deep(part) for part in parts)
            stream = self._rest(stream, self._attend(query, key, value, unidirectional=int(self.causal)), block)
        return self._last(stream, place, self.body.blocks[-1]) if place else stream

    def finish(self, pooled: str, projection: Linear | None) -> None:
        """[n, width] -> [n, dim] of unit length, and write the graph. The last product is small: it stays exact."""
        graph, dim = self.graph, self.body.width
        if projection:
            pooled, dim = graph.linear(pooled, projection.weight, projection.bias, form="fp32"), len(projection.weight)
        graph.output(graph.op("LpNormalization", pooled, axis=-1, p=2), "embedding", FLOAT, ["n", dim])
        graph.save()

    def _last(self, stream: str, place: str, block: Block) -> str:
        """The last block: keys and values of all rows, everything else of one row each."""
        graph, width = self.graph, self.body.width
        weight, bias = block.inward.weight, block.inward.bias
        queries, others = (
            Linear(weight[part], None if bias is None else bias[part]) for part in (slice(width), slice(width, None))
        )
        normed = self.norm(stream, block.first)
        starts = graph.op("Mul", graph.op("Range", graph.scalar(0), graph.op("Squeeze", self.count), graph.scalar(1)),
                          self.length)  # fmt: skip
        rows = graph.op("Add", starts, place)
        stream, picked = (graph.op("Gather", value, rows, axis=0) for value in (stream, normed))
        query = graph.op("Unsqueeze", self.linear(picked, queries), graph.ints(1))
        parts = graph.ops("Split", self.linear(normed, others), count=2, axis=-1, num_outputs=2)
        key, value = (self.deep(part) for part in parts)
        seen = graph.op("Cast", graph.op("Add", place, graph.ints(1)), to=INT32) if self.causal else ""
        return self._rest(stream, self._attend(query, key, value, seen), block)

    def _attend(self, query: str, key: str, value: str, seen: str = "", unidirectional: int = 0) -> str:
        """[n, rows, width] each -> [n * rows, width]; `seen` [n] int32: how many keys there are for each."""
        optional = ["", seen] if seen else []
        return self.flat(self.graph.op(
            "MultiHeadAttention", query, key, value, *optional, domain=MICROSOFT, num_heads=self.body.heads,
            unidirectional=unidirectional,
        ))  # fmt: skip

    def _rest(self, stream: str, attended: str, block: Block) -> str:
        stream = self.graph.op("Add", stream, self.linear(attended, block.out))
        inner = self._activated(self.linear(self.norm(stream, block.second), block.up), block.activation)
        return self.graph.op("Add", stream, self.linear(inner, block.down))

    def _activated(self, value: str, activation: str) -> str:
        if activation == "quick_gelu":
            return self.graph.op("QuickGelu", value, domain=MICROSOFT, alpha=1.702)
        return self.graph.op("Gelu", value, approximate="tanh" if activation == "gelu_tanh" else "none")


def _patches(writer: _Writer, tower: ImageTower, pixels: str) -> str:
    """[n, 3, height, width] -> [n, patches, width of a row]: a convolution whose steps do not overlap is a product."""
    graph, (down, across) = writer.graph, tower.patch
    rows, columns = tower.side[0] // down, tower.side[1] // across
    cut = graph.op("Reshape", pixels, graph.ints(-1, 3, rows, down, columns, across))
    cut = graph.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
    embedded = writer.linear(graph.op("Reshape", cut, graph.ints(-1, 3 * down * across)), tower.kernel)
    return graph.op("Reshape", embedded, graph.ints(-1, rows * columns, tower.body.width))


def _with_token(writer: _Writer, tower: ImageTower, patches: str) -> str:
    """Positions added, and the class token before the patches of each picture."""
    graph = writer.graph
    placed = graph.op("Add", patches, graph.weight(tower.positions[1:], "positions"))
    token = graph.weight((tower.token + tower.positions[0])[None, None], "token")
    shape = graph.op("Concat", writer.count, graph.ints(1, tower.body.width), axis=0)
    return graph.op("Concat", graph.op("Expand", token, shape), placed, axis=1)


def _place(graph: GraphBuilder, tower: TextTower, tokens: str, count: str) -> str:
    """[n] int64: which token's row is the text's."""
    if tower.pool in ("first", "last"):
        place = 0 if tower.pool == "first" else len(tower.positions) - 1
        return graph.op("Expand", graph.ints(place), count)
    if tower.pool == "eos":
        tokens = graph.op("Cast", graph.op("Equal", tokens, graph.scalar(tower.eos)), to=INT32)
    return graph.op("ArgMax", tokens, axis=1, keepdims=0)


def _looked_up(graph: GraphBuilder, tower: TextTower, tokens: str) -> str:
    """[n, length] -> [n, length, width]; with whole-number weights the table has one byte a number, too."""
    if not isinstance(graph.form, Blocks):
        return graph.op("Gather", graph.weight(tower.table, "tokens"), tokens, axis=0)
    packed, scales = quantise(tower.table, BYTES)
    numbers = (packed[:, 0].astype(np.int16) - 128).astype(np.int8)
    rows = graph.op("Cast", graph.op("Gather", graph.weight(numbers, "tokens"), tokens, axis=0), to=FLOAT)
    return graph.op("Mul", rows, graph.op("Gather", graph.weight(scales, "token_scales"), tokens, axis=0))
