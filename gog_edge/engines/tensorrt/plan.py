"""Kernels that TensorRT for RTX compiles where they run, kept beside the engine for the next start."""

from __future__ import annotations

import hashlib
import importlib
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.engines.cuda import Cuda, DeviceBuffer, DeviceProperties
from gog_edge.engines.manifest import CACHE, TENSORRT, TENSORRT_RTX, BuiltEngines, BuiltGraph
from gog_edge.engines.tensorrt.shapes import Profile, Shape
from gog_edge.errors import ArtifactError, BackendError, OutOfDeviceMemory
from gog_edge.files import write_atomic

_log = logging.getLogger(__name__)


class Kernels:
    """TensorRT for RTX compiles kernels where they run: how, and where they are kept for the next start.

    TensorRT proper has its kernels in the plan: there is nothing of this.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        """`path`: the file they are kept in; one of another GPU, driver or release is not used, and written anew."""
        self._path, self._kept = path, hashlib.sha256().digest()  # of nothing
        first = engine.create_runtime_config()
        self._cache = first.create_runtime_cache()
        self._read()
        # Kernels for one shape are worth their compiling where it comes for ever, in a decode step. Pictures and
        # appended texts have ever other shapes: compiling for each would go on without end, in threads that call our
        # logger while Python may be waiting for them.
        specialised = trt.DynamicShapesKernelSpecializationStrategy
        self._any_shape = self._config(trt, first, specialised.NONE)
        self._one_shape = self._config(trt, engine.create_runtime_config(), specialised.EAGER)

    def _config(self, trt: Any, config: Any, specialisation: Any) -> Any:
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = specialisation
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture copies along with it
        return config

    def config(self, *, one_shape: bool) -> Any:
        """How to open a context; `one_shape`: with kernels made for the one that it will run."""
        return self._one_shape if one_shape else self._any_shape

    def _read(self) -> None:
        try:
            kept = self._path.read_bytes() if self._path.is_file() else b""
        except OSError as exc:
            _log.warning("compiled kernels in '%s' cannot be read (%s): they are compiled again", self._path, exc)
            return
        if kept and self._cache.deserialize(kept):
            self._kept = hashlib.sha256(kept).digest()

    def keep(self) -> None:
        """Write what was compiled since; a folder that cannot be written is logged: every start compiles again.

        All kernels are serialised to see whether there are others: call it where some may have been compiled.
        """
        compiled = bytes(self._cache.serialize())
        digest = hashlib.sha256(compiled).digest()
        if digest == self._kept:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomic(self._path, compiled)
            self._kept = digest
        except OSError as exc:
            _log.warning("compiled kernels cannot be kept in '%s' (%s): every start compiles them", self._path, exc)


MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx_bindings"}
INSTALL = {
    TENSORRT: "it comes with JetPack, or with NVIDIA's package 'tensorrt'",
    TENSORRT_RTX: "pip install 'gog_edge[tensorrt-rtx]'",
}
NO_INT4 = 75  # a compute capability whose engines hold no numbers of four bits

# By the names of TensorRT's DataType; what engines of ours take and give.
DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_), "UINT8": np.dtype(np.uint8),
}  # fmt: skip
LAST_LINES = 6  # of TensorRT's messages, that an error repeats
SPOILT = ("Serialization", "magicTag", "readHeader")  # in messages about a file that is no plan, or not whole


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of an engine."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape  # -1 where it is not fixed


def trt_module(engine: str) -> Any:
    """The Python module of a TensorRT flavour. BackendError where it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(MODULES[engine])
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendError(f"'{engine}' is not to be had here ({exc}): {INSTALL[engine]}") from exc


def known_sms(trt: Any) -> dict[int, Any]:
    """The compute capabilities that this TensorRT builds for, 86 for 8.6."""
    members = getattr(trt, "ComputeCapability", None)
    named = members.__members__ if members else {}
    return {int(name[2:]): value for name, value in named.items() if name.startswith("SM")}


def check_version(trt: Any, built: BuiltEngines) -> None:
    """BackendError when engines are of another release than the one here: TensorRT loads none but its own."""
    if built.version != trt.__version__:
        raise BackendError(
            f"the engines were built by {built.engine} {built.version}, here is {trt.__version__}; build them again: "
            f"{built.rebuild()}"
        )


def check_device(device: DeviceProperties, built: BuiltEngines) -> None:
    """BackendError when engines are for other GPUs than this one."""
    if device.sm not in built.sms:
        raise BackendError(
            f"the engines are for GPUs of SM {', '.join(map(str, built.sms))}, '{device.name}' is of SM {device.sm}; "
            f"build them again: {built.rebuild(sms=[device.sm])}"
        )


