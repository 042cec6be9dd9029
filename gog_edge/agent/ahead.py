"""Searches that begin before it is certain that they are needed: what the policy has yet to say hides their time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from gog_edge.agent.aim import Target
from gog_edge.types import Box, Query, SearchResult

# The whole picture may still be searched when the first guess comes, or a guess that was wrong when the next one does.
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """What a search brought back, and how long it took."""

    result: SearchResult
    ms: float


class Ahead:
    """Begun searches by what they search for. A failure is raised to who takes the result, and to nobody else."""

    def __init__(self, search: Callable[[Query], SearchResult]) -> None:
        self._search = search
        self._begun: dict[Box | str, Future[Timed]] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="search")

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)  # waits for one that runs: a pack may be closed after us

    def begin(self, target: Target) -> None:
        """Search in the background, once for each key."""
        if target.key not in self._begun:
            self._begun[target.key] = self._pool.submit(self.now, target.query)

    def take(self, target: Target) -> Timed:
        """The result of a begun search, waited for; else of one made now."""
        begun = self._begun.pop(target.key, None)
        return begun.result() if begun else self.now(target.query)

    def now(self, query: Query) -> Timed:
        """Search in this thread."""
        started = time.monotonic()
        result = self._search(query)
        return Timed(result, (time.monotonic() - started) * 1000)
