"""TensorRT engines on this machine: import TensorRT, check that an engine fits it, deserialize the plan file.

Engines are opened through `open_plan`. Errors of TensorRT become this package's, with TensorRT's own messages.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import mmap
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gog_edge.engines.cuda import Cuda, DeviceBuffer, DeviceProperties
from gog_edge.engines.manifest import CACHE_FOLDER, TENSORRT, TENSORRT_RTX, BuiltGraph, EngineManifest
from gog_edge.errors import ArtifactError, BackendError, OutOfDeviceMemory
from gog_edge.files import write_atomic

Shape: TypeAlias = tuple[int, ...]
Bounds: TypeAlias = tuple[Shape, Shape, Shape]  # min, opt and max shape of one input
Profile: TypeAlias = Mapping[str, Bounds]  # an optimization profile: every input with a dynamic shape

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx_bindings"}
INSTALL = {
    TENSORRT: "pip install 'gog_edge[tensorrt]' on Linux x86-64; on a Jetson it is part of JetPack",
    TENSORRT_RTX: "pip install 'gog_edge[tensorrt-rtx]'",
}
NO_INT4_SM = 75  # compute capability for which TensorRT for RTX builds no engines with int4 weights

# Data types of inputs and outputs, by the names of TensorRT's DataType.
DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_), "UINT8": np.dtype(np.uint8),
}  # fmt: skip
MAX_LOG_LINES = 6  # of TensorRT's errors, repeated in ours
CORRUPT_PLAN = ("Serialization", "magicTag", "readHeader")  # words in TensorRT's errors about a damaged plan file
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of an engine."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape  # -1 for dynamic dimensions


def import_tensorrt(engine: str) -> Any:
    """Return the Python module of TENSORRT or TENSORRT_RTX. Raises BackendError if it cannot be imported."""
    try:
        return importlib.import_module(MODULES[engine])
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendError(f"'{engine}' cannot be imported ({exc}); {INSTALL[engine]}") from exc


def supported_sms(trt: Any) -> dict[int, Any]:
    """Return the compute capabilities that this TensorRT can build for: 86 for 8.6 -> its enumeration member."""
    members = getattr(trt, "ComputeCapability", None)
    named = members.__members__ if members else {}
    return {int(name[2:]): value for name, value in named.items() if name.startswith("SM")}


def check_version(version: str, built: EngineManifest) -> None:
    """Raise BackendError if the engines were not built with TensorRT `version`, which only loads engines of its own."""
    if built.version != version:
        raise BackendError(
            f"the engines were built with {built.engine} {built.version}, but {version} is installed; build "
            f"them again: {built.rebuild_command()}"
        )


def check_device(device: DeviceProperties, built: EngineManifest) -> None:
    """Raise BackendError if the engines were not built for this GPU's compute capability."""
    if device.sm not in built.sms:
        raise BackendError(
            f"the engines were built for SM {', '.join(map(str, built.sms))}, but '{device.name}' has SM {device.sm}; "
            f"build them again: {built.rebuild_command(sms=[device.sm])}"
        )


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the profile that accepts all shapes and whose `opt` shapes are nearest, in ratio.

    Raises BackendError if no profile accepts them.
    """
    fitting = [index for index, profile in enumerate(profiles) if _accepts(profile, shapes)]
    if not fitting:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if any(name in one for one in profiles))
        limits = "; ".join(", ".join(f"{name} {bounds[2]}" for name, bounds in one.items()) for one in profiles)
        raise BackendError(f"no profile of the engine accepts {given}; their maximum shapes are {limits}")
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _accepts(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shapes[name]) == len(least) and all(map(_within, least, shapes[name], most))
        for name, (least, _, most) in profile.items()
    )


def _within(least: int, size: int, most: int) -> bool:
    return least <= size <= most


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    return sum(
        abs(math.log(max(1, size) / max(1, opt)))
        for name, (_, sizes, _) in profile.items()
        for size, opt in zip(shapes[name], sizes, strict=True)
    )


class ErrorLog:
    """A logger for TensorRT that keeps the last error messages."""

    def __init__(self, trt: Any) -> None:
        lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
        errors = {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in errors:
                    lines.append(msg.strip())

        self.lines, self.logger = lines, Logger()

    def drain(self) -> str:
        """Return and remove the messages since the last call, joined."""
        text = "; ".join(self.lines) or "TensorRT gave no reason"
        self.lines.clear()
        return text


@cache
def error_log(trt: Any) -> ErrorLog:
    """Return the process-wide log: TensorRT keeps the first logger it is given as long as any object of it exists."""
    return ErrorLog(trt)


def deserialize_engine(runtime: Any, errors: ErrorLog, path: Path) -> Any:
    """Load a plan file and copy its weights to the device.

    Raises:
        ArtifactError: the file is missing, empty, truncated, or not a plan of this release.
        OutOfDeviceMemory: the weights do not fit.
        BackendError: TensorRT reports another error.
    """
    errors.lines.clear()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)  # does not use the mapping afterwards
    except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"engines: '{path}' cannot be read ({exc}); build or copy it again") from exc
    if engine is not None:
        return engine
    text = errors.drain()
    if any(word in text for word in CORRUPT_PLAN):
        raise ArtifactError(
            f"engines: '{path}' is truncated or was not written by this release ({text}); build it again"
        )
    raise tensorrt_error(f"the engine '{path}' cannot be loaded", text)


def tensorrt_error(problem: str, text: str) -> BackendError:
    """Return the error for something that TensorRT refused to do; `text` holds its own messages."""
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return OutOfDeviceMemory(f"{problem}: the GPU is out of memory ({text}); close other programs that use it")
    return BackendError(f"{problem}: {text}; run `gog-edge doctor` to check this machine")


class KernelCache:
    """Kernels that TensorRT for RTX compiles at run time, stored next to the engine for the next start.

    TensorRT itself needs none of this: its plan files contain the kernels.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        """Read `path`. A file of another GPU, driver or release is ignored and overwritten."""
        self._path, self._stored = path, hashlib.sha256().digest()
        first = engine.create_runtime_config()
        self._cache = first.create_runtime_cache()
        self._read()
        # Kernels specialized for one shape pay off for a decode step, whose shape never changes. Pictures and appended
        # texts come in ever new shapes: specializing for each would compile forever, in threads that call our logger
        # while Python may be waiting for them.
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        self._any_shape = self._config(trt, first, strategies.NONE)
        self._one_shape = self._config(trt, engine.create_runtime_config(), strategies.EAGER)

    def _config(self, trt: Any, config: Any, specialization: Any) -> Any:
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = specialization
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # `Run.capture` captures the copies, too
        return config

    def config(self, *, one_shape: bool) -> Any:
        """Return the configuration of a context; `one_shape`: its kernels are specialized for its first shapes."""
        return self._one_shape if one_shape else self._any_shape

    def _read(self) -> None:
        try:
            stored = self._path.read_bytes() if self._path.is_file() else b""
        except OSError as exc:
            _log.warning("compiled kernels in '%s' cannot be read (%s): they are compiled again", self._path, exc)
            return
        if stored and self._cache.deserialize(stored):
            self._stored = hashlib.sha256(stored).digest()

    def save(self) -> None:
        """Write the cache if kernels were compiled since. If the file cannot be written, log a warning.

        Detecting new kernels takes serializing all of them, so call this only after runs that may have compiled some.
        """
        compiled = bytes(self._cache.serialize())
        digest = hashlib.sha256(compiled).digest()
        if digest == self._stored:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomic(self._path, compiled)
            self._stored = digest
        except OSError as exc:
            _log.warning("compiled kernels cannot be stored in '%s' (%s): every start compiles them", self._path, exc)