class Messages:
    """What TensorRT says of errors while it works: the last lines."""

    def __init__(self, trt: Any) -> None:
        lines: deque[str] = deque(maxlen=LAST_LINES)
        grave = {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in grave:
                    lines.append(msg.strip())

        self.lines, self.logger = lines, Logger()

    def take(self) -> str:
        """All lines since the last time, in one."""
        said = "; ".join(self.lines) or "no reason was given"
        self.lines.clear()
        return said


@cache
def messages_of(trt: Any) -> Messages:
    """The process's own: TensorRT keeps the first logger that it gets, and calls it as long as anything is open."""
    return Messages(trt)


def deserialise(runtime: Any, messages: Messages, path: Path) -> Any:
    """The engine of a plan file, its weights copied to the device.

    Raises:
        ArtifactError: the file is missing, empty, truncated, or no plan of this release.
        OutOfDeviceMemory: the weights do not fit.
        BackendError: anything else that TensorRT says.
    """
    messages.lines.clear()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)  # it keeps nothing of the mapping
    except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"engines: '{path}' cannot be read ({exc}); build or copy it again") from exc
    if engine is not None:
        return engine
    said = messages.take()
    if any(word in said for word in SPOILT):
        raise ArtifactError(f"engines: '{path}' is truncated or no plan of this release ({said}); build it again")
    raise failure(f"the engine '{path}' cannot be loaded", said)


def failure(what: str, said: str) -> BackendError:
    """The error for something that TensorRT would not do, with its own words."""
    if "out of memory" in said.lower() or "OutOfMemory" in said:
        return OutOfDeviceMemory(f"{what}: the GPU's memory is taken ({said}); end what else uses it")
    return BackendError(f"{what}: {said}; `gog-edge doctor` says what this box has")


class Plan:
    """A loaded engine. Its contexts share the memory that they compute in: one may run at a time."""

    def __init__(self, trt: Any, cuda: Cuda, folder: Path, built: BuiltEngines, graph: BuiltGraph) -> None:
        """Load and check; see `deserialise` for what it raises, and ArtifactError when plan and manifest disagree."""
        self.trt, self.cuda, self.path = trt, cuda, folder / graph.file
        self.messages = messages_of(trt)
        with self.explained("there is no runtime for it"):
            self._runtime = trt.Runtime(self.messages.logger)
        self.engine = deserialise(self._runtime, self.messages, self.path)
        self.inputs = {tensor.name: tensor for tensor in self._tensors(trt.TensorIOMode.INPUT)}
        self.outputs = {tensor.name: tensor for tensor in self._tensors(trt.TensorIOMode.OUTPUT)}
        self.profiles = tuple(self._profile(number) for number in range(self.engine.num_optimization_profiles))
        check_profiles(self.profiles, graph, built)
        kept = folder / CACHE / f"{graph.name}.kernels"
        self._kernels = Kernels(trt, self.engine, kept) if built.engine == TENSORRT_RTX else None
        self._workspace = DeviceBuffer(cuda, self.engine.device_memory_size_v2)

    def _tensors(self, mode: Any) -> Iterator[Tensor]:
        engine = self.engine
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) != mode:
                continue
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES or engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE:
                raise ArtifactError(
                    f"engines: '{self.path}' has '{name}' as {kind} in {engine.get_tensor_location(name).name} memory, "
                    f"which is not run here (device memory, {', '.join(DTYPES)}); build it again with this version"
                )
            yield Tensor(name, DTYPES[kind], tuple(engine.get_tensor_shape(name)))

    def _profile(self, number: int) -> Profile:
        profile = {}
        for name, tensor in self.inputs.items():
            if -1 in tensor.shape:
                least, usual, most = map(tuple, self.engine.get_tensor_profile_shape(name, number))
                profile[name] = (least, usual, most)
        return profile

    def context(self, *, one_shape: bool) -> Any:
        """A new execution context; `one_shape`: its kernels are to be made for the one that it will always run."""
        if self._kernels is None:
            context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self.engine.create_execution_context(self._kernels.config(one_shape=one_shape))
        if context is None:
            raise self.failure("it gives no execution context")
        context.set_device_memory(self._workspace.address, self._workspace.nbytes)
        return context

    def keep_kernels(self) -> None:
        """Let the next start have the kernels that were compiled for this one."""
        if self._kernels is not None:
            self._kernels.keep()

    def failure(self, what: str) -> BackendError:
        """The error for something that TensorRT would not do with this engine."""
        said = self.messages.take()
        try:
            self.cuda.memory()  # a lost device fails in this, too, and says what it is
        except BackendError as exc:
            return exc
        return failure(f"the engine '{self.path}': {what}", said)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what TensorRT's bindings raise into our errors."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as exc:
            raise self.failure(f"{what} ({exc})") from exc


def check_profiles(profiles: tuple[Profile, ...], graph: BuiltGraph, built: BuiltEngines) -> None:
    """ArtifactError when an engine was built for other shapes than the manifest says: they do not belong together."""
    said = graph.profiles
    if said and (len(said) != len(profiles) or any(map(_other, said, profiles))):
        raise ArtifactError(
            f"engines: '{graph.file}' takes other shapes than the manifest says; build them again: {built.rebuild()}"
        )


def _other(said: Mapping[str, tuple[Shape, ...]], profile: Profile) -> bool:
    return any(name in profile and profile[name] != shapes for name, shapes in said.items())
