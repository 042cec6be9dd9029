"""A small writer of ONNX graphs: values are names, an operator call returns its output's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.quantization import quantise
from gog_edge.policy.manifest import Blocks

OPSET = 24
MICROSOFT = "com.microsoft"
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
INT32, INT64, BOOL, UINT16 = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT16
# Small graphs are one file; the weights of larger ones lie beside, where they can be mapped (and may pass 2 GiB).
EMBEDDED_BYTES = 2**26
WHOLE_NUMBERS = 4  # MatMulNBits' accuracy level: activations become 8-bit numbers too, which is twice as fast
MIDDLE = 128  # stands for zero among unsigned 8-bit numbers
ALIGNMENT = 4096  # bytes: weights begin on a page, so that they can be mapped; smaller ones stay in the graph

Shape = Sequence[int | str]
Form: TypeAlias = Literal["fp32", "fp16"] | Blocks
Progress: TypeAlias = Callable[[range, str], Iterable[int]]  # layers, and what they are of -> the same layers


def silent(layers: range, _: str) -> Iterable[int]:
    """A `Progress` that shows nothing."""
    return layers


class GraphBuilder:
    """Collects nodes, weights, inputs and outputs, then writes one .onnx file.

    Weights go to `<path>.data` as they come: a model is never held whole. What an earlier export left there goes.
    """

    def __init__(self, name: str, path: Path, form: Form = "fp32", *, opset: int = OPSET) -> None:
        """`form` is how the weights of `linear` are stored; everything that is written here computes in float32."""
        self.form: Form = form
        self._opset = opset
        self._name, self._path, self._data = name, path, path.with_name(f"{path.name}.data")
        self._data.unlink(missing_ok=True)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._bytes = 0

    def _fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, kind: int, shape: Shape) -> str:
        """Declare a graph input; strings in `shape` are free dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, value: str, name: str, kind: int, shape: Shape) -> None:
        """Give `value` out under `name`."""
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name]))
        self.declare_output(name, kind, shape)

    def declare_output(self, name: str, kind: int, shape: Shape) -> None:
        """Declare an output that some node already writes under its final name."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def weight(self, array: Array, name: str = "constant") -> str:
        """An initializer."""
        fresh = self._fresh(name)
        array = np.asarray(array, order="C")
        small = array.nbytes < ALIGNMENT
        self._weights.append(numpy_helper.from_array(array, fresh) if small else self._spooled(array, fresh))
        self._bytes += array.nbytes
        return fresh

    def half(self, array: Array, name: str) -> str:
        """An initializer of halves. CheckpointError where they do not hold its numbers."""
        return self.weight(_half(array, name), name)

    def int4(self, packed: Array, shape: Sequence[int], name: str) -> str:
        """An initializer of whole numbers -8..7, two a byte, the first in the low half."""
        fresh = self._fresh(name)
        tensor = self._spooled(packed, fresh)
        tensor.data_type, tensor.dims[:] = TensorProto.INT4, shape
        self._weights.append(tensor)
        self._bytes += packed.nbytes
        return fresh

    def prune(self) -> None:
        """Leave out what no output needs."""
        wanted = {output.name for output in self._outputs}
        kept = []
        for node in reversed(self._nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self._nodes = kept[::-1]
        self._weights = [tensor for tensor in self._weights if tensor.name in wanted]

    def _spooled(self, array: Array, name: str) -> onnx.TensorProto:
        with self._data.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            array.tofile(file)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._data.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def ints(self, *values: int) -> str:
        """A small int64 vector."""
        return self.weight(np.asarray(values, np.int64))

    def scalar(self, value: int) -> str:
        """An int64 without dimensions."""
        return self.weight(np.asarray(value, np.int64))

    def ops(self, kind: str, *inputs: str, count: int = 1, names: Sequence[str] = (), domain: str = "",
            **attributes: Any) -> list[str]:
        """Add a node with several outputs; `names` fixes the names of the last ones; '' is an input left out."""
        outputs = [self._fresh(kind) for _ in range(count)] + list(names)
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, domain=domain, **attributes))
        return outputs

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def linear(
        self, value: str, weight: Array, bias: Array | None = None, *, name: str = "weight", form: Form | None = None
    ) -> str:
        """value @ weight.T + bias, weight [out, in] as PyTorch keeps it; `form` other than the graph's own."""
        form = form or self.form
        if isinstance(form, Blocks):
            return (self._blocked if form.size else self._by_rows)(value, weight, bias, name, form)
        if form == "fp16":  # halves the file; the engine widens it once, at load
            stored = self.op("Cast", self.weight(_half(weight.T, name), name), to=FLOAT)
        else:
            stored = self.weight(weight.T, name)
        product = self.op("MatMul", value, stored)
        return product if bias is None else self.op("Add", product, self.weight(bias, f"{name}_bias"))

    def _blocked(self, value: str, weight: Array, bias: Array | None, name: str, blocks: Blocks) -> str:
        packed, scales = quantise(weight, blocks)
        inputs = [value, self.weight(packed, name), self.weight(scales, f"{name}_scales")]
        if bias is not None:
            inputs += ["", "", self.weight(bias, f"{name}_bias")]
        return self.op(
            "MatMulNBits", *inputs, domain=MICROSOFT, K=weight.shape[1], N=weight.shape[0], bits=blocks.bits,
            block_size=blocks.size, accuracy_level=WHOLE_NUMBERS,
        )

    def _by_rows(self, value: str, weight: Array, bias: Array | None, name: str, blocks: Blocks) -> str:
        """One scale for each row of both factors; the product of the whole numbers is exact."""
        packed, scales = quantise(weight, blocks)
        numbers = (packed[:, 0].astype(np.int16) - 2 ** (blocks.bits - 1)).astype(np.int8)
        whole, row_scales = self._whole_rows(value)
        product = self.op(
            "MatMulIntegerToFloat", whole, self.weight(numbers.T, name), self.weight(np.ones((), np.float32)),
            self.weight(scales[:, 0], f"{name}_scales"), self.weight(np.asarray(MIDDLE, np.uint8)), domain=MICROSOFT,
        )
        scaled = self.op("Mul", product, row_scales)
        return scaled if bias is None else self.op("Add", scaled, self.weight(bias, f"{name}_bias"))

    def _whole_rows(self, value: str) -> tuple[str, str]:
        """[..., T, K] -> 8-bit numbers about 128, and the scale of each row [T, 1]."""
        last = self.ints(-1)
        ends = [self.op(kind, value, last, keepdims=0) for kind in ("ReduceMax", "ReduceMin")]
        greatest = self.op("Max", ends[0], self.op("Neg", ends[1]), self.weight(np.asarray(1e-20, np.float32)))
        flat = self.op("Reshape", greatest, last)
        scales = self.op("Div", flat, self.weight(np.asarray(MIDDLE - 1, np.float32)))
        middles = self.op("Expand", self.weight(np.asarray(MIDDLE, np.uint8)), self.op("Shape", scales))
        return self.op("QuantizeLinear", value, scales, middles, axis=-2), self.op("Unsqueeze", scales, self.ints(1))

    def swiglu(self, value: str, gate: tuple[Array, Array | None], up: tuple[Array, Array | None]) -> str:
        """silu(gate(value)) * up(value), both projections in one product; each is (weight, bias)."""
        bias = None if gate[1] is None or up[1] is None else np.concatenate([gate[1], up[1]])
        both = self.linear(value, np.concatenate([gate[0], up[0]]), bias, name="gate_up")
        first, second = self.ops("Split", both, count=2, axis=-1, num_outputs=2)
        return self.op("Mul", self.op("Mul", first, self.op("Sigmoid", first)), second)

    def save(self) -> None:
        """Write the graph; weights that fit into it move there."""
        if self._bytes <= EMBEDDED_BYTES:
            self._embed()
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._weights)
        imports = [helper.make_opsetid("", self._opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in self._nodes} - {""})]
        model = helper.make_model(graph, opset_imports=imports, producer_name="gog_edge", ir_version=11)
        onnx.save_model(model, self._path)

    def _embed(self) -> None:
        for tensor in self._weights:
            if tensor.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(self._data.parent))
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
        self._data.unlink(missing_ok=True)


def _half(weight: Array, name: str) -> Array:
    if np.abs(weight).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"a weight of '{name}' is too large for float16; export in another precision")
    return weight.astype(np.float16)
