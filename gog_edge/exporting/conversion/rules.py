"""Conversion rules by operator: those that all target runtimes share, and those for ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, ValueInfoProto

from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.values import ValueMap, node_attributes
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64

# Standard operators that compute in fp16, those that compute in fp32, and those whose results are integers or booleans.
# All others compute in the widest precision among their non-constant inputs; constants follow.
FP16_OPERATORS = {"MatMul", "Gemm", "Conv", "Attention", "RotaryEmbedding"}
FP32_OPERATORS = {
    "LayerNormalization", "LpNormalization", "Softmax", "ReduceL2", "ReduceMean", "Div", "Pow", "Sqrt", "Exp"
}  # fmt: skip
INTEGER_OPERATORS = {"Shape", "ArgMax", "Equal", "Less", "LessOrEqual", "Greater", "Range"}

# The inputs and results of some checkpoints' matmuls exceed the fp16 range of 65,504 (in the vision towers of
# Qwen2.5-VL and Qwen3-VL they do). Matmul inputs are therefore divided by 64, and results are multiplied by 64 in fp32.
# This is exact, except that values below 0.004 become subnormal and lose up to six bits. Runtimes fuse both factors
# with neighbouring operators. Gemm and Conv, which only torch.onnx writes for us, are not scaled.
INPUT_SCALE = 2.0**-6


class GraphConverter:
    """A converter that visits each node: `convert_<operator>` handles it if defined, otherwise `convert_other`."""

    def __init__(self, values: ValueMap, context: int) -> None:
        """Convert the graph of `values`; `context` is the tokens of a decoder's KV cache, 0 for other graphs."""
        self.values, self.graph, self.op = values, values.graph, values.op
        self.context = context
        self._dequantized: dict[str, str] = {}  # quantized rows -> the value they were quantized from
        self._unscaled: set[str] = set()  # results of matmuls whose row scales need not be applied any more
        self._weights: set[str] = set()  # outputs of casts that are constants
        self._negated_keep = ""  # the source value -keep, which starts the slice of the last rows

    def convert(self) -> None:
        """Convert inputs, nodes and outputs."""
        for value in self.values.source.input:
            self.declare_input(value)
        for node in self.values.source.node:
            rule: Callable[[NodeProto], None] = getattr(self, f"convert_{node.op_type}", self.convert_other)
            rule(node)
        for output in self.values.source.output:
            self.declare_output(output)

    def declare_input(self, value: ValueInfoProto, dtype: int = 0) -> None:
        """Declare an input of the source, in its own dtype if `dtype` is 0.

        The input `keep`, the number of rows of logits, becomes `rows`, their indices: no shape may depend on a value
        that would have to be copied from the GPU.
        """
        if value.name == "keep":
            self.values.bind("keep", self.graph.input("rows", INT64, ["rows"]))
            return
        type_ = value.type.tensor_type
        self.graph.input(value.name, dtype or type_.elem_type, self.shape(value))
        self.values.bind(value.name, value.name, (dtype or FLOAT) if type_.elem_type == FLOAT else 0)

    def declare_output(self, output: ValueInfoProto) -> None:
        """Declare an output of the source in its own dtype."""
        dtype = output.type.tensor_type.elem_type
        self.graph.output(self.values.value(output.name, dtype), output.name, dtype, self.shape(output))

    def shape(self, value: ValueInfoProto) -> list[int | str]:
        """Return the shape of an input or output, with `context` for the dynamic dimension "capacity"."""
        dims = value.type.tensor_type.shape.dim
        return [self.context if dim.dim_param == "capacity" else dim.dim_param or dim.dim_value for dim in dims]

    def convert_other(self, node: NodeProto) -> None:
        """Copy a standard operator. Raises CheckpointError for operators of other domains."""
        if node.domain:
            raise CheckpointError(f"operator {node.domain}.{node.op_type} ('{node.output[0]}') cannot be converted")
        precision = self._precision(node)
        input_precision = None if node.op_type in INTEGER_OPERATORS else precision
        inputs = [self.values.value(name, input_precision) for name in node.input]
        self.values.copy_node(node, inputs, precision)

    def _precision(self, node: NodeProto) -> int:
        precisions = {name: self.values.precision(name) for name in node.input if name}
        if node.op_type in INTEGER_OPERATORS or not any(precisions.values()):
            return 0
        computed = [precision for name, precision in precisions.items() if not self.values.is_constant(name)]
        fp32 = node.op_type in FP32_OPERATORS or (FLOAT in computed and node.op_type not in FP16_OPERATORS)
        return FLOAT if fp32 else FLOAT16

    # --- matmuls ----------------------------------------------------------------------------------

    def matmul(self, node: NodeProto, value: str, weight: str, bias: str = "") -> None:
        """Replace the node's output by value @ weight + bias; `weight` is a converted value in fp16."""
        self.restore_scale(node, self.op("MatMul", self.scaled_input(value), weight), bias)

    def scaled_input(self, value: str) -> str:
        """Return a source value times INPUT_SCALE, in fp16."""
        precision = self.values.precision(value)
        factor = self.values.scalar(INPUT_SCALE, precision)
        return self.values.cast(self.op("Mul", self.values.value(value), factor, precision=precision), FLOAT16)

    def restore_scale(self, node: NodeProto, product: str, bias: str = "") -> None:
        """Replace the node's output by `product` divided by INPUT_SCALE, plus a bias, in fp32."""
        fp32 = self.values.cast(product, FLOAT)
        result = self.op("Mul", fp32, self.values.scalar(1 / INPUT_SCALE, FLOAT), precision=FLOAT)
        if bias:
            result = self.op("Add", result, self.values.fp32(bias), precision=FLOAT)
        self.values.bind(node.output[0], result, FLOAT)

    def convert_MatMul(self, node: NodeProto) -> None:
        """Convert a matmul with a weight, in fp16."""
        if self.values.is_constant(node.input[1]) or node.input[1] in self._weights:
            self.matmul(node, node.input[0], self.values.fp16(node.input[1]))
        else:
            self.convert_other(node)

    def convert_QuantizeLinear(self, node: NodeProto) -> None:
        """Skip the quantization of a matmul's input."""
        self._dequantized[node.output[0]] = node.input[0]

    def convert_MatMulIntegerToFloat(self, node: NodeProto) -> None:
        """Convert an integer matmul with one scale per row of both factors to an fp16 matmul."""
        weight, scales = (self.values.constant(node.input[index]) for index in (1, 3))
        fp16_weight = self.values.fp16_weight(weight.astype(np.float32) * scales, node.input[1])
        self.matmul(node, self._dequantized[node.input[0]], fp16_weight)
        self._unscaled.add(node.output[0])

    def convert_Mul(self, node: NodeProto) -> None:
        """Omit the row scales of inputs that are no longer quantized."""
        if node.input[0] in self._unscaled:
            value = self.values.value(node.input[0])
            self.values.bind(node.output[0], value, self.values.precision(node.input[0]))
        else:
            self.convert_other(node)

    # --- other operators --------------------------------------------------------------------------

    def convert_Cast(self, node: NodeProto) -> None:
        """Keep weights that are stored in fp16 as they are; cast other values to fp32 or to an integer type."""
        value, to_fp32 = node.input[0], node_attributes(node)["to"] == FLOAT
        if to_fp32 and self.values.precision(value):
            is_weight = self.values.is_constant(value)
            precision = FLOAT16 if is_weight else FLOAT
            self.values.bind(node.output[0], self.values.value(value, precision), precision)
            self._weights |= {node.output[0]} if is_weight else set()
        else:
            self.values.copy_node(node, [self.values.value(value)], FLOAT if to_fp32 else 0)

    def convert_Gather(self, node: NodeProto) -> None:
        """Convert int8 lookup tables to fp16, which represents them exactly: TensorRT cannot gather from int8."""
        table = node.input[0]
        if self.values.is_constant(table) and self.values.constant(table).dtype == np.int8:
            converted = self.values.fp16_weight(self.values.constant(table).astype(np.float32), table)
            rows = self.op("Gather", converted, self.values.value(node.input[1]), **node_attributes(node))
            self.values.bind(node.output[0], rows, FLOAT16)
        else:
            self.convert_other(node)

    def convert_Neg(self, node: NodeProto) -> None:
        """Remember -keep, the start of the slice of the last rows."""
        if node.input[0] == "keep":
            self._negated_keep = node.output[0]
        else:
            self.convert_other(node)

    def convert_Slice(self, node: NodeProto) -> None:
        """Convert the slice of the last `keep` rows to a gather of `rows`."""
        if node.input[1] == self._negated_keep and self._negated_keep:
            precision = self.values.precision(node.input[0])
            rows = self.op("Gather", self.values.value(node.input[0]), "rows", precision=precision, axis=1)
            self.values.bind(node.output[0], rows, precision)
        else:
            self.convert_other(node)


