"""The runtime that a server serves: what it lacks is tried again, and what a lost device took along is given up."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TypeAlias, TypeVar

from gog_edge.errors import BackendError, DeviceLost, GogEdgeError
from gog_edge.runtime import Runtime

T = TypeVar("T")
Mend: TypeAlias = Callable[[Runtime], Runtime]

FIRST_S, LAST_S = 1.0, 30.0  # until what failed is tried again, doubled from time to time
CLOSING_S = 5.0  # that opening engines may go on when the server is told to stop
_log = logging.getLogger(__name__)


class Supervisor:
    """Lends the runtime of the moment; may be used from several threads."""

    def __init__(self, runtime: Runtime, mend: Mend | None = None) -> None:
        """`mend` opens what a runtime lacks, and says in its `failure` why it could not; None: nothing can fail."""
        self._runtime, self._mend = runtime, mend
        self._lock = threading.Lock()  # of which runtime it is: held for a moment only
        self._woken, self._stopped = threading.Event(), threading.Event()
        self.device_lost = False  # and with it all that this process may do on it: another is to begin
        self._lost: list[Runtime] = []  # what lay on the lost device
        if runtime.failure:
            _tell(runtime)

    @property
    def runtime(self) -> Runtime:
        """What is served now."""
        return self._runtime

    def run(self, work: Callable[[Runtime], Generator[T, None, None]]) -> Generator[T, None, None]:
        """Do work with the runtime of now; it is given up where a GPU is lost under it. Not for the event loop."""
        runtime = self._runtime
        try:
            yield from work(runtime)
        except DeviceLost as exc:
            self._give_up(runtime, exc)
            raise

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Try again what failed, and look for new generations of packs, in threads until the end of the block."""
        thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._woken.set()
            thread.join(CLOSING_S)

    def wake(self) -> None:
        """Let the watch look at once; may be called from a signal's handler."""
        self._woken.set()
        if self._runtime.packs is not None:
            self._runtime.packs.wake()

    def close(self) -> None:
        """Close the packs; what is lent stays open until it is given back."""
        self._stopped.set()
        with self._lock:
            last = self._runtime
            self._runtime = replace(last, policy=None, packs=None, failure="the server is stopping")
        if last.packs is not None:
            last.packs.close()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            runtime = self._runtime
            with nullcontext() if runtime.packs is None else runtime.packs.watching():
                self._attend(runtime)

    def _attend(self, runtime: Runtime) -> None:
        """Until another runtime is served in place of this one."""
        wait = FIRST_S
        if runtime.lost:  # not at once: what loses it while it is opened may do so every time
            if not self._stopped.wait(LAST_S):
                self.device_lost = True
            self._stopped.wait()
        while self._runtime is runtime and not self._stopped.is_set():
            self._woken.wait(wait if runtime.failure else None)
            self._woken.clear()
            if runtime.failure and not self._stopped.is_set():
                self._retry(runtime)
                wait = min(2 * wait, LAST_S)

    def _retry(self, runtime: Runtime) -> None:
        if self._mend is None:
            return
        gc.collect()  # what was given up holds memory of the device until it is collected
        try:
            mended = self._mend(runtime)
        except Exception as exc:  # whatever is wrong, the server stays up
            mended = replace(runtime, failure=str(exc) if isinstance(exc, GogEdgeError) else repr(exc))
        if mended != runtime and self._serve(runtime, mended):
            _tell(mended)

    def _give_up(self, runtime: Runtime, exc: BackendError) -> None:
        """Serve nothing that may lie on the device, the packs too, for their encoder does."""
        if self._mend is None:
            return
        self.device_lost |= isinstance(exc, DeviceLost)
        failed = replace(runtime, policy=None, packs=None, failure=str(exc))
        if self._serve(runtime, failed):
            _tell(failed)
            self._woken.set()

    def _serve(self, old: Runtime, new: Runtime) -> bool:
        """Put another runtime in the place of an old one, if that is still served; packs that nobody has are closed."""
        with self._lock:
            placed = self._runtime is old
            if placed:
                self._runtime = new
        lost, kept = (old, new) if placed else (new, self._runtime)
        if lost.packs is not None and lost.packs is not kept.packs:
            if self.device_lost:  # FAISS ends the process where it cannot free memory, and this one ends itself soon
                self._lost.append(lost)
            else:
                lost.packs.close()
        return placed


def _tell(runtime: Runtime) -> None:
    if runtime.failure:
        _log.warning("gog_edge is not ready: %s", " ".join(runtime.failure.split()))
    else:
        _log.warning("gog_edge is ready: '%s' is served", runtime.name)
