"""Graphs that were exported for ONNX Runtime's CPU, rewritten for other runtimes: same weights, same names.

`standard` holds operators of the ONNX standard alone (opset 24), as TensorRT takes them from 10.15 on: TensorScatter
becomes its in-place cache, Attention its fused attention. `decomposed` (opset 21) is for TensorRT before that, which
has neither. `half` keeps ONNX Runtime's own operators, for its CUDA provider.

All compute in half precision, but for what that spoils: norms, softmax, and the stream that a decoder's and a vision
tower's blocks add to stay in single precision, as do inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, ValueInfoProto

from gog_edge.engines.base import Array, Floats
from gog_edge.errors import CheckpointError
from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64, OPSET, GraphBuilder
from gog_edge.exporting.lift_operators import CacheShape, DecomposedOperators, StandardOperators
from gog_edge.exporting.lift_values import Rewriter, attributes
from gog_edge.exporting.quantise import dequantise
from gog_edge.policy.manifest import Blocks

Kind = Literal["standard", "decomposed", "half"]
KINDS: tuple[Kind, ...] = ("standard", "decomposed", "half")

# Operators of the standard that compute in half precision, and those that are wide inside. Results of COUNTS hold no
# fractions. All others keep to what they are given, the wider of two; constants follow.
HALF = {"MatMul", "Gemm", "Conv", "Attention", "RotaryEmbedding"}
WIDE = {"LayerNormalization", "LpNormalization", "Softmax", "ReduceL2", "ReduceMean", "Div", "Pow", "Sqrt", "Exp"}
COUNTS = {"Shape", "ArgMax", "Equal", "Less", "LessOrEqual", "Greater", "Range"}
WHERE_PATCHES_ENTER = "patch_embed"  # name of the weights whose product is the stream that a tower's blocks add to


def lift_graph(source: Path, target: Path, kind: Kind, *, context: int = 0) -> None:
    """Rewrite a graph of a policy or an encoder.

    Args:
        source: decoder.onnx or vision.onnx of a policy folder, image.onnx or text.onnx of an encoder folder.
        target: the file to write; larger weights go to a file beside it.
        kind: what for.
        context: tokens that each cache of a decoder holds.

    Raises:
        CheckpointError: an operator cannot be rewritten, half precision does not hold a weight, or a decoder's context
            is none.
    """
    model = onnx.load(str(source), load_external_data=False)
    if context < 1 and any(node.op_type == "GroupQueryAttention" for node in model.graph.node):
        raise CheckpointError(f"'{source}' is a decoder, whose caches must hold a token at least, not {context}")
    graph = GraphBuilder(model.graph.name, target, opset=21 if kind == "decomposed" else OPSET)
    rewriter = Rewriter(graph, model.graph, source.parent)
    lifter: Lifter = HalfLifter(rewriter, context)
    if kind != "half":
        operators = StandardOperators if kind == "standard" else DecomposedOperators
        lifter = StandardLifter(rewriter, context, operators(rewriter))
    lifter.lift()
    graph.prune()
    graph.save()


class Lifter:
    """Rewrites node after node: by the method lift_<operator>, or as it stands in the precision that suits it."""

    def __init__(self, rewriter: Rewriter, context: int) -> None:
        self.rewriter, self.graph, self.op = rewriter, rewriter.graph, rewriter.op
        self.context = context
        self._whole: dict[str, str] = {}  # rows of whole numbers -> what they were before they were rounded
        self._scaled: set[str] = set()  # products of such rows, whose scales are in them already

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
        """An input of the source stays one; `kind` of its numbers other than its own."""
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
        """given @ weight + bias stands for the node's output."""
        result = self.op("MatMul", self.rewriter.half(given), weight)
        if bias:
            result = self.op("Add", result, self.rewriter.half(bias))
        if node.input[1].startswith(WHERE_PATCHES_ENTER):
            self.rewriter.bind(node.output[0], self.rewriter.cast(result, FLOAT), FLOAT)
        else:
            self.rewriter.bind(node.output[0], result, FLOAT16)

    def lift_MatMul(self, node: NodeProto) -> None:
        """In half precision."""
        self.product(node, node.input[0], self.rewriter.half(node.input[1]))

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
            kind = FLOAT16 if self.rewriter.is_constant(given) else FLOAT
            self.rewriter.bind(node.output[0], self.rewriter.value(given, kind), kind)
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

    def lift_LayerNormalization(self, node: NodeProto) -> None:
        """Wide inside; half for the products that follow."""
        self.lift_other(node)
        self.narrow(node.output[0])

    def narrow(self, old: str) -> None:
        """From here on, a value goes on in half precision."""
        self.rewriter.bind(old, self.rewriter.half(old), FLOAT16)


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
        """Half."""
        self.rewriter.ops(node, [self.rewriter.half(node.input[0])], [FLOAT16])

    def blocked(self, packed: Array, scales: Floats, blocks: Blocks, columns: int, name: str) -> str:
        """Not used: products with blocks stay whole."""
        raise NotImplementedError

    def lift_MatMulNBits(self, node: NodeProto) -> None:
        """Half, by half scales."""
        given, packed, scales, *more = node.input
        inputs = [self.rewriter.half(given), self.rewriter.value(packed), self.rewriter.half(scales),
                  *(self.rewriter.half(name) for name in more)]  # fmt: skip
        self.rewriter.ops(node, inputs, [FLOAT16])

    def lift_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """Sum and norm are wide; the norm goes on as half."""
        inputs = [self.rewriter.wide(name) for name in node.input]
        self.rewriter.ops(node, inputs, [FLOAT] * len(node.output))
        self.narrow(node.output[0])

    def lift_RMSNormalization(self, node: NodeProto) -> None:
        """By the name that the CUDA provider has had it under for longest."""
        normed = self.op("SimplifiedLayerNormalization", *(self.rewriter.wide(name) for name in node.input), kind=FLOAT,
                         **attributes(node))  # fmt: skip
        self.rewriter.bind(node.output[0], normed, FLOAT)
        self.narrow(node.output[0])


