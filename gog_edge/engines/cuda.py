"""One GPU through NVIDIA's own bindings of the CUDA runtime: every return code is checked, what is taken is given back.

Nothing here imports the bindings before a device is opened, and nothing imports torch. What CUDA's functions do is
said in NVIDIA's "CUDA Runtime API"; their Python names and answers are those of the package `cuda-bindings`.
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
INSTALL = "pip install 'gog_edge[tensorrt-rtx]' (on a Jetson: the cuda-bindings of JetPack's CUDA release)"

# Numbers of cudaError_t; releases of the bindings name not all of them.
NO_MEMORY = 2
UNLOADING = 4  # the process ends
NO_DRIVER = (34, 35)  # only a stub of it, or none, or one older than the runtime
NO_DEVICE = 100
INVALID_DEVICE = 101
# After these CUDA answers every later call of the process in the same way.
LOST = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """What a GPU is."""

    name: str
    sm: int  # compute capability, 86 for 8.6
    memory: int  # bytes in all
    integrated: bool  # it shares the host's memory, as on a Jetson


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU's memory."""

    free: int
    total: int


class Cuda:
    """The CUDA runtime on one device. May be used from several threads: each says `use` before other calls."""

    def __init__(self, runtime: Any, index: int = 0) -> None:
        """`runtime`: the module of the bindings. BackendError without a driver or that device."""
        self.runtime, self.index = runtime, index
        self.use()

    @classmethod
    def open(cls, index: int = 0) -> Cuda:
        """Open a device of this box. BackendError where bindings, driver or device are missing."""
        try:
            runtime = importlib.import_module(BINDINGS)
        except ImportError as exc:
            raise BackendError(f"there are no bindings for CUDA here ({exc}); install them: {INSTALL}") from exc
        return cls(runtime, index)

    def use(self) -> None:
        """Make this the device of the calling thread, as a new thread's is always the first one."""
        self.call("cudaSetDevice", self.index)

    def call(self, name: str, *values: Any) -> Any:
        """Call a function of the runtime: its one answer, or the tuple of them, or None.

        Raises:
            OutOfDeviceMemory: the device's memory is taken.
            DeviceLost: no call of this process will succeed any more.
            BackendError: anything else went wrong.
        """
        code, *answers = getattr(self.runtime, name)(*values)
        if int(code):
            raise self._error(name, code)
        return answers[0] if len(answers) == 1 else tuple(answers) or None

    def properties(self) -> DeviceProperties:
        """What this device is."""
        found = self.call("cudaGetDeviceProperties", self.index)
        name = found.name.decode(errors="replace").rstrip("\0")
        return DeviceProperties(name, 10 * found.major + found.minor, found.totalGlobalMem, bool(found.integrated))

    def memory(self) -> DeviceMemory:
        """Bytes free now and in all."""
        return DeviceMemory(*map(int, self.call("cudaMemGetInfo")))

    def give_back(self, name: str, handle: Any) -> None:
        """Free or destroy something, of whatever thread: never raises, for nobody could do anything about it."""
        self.runtime.cudaSetDevice(self.index)
        (code,) = getattr(self.runtime, name)(handle)
        if int(code) and int(code) != UNLOADING and int(code) not in LOST:
            _log.warning("CUDA's %s failed: %s", name, self._said(code))

    def _error(self, name: str, code: Any) -> BackendError:
        number = int(code)
        if number == NO_MEMORY:
            return OutOfDeviceMemory(
                f"the GPU's memory is taken ({self._free()}); end what else uses it, build engines with a shorter "
                "--context, or take a smaller policy"
            )
        if number in LOST:
            return DeviceLost(
                f"GPU {self.index} is lost to this process: {self._said(code)} at {name}; start it again, and look for "
                "NVIDIA's 'Xid' lines in the kernel's log"
            )
        if number in NO_DRIVER:
            return BackendError(f"{self._driver()}; install NVIDIA's driver, or ask for --engine ort")
        if number in (NO_DEVICE, INVALID_DEVICE):
            return BackendError(f"this process sees no GPU {self.index}; `gog-edge doctor` says which this box has")
        return BackendError(f"CUDA's {name} failed: {self._said(code)}; `gog-edge doctor` says what this box has")

    def _said(self, code: Any) -> str:
        texts = (self.runtime.cudaGetErrorName(code)[1], self.runtime.cudaGetErrorString(code)[1])
        return ", ".join(text.decode() for text in texts)

    def _free(self) -> str:
        code, *bytes_ = self.runtime.cudaMemGetInfo()
        return "nothing is known of it" if int(code) else "{:,} of {:,} bytes are free".format(*bytes_)

    def _driver(self) -> str:
        needed, has = (_release(getattr(self.runtime, f"cuda{part}GetVersion")()[1]) for part in ("Runtime", "Driver"))
        return f"the driver here is for CUDA {has}, needed is {needed}" if has else "there is no CUDA driver here"


