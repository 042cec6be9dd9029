"""A graph being rewritten: which new value stands for which old one, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from gog_edge.engines.base import Array
from gog_edge.exporting.graph import FLOAT, FLOAT16, GraphBuilder

NOTHING = np.float32(np.finfo(np.float16).min)  # what masks add to a score is as good as minus infinity from here on
FRACTIONS = (TensorProto.FLOAT, TensorProto.FLOAT16)


class Rewriter:
    """Names of the source on one side, the builder of the result on the other.

    The kind of a value is FLOAT, FLOAT16, or 0 for whole numbers and truths.
    """

    def __init__(self, graph: GraphBuilder, source: onnx.GraphProto, folder: Path) -> None:
        self.graph, self.source = graph, source
        self._folder = folder
        self._initializers = {tensor.name: tensor for tensor in source.initializer}
        self._names: dict[str, str] = {"": ""}  # value of the source -> value of the result
        self._kinds: dict[str, int] = {}  # of values of the result
        self._cast: dict[tuple[str, int], str] = {}  # (value or constant, kind) -> the same in that precision

    def bind(self, old: str, new: str, kind: int = 0) -> None:
        """`new` stands for `old` from now on."""
        self._names[old] = new
        self._kinds[new] = kind

    def knows(self, old: str) -> bool:
        """Whether something stands for it: a node that nobody asked for may not have been rewritten."""
        return old in self._names

    def is_constant(self, old: str) -> bool:
        """Whether it is a constant of the source."""
        return old in self._initializers

    def constant(self, old: str) -> Array:
        """The numbers of a constant of the source."""
        return numpy_helper.to_array(self._initializers[old], str(self._folder))

    def kind(self, old: str) -> int:
        """Of a value of the source."""
        if self.is_constant(old):
            return FLOAT if self._initializers[old].data_type in FRACTIONS else 0
        return self._kinds[self._names[old]]

    def value(self, old: str, kind: int | None = None) -> str:
        """What stands for a value of the source, in the precision `kind`; in its own where it is None or no fraction.
        """
        own = 0 if old == "" else self.kind(old)
        kind = (own if kind is None else kind) if own else 0
        if self.is_constant(old):
            if (old, kind) not in self._cast:
                self._cast[old, kind] = self._written(old, kind)
            return self._cast[old, kind]
        return self.cast(self._names[old], kind) if own else self._names[old]

    def half(self, old: str) -> str:
        """What stands for it, in half precision."""
        return self.value(old, FLOAT16)

    def wide(self, old: str) -> str:
        """What stands for it, in single precision."""
        return self.value(old, FLOAT)

    def cast(self, new: str, kind: int) -> str:
        """A value of the result in another precision, cast once."""
        if self._kinds[new] == kind:
            return new
        if (new, kind) not in self._cast:
            self._cast[new, kind] = self.op("Cast", new, kind=kind, to=kind)
        return self._cast[new, kind]

    def op(self, operator: str, *inputs: str, kind: int = FLOAT16, domain: str = "", **has: Any) -> str:
        """A new node of the result, whose one output is of `kind`."""
        value = self.graph.op(operator, *inputs, domain=domain, **has)
        self._kinds[value] = kind
        return value

    def ops(self, node: NodeProto, inputs: list[str], kinds: list[int]) -> None:
        """A node like one of the source, with other inputs; its outputs stand for the old ones."""
        outputs = self.graph.ops(node.op_type, *inputs, count=len(node.output), domain=node.domain, **attributes(node))
        for old, new, kind in zip(node.output, outputs, kinds, strict=True):
            if old:
                self.bind(old, new, kind)

    def written(self, array: Array, name: str) -> str:
        """New weights in half precision. CheckpointError where it does not hold them."""
        value = self.graph.half(array, name)
        self._kinds[value] = FLOAT16
        return value

    def scalar(self, number: float, kind: int) -> str:
        """A constant without dimensions, written once for each precision."""
        name = f"{number!r}"
        if (name, kind) not in self._cast:
            array = np.asarray(number, np.float16 if kind == FLOAT16 else np.float32)
            self._cast[name, kind] = self.graph.weight(array, "number")
        return self._cast[name, kind]

    def _written(self, old: str, kind: int) -> str:
        array, name = self.constant(old), old.rsplit("_", 1)[0]
        if kind == FLOAT16:
            return self.written(np.maximum(array, NOTHING) if array.max(initial=0) <= 0 else array, name)
        value = self.graph.weight(array.astype(np.float32) if kind else array, name)
        self._kinds[value] = kind
        return value


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {each.name: _text(helper.get_attribute_value(each)) for each in node.attribute}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
