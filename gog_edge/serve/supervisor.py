"""A bounded pool of worker threads whose work is a stream of events.

The event loop only passes events on; decoding, looking, searching and generating happen in a worker.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Generic, TypeAlias, TypeVar

from gog_edge.errors import BackendError, Busy, DeviceLost, GogEdgeError
from gog_edge.runtime import Runtime

T = TypeVar("T")
Start: TypeAlias = Callable[[], Generator[T, None, None]]
_END: Any = object()  # the stream is over: the future says how


class Run(Generic[T]):
    """One admitted piece of work: iterate over its events, or stop it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[T] = asyncio.Queue()
        self._stop = threading.Event()
        self._future: Future[None] = Future()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called: the caller went away or the server is closing."""
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        """Whether the worker has ended, well or not."""
        return self._future.done()

    def stop(self) -> None:
        """End the stream now; the worker leaves at its next event, or never starts."""
        self._stop.set()
        self._future.cancel()
        self._hand(_END)

    async def __aiter__(self) -> AsyncIterator[T]:
        """The events as they come; raises what the worker raised."""
        while (item := await self._queue.get()) is not _END:
            yield item
        if not self.stopped:
            self._future.result()

    def submit(self, pool: ThreadPoolExecutor, start: Start[T], leave: Callable[[Run[T]], None]) -> None:
        """Begin in `pool`; `leave` is called, from any thread, when the worker is free again."""
        self._future = pool.submit(self._work, start)
        self._future.add_done_callback(lambda _: leave(self))
        self._future.add_done_callback(lambda _: self._hand(_END))

    def _work(self, start: Start[T]) -> None:
        with closing(start()) as events:
            for event in events:
                if self.stopped:
                    return
                self._hand(event)

    def _hand(self, item: T) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Workers:
    """At most `concurrent` runs at once, at most `waiting` in line behind them; more is refused as `Busy`."""

    def __init__(self, concurrent: int, waiting: int) -> None:
        self.capacity = concurrent + waiting
        self._pool = ThreadPoolExecutor(concurrent, thread_name_prefix="episode")
        self._runs: set[Run[Any]] = set()
        self._lock = threading.Lock()  # runs leave from their worker's thread

    @property
    def admitted(self) -> int:
        """How many runs work or wait."""
        return len(self._runs)

    def admit(self, start: Start[T]) -> Run[T]:
        """Put a generator function to work; call it from the event loop. Raises `Busy`."""
        run = Run[T](asyncio.get_running_loop())
        with self._lock:
            if len(self._runs) >= self.capacity:
                raise Busy(f"{self.capacity} questions are being worked on or waiting already; ask again in a moment")
            self._runs.add(run)
        run.submit(self._pool, start, self._leave)
        return run

    def close(self) -> None:
        """Stop what runs; nothing is admitted afterwards."""
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, run: Run[Any]) -> None:
        with self._lock:
            self._runs.discard(run)


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
