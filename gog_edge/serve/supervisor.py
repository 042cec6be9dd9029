"""A bounded pool of worker threads, and a supervisor that retries engines which are not available.

The event loop only passes events on; decoding, searching and generating happen in a worker thread.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Generic, TypeAlias, TypeVar

from gog_edge.agent.loop import EpisodeClosed
from gog_edge.errors import Busy, DeviceLost, GogEdgeError
from gog_edge.runtime import Runtime

T = TypeVar("T")
Work: TypeAlias = Callable[[Callable[[T], None]], object]  # called in a worker with a function that takes its events
_END: Any = object()  # ends the queue of a job

MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0  # between two attempts to open what failed; doubled from one to the next
CLOSING_S = 5.0  # wait for an attempt that is running when the server stops
_log = logging.getLogger(__name__)


class Job(Generic[T]):
    """Work that was submitted to the pool: iterate over its events in the event loop, or stop it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[T] = asyncio.Queue()
        self._stop = threading.Event()
        self._future: Future[object] = Future()

    @property
    def stopped(self) -> bool:
        """Return whether `stop` was called: the client has disconnected, or the server is closing."""
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        """Return whether the work has ended, with or without an error."""
        return self._future.done()

    def stop(self) -> None:
        """End the iteration now; the worker stops at its next event, or does not start."""
        self._stop.set()
        self._future.cancel()
        self._put(_END)

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield the events, and raise the error that ended the work."""
        while (event := await self._queue.get()) is not _END:
            yield event
        if not self.stopped:
            self._future.result()

    def start(self, pool: ThreadPoolExecutor, work: Work[T], on_done: Callable[[Job[T]], None]) -> None:
        """Run `work` in the pool; `on_done` is called from any thread, before the iteration ends."""
        self._future = pool.submit(work, self._emit)
        self._future.add_done_callback(lambda _: on_done(self))
        self._future.add_done_callback(lambda _: self._put(_END))

    def _emit(self, event: T) -> None:
        if self.stopped:
            raise EpisodeClosed("the client has disconnected, or the server is stopping")
        self._put(event)

    def _put(self, event: T) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)


class WorkerPool:
    """Threads that run at most `concurrent` jobs, with at most `waiting` more in the queue."""

    def __init__(self, concurrent: int, waiting: int) -> None:
        self.capacity = concurrent + waiting
        self._pool = ThreadPoolExecutor(concurrent, thread_name_prefix="episode")
        self._jobs: set[Job[Any]] = set()
        self._lock = threading.Lock()  # jobs are removed by their worker thread

    @property
    def size(self) -> int:
        """Return the number of jobs that run or wait."""
        return len(self._jobs)

    def submit(self, work: Work[T]) -> Job[T]:
        """Run work in a thread; call this in the event loop. Raises Busy if the queue is full."""
        job = Job[T](asyncio.get_running_loop())
        with self._lock:
            if len(self._jobs) >= self.capacity:
                raise Busy(f"{self.capacity} questions are being answered or waiting; try again in a few seconds")
            self._jobs.add(job)
        job.start(self._pool, work, self._remove)
        return job

    def close(self) -> None:
        """Stop all jobs; nothing can be submitted afterwards."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _remove(self, job: Job[Any]) -> None:
        with self._lock:
            self._jobs.discard(job)


Repair: TypeAlias = Callable[[Runtime], Runtime]


class Supervisor:
    """Holds the runtime that is served, and replaces it when its engines fail or become available. Thread-safe."""

    def __init__(self, runtime: Runtime, repair: Repair | None = None) -> None:
        """`repair` opens the missing parts of a runtime, or sets its `failure`; None if no part can be missing."""
        self._runtime, self._repair = runtime, repair
        self._lock = threading.Lock()  # guards the replacement of the runtime
        self._wake, self._stopped = threading.Event(), threading.Event()
        self.device_lost = False  # this process cannot use the GPU any more: a new process must be started
        self._abandoned: list[Runtime] = []  # runtimes on the lost device, which cannot be closed
        if runtime.failure:
            _log_state(runtime)

    @property
    def runtime(self) -> Runtime:
        """Return the runtime that is served now."""
        return self._runtime

    @contextmanager
    def lend(self) -> Iterator[Runtime]:
        """Lend the runtime of this moment to a worker; it is given up if the GPU is lost in the block."""
        runtime = self._runtime
        try:
            yield runtime
        except DeviceLost as exc:
            self._give_up(runtime, exc)
            raise

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Retry what failed, and look for new generations of packs, in background threads during the block."""
        thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._wake.set()
            thread.join(CLOSING_S)

    def wake(self) -> None:
        """Retry and look for new generations at once; may be called from a signal handler."""
        self._wake.set()
        if self._runtime.packs is not None:
            self._runtime.packs.request_refresh()

    def close(self) -> None:
        """Close the packs; packs in use stay open until they are released."""
        self._stopped.set()
        with self._lock:
            last = self._runtime
            self._runtime = replace(last, policy=None, packs=None, failure="the server is stopping")
        if last.packs is not None:
            last.packs.close()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            runtime = self._runtime
            with nullcontext() if runtime.packs is None else runtime.packs.watch():
                self._watch_runtime(runtime)

    def _watch_runtime(self, runtime: Runtime) -> None:
        """Return when another runtime is served or the server stops."""
        wait = MIN_RETRY_S
        if runtime.lost:  # delayed, because opening the engines may lose the device every time
            if not self._stopped.wait(MAX_RETRY_S):
                self.device_lost = True
            self._stopped.wait()
        while self._runtime is runtime and not self._stopped.is_set():
            self._wake.wait(wait if runtime.failure else None)
            self._wake.clear()
            if runtime.failure and not self._stopped.is_set():
                self._retry(runtime)
                wait = min(2 * wait, MAX_RETRY_S)

    def _retry(self, runtime: Runtime) -> None:
        if self._repair is None:
            return
        gc.collect()  # a runtime that was given up holds device memory until it is collected
        try:
            repaired = self._repair(runtime)
        except Exception as exc:  # the server stays up whatever fails
            repaired = replace(runtime, failure=str(exc) if isinstance(exc, GogEdgeError) else repr(exc))
        if repaired != runtime and self._replace(runtime, repaired):
            _log_state(repaired)

    def _give_up(self, runtime: Runtime, exc: DeviceLost) -> None:
        """Serve no part that uses the lost device: not the policy, and not the packs, whose encoder may run there."""
        if self._repair is None:
            return
        self.device_lost = True
        failed = replace(runtime, policy=None, packs=None, failure=str(exc))
        if self._replace(runtime, failed):
            _log_state(failed)
            self._wake.set()

    def _replace(self, old: Runtime, new: Runtime) -> bool:
        """Serve `new` if `old` is still served; close the packs of the one that is not served. Return whether it is."""
        with self._lock:
            replaced = self._runtime is old
            if replaced:
                self._runtime = new
        dropped, served = (old, new) if replaced else (new, self._runtime)
        if dropped.packs is not None and dropped.packs is not served.packs:
            if self.device_lost:  # FAISS ends the process if it cannot free device memory
                self._abandoned.append(dropped)
            else:
                dropped.packs.close()
        return replaced


def _log_state(runtime: Runtime) -> None:
    if runtime.failure:
        _log.warning("gog_edge is not ready: %s", " ".join(runtime.failure.split()))
    else:
        _log.warning("gog_edge is ready: '%s' is served", runtime.name)
