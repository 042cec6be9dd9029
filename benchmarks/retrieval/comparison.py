"""The comparison of vector indexes: each engine at its fastest setting with sufficient recall, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.retrieval.corpus import CROPS, PICTURES, Corpus
from benchmarks.retrieval.engines import OURS, SearchEngine, open_engines

RECALL = 0.95  # recall@10 that every engine must reach
TOLERANCE = 0.005  # of the recall measured with other queries
SWEEP = 48  # pictures with which the setting is chosen
SUFFICIENT = 3  # settings with sufficient recall that are tried
SLOW_MS = 50.0  # an engine that is slower searches for fewer pictures per round
FEW = 6


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of one engine over one number of vectors. The field names are keys in the results file."""

    engine: str
    about: str
    rows: int
    point: Any  # the setting
    recall1: float
    recall10: float
    p50_ms_1: float
    p95_ms_1: float
    p50_ms_8: float
    p95_ms_8: float
    over_ours_1: float  # time relative to ours in the same round, median over the rounds
    over_ours_8: float
    resident_mib: float
    disk_mib: float  # of its index, including vectors if it stores its own
    build_rows_s: float
    open_s: float
    searches: int  # before its memory was measured

    @property
    def enough(self) -> bool:
        """Return whether the recall is sufficient."""
        return self.recall10 >= RECALL - TOLERANCE


@dataclass(slots=True)
class _Timings:
    """The timings of one engine in all rounds."""

    engine: SearchEngine
    setting: Any
    slow: bool
    ms: dict[int, list[NDArray[np.float64]]]  # by number of crops: milliseconds of each round

    @property
    def pictures(self) -> int:
        """Return the number of pictures per round."""
        return FEW if self.slow else PICTURES


@contextmanager
def opened(
    corpus: Corpus, peers: Sequence[str], environments: dict[str, Path], threads: int
) -> Iterator[tuple[list[SearchEngine], dict[str, str]]]:
    """Open all engines over a corpus, and close them afterwards."""
    engines, missing = open_engines(corpus.folder, corpus.rows, peers, environments, threads)
    try:
        yield engines, missing
    finally:
        for engine in engines:
            engine.close()


def compare(corpus: Corpus, engines: Sequence[SearchEngine], rounds: int) -> list[Figures]:
    """Tune all engines, then measure them in turns; only one works at a time, with the same queries."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(engines) * (rounds + 1))
        tuned = []
        for engine in engines:
            progress.update(task, description=f"{corpus.rows:,} rows: {engine.name}, tuning")
            tuned.append(_tune(engine, corpus))
            progress.advance(task)
        for _ in range(rounds):
            for timings in tuned:
                progress.update(task, description=f"{corpus.rows:,} rows: {timings.engine.name}")
                for crops in timings.ms:
                    answers = timings.engine.search(timings.setting, range(timings.pictures), crops)
                    timings.ms[crops].append(answers.ms)
                progress.advance(task)
    ours = next(timings for timings in tuned if timings.engine.name == OURS)
    return [_figures(timings, ours, corpus) for timings in tuned]


def _tune(engine: SearchEngine, corpus: Corpus) -> _Timings:
    """Select the fastest of the first settings with sufficient recall, or the setting with the highest recall."""
    tried: list[tuple[float, float, Any]] = []  # milliseconds, recall, setting
    for setting in engine.settings:
        answers = engine.search(setting, range(FEW), CROPS)
        slow = float(np.median(answers.ms)) > SLOW_MS
        if not slow or len(engine.settings) > 1:
            answers = engine.search(setting, range(FEW if slow else SWEEP), CROPS)
        tried.append((float(np.median(answers.ms)), corpus.recall(answers.ids), setting))
        if sum(recall >= RECALL for _, recall, _ in tried) == SUFFICIENT:
            break
    reached = [one for one in tried if one[1] >= RECALL]
    ms, _, setting = min(reached, key=lambda one: one[0]) if reached else max(tried, key=lambda one: one[1])
    return _Timings(engine, setting, ms > SLOW_MS, {1: [], CROPS: []})


def _figures(timings: _Timings, ours: _Timings, corpus: Corpus) -> Figures:
    engine = timings.engine
    found = engine.search(timings.setting, range(timings.pictures), CROPS).ids
    all_ms = {crops: np.concatenate(parts) for crops, parts in timings.ms.items()}
    return Figures(
        engine=engine.name,
        about=engine.about,
        rows=corpus.rows,
        point=timings.setting,
        recall1=round(corpus.recall(found, 1), 4),
        recall10=round(corpus.recall(found), 4),
        p50_ms_1=_percentile(all_ms[1], 50),
        p95_ms_1=_percentile(all_ms[1], 95),
        p50_ms_8=_percentile(all_ms[CROPS], 50),
        p95_ms_8=_percentile(all_ms[CROPS], 95),
        over_ours_1=_ratio(timings, ours, 1),
        over_ours_8=_ratio(timings, ours, CROPS),
        resident_mib=round(engine.resident / 2**20, 1),
        disk_mib=round(engine.built.disk_bytes / 2**20, 1),
        build_rows_s=round(corpus.rows / engine.fill_s, 1),
        open_s=round(engine.open_s, 3),
        searches=sum(len(part) for parts in timings.ms.values() for part in parts),
    )


def _percentile(ms: NDArray[np.float64], percent: int) -> float:
    return round(float(np.percentile(ms, percent)), 3)


def _ratio(timings: _Timings, ours: _Timings, crops: int) -> float:
    pairs = zip(timings.ms[crops], ours.ms[crops], strict=True)
    return round(float(np.median([np.median(theirs) / np.median(mine) for theirs, mine in pairs])), 3)
