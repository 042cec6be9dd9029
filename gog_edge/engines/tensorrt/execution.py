"""Running a TensorRT engine: execution contexts, input and output buffers, and runs captured as CUDA graphs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import Cuda, CudaGraph, DeviceBuffer, Stream, pinned_array
from gog_edge.engines.tensorrt.plan import Plan, Shape
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

PAGE_BYTES = 4096
_log = logging.getLogger(__name__)


class Execution:
    """An execution context with one profile, for one thread at a time."""

    def __init__(self, plan: Plan, stream: Stream, profile: int, *, one_shape: bool = False) -> None:
        self._plan = plan
        self._context = plan.context(one_shape=one_shape)
        if not self._context.set_optimization_profile_async(profile, stream.handle):
            raise plan.error(f"profile {profile} cannot be selected")
        stream.synchronize()

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the shapes of the inputs by name and return those of all outputs.

        Raises:
            BackendError: the profile does not accept a shape, or the shape of an output depends on values.
        """
        with self._plan.translate_errors("input shapes cannot be set"):
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise self._plan.error(f"'{name}' cannot have shape {shape}")
            outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._plan.outputs}
        unknown = [name for name, shape in outputs.items() if min(shape, default=0) < 0]
        if unknown:
            raise self._plan.error(f"the shape of {', '.join(unknown)} depends on the values of the inputs")
        return outputs

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set the device addresses of inputs and outputs by name. Raises BackendError if TensorRT refuses one."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._plan.error(f"'{name}' cannot be bound to address {address:#x}")

    def enqueue(self, stream: Stream) -> None:
        """Enqueue the engine's work on a stream, after `set_shapes` and `bind`.

        Raises:
            BackendError: the work cannot be run; OutOfDeviceMemory, DeviceLost.
        """
        with self._plan.translate_errors("it cannot be run"):
            if not self._context.execute_async_v3(stream.handle):
                raise self._plan.error("it cannot be run")

    def capturable(self, stream: Stream) -> bool:
        """Return whether that work may be captured as a CUDA graph."""
        query = getattr(self._context, "is_stream_capturable", None)  # only TensorRT for RTX has it
        return True if query is None else bool(query(stream.handle))


@dataclass(frozen=True, slots=True)
class Buffer:
    """Device memory of one tensor and, if it is copied from or to the host, an array in page-locked host memory."""

    address: int
    nbytes: int
    host: Array | None = None


class BufferPool:
    """Reusable buffers by tensor name; a buffer that is too small is replaced by a larger one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, Array] = {}
        self.reallocations = 0  # a change invalidates addresses handed out before

    def get(self, name: str, shape: Shape, dtype: np.dtype[Any], *, host: bool = True) -> Buffer:
        """Return a buffer for a tensor, with a host array if `host`. No work that uses `name` may be pending."""
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._device.get(name)
        if held is None or held.nbytes < nbytes:
            size = grown_size(held.nbytes if held else 0, nbytes)
            self.reallocations += 1
            if held is not None:  # free the old buffer first
                held.close()
                del self._device[name], held
            if host:
                self._host[name] = pinned_array(self._cuda, (size,), np.uint8)
            held = self._device[name] = DeviceBuffer(self._cuda, size)
        array = self._host[name][:nbytes].view(dtype).reshape(shape) if host else None
        return Buffer(held.address, nbytes, array)


def grown_size(held: int, needed: int) -> int:
    """Return the size of a buffer of `held` bytes that must have `needed`: if too small, `needed` plus a quarter."""
    return held if needed <= held else -(-(needed + needed // 4) // PAGE_BYTES) * PAGE_BYTES


class Run:
    """One run of an engine with fixed shapes: copy inputs to the device, execute, copy outputs to the host."""

    def __init__(
        self, stream: Stream, execution: Execution, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        self._stream, self._execution = stream, execution
        self.inputs, self.outputs = inputs, outputs
        self._graph: CudaGraph | None = None

    def set_inputs(self, arrays: Mapping[str, Array]) -> None:
        """Copy the inputs of the next launch to page-locked memory. The last launch must be complete."""
        for name, array in arrays.items():
            host = self.inputs[name].host
            if host is not None:
                np.copyto(host, array)

    def launch(self) -> None:
        """Enqueue the run, or launch its CUDA graph if it was captured."""
        if self._graph is not None:
            self._stream.launch(self._graph)
        else:
            self._enqueue()

    def output(self, name: str) -> Array:
        """Return the host array of an output, in the output's shape and dtype, after the stream was synchronized.

        The next launch overwrites it.

        Raises:
            BackendError: the output is not copied to the host.
        """
        host = self.outputs[name].host
        if host is None:
            raise BackendError(f"output '{name}' is not copied to the host")
        return host

    def _enqueue(self) -> None:
        for buffer in self.inputs.values():
            if buffer.host is not None:
                self._stream.copy(buffer.address, buffer.host.ctypes.data, buffer.nbytes)
        self._execution.enqueue(self._stream)
        for buffer in self.outputs.values():
            if buffer.host is not None:
                self._stream.copy(buffer.host.ctypes.data, buffer.address, buffer.nbytes)

    def capture(self, plan: Plan) -> bool:
        """Capture this run as a CUDA graph; return False if TensorRT reports that this engine cannot be captured.

        If the capture fails otherwise, this run continues without a graph, and True is returned: other runs may
        succeed. The run must have been executed with these shapes before, because TensorRT allocates in the first
        execution, which a graph must not contain. Its context must be used by this run only: changing a context
        invalidates the graph.
        """
        if not self._execution.capturable(self._stream):
            _log.warning("'%s' runs without CUDA graphs: TensorRT reports that it cannot be captured", plan.path)
            return False
        try:
            self._graph = self._stream.capture(self._enqueue)
        except (DeviceLost, OutOfDeviceMemory):
            raise
        except BackendError as exc:
            _log.warning("a run of '%s' continues without a CUDA graph: %s", plan.path, exc)
        return True