class Plan:
    """A loaded engine. Its execution contexts share one workspace, so only one may run at a time."""

    def __init__(self, trt: Any, cuda: Cuda, folder: Path, built: EngineManifest, graph: BuiltGraph) -> None:
        """Load and check the engine of `graph` in `folder`.

        Raises ArtifactError if the engine does not match the manifest; see `deserialize_engine` for other errors.
        """
        self.trt, self.cuda, self.path = trt, cuda, folder / graph.file
        self.errors = error_log(trt)
        with self.translate_errors("no runtime can be created for it"):
            self._runtime = trt.Runtime(self.errors.logger)
        self.engine = deserialize_engine(self._runtime, self.errors, self.path)
        self.inputs = {tensor.name: tensor for tensor in self._tensors(trt.TensorIOMode.INPUT)}
        self.outputs = {tensor.name: tensor for tensor in self._tensors(trt.TensorIOMode.OUTPUT)}
        self.profiles = tuple(self._profile(index) for index in range(self.engine.num_optimization_profiles))
        _check_profiles(self.profiles, graph, built)
        kernels = folder / CACHE_FOLDER / f"{graph.name}.kernels"
        self._kernels = KernelCache(trt, self.engine, kernels) if built.engine == TENSORRT_RTX else None
        self._workspace = DeviceBuffer(cuda, self.engine.device_memory_size_v2)

    def _tensors(self, mode: Any) -> Iterator[Tensor]:
        engine = self.engine
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) != mode:
                continue
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES or engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE:
                raise ArtifactError(
                    f"engines: '{self.path}' has '{name}' as {kind} in {engine.get_tensor_location(name).name} memory; "
                    f"supported are {', '.join(DTYPES)} in device memory; build it again with this version"
                )
            yield Tensor(name, DTYPES[kind], tuple(engine.get_tensor_shape(name)))

    def _profile(self, index: int) -> Profile:
        profile = {}
        for name, tensor in self.inputs.items():
            if -1 in tensor.shape:
                least, opt, most = map(tuple, self.engine.get_tensor_profile_shape(name, index))
                profile[name] = (least, opt, most)
        return profile

    def context(self, *, one_shape: bool) -> Any:
        """Return a new execution context; `one_shape`: it will always run with the same shapes."""
        if self._kernels is None:
            context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self.engine.create_execution_context(self._kernels.config(one_shape=one_shape))
        if context is None:
            raise self.error("no execution context can be created")
        context.set_device_memory(self._workspace.address, self._workspace.nbytes)
        return context

    def save_kernels(self) -> None:
        """Store kernels compiled since the last call, for the next start."""
        if self._kernels is not None:
            self._kernels.save()

    def error(self, problem: str) -> BackendError:
        """Return the error for something that TensorRT refused to do with this engine."""
        text = self.errors.drain()
        try:
            self.cuda.memory()  # if the device is lost, this fails too, with a better message
        except BackendError as exc:
            return exc
        return tensorrt_error(f"the engine '{self.path}': {problem}", text)

    @contextmanager
    def translate_errors(self, problem: str) -> Iterator[None]:
        """Raise exceptions of TensorRT's bindings as BackendErrors."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as exc:
            raise self.error(f"{problem} ({exc})") from exc


def open_plan(folder: Path, built: EngineManifest, name: str, *, device: int = 0) -> Plan:
    """Load the engine `name` of a folder whose manifest is `built`.

    Raises:
        ArtifactError: the folder has no such engine, or its file is damaged or not the one in the manifest.
        BackendError: TensorRT, the driver or the GPU is missing, or the engine was built for another release or
            compute capability; OutOfDeviceMemory: the weights do not fit; DeviceLost.
    """
    graph = built.graph(name)
    trt = import_tensorrt(built.engine)
    check_version(trt.__version__, built)
    cuda = Cuda.open(device)
    check_device(cuda.properties(), built)
    return Plan(trt, cuda, folder, built, graph)


def _check_profiles(profiles: tuple[Profile, ...], graph: BuiltGraph, built: EngineManifest) -> None:
    """Raise ArtifactError if an engine's profiles are not those of the manifest: the files belong to two builds."""
    listed = graph.profiles
    if listed and (len(listed) != len(profiles) or any(map(_differs, listed, profiles))):
        raise ArtifactError(
            f"engines: the profiles of '{graph.file}' are not those in the manifest; build them again: "
            f"{built.rebuild_command()}"
        )


def _differs(listed: Mapping[str, tuple[Shape, ...]], profile: Profile) -> bool:
    return any(name in profile and profile[name] != shapes for name, shapes in listed.items())
