"""The race of the vector indexes: every engine at its quickest that still finds enough, by turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.retrieval.corpus import PICTURES, Corpus
from benchmarks.retrieval.engines import OURS, Engine, open_engines
from benchmarks.retrieval.vectors import CROPS

RECALL = 0.95  # recall@10 that every engine must reach
SWEEP = 48  # pictures that choose how an engine searches
FURTHER = 3  # ways that reach the recall and are compared
SLOW_MS = 50.0  # from here an engine searches for fewer pictures a turn
FEW = 6


@dataclass(frozen=True, slots=True)
class Figures:
    """One engine over one number of vectors."""

    engine: str
    about: str
    rows: int
    point: Any  # how it searches
    recall1: float
    recall10: float
    p50_ms_1: float
    p95_ms_1: float
    p50_ms_8: float
    p95_ms_8: float
    over_ours_1: float  # times as long as ours takes, in the same round: median over the rounds
    over_ours_8: float
    resident_mib: float
    disk_mib: float  # of its index, with vectors where it keeps its own
    build_rows_s: float
    open_s: float
    searches: int  # that its memory was measured after

    @property
    def enough(self) -> bool:
        """Whether it finds what is asked of all, as far as these queries can tell."""
        return self.recall10 >= RECALL - 0.005


@dataclass(slots=True)
class _Turns:
    """What an engine gave in all rounds."""

    engine: Engine
    point: Any
    slow: bool
    ms: dict[int, list[np.ndarray[Any, np.dtype[np.float64]]]]  # crops -> milliseconds, round by round

    @property
    def pictures(self) -> int:
        """That it searches for in a turn."""
        return FEW if self.slow else PICTURES


@contextmanager
def opened(corpus: Corpus, peers: Sequence[str], homes: dict[str, Path], threads: int) -> Iterator[
    tuple[list[Engine], dict[str, str]]
]:
    """All engines over a corpus, built where they are not; ended afterwards."""
    engines, missing = open_engines(corpus.folder, corpus.rows, peers, homes, threads)
    try:
        yield engines, missing
    finally:
        for engine in engines:
            engine.close()


def race(corpus: Corpus, engines: Sequence[Engine], rounds: int) -> list[Figures]:
    """Tune all, then let them take turns: one works at a time, on the same crops."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(engines) * (rounds + 1))
        tuned = []
        for engine in engines:
            progress.update(task, description=f"{corpus.rows:,} rows: {engine.name}, tuning")
            tuned.append(_tuned(engine, corpus))
            progress.advance(task)
        for _ in range(rounds):
            for turns in tuned:
                progress.update(task, description=f"{corpus.rows:,} rows: {turns.engine.name}")
                for crops in turns.ms:
                    turns.ms[crops].append(turns.engine.search(turns.point, range(turns.pictures), crops).ms)
                progress.advance(task)
    ours = next(turns for turns in tuned if turns.engine.name == OURS)
    return [_figures(turns, ours, corpus) for turns in tuned]


def _tuned(engine: Engine, corpus: Corpus) -> _Turns:
    """The quickest of the first ways that find enough; where none does, the one that finds most."""
    tried: list[tuple[float, float, Any]] = []
    for point in engine.points:
        answers = engine.search(point, range(FEW), CROPS)
        slow = float(np.median(answers.ms)) > SLOW_MS
        if not slow or len(engine.points) > 1:
            answers = engine.search(point, range(FEW if slow else SWEEP), CROPS)
        tried.append((float(np.median(answers.ms)), corpus.recall(answers.ids), point))
        if sum(recall >= RECALL for _, recall, _ in tried) == FURTHER:
            break
    reached = [way for way in tried if way[1] >= RECALL]
    ms, _, point = min(reached, key=lambda way: way[0]) if reached else max(tried, key=lambda way: way[1])
    return _Turns(engine, point, ms > SLOW_MS, {1: [], CROPS: []})


def _figures(turns: _Turns, ours: _Turns, corpus: Corpus) -> Figures:
    engine = turns.engine
    found = engine.search(turns.point, range(turns.pictures), CROPS).ids
    spent = {crops: np.concatenate(parts) for crops, parts in turns.ms.items()}
    return Figures(
        engine=engine.name,
        about=engine.about,
        rows=corpus.rows,
        point=turns.point,
        recall1=round(corpus.recall(found, 1), 4),
        recall10=round(corpus.recall(found), 4),
        p50_ms_1=_percentile(spent[1], 50),
        p95_ms_1=_percentile(spent[1], 95),
        p50_ms_8=_percentile(spent[CROPS], 50),
        p95_ms_8=_percentile(spent[CROPS], 95),
        over_ours_1=_ratio(turns, ours, 1),
        over_ours_8=_ratio(turns, ours, CROPS),
        resident_mib=round(engine.resident / 2**20, 1),
        disk_mib=round(engine.built.disk_bytes / 2**20, 1),
        build_rows_s=round(corpus.rows / engine.fill_s, 1),
        open_s=round(engine.open_s, 3),
        searches=sum(len(part) for parts in turns.ms.values() for part in parts),
    )


def _percentile(ms: np.ndarray[Any, np.dtype[np.float64]], share: int) -> float:
    return round(float(np.percentile(ms, share)), 3)


def _ratio(turns: _Turns, ours: _Turns, crops: int) -> float:
    pairs = zip(turns.ms[crops], ours.ms[crops], strict=True)
    return round(float(np.median([np.median(theirs) / np.median(mine) for theirs, mine in pairs])), 3)
