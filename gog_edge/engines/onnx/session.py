"""ONNX Runtime sessions: provider options, opening a graph, running a stateless one, errors.

A session runs on exactly the execution providers that were requested, or opening it fails: there is no silent
fallback to the CPU.
"""

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
from gog_edge.engines.cuda import LOST_DEVICE_CODES, MEMORY_ALLOCATION
from gog_edge.engines.onnx import INSTALL_COMMAND, unsupported_reason
from gog_edge.errors import ArtifactError, BackendError, DeviceLost, OutOfDeviceMemory

CPU_PROVIDERS = ("CPUExecutionProvider",)
CUDA_PROVIDERS = ("CUDAExecutionProvider",)
_INSTALL = {CUDA_PROVIDERS[0]: " (pip uninstall onnxruntime, then pip install 'gog_edge[gpu]': both packages install "
            "into the same folder)"}  # fmt: skip

# Options that differ from the defaults. CUDA graphs stay off: while ONNX Runtime captures one, no thread of the process
# may allocate or copy device memory (cudaStreamCaptureModeGlobal), but crops are embedded while the policy decodes. It
# would also keep one graph per thread that steps a cache, and each is valid for the addresses of one cache only.
_PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    CUDA_PROVIDERS[0]: {
        # Grow by the requested size, not to the next power of two: caches, towers and an index share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
        # The default benchmarks all convolution algorithms for each new picture size.
        "cudnn_conv_algo_search": "HEURISTIC",
    },
}

# A decoder has no convolutions, so it does not need cuDNN.
_DECODER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    CUDA_PROVIDERS[0]: {**_PROVIDER_OPTIONS[CUDA_PROVIDERS[0]], "enable_cudnn": "0"}
}

# ONNX Runtime's exceptions neither derive from RuntimeError nor share a base class.
RUN_ERRORS = (RuntimeError, state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph,
              state.NotImplemented, state.RuntimeException)  # fmt: skip
LOAD_ERRORS = (*RUN_ERRORS, InvalidProtobuf, NoSuchFile)
_EXPORT_AGAIN = "export the model again, or copy it again"
START_ERRORS = (RuntimeError, ValueError)  # of a provider that cannot start: no driver, no GPU

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32), "tensor(int64)": np.dtype(np.int64),
}  # fmt: skip

# Shape computations, which may stay on the CPU although a GPU was requested. ONNX Runtime places these operators there
# if they work on shapes; for other tensors the provider has kernels for all of them. ArgMax finds the end of a text.
SHAPE_OPS = frozenset({
    "Add", "ArgMax", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Less", "LessOrEqual",
    "Mul", "Range", "ReduceMax", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
    "Where",
})  # fmt: skip

_FAILURE = re.compile(r"(CUDA|CUBLAS|CUDNN) failure (\d+):? ?([^;]*)")
_OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "Available memory of", "CUBLAS_STATUS_ALLOC_FAILED")
_PROVIDER_UNAVAILABLE = (
    "'{1}' was requested on {0} but would run on the CPU: the provider's libraries or the driver cannot be loaded, or "
    "the provider lacks an operator (ONNX Runtime's log names it); run `gog-edge doctor`"
)


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.is_file() else str(cpu))
    return max(1, len(siblings))


def session_options(threads: int | None = None, *, spinning: bool = True) -> ort.SessionOptions:
    """Return the options common to all sessions. `threads`: None for one per physical core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin while a graph runs, since its operators are short, and sleep between runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    # A fused DequantizeLinear + MatMul must not round the activations: accuracy level 1 is float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(
    path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU_PROVIDERS, optimized: bool = False,
    spinning: bool = True, decoder: bool = False, operators: Path | None = None,
) -> ort.InferenceSession:
    """Load a graph on exactly the requested execution providers.

    Args:
        path: the graph.
        threads: of the CPU provider; None for one per physical core.
        providers: in order of preference.
        optimized: the graph was optimized before it was saved, so skip graph optimization.
        spinning: let idle threads spin within a run; otherwise they sleep.
        decoder: every operator must run on the provider; otherwise SHAPE_OPS may run on the CPU.
        operators: a custom operator library that the graph needs.

    Raises:
        BackendError: a provider is unavailable or would not run the graph, or the graph or the library cannot be
            loaded; OutOfDeviceMemory, DeviceLost.
    """
    _preload_cuda_libraries(providers)
    _check_available(providers)
    options = session_options(threads, spinning=spinning)
    if operators is not None:
        _register_operators(options, operators)
    on_device = tuple(providers) != CPU_PROVIDERS
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(decoder and on_device)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(on_device)))
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider_options = _DECODER_OPTIONS if decoder else _PROVIDER_OPTIONS
    requested = [(name, dict(provider_options.get(name, {}))) for name in providers]
    try:
        with device_errors(f"'{path}' cannot be loaded"):
            session = ort.InferenceSession(str(path), options, providers=requested, enable_fallback=False)
    except (*START_ERRORS, *LOAD_ERRORS) as exc:
        raise _load_error(exc, path, providers, optimized) from exc
    if session.get_providers()[: len(providers)] != list(providers):
        raise BackendError(_PROVIDER_UNAVAILABLE.format(", ".join(providers), path))
    if CPU_PROVIDERS[0] not in providers:
        _check_assignment(session, path, providers)
    return session


class _Outputs(dict[str, Array]):
    """The outputs of a run by name."""

    def __missing__(self, name: str) -> Array:
        raise ArtifactError(f"a graph must have the output '{name}', got {', '.join(self)}; {_EXPORT_AGAIN}")


class OrtGraph:
    """A graph without state that ONNX Runtime runs."""

    def __init__(
        self, path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU_PROVIDERS,
        optimized: bool = False, spinning: bool = True, operators: Path | None = None,
    ) -> None:
        """Open the graph; see `open_session` for the arguments and the errors raised."""
        self._session = open_session(
            path, threads=threads, providers=providers, optimized=optimized, spinning=spinning, operators=operators
        )
        self._path = path
        self._on_device = tuple(providers) != CPU_PROVIDERS
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; see `GraphEngine`.

        Raises:
            ArtifactError: it has other inputs, outputs or shapes than its manifest promises.
            BackendError: a device fails.
        """
        if feeds.keys() != self._inputs:
            raise ArtifactError(f"'{self._path}' must have the inputs {', '.join(sorted(feeds))}, got "
                                f"{', '.join(sorted(self._inputs))}; {_EXPORT_AGAIN}")
        with device_errors(f"'{self._path}' cannot be run", on_device=self._on_device, on_cpu=ArtifactError):
            return _Outputs(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def _preload_cuda_libraries(providers: Sequence[str]) -> None:
    """Load CUDA's libraries from the folders pip installs them to, which the dynamic loader does not search."""
    if CUDA_PROVIDERS[0] in providers and CUDA_PROVIDERS[0] in ort.get_available_providers():
        with contextlib.redirect_stdout(sys.stderr):  # it prints the libraries it cannot find
            ort.preload_dlls()


def _register_operators(options: ort.SessionOptions, operators: Path) -> None:
    try:
        options.register_custom_ops_library(str(operators))
    except RUN_ERRORS as exc:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load '{operators}': {exc}; remove it and install gog_edge again"
        ) from exc


