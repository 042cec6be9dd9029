"""Conversion rules for runtimes that take operators of the ONNX standard only."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, ValueInfoProto

from gog_edge.engines.base import Array, Floats
from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.operators import CacheShape, StandardCache, StandardOperators
from gog_edge.exporting.conversion.rules import GraphConverter
from gog_edge.exporting.conversion.values import ValueMap, node_attributes
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64
from gog_edge.exporting.quantization import dequantize
from gog_edge.policy.manifest import WeightQuantization


class StandardConverter(GraphConverter):
    """A converter to operators of the ONNX standard, for TensorRT."""

    def __init__(self, values: ValueMap, context: int, operators: StandardOperators) -> None:
        super().__init__(values, context)
        self.operators = operators
        self._cache: StandardCache | None = None  # of a decoder, created at its first attention

    def declare_input(self, value: ValueInfoProto, dtype: int = 0) -> None:
        """Declare rotary tables of the new tokens only, and caches in fp16; omit `last` and `total`."""
        if value.name in ("last", "total"):
            return
        if self.context and value.name in ("cos", "sin"):
            half = value.type.tensor_type.shape.dim[1].dim_value
            self.values.bind(value.name, self.graph.input(value.name, FLOAT, [1, "tokens", half]), FLOAT)
        else:
            super().declare_input(value, FLOAT16 if value.name.startswith("past_") else dtype)

    def declare_output(self, output: ValueInfoProto) -> None:
        """Declare a decoder's caches as the operators write them: whole, or the new tokens' rows."""
        shape = self.shape(output)
        if not output.name.startswith("present_"):
            super().declare_output(output)
        else:
            rows = shape[2] if self.operators.cache_type.whole_output else "tokens"
            self.graph.declare_output(self._cache_name(output.name), FLOAT16, [*shape[:2], rows, shape[3]])

    def _cache_name(self, present: str) -> str:
        return present.replace("present", self.operators.cache_type.output_prefix, 1)

    def convert_GroupQueryAttention(self, node: NodeProto) -> None:
        """Split heads, apply rotary embeddings, update the cache and compute attention."""
        attributes, operators = node_attributes(node), self.operators
        heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
        if self._cache is None:
            shape = CacheShape(heads, kv_heads, self._head_dim(node), self.context)
            self._cache = operators.cache_type(operators, "inputs_embeds", shape)
        cos, sin = self.values.fp16("cos"), self.values.fp16("sin")
        query, key, value = self._projections(node, heads, kv_heads)
        query, key = operators.rotate(query, cos, sin, heads), operators.rotate(key, cos, sin, kv_heads)
        attended = self._cache.attend(
            operators.split_heads(query, heads),
            (operators.split_heads(key, kv_heads), operators.split_heads(value, kv_heads)),
            (node.input[3], node.input[4]),
            (self._cache_name(node.output[1]), self._cache_name(node.output[2])),
        )
        self.values.bind(node.output[0], operators.join_heads(attended), FLOAT16)

    def _projections(self, node: NodeProto, heads: int, kv_heads: int) -> list[str]:
        """Return query, key and value [1, T, heads * head_dim], split if they are concatenated in one input."""
        if node.input[1]:
            return [self.values.fp16(name) for name in node.input[:3]]
        width = self._head_dim(node)
        widths = self.graph.ints(heads * width, kv_heads * width, kv_heads * width)
        return self.graph.ops("Split", self.values.fp16(node.input[0]), widths, count=3, axis=-1)

    def _head_dim(self, node: NodeProto) -> int:
        """Return the width of a decoder's heads, from the shape of a cache."""
        cache = next(value for value in self.values.source.input if value.name == node.input[3])
        return int(cache.type.tensor_type.shape.dim[3].dim_value)

    def convert_MultiHeadAttention(self, node: NodeProto) -> None:
        """Convert attention over all rows, causal attention, or attention over a given number of keys per item."""
        attributes = node_attributes(node)
        key_counts = node.input[4] if len(node.input) > 4 else ""
        mask = self._key_mask(node.input[1], key_counts) if key_counts else ""
        self._attend(node, attributes["num_heads"], mask, attributes.get("scale"),
                     causal=bool(attributes.get("unidirectional")))  # fmt: skip

    def convert_Attention(self, node: NodeProto) -> None:
        """Convert attention within windows."""
        attributes = node_attributes(node)
        mask = self.values.value(node.input[3]) if len(node.input) > 3 else ""
        self._attend(node, attributes["q_num_heads"], mask, attributes["scale"])

    def _attend(self, node: NodeProto, heads: int, mask: str, scale: float | None, *, causal: bool = False) -> None:
        """Split the heads, compute attention and join the heads."""
        operators = self.operators
        parts = [operators.split_heads(self.values.fp16(name), heads) for name in node.input[:3]]
        attended = operators.attend(*parts, mask=mask, scale=scale, causal=causal)
        self.values.bind(node.output[0], operators.join_heads(attended), FLOAT16)

    def _key_mask(self, key: str, counts: str) -> str:
        """Return a boolean mask [n, 1, 1, S] of the first `counts` [n] keys of [n, S, width]."""
        length = self.op("Shape", self.values.value(key), precision=0, start=1, end=2)
        indices = self.operators.arange(self.op("Squeeze", length, precision=0))
        limits = self.op("Cast", self.values.value(counts), precision=0, to=INT64)
        limits = self.op("Unsqueeze", limits, self.graph.ints(1, 2, 3), precision=0)
        return self.op("Less", indices, limits, precision=0)

    def convert_MatMulNBits(self, node: NodeProto) -> None:
        """Keep 4-bit blocks; convert 8-bit ones to fp16, since TensorRT has no block quantization of them."""
        attributes, name = node_attributes(node), node.input[1]
        packed, scales = (self.values.constant(each) for each in node.input[1:3])
        scheme = WeightQuantization(attributes["bits"], attributes["block_size"])
        weight = self.quantized_weight(packed, scales.reshape(len(packed), -1), scheme, attributes["K"], name)
        self.matmul(node, node.input[0], weight, node.input[5] if len(node.input) > 5 else "")

    def quantized_weight(
        self, packed: Array, scales: Floats, scheme: WeightQuantization, columns: int, name: str
    ) -> str:
        """Return an fp16 weight [columns, rows] of values [rows, blocks, bytes] packed as `quantize` does."""
        size = scheme.size or columns
        if scheme.bits != 4 or columns % size:
            return self.values.fp16_weight(dequantize(packed, scales, scheme, columns).T, name)
        packed = _transpose_int4(packed.reshape(len(packed), -1))
        quantized = self.graph.int4_weight(packed, (columns, len(scales)), name)
        block_scales = self.values.fp16_weight(scales.T, f"{name}_scales")
        return self.op("DequantizeLinear", quantized, block_scales, axis=0, block_size=size)

    def convert_RotaryEmbedding(self, node: NodeProto) -> None:
        """Rotate in fp16."""
        value, cos, sin = (self.values.fp16(name) for name in node.input)
        rotated = self.operators.rotate(value, cos, sin, node_attributes(node)["num_heads"])
        self.values.bind(node.output[0], rotated, FLOAT16)

    def convert_RMSNormalization(self, node: NodeProto) -> None:
        """Normalize in fp32."""
        self._norm(node.input[0], node.input[1], node_attributes(node)["epsilon"], node.output[0])

    def convert_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """Add and normalize in fp32."""
        total = self.op("Add", *(self.values.fp32(name) for name in node.input[:2]), precision=FLOAT)
        self.values.bind(node.output[3], total, FLOAT)
        self._norm(node.output[3], node.input[2], node_attributes(node)["epsilon"], node.output[0])

    def _norm(self, value: str, scale: str, epsilon: float, output: str) -> None:
        normed = self.operators.rms_norm(self.values.fp32(value), self.values.fp32(scale), epsilon)
        self.values.bind(output, normed, FLOAT)

    def convert_QuickGelu(self, node: NodeProto) -> None:
        """Compute value * sigmoid(alpha * value) in fp32."""
        value = self.values.fp32(node.input[0])
        alpha = self.values.scalar(node_attributes(node)["alpha"], FLOAT)
        scaled = self.op("Mul", value, alpha, precision=FLOAT)
        result = self.op("Mul", value, self.op("Sigmoid", scaled, precision=FLOAT), precision=FLOAT)
        self.values.bind(node.output[0], result, FLOAT)

    def convert_ReduceMax(self, node: NodeProto) -> None:
        """Replace the length of the longest text by the full context length.

        TensorRT does not take shapes that depend on values. In causal texts, tokens after the pooled one have no
        effect on the result.
        """
        if self.values.precision(node.input[0]):
            self.convert_other(node)
        else:
            tokens = next((value for value in self.values.source.input if value.name == "tokens"), None)
            if tokens is None or not node_attributes(node).get("keepdims", 1):
                raise CheckpointError(
                    f"'{node.output[0]}' makes a shape depend on a value, which cannot be converted"
                )
            self.values.bind(node.output[0], self.graph.ints(int(self.shape(tokens)[1]) - 1))


def _transpose_int4(packed: Array) -> Array:
    """Transpose 4-bit values: [rows, columns / 2] with an offset of 8 -> two's complement [columns, rows / 2], flat.

    Two values share a byte, the first in the low four bits; this is the order of the ONNX standard.
    """
    signed = packed ^ np.uint8(0x88)
    columns = np.empty((2 * packed.shape[1], len(packed)), np.uint8)
    columns[0::2], columns[1::2] = (signed & 15).T, (signed >> 4).T
    pairs = columns.reshape(-1, 2)
    transposed: Array = pairs[:, 0] | (pairs[:, 1] << 4)
    return transposed
