"""ONNX Runtime on a GPU: its CUDA provider's options and libraries, and what a device's failures mean.

Options and the words of failures are those of ONNX Runtime 1.31's CUDA provider:
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from gog_edge.engines.cuda import LOST, NO_MEMORY
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

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