class StandardLifter(Lifter):
    """Operators of the ONNX standard alone."""

    def __init__(self, rewriter: Rewriter, context: int, operators: StandardOperators) -> None:
        super().__init__(rewriter, context)
        self.operators = operators
        self._tail = ""  # value of the source that tells how many of the last rows are wanted

    def declare(self, value: ValueInfoProto, kind: int = 0) -> None:
        """A decoder gets the rotary rows of the new tokens only, and which rows of logits are wanted."""
        if value.name in ("last", "total"):
            return
        if value.name == "keep":
            self.rewriter.bind("keep", self.graph.input("rows", INT64, ["rows"]))
        elif self.context and value.name in ("cos", "sin"):
            half = value.type.tensor_type.shape.dim[1].dim_value
            self.rewriter.bind(value.name, self.graph.input(value.name, FLOAT, [1, "tokens", half]), FLOAT)
        else:
            super().declare(value, FLOAT16 if value.name.startswith("past_") else kind)

    def give_out(self, output: ValueInfoProto) -> None:
        """A decoder's caches leave as its operators say; logits of the rows asked for."""
        shape = self.shape(output)
        if not output.name.startswith("present_"):
            super().give_out(output)
        elif self.operators.cache == "present":
            self.graph.declare_output(output.name, FLOAT16, shape)
        else:
            name = self._cache_name(output.name)
            self.graph.declare_output(name, FLOAT16, [*shape[:2], "tokens", shape[3]])

    def _cache_name(self, present: str) -> str:
        return present.replace("present", self.operators.cache, 1)

    def lift_GroupQueryAttention(self, node: NodeProto) -> None:
        """Heads, rotation, cache, attention."""
        has, operators, half = attributes(node), self.operators, self.rewriter.half
        heads, kv_heads = has["num_heads"], has["kv_num_heads"]
        cos, sin = half("cos"), half("sin")
        if operators.shape is None:
            operators.begin_cached("inputs_embeds", CacheShape(heads, kv_heads, self._head_dim(node), self.context))
        query, key, value = self._parts(node, heads, kv_heads)
        query, key = operators.rotate(query, cos, sin, heads), operators.rotate(key, cos, sin, kv_heads)
        new = operators.split_heads(key, kv_heads), operators.split_heads(value, kv_heads)
        past, names = (node.input[3], node.input[4]), tuple(map(self._cache_name, node.output[1:3]))
        attended = operators.attend_cached(operators.split_heads(query, heads), new, past, (names[0], names[1]))
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

    def lift_RotaryEmbedding(self, node: NodeProto) -> None:
        """Half, by half angles."""
        value, cos, sin = (self.rewriter.half(name) for name in node.input)
        self.rewriter.bind(node.output[0], self.operators.rotate(value, cos, sin, attributes(node)["num_heads"]),
                           FLOAT16)  # fmt: skip

    def lift_RMSNormalization(self, node: NodeProto) -> None:
        """Wide inside, half for the products that follow."""
        self._norm(node.input[0], node.input[1], attributes(node)["epsilon"], node.output[0])

    def lift_SkipSimplifiedLayerNormalization(self, node: NodeProto) -> None:
        """The sum stays wide; its norm goes on as half."""
        total = self.op("Add", *(self.rewriter.wide(name) for name in node.input[:2]), kind=FLOAT)
        self.rewriter.bind(node.output[3], total, FLOAT)
        self._norm(node.output[3], node.input[2], attributes(node)["epsilon"], node.output[0])

    def _norm(self, value: str, scale: str, epsilon: float, output: str) -> None:
        normed = self.operators.rms_norm(self.rewriter.wide(value), self.rewriter.wide(scale), epsilon)
        self.rewriter.bind(output, normed, FLOAT)
        self.narrow(output)

    def lift_QuickGelu(self, node: NodeProto) -> None:
        """value * sigmoid(alpha * value)."""
        value = self.rewriter.half(node.input[0])
        alpha = self.rewriter.written(np.asarray(attributes(node)["alpha"], np.float32), "alpha")
        gate = self.op("Sigmoid", self.op("Mul", value, alpha))
        self.rewriter.bind(node.output[0], self.op("Mul", value, gate), FLOAT16)

    def lift_ReduceMax(self, node: NodeProto) -> None:
        """Texts are taken at full length: TensorRT wants no shape that depends on what is read.

        Of causal texts, what stands behind the last token that counts is not looked at.
        """
        if self.rewriter.kind(node.input[0]):
            self.lift_other(node)
        else:
            tokens = next(value for value in self.rewriter.source.input if value.name == "tokens")
            self.rewriter.bind(node.output[0], self.graph.ints(int(self.shape(tokens)[1]) - 1))

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


def _turned(packed: Array) -> Array:
    """Numbers of four bits [rows, columns / 2], two a byte from -8 on -> the same [columns, rows] in two's complement.

    The standard's order: row after row, the first of two in the low half.
    """
    numbers = packed ^ np.uint8(0x88)
    columns = np.empty((2 * packed.shape[1], len(packed)), np.uint8)
    columns[0::2], columns[1::2] = (numbers & 15).T, (numbers >> 4).T
    pairs = columns.reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
