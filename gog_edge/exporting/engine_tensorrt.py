"""What differs between TensorRT on the device and TensorRT for RTX, and the objects that they call back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

from gog_edge.engines.built import TENSORRT, TENSORRT_RTX
from gog_edge.errors import BackendError

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx_bindings"}
INSTALL = {TENSORRT: "JetPack brings it: install there", TENSORRT_RTX: "pip install -e '.[tensorrt-rtx]'"}
LONG_PHASE = "Computing profile costs"  # of a build, as TensorRT calls it: kernels are made; others take no time

OnStep: TypeAlias = Callable[[int, int], None]  # done, of


def load_tensorrt(engine: str) -> Any:
    """The module of a TensorRT. BackendError, with what to install, where it is not here."""
    try:
        return importlib.import_module(MODULES[engine])
    except (ImportError, OSError) as exc:
        raise BackendError(
            f"engine '{engine}' needs the module '{MODULES[engine]}', which is not to be had ({exc}); {INSTALL[engine]}"
        ) from exc


def known_sms(trt: Any) -> dict[int, Any]:
    """The compute capabilities that this TensorRT builds for, 86 for 8.6."""
    members = getattr(trt, "ComputeCapability", None)
    named = members.__members__ if members else {}
    return {int(name[2:]): value for name, value in named.items() if name.startswith("SM")}


def logger(trt: Any) -> Any:
    """A logger that says nothing and keeps errors."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """`said` are the texts of errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.said.append(message)

    return Log()


def step_monitor(trt: Any, on_step: OnStep) -> Any:
    """Tells `on_step` how far a build is."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Listens to the phase that takes the time."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if phase == LONG_PHASE:
                self.steps = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase == LONG_PHASE:
                    on_step(step + 1, self.steps)
            except OSError:  # who asked for the engine is gone: the build ends
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def file_stream(trt: Any, file: BinaryIO) -> Any:
    """A stream of TensorRT into an open file. `failed` is the error of a write that did not go well."""

    class Stream(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        """Keeps errors: they must not pass through the frames of TensorRT."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failed: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as exc:
                self.failed = exc
                return 0

    return Stream()
