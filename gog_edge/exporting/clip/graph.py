"""The two towers of a CLIP model as ONNX graphs, written directly from their weights.

The rows of all pictures or texts are stacked, [n * length, width], because an integer matmul has one scale per row. The
last block is computed only for the pooled rows, and causal texts only up to the last pooled token. Both are exact: the
rest has no effect on the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gog_edge.exporting.clip.blocks import Block, ImageTower, Linear, Norm, TextTower, Transformer
from gog_edge.exporting.graph import FLOAT, INT32, INT64, MICROSOFT, GraphBuilder, WeightFormat
from gog_edge.exporting.quantization import quantize
from gog_edge.policy.manifest import WeightQuantization

INT8_BY_ROW = WeightQuantization(8, None)


def write_image_tower(path: Path, tower: ImageTower, weight_format: WeightFormat) -> None:
    """Write the graph `pixels` [n, 3, height, width] float32 -> `embedding` [n, dim] of unit length."""
    graph = GraphBuilder("image", path, weight_format)
    (height, width), rows = tower.side, len(tower.positions)
    pixels = graph.input("pixels", FLOAT, ["n", 3, height, width])
    writer = _TowerWriter(graph, tower.body, graph.ints(rows))
    writer.count = graph.op("Shape", pixels, start=0, end=1)
    stream = writer.stack(_add_class_token(writer, tower, _embed_patches(writer, tower, pixels)))
    if tower.before:
        stream = writer.norm(stream, tower.before)
    if tower.mean:
        stream = writer.norm(writer.blocks(stream), tower.after)
        patches = graph.op("Slice", writer.unstack(stream), graph.ints(1), graph.ints(rows), graph.ints(1))
        pooled = graph.op("ReduceMean", patches, graph.ints(1), keepdims=0)
    else:
        first = graph.op("Expand", graph.ints(0), writer.count)
        pooled = writer.norm(writer.blocks(stream, first), tower.after)
    writer.finish(pooled, tower.projection)


def write_text_tower(path: Path, tower: TextTower, weight_format: WeightFormat) -> None:
    """Write the graph `tokens` [n, context] int64 -> `embedding` [n, dim] of unit length."""
    graph = GraphBuilder("text", path, weight_format)
    context = len(tower.positions)
    tokens = graph.input("tokens", INT64, ["n", context])
    count = graph.op("Shape", tokens, start=0, end=1)
    pooled_index = _pooled_index(graph, tower, tokens, count)
    positions = graph.weight(tower.positions, "positions")
    if not tower.causal:
        length = graph.ints(context)
    else:
        length = graph.op("Add", graph.op("ReduceMax", pooled_index, keepdims=1), graph.ints(1))
        tokens = graph.op("Slice", tokens, graph.ints(0), length, graph.ints(1))
        positions = graph.op("Slice", positions, graph.ints(0), length, graph.ints(0))
    writer = _TowerWriter(graph, tower.body, length, causal=tower.causal)
    writer.count = count
    stream = writer.stack(graph.op("Add", _embed_tokens(graph, tower, tokens), positions))
    writer.finish(writer.norm(writer.blocks(stream, pooled_index), tower.after), tower.projection)


class _TowerWriter:
    """The parts that both towers share."""

    def __init__(self, graph: GraphBuilder, body: Transformer, length: str, *, causal: bool = False) -> None:
        """`length` [1] is the name of the number of rows of one picture or text."""
        self.graph, self.body, self.length, self.causal = graph, body, length, causal
        self.count = ""  # name of the number of pictures or texts [1]
        self._shape = graph.op("Concat", graph.ints(-1), length, graph.ints(body.width), axis=0)

    def stack(self, value: str) -> str:
        """Reshape [n, length, width] to [n * length, width]."""
        return self.graph.op("Reshape", value, self.graph.ints(-1, self.body.width))

    def unstack(self, rows: str) -> str:
        """Reshape [n * length, width] to [n, length, width]."""
        return self.graph.op("Reshape", rows, self._shape)

    def norm(self, value: str, norm: Norm) -> str:
        """Apply a layer norm to each row."""
        scale, bias = (self.graph.weight(array, "norm") for array in (norm.scale, norm.bias))
        return self.graph.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=norm.epsilon)

    def linear(self, value: str, linear: Linear) -> str:
        """Apply a linear layer, stored in the graph's weight format."""
        return self.graph.linear(value, linear.weight, linear.bias, name="linear")

    def blocks(self, stream: str, pooled_index: str = "") -> str:
        """Apply all blocks; with `pooled_index` [n] int64, return only that row of each picture or text [n, width]."""
        for block in self.body.blocks[: -1 if pooled_index else None]:
            normed = self.norm(stream, block.first)
            parts = self.graph.ops("Split", self.linear(normed, block.inward), count=3, axis=-1, num_outputs=3)
            query, key, value = (self.unstack(part) for part in parts)
            stream = self._after_attention(
                stream, self._attend(query, key, value, unidirectional=int(self.causal)), block
            )
        return self._pooled_block(stream, pooled_index, self.body.blocks[-1]) if pooled_index else stream

    def finish(self, pooled: str, projection: Linear | None) -> None:
        """Project [n, width] to [n, dim], normalize to unit length and write the graph.

        The projection stays in fp32, since it is small.
        """
        graph, dim = self.graph, self.body.width
        if projection:
            pooled = graph.linear(pooled, projection.weight, projection.bias, weight_format="fp32")
            dim = len(projection.weight)
        graph.output(graph.op("LpNormalization", pooled, axis=-1, p=2), "embedding", FLOAT, ["n", dim])
        graph.save()

    def _pooled_block(self, stream: str, pooled_index: str, block: Block) -> str:
        """Apply the last block: keys and values of all rows, everything else of the pooled rows."""
        graph, width = self.graph, self.body.width
        weight, bias = block.inward.weight, block.inward.bias
        query_layer, key_value_layer = (
            Linear(weight[part], None if bias is None else bias[part]) for part in (slice(width), slice(width, None))
        )
        normed = self.norm(stream, block.first)
        starts = graph.op("Mul", graph.op("Range", graph.scalar(0), graph.op("Squeeze", self.count), graph.scalar(1)),
                          self.length)  # fmt: skip
        rows = graph.op("Add", starts, pooled_index)
        stream, pooled = (graph.op("Gather", value, rows, axis=0) for value in (stream, normed))
        query = graph.op("Unsqueeze", self.linear(pooled, query_layer), graph.ints(1))
        parts = graph.ops("Split", self.linear(normed, key_value_layer), count=2, axis=-1, num_outputs=2)
        key, value = (self.unstack(part) for part in parts)
        key_counts = graph.op("Cast", graph.op("Add", pooled_index, graph.ints(1)), to=INT32) if self.causal else ""
        return self._after_attention(stream, self._attend(query, key, value, key_counts), block)

    def _attend(self, query: str, key: str, value: str, key_counts: str = "", unidirectional: int = 0) -> str:
        """Compute attention of [n, rows, width] -> [n * rows, width]; `key_counts` [n] int32 limits the keys."""
        optional = ["", key_counts] if key_counts else []
        return self.stack(self.graph.op(
            "MultiHeadAttention", query, key, value, *optional, domain=MICROSOFT, num_heads=self.body.heads,
            unidirectional=unidirectional,
        ))  # fmt: skip

    def _after_attention(self, stream: str, attended: str, block: Block) -> str:
        stream = self.graph.op("Add", stream, self.linear(attended, block.out))
        inner = self._activation(self.linear(self.norm(stream, block.second), block.up), block.activation)
        return self.graph.op("Add", stream, self.linear(inner, block.down))

    def _activation(self, value: str, activation: str) -> str:
        if activation == "quick_gelu":
            return self.graph.op("QuickGelu", value, domain=MICROSOFT, alpha=1.702)
        return self.graph.op("Gelu", value, approximate="tanh" if activation == "gelu_tanh" else "none")


