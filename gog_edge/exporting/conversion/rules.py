"""What becomes of each operator: the rules that all rewritings share, and those for ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, ValueInfoProto

from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.values import Rewriter, attributes
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64

# Operators of the standard that compute in half precision, and those that are wide inside. Results of COUNTS hold no
# fractions. All others keep to what they are given, the wider of two; constants follow.
HALF = {"MatMul", "Gemm", "Conv", "Attention", "RotaryEmbedding"}
WIDE = {"LayerNormalization", "LpNormalization", "Softmax", "ReduceL2", "ReduceMean", "Div", "Pow", "Sqrt", "Exp"}
COUNTS = {"Shape", "ArgMax", "Equal", "Less", "LessOrEqual", "Greater", "Range"}

# Some checkpoints' products, and what they multiply, pass the largest half, 65,504 (Qwen2.5-VL's and Qwen3-VL's vision
# towers do). So products are taken of values 64 times smaller, and grow back in single precision: exact but for values
# below 0.004, which lose up to six of their bits. Runtimes fuse both with what stands beside. Gemm and Conv, which only
# torch.onnx writes for us, are left as they are.
SMALLER = 2.0**-6


class Lifter:
    """Rewrites node after node: by the method lift_<operator>, or as it stands in the precision that suits it."""

    def __init__(self, rewriter: Rewriter, context: int) -> None:
        self.rewriter, self.graph, self.op = rewriter, rewriter.graph, rewriter.op
        self.context = context
        self._whole: dict[str, str] = {}  # rows of whole numbers -> what they were before they were rounded
        self._scaled: set[str] = set()  # products of such rows, whose scales are in them already
        self._weights: set[str] = set()  # constants under other names
        self._tail = ""  # value of the source that tells how many of the last rows are wanted

    def lift(self) -> None:
        """Inputs, nodes, outputs."""
        for value in self.rewriter.source.input:
            self.declare(value)
        for node in self.rewriter.source.node:
            rule: Callable[[NodeProto], None] = getattr(self, f"lift_{node.op_type}", self.lift_other)
            rule(node)
        for output in self.rewriter.source.output:
            self.give_out(output)

    def declare(self, value: ValueInfoProto, kind: int = 0) -> None:
        """An input of the source stays one; `kind` of its numbers other than its own.

        But how many rows of logits are wanted becomes which: no shape depends on what a GPU would have to tell first.
        """
        if value.name == "keep":
            self.rewriter.bind("keep", self.graph.input("rows", INT64, ["rows"]))
            return
        type_ = value.type.tensor_type
        self.graph.input(value.name, kind or type_.elem_type, self.shape(value))
        self.rewriter.bind(value.name, value.name, (kind or FLOAT) if type_.elem_type == FLOAT else 0)

    def give_out(self, output: ValueInfoProto) -> None:
        """An output of the source, in its own precision."""
        kind = output.type.tensor_type.elem_type
        self.graph.output(self.rewriter.value(output.name, kind), output.name, kind, self.shape(output))

    def shape(self, value: ValueInfoProto) -> list[int | str]:
        """Of an input or output, with the caches' length."""
        dims = value.type.tensor_type.shape.dim
        return [self.context if dim.dim_param == "capacity" else dim.dim_param or dim.dim_value for dim in dims]

    def lift_other(self, node: NodeProto) -> None:
        """An operator of the standard; CheckpointError for all others."""
        if node.domain:
            raise CheckpointError(f"operator {node.domain}.{node.op_type} ('{node.output[0]}') cannot be rewritten")
        kind = self._precision(node)
        given = None if node.op_type in COUNTS else kind
        inputs = [self.rewriter.value(name, given) for name in node.input]
        self.rewriter.ops(node, inputs, [kind] * len(node.output))

    def _precision(self, node: NodeProto) -> int:
        kinds = {name: self.rewriter.kind(name) for name in node.input if name}
        if node.op_type in COUNTS or not any(kinds.values()):
            return 0
        computed = [kind for name, kind in kinds.items() if not self.rewriter.is_constant(name)]
        wide = node.op_type in WIDE or (FLOAT in computed and node.op_type not in HALF)
        return FLOAT if wide else FLOAT16

    # --- products ---------------------------------------------------------------------------------

    def product(self, node: NodeProto, given: str, weight: str, bias: str = "") -> None:
        """given @ weight + bias stands for the node's output; `weight` is a value of the result, half."""
        self.restore(node, self.op("MatMul", self.made_smaller(given), weight), bias)

    def made_smaller(self, given: str) -> str:
        """A factor of a product, half."""
        kind = self.rewriter.kind(given)
        factor = self.rewriter.scalar(SMALLER, kind)
        return self.rewriter.cast(self.op("Mul", self.rewriter.value(given), factor, kind=kind), FLOAT16)

    def restore(self, node: NodeProto, product: str, bias: str = "") -> None:
        """What a product of a smaller factor should have been, wide, plus a bias, stands for the node's output."""
        wide = self.rewriter.cast(product, FLOAT)
        result = self.op("Mul", wide, self.rewriter.scalar(1 / SMALLER, FLOAT), kind=FLOAT)
        if bias:
            result = self.op("Add", result, self.rewriter.wide(bias), kind=FLOAT)
        self.rewriter.bind(node.output[0], result, FLOAT)

    def lift_MatMul(self, node: NodeProto) -> None:
        """In half precision."""
        if self.rewriter.is_constant(node.input[1]) or node.input[1] in self._weights:
            self.product(node, node.input[0], self.rewriter.half(node.input[1]))
        else:
            self.lift_other(node)

    def lift_QuantizeLinear(self, node: NodeProto) -> None:
        """Rows that were rounded for a product of whole numbers are not rounded any more."""
        self._whole[node.output[0]] = node.input[0]

    def lift_MatMulIntegerToFloat(self, node: NodeProto) -> None:
        """A product of whole numbers, with a scale for each row of both factors, is one of halves again."""
        numbers, scales = (self.rewriter.constant(node.input[at]) for at in (1, 3))
        weight = self.rewriter.written(numbers.astype(np.float32) * scales, node.input[1])
        self.product(node, self._whole[node.input[0]], weight)
        self._scaled.add(node.output[0])

    def lift_Mul(self, node: NodeProto) -> None:
        """Scales of rows that were not rounded are left out."""
        if node.input[0] in self._scaled:
            value = self.rewriter.value(node.input[0])
            self.rewriter.bind(node.output[0], value, self.rewriter.kind(node.input[0]))
        else:
            self.lift_other(node)

    # --- the rest ---------------------------------------------------------------------------------

    def lift_Cast(self, node: NodeProto) -> None:
        """Weights stored in halves stay so; other numbers become wide."""
        given, wide = node.input[0], attributes(node)["to"] == FLOAT
        if wide and self.rewriter.kind(given):
            weight = self.rewriter.is_constant(given)
            kind = FLOAT16 if weight else FLOAT
            self.rewriter.bind(node.output[0], self.rewriter.value(given, kind), kind)
            self._weights |= {node.output[0]} if weight else set()
        else:
            self.rewriter.ops(node, [self.rewriter.value(given)], [FLOAT if wide else 0])

    def lift_Gather(self, node: NodeProto) -> None:
        """Tables of whole numbers become halves, which hold those of eight bits: TensorRT looks none up."""
        table = node.input[0]
        if self.rewriter.is_constant(table) and self.rewriter.constant(table).dtype == np.int8:
            halves = self.rewriter.written(self.rewriter.constant(table).astype(np.float32), table)
            rows = self.op("Gather", halves, self.rewriter.value(node.input[1]), **attributes(node))
            self.rewriter.bind(node.output[0], rows, FLOAT16)
        else:
            self.lift_other(node)

    def lift_Neg(self, node: NodeProto) -> None:
        """Minus how many rows are wanted: where the last rows begin."""
        if node.input[0] == "keep":
            self._tail = node.output[0]
        else:
            self.lift_other(node)

    def lift_Slice(self, node: NodeProto) -> None:
        """Of the last rows, those asked for by name."""
        if node.input[1] == self._tail and self._tail:
            kind = self.rewriter.kind(node.input[0])
            rows = self.op("Gather", self.rewriter.value(node.input[0]), "rows", kind=kind, axis=1)
            self.rewriter.bind(node.output[0], rows, kind)
        else:
            self.lift_other(node)


