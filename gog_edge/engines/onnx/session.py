"""Which releases of ONNX Runtime load a policy's graphs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf, NoSuchFile

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import LOST, NO_MEMORY
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

OLDEST = (1, 24)  # the first that takes graphs of opset 24
NEWER = "pip install 'gog_edge[cpu]'"  # how to get one


def too_old(version: str) -> str:
    """Why this release loads no policy; "" where it does."""
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return ""
    return f"ONNX Runtime {version} is too old for graphs of opset 24, as policies have: 1.24 began to take them"


CUDA = ("CUDAExecutionProvider",)
INSTALL = {CUDA[0]: " (pip uninstall onnxruntime, then pip install 'gog_edge[gpu]': both lie in one folder)"}

# What is set otherwise than by default. CUDA graphs stay off: while ONNX Runtime captures one, no thread of the process
# may take memory or copy (cudaStreamCaptureModeGlobal), and crops are embedded while the policy speaks. It would also
# keep one for every thread that steps a cache, and each is good for one cache's addresses alone.
PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    CUDA[0]: {
        # Memory grows by what is asked for, not to the next power of two: caches, towers and an index share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
        # By default all ways to convolve are tried for each size of picture that comes the first time.
        "cudnn_conv_algo_search": "HEURISTIC",
    },
}

# A decoder convolves nothing: it does without cuDNN.
DECODER_OPTIONS: Mapping[str, Mapping[str, str]] = {CUDA[0]: {**PROVIDER_OPTIONS[CUDA[0]], "enable_cudnn": "0"}}

# None of ONNX Runtime's own errors is a RuntimeError, nor have they a class in common.
RUN_ERRORS = (RuntimeError, state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph,
              state.NotImplemented, state.RuntimeException)  # fmt: skip
_FAILURE = re.compile(r"(CUDA|CUBLAS|CUDNN) failure (\d+):? ?([^;]*)")
_FULL = ("out of memory", "Failed to allocate memory", "Available memory of", "CUBLAS_STATUS_ALLOC_FAILED")


class device_errors:
    """Within it, ONNX Runtime's failures of a device are raised as ours; `doing` says what could not be done.

    `on_device`: what runs is on a device, so that every other error of ONNX Runtime is a BackendError, too.
    """

    __slots__ = ("_doing", "_on_device")

    def __init__(self, doing: str, *, on_device: bool = False) -> None:
        self._doing, self._on_device = doing, on_device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(exc, RUN_ERRORS):
            meant = device_error(exc, self._doing)
            if meant is not None:
                raise meant from exc
            if self._on_device:
                raise BackendError(f"{self._doing}: {failure_of(exc)}; `gog-edge doctor` says what works here") from exc


def device_error(exc: Exception, doing: str) -> OutOfDeviceMemory | DeviceLost | None:
    """What an error of ONNX Runtime says of the device; None when it says something else."""
    text = str(exc)
    failure = _FAILURE.search(text)
    number = int(failure[2]) if failure and failure[1] == "CUDA" else 0
    reason = failure[0].strip() if failure else text.rpartition(" : ")[2].strip()
    if number == NO_MEMORY or any(words in text for words in _FULL):
        return OutOfDeviceMemory(
            f"{doing}: the device has not the memory ({reason}); serve a smaller context or export in int4"
        )
    if number in LOST:
        return DeviceLost(f"{doing}: the GPU is lost ({reason}); start again, and see the driver's log if it recurs")
    return None


def failure_of(exc: Exception) -> str:
    """The few words of an error that name the failure."""
    failure = _FAILURE.search(str(exc))
    return failure[0].strip() if failure else str(exc)


def of_device(exc: Exception) -> bool:
    """Whether an error names a failure of CUDA or its libraries."""
    return _FAILURE.search(str(exc)) is not None


def load_libraries(providers: Sequence[str]) -> None:
    """Load CUDA's libraries where pip put them: the loader does not look there."""
    if CUDA[0] in providers and CUDA[0] in ort.get_available_providers():
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()


LOAD_ERRORS = (*RUN_ERRORS, InvalidProtobuf, NoSuchFile)
START_ERRORS = (RuntimeError, ValueError)  # of a provider that cannot begin: no driver, no GPU
CPU = ("CPUExecutionProvider",)
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32), "tensor(int64)": np.dtype(np.int64),
}  # fmt: skip

