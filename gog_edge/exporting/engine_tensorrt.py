"""What TensorRT builds for, and the objects that it calls back while it builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

LONG_PHASE = "Computing profile costs"  # of a build, as TensorRT calls it: kernels are made; others take no time

OnStep: TypeAlias = Callable[[int, int], None]  # done, of


def step_monitor(trt: Any, on_step: OnStep) -> Any:
    """Tells `on_step` how far a build is."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
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

    class Stream(trt.IStreamWriter):  # type: ignore[misc]
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