def _embed_patches(writer: _TowerWriter, tower: ImageTower, pixels: str) -> str:
    """Embed [n, 3, height, width] to [n, patches, width]: a convolution without overlap is a matmul of patches."""
    graph, (down, across) = writer.graph, tower.patch
    rows, columns = tower.side[0] // down, tower.side[1] // across
    split = graph.op("Reshape", pixels, graph.ints(-1, 3, rows, down, columns, across))
    patches = graph.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    embedded = writer.linear(graph.op("Reshape", patches, graph.ints(-1, 3 * down * across)), tower.kernel)
    return graph.op("Reshape", embedded, graph.ints(-1, rows * columns, tower.body.width))


def _add_class_token(writer: _TowerWriter, tower: ImageTower, patches: str) -> str:
    """Add positions, and put the class token before the patches of each picture."""
    graph = writer.graph
    embedded = graph.op("Add", patches, graph.weight(tower.positions[1:], "positions"))
    token = graph.weight((tower.token + tower.positions[0])[None, None], "token")
    shape = graph.op("Concat", writer.count, graph.ints(1, tower.body.width), axis=0)
    return graph.op("Concat", graph.op("Expand", token, shape), embedded, axis=1)


def _pooled_index(graph: GraphBuilder, tower: TextTower, tokens: str, count: str) -> str:
    """Return the index [n] int64 of the token whose row represents each text."""
    if tower.pool in ("first", "last"):
        index = 0 if tower.pool == "first" else len(tower.positions) - 1
        return graph.op("Expand", graph.ints(index), count)
    if tower.pool == "eos":
        tokens = graph.op("Cast", graph.op("Equal", tokens, graph.scalar(tower.eos)), to=INT32)
    return graph.op("ArgMax", tokens, axis=1, keepdims=0)


def _embed_tokens(graph: GraphBuilder, tower: TextTower, tokens: str) -> str:
    """Embed [n, length] to [n, length, width]; the table is int8 if the weights are quantized."""
    if not isinstance(graph.weight_format, WeightQuantization):
        return graph.op("Gather", graph.weight(tower.table, "tokens"), tokens, axis=0)
    packed, scales = quantize(tower.table, INT8_BY_ROW)
    signed = (packed[:, 0].astype(np.int16) - 128).astype(np.int8)
    rows = graph.op("Cast", graph.op("Gather", graph.weight(signed, "tokens"), tokens, axis=0), to=FLOAT)
    return graph.op("Mul", rows, graph.op("Gather", graph.weight(scales, "token_scales"), tokens, axis=0))