class CudaConverter(GraphConverter):
    """A converter for ONNX Runtime's CUDA provider: its own operators, with caches and rotary tables in fp16."""

    def declare_input(self, value: ValueInfoProto, dtype: int = 0) -> None:
        """Declare a decoder's caches and rotary tables in fp16."""
        fp16 = value.name.startswith("past_") or (self.context > 0 and value.name in ("cos", "sin"))
        super().declare_input(value, FLOAT16 if fp16 else dtype)

    def declare_output(self, output: ValueInfoProto) -> None:
        """Declare a decoder's caches in fp16."""
        if output.name.startswith("present_"):
            self.graph.declare_output(output.name, FLOAT16, self.shape(output))
        else:
            super().declare_output(output)

    def convert_GroupQueryAttention(self, node: NodeProto) -> None:
        """Copy the operator with fp16 inputs; the cache outputs keep their names."""
        inputs = [self.values.fp16(name) for name in node.input]
        attended = self.graph.ops(
            node.op_type, *inputs, names=node.output[1:], domain=node.domain, **node_attributes(node)
        )
        self.values.bind(node.output[0], attended[0], FLOAT16)

    def convert_MultiHeadAttention(self, node: NodeProto) -> None:
        """Copy the operator with fp16 inputs."""
        self.values.copy_node(node, [self.values.fp16(name) for name in node.input], FLOAT16)

    def convert_QuickGelu(self, node: NodeProto) -> None:
        """Copy the operator with fp32 inputs."""
        self.values.copy_node(node, [self.values.fp32(node.input[0])], FLOAT)

    def convert_MatMulNBits(self, node: NodeProto) -> None:
        """Keep the quantized weight; its scales and the other factor become fp16."""
        value, packed, scales, *more = node.input
        inputs = [self.scaled_input(value), self.values.value(packed), self.values.fp16(scales)]
        product = self.op(node.op_type, *inputs, domain=node.domain, **node_attributes(node))
        self.restore_scale(node, product, more[-1] if more else "")

    def convert_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """Copy the operator with fp32 inputs."""
        self.values.copy_node(node, [self.values.fp32(name) for name in node.input], FLOAT)

    def convert_RMSNormalization(self, node: NodeProto) -> None:
        """Write SimplifiedLayerNormalization, the name that more releases of the CUDA provider know."""
        inputs = [self.values.fp32(name) for name in node.input]
        normed = self.op("SimplifiedLayerNormalization", *inputs, precision=FLOAT, **node_attributes(node))
        self.values.bind(node.output[0], normed, FLOAT)