class HalfLifter(Lifter):
    """For ONNX Runtime's CUDA provider: its own operators, caches and rotary tables in half precision."""

    def declare(self, value: ValueInfoProto, kind: int = 0) -> None:
        """What a decoder keeps is half."""
        kept = value.name.startswith("past_") or (self.context > 0 and value.name in ("cos", "sin"))
        super().declare(value, FLOAT16 if kept else kind)

    def give_out(self, output: ValueInfoProto) -> None:
        """Caches are half."""
        if output.name.startswith("present_"):
            self.graph.declare_output(output.name, FLOAT16, self.shape(output))
        else:
            super().give_out(output)

    def lift_GroupQueryAttention(self, node: NodeProto) -> None:
        """Half; the caches keep their names."""
        inputs = [self.rewriter.half(name) for name in node.input]
        attended = self.graph.ops(node.op_type, *inputs, names=node.output[1:], domain=node.domain, **attributes(node))
        self.rewriter.bind(node.output[0], attended[0], FLOAT16)

    def lift_MultiHeadAttention(self, node: NodeProto) -> None:
        """Half."""
        inputs = [self.rewriter.half(name) for name in node.input]
        self.rewriter.ops(node, inputs, [FLOAT16])

    def lift_QuickGelu(self, node: NodeProto) -> None:
        """Wide."""
        self.rewriter.ops(node, [self.rewriter.wide(node.input[0])], [FLOAT])

    def lift_MatMulNBits(self, node: NodeProto) -> None:
        """By blocks as they are; their scales, and what they are multiplied with, are half."""
        given, packed, scales, *more = node.input
        inputs = [self.made_smaller(given), self.rewriter.value(packed), self.rewriter.half(scales)]
        product = self.op(node.op_type, *inputs, domain=node.domain, **attributes(node))
        self.restore(node, product, more[-1] if more else "")

    def lift_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """Sum and norm are wide."""
        inputs = [self.rewriter.wide(name) for name in node.input]
        self.rewriter.ops(node, inputs, [FLOAT] * len(node.output))

    def lift_RMSNormalization(self, node: NodeProto) -> None:
        """By the name that the CUDA provider has had it under for longest."""
        normed = self.op("SimplifiedLayerNormalization", *(self.rewriter.wide(name) for name in node.input), kind=FLOAT,
                         **attributes(node))  # fmt: skip
        self.rewriter.bind(node.output[0], normed, FLOAT)
