"""Running an engine: its contexts, the places of what goes in and out, and runs that are captured as CUDA graphs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import CapturedGraph, Cuda, DeviceBuffer, Stream, pinned
from gog_edge.engines.tensorrt.plan import Plan
from gog_edge.engines.tensorrt.shapes import Shape, grown
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

_log = logging.getLogger(__name__)


class Execution:
    """One context with one profile, for one thread at a time."""

    def __init__(self, plan: Plan, stream: Stream, profile: int, *, one_shape: bool = False) -> None:
        self._plan = plan
        self._context = plan.context(one_shape=one_shape)
        if not self._context.set_optimization_profile_async(profile, stream.handle):
            raise plan.failure(f"it does not take profile {profile}")
        stream.synchronize()

    def reshape(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Say the inputs' shapes -> those of the outputs."""
        with self._plan.explained("shapes are refused"):
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise self._plan.failure(f"it takes no '{name}' of {shape}")
            outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._plan.outputs}
        unknown = [name for name, shape in outputs.items() if min(shape, default=0) < 0]
        if unknown:
            raise self._plan.failure(f"it does not say what shape {', '.join(unknown)} will have")
        return outputs

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Say where on the device inputs and outputs lie."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._plan.failure(f"it does not take address {address:#x} for '{name}'")

    def enqueue(self, stream: Stream) -> None:
        """Give a stream the engine's work."""
        with self._plan.explained("it does not run"):
            if not self._context.execute_async_v3(stream.handle):
                raise self._plan.failure("it does not run")

    def capturable(self, stream: Stream) -> bool:
        """Whether that work may be captured."""
        asked = getattr(self._context, "is_stream_capturable", None)  # RTX alone can say no
        return True if asked is None else bool(asked(stream.handle))


@dataclass(frozen=True, slots=True)
class Staged:
    """A tensor's place on the device and, where it is copied, in page-locked memory of the host."""

    address: int
    nbytes: int
    host: Array | None = None


class Staging:
    """Places for tensors by their names; they grow and are used again."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, Array] = {}
        self.moves = 0  # how often a place became another: what knew its address is of no use then

    def place(self, name: str, shape: Shape, dtype: np.dtype[Any], *, host: bool = True) -> Staged:
        """A place for a tensor, with one on the host if wanted. Nothing may be under way for that name."""
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._device.get(name)
        if held is None or held.nbytes < nbytes:
            size = grown(held.nbytes if held else 0, nbytes)
            self.moves += 1
            if held is not None:  # freed before more is taken
                held.close()
                del self._device[name], held
            if host:
                self._host[name] = pinned(self._cuda, (size,), np.uint8)
            held = self._device[name] = DeviceBuffer(self._cuda, size)
        array = self._host[name][:nbytes].view(dtype).reshape(shape) if host else None
        return Staged(held.address, nbytes, array)


class Run:
    """Inputs go to the device, the engine runs, outputs come back."""

    def __init__(
        self, stream: Stream, execution: Execution, inputs: Mapping[str, Staged], outputs: Mapping[str, Staged]
    ) -> None:
        self._stream, self._execution = stream, execution
        self.inputs, self.outputs = inputs, outputs
        self._captured: CapturedGraph | None = None

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Set what the inputs will be. The last `go` must be over."""
        for name, array in arrays.items():
            host = self.inputs[name].host
            if host is not None:
                np.copyto(host, array)

    def go(self) -> None:
        """Give the stream all there is to do."""
        if self._captured is not None:
            self._stream.launch(self._captured)
        else:
            self._work()

    def output(self, name: str) -> Array:
        """What came back, once the stream is done; overwritten by the next `go`."""
        host = self.outputs[name].host
        if host is None:
            raise BackendError(f"output '{name}' stays on the device")
        return host

    def _work(self) -> None:
        for staged in self.inputs.values():
            if staged.host is not None:
                self._stream.copy(staged.address, staged.host.ctypes.data, staged.nbytes)
        self._execution.enqueue(self._stream)
        for staged in self.outputs.values():
            if staged.host is not None:
                self._stream.copy(staged.host.ctypes.data, staged.address, staged.nbytes)

    def capture(self, plan: Plan) -> bool:
        """Make the next `go` one launch; False where TensorRT says that this engine's runs cannot be captured.

        A capture that fails otherwise leaves this run as it is, and says nothing of others. The run must have been done
        with these shapes: TensorRT prepares itself in the first one, which no graph may hold. Its context must be for
        this run alone: a captured graph is of no use once its context was changed.
        """
        if not self._execution.capturable(self._stream):
            _log.warning("'%s' runs without CUDA graphs: TensorRT says that it cannot be captured", plan.path)
            return False
        try:
            self._captured = self._stream.capture(self._work)
        except (DeviceLost, OutOfDeviceMemory):
            raise
        except BackendError as exc:
            _log.warning("a run of '%s' goes on without a CUDA graph: %s", plan.path, exc)
        return True
