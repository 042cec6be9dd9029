"""One GPU through NVIDIA's Python bindings of the CUDA runtime: return codes become errors, resources are freed.

The bindings are imported when a device is opened, and torch is not used. For the functions called here see NVIDIA's
"CUDA Runtime API"; their Python names and return values are those of the package `cuda-bindings`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gog_edge.engines.base import Array
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

BINDINGS = "cuda.bindings.runtime"
INSTALL = "pip install 'cuda-bindings>=13,<14'"

# Values of cudaError_t. They are numbers because older releases of the bindings do not name all of them.
MEMORY_ALLOCATION = 2
CUDART_UNLOADING = 4  # the process is exiting
NO_DRIVER = (34, 35)  # cudaErrorStubLibrary, cudaErrorInsufficientDriver
NO_DEVICE = 100
INVALID_DEVICE = 101
# After one of these, every later CUDA call of the process fails in the same way.
LOST_DEVICE_CODES = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """Model and compute capability of a GPU."""

    name: str
    sm: int  # compute capability, 86 for 8.6
    memory: int  # bytes in total
    integrated: bool  # it shares the host's memory, as on a Jetson


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a GPU, in bytes."""

    free: int
    total: int


class Cuda:
    """One device of the CUDA runtime."""

    def __init__(self, runtime: Any, index: int = 0) -> None:
        """Use the device `index` through `runtime`, the bindings' module. Raises BackendError without that device."""
        self.runtime, self.index = runtime, index
        self.use()

    @classmethod
    def open(cls, index: int = 0) -> Cuda:
        """Open a device of this machine. Raises BackendError if the bindings, the driver or the device is missing."""
        try:
            runtime = importlib.import_module(BINDINGS)
        except ImportError as exc:
            raise BackendError(f"the CUDA bindings are not installed ({exc}); install them: {INSTALL}") from exc
        return cls(runtime, index)

    def use(self) -> None:
        """Make this the current device of the calling thread. A new thread starts with device 0."""
        self.call("cudaSetDevice", self.index)

    def call(self, name: str, *values: Any) -> Any:
        """Call a function of the runtime and return its result: None, one value, or a tuple of values.

        Raises:
            OutOfDeviceMemory: the device is out of memory.
            DeviceLost: every further call of this process would fail.
            BackendError: any other error.
        """
        code, *results = getattr(self.runtime, name)(*values)
        if int(code):
            raise self._error(name, code)
        return results[0] if len(results) == 1 else tuple(results) or None

    def properties(self) -> DeviceProperties:
        """Return the device's properties."""
        found = self.call("cudaGetDeviceProperties", self.index)
        name = found.name.decode(errors="replace").rstrip("\0")
        return DeviceProperties(name, 10 * found.major + found.minor, found.totalGlobalMem, bool(found.integrated))

    def memory(self) -> DeviceMemory:
        """Return the free and the total memory."""
        return DeviceMemory(*map(int, self.call("cudaMemGetInfo")))

    def release(self, name: str, handle: Any) -> None:
        """Free or destroy a resource, from any thread. Errors are logged: finalizers have nobody to raise them to."""
        self.runtime.cudaSetDevice(self.index)
        (code,) = getattr(self.runtime, name)(handle)
        if int(code) and int(code) != CUDART_UNLOADING and int(code) not in LOST_DEVICE_CODES:
            _log.warning("%s failed: %s", name, self._describe(code))

    def _error(self, name: str, code: Any) -> BackendError:
        number = int(code)
        if number == MEMORY_ALLOCATION:
            return OutOfDeviceMemory(
                f"the GPU is out of memory ({self._free_memory()}); close other programs that use it, build engines "
                "with a shorter --context, or use a smaller policy"
            )
        if number in LOST_DEVICE_CODES:
            return DeviceLost(
                f"this process can no longer use GPU {self.index}: {self._describe(code)} in {name}; restart it, and "
                "search the kernel log for NVIDIA's 'Xid' messages"
            )
        if number in NO_DRIVER:
            return BackendError(f"{self._driver_problem()}; install NVIDIA's driver, or use --engine ort")
        if number in (NO_DEVICE, INVALID_DEVICE):
            return BackendError(f"GPU {self.index} does not exist; run `gog-edge doctor` to list this machine's GPUs")
        return BackendError(f"{name} failed: {self._describe(code)}; run `gog-edge doctor` to check this machine")

    def _describe(self, code: Any) -> str:
        texts = (self.runtime.cudaGetErrorName(code)[1], self.runtime.cudaGetErrorString(code)[1])
        return ", ".join(text.decode() for text in texts)

    def _free_memory(self) -> str:
        code, *sizes = self.runtime.cudaMemGetInfo()
        return "free memory unknown" if int(code) else "{:,} of {:,} bytes are free".format(*sizes)

    def _driver_problem(self) -> str:
        required, supported = (
            _release(getattr(self.runtime, f"cuda{part}GetVersion")()[1]) for part in ("Runtime", "Driver")
        )
        if not supported:
            return "no CUDA driver is installed"
        return f"the installed driver supports CUDA {supported}, but {required} is required"


