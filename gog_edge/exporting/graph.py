"""A small writer of ONNX graphs. Values are names; calling an operator returns the name of its output."""

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
from gog_edge.exporting.quantization import quantize
from gog_edge.policy.manifest import WeightQuantization

OPSET = 24
MICROSOFT = "com.microsoft"
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
INT32, INT64, BOOL, UINT16 = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT16
# Weights up to this total are embedded in the .onnx file. Larger ones go to an external data file, which can be
# memory-mapped and may exceed the 2 GiB limit of protocol buffers.
EMBEDDED_BYTES = 2**26
INT8_ACCURACY_LEVEL = 4  # of MatMulNBits: activations are quantized to int8 too, which is twice as fast
UINT8_ZERO_POINT = 128
ALIGNMENT = 4096  # bytes: external tensors start on a page so that they can be mapped; smaller ones stay in the graph

Shape = Sequence[int | str]
WeightFormat: TypeAlias = Literal["fp32", "fp16"] | WeightQuantization
Progress: TypeAlias = Callable[[range, str], Iterable[int]]  # (layers, name of the part) -> the same layers


def silent(layers: range, _: str) -> Iterable[int]:
    """Iterate over `layers` without showing progress."""
    return layers


class GraphBuilder:
    """A builder that collects nodes, weights, inputs and outputs, and writes one .onnx file.

    Weights are appended to `<path>.data` as they are added, so that a model is never held in memory as a whole. An
    existing `<path>.data` is deleted.
    """

    def __init__(
        self, name: str, path: Path, weight_format: WeightFormat = "fp32", *, opset: int = OPSET
    ) -> None:
        """Create an empty graph.

        Args:
            name: name of the graph.
            path: the .onnx file to write.
            weight_format: how `linear` stores its weights. All operators compute in float32.
            opset: version of the ONNX operator set.
        """
        self.weight_format: WeightFormat = weight_format
        self._opset = opset
        self._name, self._path, self._data = name, path, path.with_name(f"{path.name}.data")
        self._data.unlink(missing_ok=True)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._bytes = 0

    def _unique(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declare a graph input; strings in `shape` are dynamic dimensions. Return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Shape) -> None:
        """Declare `value` as the graph output `name`."""
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name]))
        self.declare_output(name, dtype, shape)

    def declare_output(self, name: str, dtype: int, shape: Shape) -> None:
        """Declare an output that a node already writes under this name."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def weight(self, array: Array, name: str = "constant") -> str:
        """Add an initializer and return its name, which is unique and begins with `name`."""
        unique = self._unique(name)
        array = np.asarray(array, order="C")
        small = array.nbytes < ALIGNMENT
        self._weights.append(numpy_helper.from_array(array, unique) if small else self._external(array, unique))
        self._bytes += array.nbytes
        return unique

    def fp16_weight(self, array: Array, name: str) -> str:
        """Add an initializer in fp16. Raises CheckpointError if a value exceeds its range."""
        return self.weight(_to_fp16(array, name), name)

    def int4_weight(self, packed: Array, shape: Sequence[int], name: str) -> str:
        """Add an initializer of int4 values, packed two per byte with the first in the low four bits."""
        unique = self._unique(name)
        tensor = self._external(packed, unique)
        tensor.data_type, tensor.dims[:] = TensorProto.INT4, shape
        self._weights.append(tensor)
        self._bytes += packed.nbytes
        return unique

    def prune(self) -> None:
        """Remove the nodes and weights that no output depends on."""
        required = {output.name for output in self._outputs}
        needed = []
        for node in reversed(self._nodes):
            if required.intersection(node.output):
                needed.append(node)
                required.update(node.input)
        self._nodes = needed[::-1]
        self._weights = [tensor for tensor in self._weights if tensor.name in required]

    def _external(self, array: Array, name: str) -> onnx.TensorProto:
        with self._data.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            array.tofile(file)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=dtype, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._data.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def ints(self, *values: int) -> str:
        """Add a small int64 vector as a constant."""
        return self.weight(np.asarray(values, np.int64))

    def scalar(self, value: int) -> str:
        """Add an int64 scalar as a constant."""
        return self.weight(np.asarray(value, np.int64))

    def ops(self, op_type: str, *inputs: str, count: int = 1, names: Sequence[str] = (), domain: str = "",
            **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names.

        Args:
            op_type: ONNX operator.
            inputs: names of values; '' omits an optional input.
            count: number of outputs with generated names.
            names: names of further outputs, which follow the generated ones.
            domain: operator domain; '' is the ONNX standard.
            attributes: attributes of the node.
        """
        outputs = [self._unique(op_type) for _ in range(count)] + list(names)
        self._nodes.append(helper.make_node(op_type, list(inputs), outputs, domain=domain, **attributes))
        return outputs

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.ops(op_type, *inputs, domain=domain, **attributes)[0]

    def linear(
        self, value: str, weight: Array, bias: Array | None = None, *, name: str = "weight",
        weight_format: WeightFormat | None = None,
    ) -> str:
        """Compute value @ weight.T + bias.

        Args:
            value: [..., in].
            weight: [out, in], as PyTorch stores it.
            bias: [out].
            name: stem of the weight's name.
            weight_format: overrides the graph's own format.
        """
        weight_format = weight_format or self.weight_format
        if isinstance(weight_format, WeightQuantization):
            write = self._linear_by_block if weight_format.size else self._linear_by_row
            return write(value, weight, bias, name, weight_format)
        if weight_format == "fp16":  # half the file size; ONNX Runtime folds the cast once, at load
            stored = self.op("Cast", self.weight(_to_fp16(weight.T, name), name), to=FLOAT)
        else:
            stored = self.weight(weight.T, name)
        result = self.op("MatMul", value, stored)
        return result if bias is None else self.op("Add", result, self.weight(bias, f"{name}_bias"))

    def _linear_by_block(
        self, value: str, weight: Array, bias: Array | None, name: str, scheme: WeightQuantization
    ) -> str:
        packed, scales = quantize(weight, scheme)
        inputs = [value, self.weight(packed, name), self.weight(scales, f"{name}_scales")]
        if bias is not None:
            inputs += ["", "", self.weight(bias, f"{name}_bias")]
        return self.op(
            "MatMulNBits", *inputs, domain=MICROSOFT, K=weight.shape[1], N=weight.shape[0], bits=scheme.bits,
            block_size=scheme.size, accuracy_level=INT8_ACCURACY_LEVEL,
        )

    def _linear_by_row(
        self, value: str, weight: Array, bias: Array | None, name: str, scheme: WeightQuantization
    ) -> str:
        """Quantize both factors with one scale per row; the integer matmul between them is exact."""
        packed, scales = quantize(weight, scheme)
        signed = (packed[:, 0].astype(np.int16) - 2 ** (scheme.bits - 1)).astype(np.int8)
        quantized, row_scales = self._quantize_rows(value)
        result = self.op(
            "MatMulIntegerToFloat", quantized, self.weight(signed.T, name), self.weight(np.ones((), np.float32)),
            self.weight(scales[:, 0], f"{name}_scales"), self.weight(np.asarray(UINT8_ZERO_POINT, np.uint8)),
            domain=MICROSOFT,
        )
        scaled = self.op("Mul", result, row_scales)
        return scaled if bias is None else self.op("Add", scaled, self.weight(bias, f"{name}_bias"))

    def _quantize_rows(self, value: str) -> tuple[str, str]:
        """Quantize [..., T, K] to uint8 with a zero point of 128; return it and the scale of each row [T, 1]."""
        last = self.ints(-1)
        extremes = [self.op(reduce, value, last, keepdims=0) for reduce in ("ReduceMax", "ReduceMin")]
        max_abs = self.op("Max", extremes[0], self.op("Neg", extremes[1]), self.weight(np.asarray(1e-20, np.float32)))
        flat = self.op("Reshape", max_abs, last)
        scales = self.op("Div", flat, self.weight(np.asarray(UINT8_ZERO_POINT - 1, np.float32)))
        zero_points = self.op("Expand", self.weight(np.asarray(UINT8_ZERO_POINT, np.uint8)), self.op("Shape", scales))
        quantized = self.op("QuantizeLinear", value, scales, zero_points, axis=-2)
        return quantized, self.op("Unsqueeze", scales, self.ints(1))

    def swiglu(self, value: str, gate: tuple[Array, Array | None], up: tuple[Array, Array | None]) -> str:
        """Compute silu(gate(value)) * up(value) with one matmul; `gate` and `up` are (weight, bias)."""
        bias = None if gate[1] is None or up[1] is None else np.concatenate([gate[1], up[1]])
        both = self.linear(value, np.concatenate([gate[0], up[0]]), bias, name="gate_up")
        first, second = self.ops("Split", both, count=2, axis=-1, num_outputs=2)
        return self.op("Mul", self.op("Mul", first, self.op("Sigmoid", first)), second)

    def save(self) -> None:
        """Write the .onnx file; small weights are moved from the data file into it."""
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


def _to_fp16(weight: Array, name: str) -> Array:
    max_abs, limit = float(np.abs(weight).max(initial=0)), float(np.finfo(np.float16).max)
    if max_abs > limit:
        raise CheckpointError(
            f"a weight of '{name}' is {max_abs:.4g}, more than fp16 can represent ({limit:,.0f}); export in another "
            "precision"
        )
    return weight.astype(np.float16)
