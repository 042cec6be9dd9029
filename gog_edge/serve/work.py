"""A bounded pool of worker threads whose work is a stream of events.

The event loop only passes events on; decoding, looking, searching and generating happen in a worker.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Generic, TypeAlias, TypeVar

from gog_edge.errors import Busy

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