def _release(number: int) -> str:
    """Format a version number of CUDA: 12040 is "12.4", 0 is ""."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def device_properties(device: int = 0) -> DeviceProperties:
    """Return the properties of a GPU. Raises BackendError if the bindings, the driver or the device is missing."""
    return Cuda.open(device).properties()


def device_memory(device: int = 0) -> DeviceMemory:
    """Return the memory of a GPU. Raises BackendError if the bindings, the driver or the device is missing."""
    return Cuda.open(device).memory()


class DeviceBuffer:
    """Device memory that is freed with this object."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        """Allocate `nbytes` bytes. Raises OutOfDeviceMemory."""
        self.nbytes = nbytes
        self.address = int(cuda.call("cudaMalloc", max(1, nbytes)))
        self._free = weakref.finalize(self, cuda.release, "cudaFree", self.address)

    def at(self, offset: int, nbytes: int) -> int:
        """Return the address of a range of `nbytes` bytes. Raises BackendError if it exceeds the buffer."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise BackendError(f"bytes {offset} to {offset + nbytes} are outside of a buffer of {self.nbytes} bytes")
        return self.address + offset

    def close(self) -> None:
        """Free the memory now; further calls do nothing."""
        self._free()


def pinned_array(cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return an array in page-locked host memory, which asynchronous copies require. Freed with its last view."""
    kind = np.dtype(dtype)
    count = math.prod(shape)
    address = int(cuda.call("cudaHostAlloc", max(1, count * kind.itemsize), 0))
    memory = (ctypes.c_ubyte * max(1, count * kind.itemsize)).from_address(address)
    weakref.finalize(memory, cuda.release, "cudaFreeHost", address)  # NumPy's views hold a reference to it
    return np.frombuffer(memoryview(memory), kind, count).reshape(shape)


class CudaGraph:
    """An executable CUDA graph: work of a stream that is launched as a whole, with the same addresses and shapes."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        """Instantiate a captured `cudaGraph_t`, which this destroys."""
        try:
            self.handle = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.release("cudaGraphDestroy", graph)
        weakref.finalize(self, cuda.release, "cudaGraphExecDestroy", self.handle)


_gc_lock = Lock()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's cyclic collector from running: a finalizer that frees device memory would break a capture.

    One block at a time: the collector is global, and the end of another block would enable it again.
    """
    with _gc_lock:
        before = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if before:
                gc.enable()


class Stream:
    """A CUDA stream. Memory on both sides of a copy must stay valid until the work is done."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # Non-blocking: a blocking stream would synchronize with the default stream.
        self.handle = int(cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking))
        weakref.finalize(self, cuda.release, "cudaStreamDestroy", self.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy of `nbytes` bytes between two addresses, on the device or in page-locked host memory."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._cuda.call("cudaMemcpyAsync", target, source, nbytes, kind, self.handle)

    def copy_2d(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes. A pitch is the distance between row starts, in bytes."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._cuda.call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.handle)

    def zero(self, target: int, nbytes: int) -> None:
        """Enqueue setting `nbytes` bytes of device memory to zero."""
        self._cuda.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def synchronize(self) -> None:
        """Wait until all work is done. Errors of earlier work are raised here, too."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` enqueues on this stream instead of executing it."""
        with no_garbage_collection():
            graph = self._captured(work)
        return CudaGraph(self._cuda, graph)

    def _captured(self, work: Callable[[], None]) -> Any:
        # Thread-local: other threads may allocate memory meanwhile.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            _, graph = self._cuda.runtime.cudaStreamEndCapture(self.handle)
            if graph is not None and int(graph):
                self._cuda.release("cudaGraphDestroy", graph)
            raise
        return self._cuda.call("cudaStreamEndCapture", self.handle)

    def launch(self, graph: CudaGraph) -> None:
        """Enqueue a captured graph."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self.handle)
