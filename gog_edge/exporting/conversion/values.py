"""The values of a graph under conversion: which new value replaces which old one, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from gog_edge.engines.base import Array
from gog_edge.exporting.graph import FLOAT, FLOAT16, GraphBuilder

FP16_MIN = np.float32(np.finfo(np.float16).min)  # lower values of an additive mask have the same effect as this one
FLOATING_POINT = (TensorProto.FLOAT, TensorProto.FLOAT16)


class ValueMap:
    """A map from names of the source graph to names of the converted graph, with the precision of each value.

    A precision is FLOAT, FLOAT16, or 0 for integers and booleans.
    """

    def __init__(self, graph: GraphBuilder, source: onnx.GraphProto, folder: Path) -> None:
        """Map the values of `source`, whose external data is in `folder`, to values of `graph`."""
        self.graph, self.source = graph, source
        self._folder = folder
        self._initializers = {tensor.name: tensor for tensor in source.initializer}
        self._names: dict[str, str] = {"": ""}  # source value -> converted value
        self._precisions: dict[str, int] = {}  # of converted values
        self._casts: dict[tuple[str, int], str] = {}  # (converted value or constant, precision) -> its cast

    def bind(self, old: str, new: str, precision: int = 0) -> None:
        """Replace the source value `old` by the converted value `new`."""
        self._names[old] = new
        self._precisions[new] = precision

    def is_constant(self, old: str) -> bool:
        """Return whether a source value is an initializer."""
        return old in self._initializers

    def constant(self, old: str) -> Array:
        """Return the array of an initializer of the source."""
        return numpy_helper.to_array(self._initializers[old], str(self._folder))

    def precision(self, old: str) -> int:
        """Return the precision of a source value."""
        if self.is_constant(old):
            return FLOAT if self._initializers[old].data_type in FLOATING_POINT else 0
        return self._precisions[self._names[old]]

    def value(self, old: str, precision: int | None = None) -> str:
        """Return the converted value for a source value, cast to `precision`.

        None keeps its own precision; integers and booleans are never cast.
        """
        own = 0 if old == "" else self.precision(old)
        precision = (own if precision is None else precision) if own else 0
        if self.is_constant(old):
            if (old, precision) not in self._casts:
                self._casts[old, precision] = self._write_constant(old, precision)
            return self._casts[old, precision]
        return self.cast(self._names[old], precision) if own else self._names[old]

    def fp16(self, old: str) -> str:
        """Return the converted value in fp16."""
        return self.value(old, FLOAT16)

    def fp32(self, old: str) -> str:
        """Return the converted value in fp32."""
        return self.value(old, FLOAT)

    def cast(self, new: str, precision: int) -> str:
        """Return a converted value in another precision; repeated casts share one node."""
        if self._precisions[new] == precision:
            return new
        if (new, precision) not in self._casts:
            self._casts[new, precision] = self.op("Cast", new, precision=precision, to=precision)
        return self._casts[new, precision]

    def op(self, op_type: str, *inputs: str, precision: int = FLOAT16, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output of the given precision and return the output's name."""
        value = self.graph.op(op_type, *inputs, domain=domain, **attributes)
        self._precisions[value] = precision
        return value

    def copy_node(self, node: NodeProto, inputs: list[str], precision: int) -> None:
        """Add a copy of a source node with other inputs; its outputs replace those of the source node."""
        outputs = self.graph.ops(
            node.op_type, *inputs, count=len(node.output), domain=node.domain, **node_attributes(node)
        )
        for old, new in zip(node.output, outputs, strict=True):
            if old:
                self.bind(old, new, precision)

    def fp16_weight(self, array: Array, name: str) -> str:
        """Add a weight in fp16. Raises CheckpointError if a value exceeds its range."""
        value = self.graph.fp16_weight(array, name)
        self._precisions[value] = FLOAT16
        return value

    def scalar(self, number: float, precision: int) -> str:
        """Return a floating-point scalar; equal ones share one constant."""
        name = f"{number!r}"
        if (name, precision) not in self._casts:
            array = np.asarray(number, np.float16 if precision == FLOAT16 else np.float32)
            self._casts[name, precision] = self.graph.weight(array, "number")
        return self._casts[name, precision]

    def _write_constant(self, old: str, precision: int) -> str:
        array, name = self.constant(old), old.rsplit("_", 1)[0]
        if precision == FLOAT16:
            return self.fp16_weight(np.maximum(array, FP16_MIN) if array.max(initial=0) <= 0 else array, name)
        value = self.graph.weight(array.astype(np.float32) if precision else array, name)
        self._precisions[value] = precision
        return value


def node_attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name, strings decoded."""
    values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
