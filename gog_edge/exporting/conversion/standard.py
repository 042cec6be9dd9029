"""The rules for operators of the ONNX standard alone."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, ValueInfoProto

from gog_edge.engines.base import Array, Floats
from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.operators import CacheShape, StandardCache, StandardOperators
from gog_edge.exporting.conversion.rules import Lifter
from gog_edge.exporting.conversion.values import Rewriter, attributes
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64
from gog_edge.exporting.quantization import dequantise
from gog_edge.policy.manifest import Blocks


class StandardLifter(Lifter):
    """Operators of the ONNX standard alone."""

    def __init__(self, rewriter: Rewriter, context: int, operators: StandardOperators) -> None:
        super().__init__(rewriter, context)
        self.operators = operators
        self._cache: StandardCache | None = None  # of a decoder, from its first attention on

    def declare(self, value: ValueInfoProto, kind: int = 0) -> None:
        """A decoder gets the rotary rows of the new tokens only."""
        if value.name in ("last", "total"):
            return
        if self.context and value.name in ("cos", "sin"):
            half = value.type.tensor_type.shape.dim[1].dim_value
            self.rewriter.bind(value.name, self.graph.input(value.name, FLOAT, [1, "tokens", half]), FLOAT)
        else:
            super().declare(value, FLOAT16 if value.name.startswith("past_") else kind)

    def give_out(self, output: ValueInfoProto) -> None:
        """A decoder's caches leave as its operators say; logits of the rows asked for."""
        shape = self.shape(output)
        if not output.name.startswith("present_"):
            super().give_out(output)
        else:
            rows = shape[2] if self.operators.cache_kind.whole else "tokens"
            self.graph.declare_output(self._cache_name(output.name), FLOAT16, [*shape[:2], rows, shape[3]])

    def _cache_name(self, present: str) -> str:
        return present.replace("present", self.operators.cache_kind.prefix, 1)

    def lift_GroupQueryAttention(self, node: NodeProto) -> None:
        """Heads, rotation, cache, attention."""
        has, operators = attributes(node), self.operators
        heads, kv_heads = has["num_heads"], has["kv_num_heads"]
        if self._cache is None:
            shape = CacheShape(heads, kv_heads, self._head_dim(node), self.context)
            self._cache = operators.cache_kind(operators, "inputs_embeds", shape)
        cos, sin = self.rewriter.half("cos"), self.rewriter.half("sin")
        query, key, value = self._parts(node, heads, kv_heads)
        query, key = operators.rotate(query, cos, sin, heads), operators.rotate(key, cos, sin, kv_heads)
        attended = self._cache.attend(
            operators.split_heads(query, heads),
            (operators.split_heads(key, kv_heads), operators.split_heads(value, kv_heads)),
            (node.input[3], node.input[4]),
            (self._cache_name(node.output[1]), self._cache_name(node.output[2])),
        )
        self.rewriter.bind(node.output[0], operators.join_heads(attended), FLOAT16)

    def _parts(self, node: NodeProto, heads: int, kv_heads: int) -> list[str]:
        """Query, key and value [1, T, heads * head_dim], which may come in one."""
        if node.input[1]:
            return [self.rewriter.half(name) for name in node.input[:3]]
        width = self._head_dim(node)
        widths = self.graph.ints(heads * width, kv_heads * width, kv_heads * width)
        return self.graph.ops("Split", self.rewriter.half(node.input[0]), widths, count=3, axis=-1)

    def _head_dim(self, node: NodeProto) -> int:
        """Of a decoder, from the shape of a cache."""
        cache = next(value for value in self.rewriter.source.input if value.name == node.input[3])
        return int(cache.type.tensor_type.shape.dim[3].dim_value)

    def lift_MultiHeadAttention(self, node: NodeProto) -> None:
        """Attention of all over all, of those before, or of as many as are said for each."""
        has = attributes(node)
        seen = node.input[4] if len(node.input) > 4 else ""
        mask = self._seen(node.input[1], seen) if seen else ""
        self._attend(node, has["num_heads"], mask, has.get("scale"), causal=bool(has.get("unidirectional")))

    def lift_Attention(self, node: NodeProto) -> None:
        """Attention within windows."""
        has = attributes(node)
        mask = self.rewriter.value(node.input[3]) if len(node.input) > 3 else ""
        self._attend(node, has["q_num_heads"], mask, has["scale"])

    def _attend(self, node: NodeProto, heads: int, mask: str, scale: float | None, *, causal: bool = False) -> None:
        """Heads apart, attention, heads together."""
        operators = self.operators
        parts = [operators.split_heads(self.rewriter.half(name), heads) for name in node.input[:3]]
        attended = operators.attend(*parts, mask=mask, scale=scale, causal=causal)
        self.rewriter.bind(node.output[0], operators.join_heads(attended), FLOAT16)

    def _seen(self, key: str, counts: str) -> str:
        """Truths [n, 1, 1, S] from how many [n] of the keys [n, S, width] there are."""
        there = self.op("Shape", self.rewriter.value(key), kind=0, start=1, end=2)
        places = self.operators.span(self.op("Squeeze", there, kind=0))
        wanted = self.op("Cast", self.rewriter.value(counts), kind=0, to=INT64)
        return self.op("Less", places, self.op("Unsqueeze", wanted, self.graph.ints(1, 2, 3), kind=0), kind=0)

    def lift_MatMulNBits(self, node: NodeProto) -> None:
        """Blocks of four bits stay as they are. Eight bits become halves: TensorRT has no blocks of them."""
        has, name = attributes(node), node.input[1]
        packed, scales = (self.rewriter.constant(each) for each in node.input[1:3])
        weight = self.blocked(packed, scales.reshape(len(packed), -1), Blocks(has["bits"], has["block_size"]),
                              has["K"], name)  # fmt: skip
        self.product(node, node.input[0], weight, node.input[5] if len(node.input) > 5 else "")

    def blocked(self, packed: Array, scales: Floats, blocks: Blocks, columns: int, name: str) -> str:
        """Weights [columns, rows] of numbers [rows, blocks, bytes], packed as `quantise` does it, by their scales."""
        size = blocks.size or columns
        if blocks.bits != 4 or columns % size:
            return self.rewriter.written(dequantise(packed, scales, blocks, columns).T, name)
        numbers = self.graph.int4(_turned(packed.reshape(len(packed), -1)), (columns, len(packed)), name)
        steps = self.rewriter.written(scales.T, f"{name}_scales")
        return self.op("DequantizeLinear", numbers, steps, axis=0, block_size=size)

    def lift_RotaryEmbedding(self, node: NodeProto) -> None:
        """Half, by half angles."""
        value, cos, sin = (self.rewriter.half(name) for name in node.input)
        self.rewriter.bind(node.output[0], self.operators.rotate(value, cos, sin, attributes(node)["num_heads"]),
                           FLOAT16)  # fmt: skip

    def lift_RMSNormalization(self, node: NodeProto) -> None:
        """Wide."""
        self._norm(node.input[0], node.input[1], attributes(node)["epsilon"], node.output[0])

    def lift_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """Sum and norm are wide."""
        total = self.op("Add", *(self.rewriter.wide(name) for name in node.input[:2]), kind=FLOAT)
        self.rewriter.bind(node.output[3], total, FLOAT)
        self._norm(node.output[3], node.input[2], attributes(node)["epsilon"], node.output[0])

    def _norm(self, value: str, scale: str, epsilon: float, output: str) -> None:
        normed = self.operators.rms_norm(self.rewriter.wide(value), self.rewriter.wide(scale), epsilon)
        self.rewriter.bind(output, normed, FLOAT)

    def lift_QuickGelu(self, node: NodeProto) -> None:
        """value * sigmoid(alpha * value), wide."""
        value = self.rewriter.wide(node.input[0])
        scaled = self.op("Mul", value, self.rewriter.scalar(attributes(node)["alpha"], FLOAT), kind=FLOAT)
        result = self.op("Mul", value, self.op("Sigmoid", scaled, kind=FLOAT), kind=FLOAT)
        self.rewriter.bind(node.output[0], result, FLOAT)

    def lift_ReduceMax(self, node: NodeProto) -> None:
        """Texts are taken at full length: TensorRT wants no shape that depends on what is read.

        Of causal texts, what stands behind the last token that counts is not looked at.
        """
        if self.rewriter.kind(node.input[0]):
            self.lift_other(node)
        else:
            tokens = next((value for value in self.rewriter.source.input if value.name == "tokens"), None)
            if tokens is None or not attributes(node).get("keepdims", 1):
                raise CheckpointError(f"'{node.output[0]}' makes a shape depend on what is read; no rule for it")
            self.rewriter.bind(node.output[0], self.graph.ints(int(self.shape(tokens)[1]) - 1))


def _turned(packed: Array) -> Array:
    """Numbers of four bits [rows, columns / 2], two a byte from -8 on -> the same [columns, rows] in two's complement.

    The standard's order: row after row, the first of two in the low half.
    """
    numbers = packed ^ np.uint8(0x88)
    columns = np.empty((2 * packed.shape[1], len(packed)), np.uint8)
    columns[0::2], columns[1::2] = (numbers & 15).T, (numbers >> 4).T
    pairs = columns.reshape(-1, 2)
    turned: Array = pairs[:, 0] | (pairs[:, 1] << 4)
    return turned