# What may be left to the processor by those who asked for a GPU: it reckons with shapes there. ONNX Runtime puts these
# operators there when they do; on other numbers the provider has kernels for them all. ArgMax finds where a text ends.
RECKONING = frozenset({
    "Add", "ArgMax", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Less", "LessOrEqual",
    "Mul", "Range", "ReduceMax", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
    "Where",
})  # fmt: skip
_NOT_OBTAINED = (
    "asked for {} for '{}', which would run on the processor: the provider's libraries or the driver cannot be loaded, "
    "or it lacks an operator (ONNX Runtime's log says which); see `gog-edge doctor`"
)


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.is_file() else str(cpu))
    return max(1, len(siblings))


def session_options(threads: int | None = None, *, spinning: bool = True) -> ort.SessionOptions:
    """How every graph runs here; `threads`: one for each physical core when None."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin while a graph runs (small operators follow each other closely) and sleep between runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    # Where it joins a product and the widening of its weights, what they are multiplied with is not to be rounded.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(
    path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
    spinning: bool = True, decoder: bool = False, operators: Path | None = None,
) -> ort.InferenceSession:
    """Load a graph on exactly the providers asked for; BackendError otherwise. `optimised` graphs are left as they are.

    Without `spinning`, threads sleep within a run, too, wherever they wait for others. `decoder`: every operator must
    run on the provider; else it may leave those of RECKONING to the processor. `operators`: a library of operators
    that the graph needs besides ONNX Runtime's.
    """
    load_libraries(providers)
    _check_available(providers)
    options = session_options(threads, spinning=spinning)
    if operators is not None:
        _register(options, operators)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(decoder and tuple(providers) != CPU)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(tuple(providers) != CPU)))
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    known = DECODER_OPTIONS if decoder else PROVIDER_OPTIONS
    asked = [(name, dict(known.get(name, {}))) for name in providers]
    try:
        with device_errors(f"'{path}' cannot be loaded"):
            session = ort.InferenceSession(str(path), options, providers=asked, enable_fallback=False)
    except (*START_ERRORS, *LOAD_ERRORS) as exc:
        raise _load_error(exc, path, providers, optimised) from exc
    if session.get_providers()[: len(providers)] != list(providers):
        raise BackendError(_NOT_OBTAINED.format(", ".join(providers), path))
    if CPU[0] not in providers:
        _check_assigned(session, path, providers)
    return session


def _register(options: ort.SessionOptions, operators: Path) -> None:
    try:
        options.register_custom_ops_library(str(operators))
    except RUN_ERRORS as exc:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load '{operators}': {exc}; remove it and install gog_edge again"
        ) from exc


def _check_assigned(session: ort.InferenceSession, path: Path, providers: Sequence[str]) -> None:
    parts = session.get_provider_graph_assignment_info()
    left = {node.op_type for part in parts if part.ep_name not in providers for node in part.get_nodes()}
    if left - RECKONING:
        raise BackendError(
            f"asked for {', '.join(providers)} for '{path}', which leaves {', '.join(sorted(left - RECKONING))} to the "
            "processor; export the model again with this version, and report this if it stays so"
        )


def _check_available(providers: Sequence[str]) -> None:
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} here has no {', '.join(missing)} (it has "
            f"{', '.join(ort.get_available_providers())}); install the build that has it"
            f"{INSTALL.get(missing[0], '')} or ask for another provider"
        )


def _load_error(exc: Exception, path: Path, providers: Sequence[str], optimised: bool) -> BackendError:
    if isinstance(exc, START_ERRORS) or of_device(exc):
        return BackendError(f"{', '.join(providers)} cannot begin here: {failure_of(exc)}; see `gog-edge doctor`")
    if "fallback to CPU EP has been explicitly disabled" in str(exc):
        return BackendError(_NOT_OBTAINED.format(", ".join(providers), path))
    if (trouble := too_old(ort.__version__)) and "opset" in str(exc):
        return BackendError(f"'{path}' cannot be loaded: {trouble}; {NEWER}")
    mend = f"remove the folder '{path.parent}', it is made anew" if optimised else "export it again"
    return BackendError(f"ONNX Runtime {ort.__version__} cannot load '{path}': {exc}; {mend}")


class SessionGraph:
    """A graph without state, in a session that is open already."""

    def __init__(self, session: ort.InferenceSession, *, on_device: bool) -> None:
        self._session, self._on_device = session, on_device
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input by name, every output by name. Raises BackendError where a device fails."""
        with device_errors("a graph cannot be run", on_device=self._on_device):
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


class OrtGraph(SessionGraph):
    """A graph without state. Raises BackendError as `open_session` does."""

    def __init__(
        self, path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
        spinning: bool = True, operators: Path | None = None,
    ) -> None:
        session = open_session(
            path, threads=threads, providers=providers, optimised=optimised, spinning=spinning, operators=operators
        )
        super().__init__(session, on_device=tuple(providers) != CPU)