def _check_available(providers: Sequence[str]) -> None:
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise BackendError(
            f"this build of ONNX Runtime {ort.__version__} does not include {', '.join(missing)} (it includes "
            f"{', '.join(ort.get_available_providers())}); install one that does{_INSTALL.get(missing[0], '')} or use "
            "another provider"
        )


def _check_assignment(session: ort.InferenceSession, path: Path, providers: Sequence[str]) -> None:
    """Raise BackendError if operators other than SHAPE_OPS were assigned to the CPU."""
    parts = session.get_provider_graph_assignment_info()
    on_cpu = {node.op_type for part in parts if part.ep_name not in providers for node in part.get_nodes()} - SHAPE_OPS
    if on_cpu:
        raise BackendError(
            f"'{path}' was requested on {', '.join(providers)} but {', '.join(sorted(on_cpu))} would run on the CPU; "
            "export the model again with this version, and report the problem if it persists"
        )


def _load_error(exc: Exception, path: Path, providers: Sequence[str], optimized: bool) -> BackendError:
    if isinstance(exc, START_ERRORS) or _FAILURE.search(str(exc)):
        return BackendError(f"{', '.join(providers)} cannot start: {_failure_text(exc)}; run `gog-edge doctor`")
    if "fallback to CPU EP has been explicitly disabled" in str(exc):
        return BackendError(_PROVIDER_UNAVAILABLE.format(", ".join(providers), path))
    if (reason := unsupported_reason(ort.__version__)) and "opset" in str(exc):
        return BackendError(f"'{path}' cannot be loaded: {reason}; {INSTALL_COMMAND}")
    remedy = f"remove the folder '{path.parent}', which is then created again" if optimized else "export it again"
    return BackendError(f"ONNX Runtime {ort.__version__} cannot load '{path}': {exc}; {remedy}")


class device_errors:
    """Context manager that raises device failures of ONNX Runtime as this package's errors.

    `action` begins the message: what could not be done. With `on_device`, every other error of ONNX Runtime is raised
    as a BackendError, too. Without, it is raised as `on_cpu`, since there the graph is at fault; unchanged if that is
    None.
    """

    __slots__ = ("_action", "_on_device", "_on_cpu")

    def __init__(
        self, action: str, *, on_device: bool = False, on_cpu: type[ArtifactError] | None = None
    ) -> None:
        self._action, self._on_device, self._on_cpu = action, on_device, on_cpu

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(exc, RUN_ERRORS):
            error = device_error(exc, self._action)
            if error is not None:
                raise error from exc
            if self._on_device:
                raise BackendError(f"{self._action}: {_failure_text(exc)}; run `gog-edge doctor`") from exc
            if self._on_cpu is not None:
                raise self._on_cpu(f"{self._action} ({' '.join(str(exc).split())}); {_EXPORT_AGAIN}") from exc


def device_error(exc: Exception, action: str) -> OutOfDeviceMemory | DeviceLost | None:
    """Return the device failure that an exception of ONNX Runtime stands for; None if it is another error."""
    text = str(exc)
    failure = _FAILURE.search(text)
    number = int(failure[2]) if failure and failure[1] == "CUDA" else 0
    reason = failure[0].strip() if failure else text.rpartition(" : ")[2].strip()
    if number == MEMORY_ALLOCATION or any(words in text for words in _OUT_OF_MEMORY):
        return OutOfDeviceMemory(
            f"{action}: the device is out of memory ({reason}); serve with a smaller context or export in int4"
        )
    if number in LOST_DEVICE_CODES:
        return DeviceLost(
            f"{action}: this process can no longer use the GPU ({reason}); restart it, and check the driver's log if "
            "this happens again"
        )
    return None


def _failure_text(exc: Exception) -> str:
    """Return the part of a message that names the failure of CUDA, cuBLAS or cuDNN; otherwise the whole message."""
    failure = _FAILURE.search(str(exc))
    return failure[0].strip() if failure else str(exc)