def _release(number: int) -> str:
    """As CUDA counts: 12040 is 12.4, 0 is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def device_properties(device: int = 0) -> DeviceProperties:
    """What a GPU of this box is. BackendError where bindings, driver or device are missing."""
    return Cuda.open(device).properties()


def device_memory(device: int = 0) -> DeviceMemory:
    """Bytes of a GPU's memory. BackendError where bindings, driver or device are missing."""
    return Cuda.open(device).memory()


class DeviceBuffer:
    """Memory of a device, freed with this object."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        """OutOfDeviceMemory when there is not so much."""
        self.nbytes = nbytes
        self.address = int(cuda.call("cudaMalloc", max(1, nbytes)))
        self._free = weakref.finalize(self, cuda.give_back, "cudaFree", self.address)

    def at(self, offset: int, nbytes: int) -> int:
        """The address of a part. BackendError when it does not lie within."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise BackendError(f"bytes {offset} to {offset + nbytes} are not within a buffer of {self.nbytes}")
        return self.address + offset

    def close(self) -> None:
        """Free it now; a second time does nothing."""
        self._free()


def pinned(cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """An array in page-locked memory of the host, which copies need that do not wait; freed with its last view."""
    kind = np.dtype(dtype)
    count = math.prod(shape)
    address = int(cuda.call("cudaHostAlloc", max(1, count * kind.itemsize), 0))
    held = (ctypes.c_ubyte * max(1, count * kind.itemsize)).from_address(address)
    weakref.finalize(held, cuda.give_back, "cudaFreeHost", address)  # NumPy's views hold it
    return np.frombuffer(memoryview(held), kind, count).reshape(shape)


class CapturedGraph:
    """What a stream was given to do, ready to be done again as a whole: the same addresses and shapes."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        try:
            self.handle = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.give_back("cudaGraphDestroy", graph)
        weakref.finalize(self, cuda.give_back, "cudaGraphExecDestroy", self.handle)


_uncollected = Lock()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python collects no cycles meanwhile: what they hold is freed by calls that no capture of the thread survives.

    One block at a time: the collector is the process's, and another's end would switch it on again.
    """
    with _uncollected:
        before = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if before:
                gc.enable()


class Stream:
    """Work of a device in its order. Memory on both sides must stay until it is done."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # Apart from the default stream, for which all others would wait.
        self.handle = int(cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking))
        weakref.finalize(self, cuda.give_back, "cudaStreamDestroy", self.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy bytes from one address to another, on the host (page-locked) or on the device."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._cuda.call("cudaMemcpyAsync", target, source, nbytes, kind, self.handle)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` runs of `width` bytes that begin `pitch` bytes from one another."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._cuda.call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.handle)

    def clear(self, target: int, nbytes: int) -> None:
        """Set bytes of the device to zero."""
        self._cuda.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def synchronize(self) -> None:
        """Wait until all is done. Errors of earlier work come out here, too."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Note down what `work` gives this stream to do, instead of doing it."""
        with no_garbage_collection():
            graph = self._captured(work)
        return CapturedGraph(self._cuda, graph)

    def _captured(self, work: Callable[[], None]) -> Any:
        # Of this thread alone: others may take memory meanwhile.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            _, graph = self._cuda.runtime.cudaStreamEndCapture(self.handle)
            if graph is not None and int(graph):
                self._cuda.give_back("cudaGraphDestroy", graph)
            raise
        return self._cuda.call("cudaStreamEndCapture", self.handle)

    def launch(self, graph: CapturedGraph) -> None:
        """Do what was captured."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self.handle)
