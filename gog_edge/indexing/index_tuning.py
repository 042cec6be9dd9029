"""Measures an index against exact search on queries that it does not hold, and finds how it is searched fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.indexing.index_planner import CANDIDATES, Plan
from gog_edge.retrieval.faiss_file import read_index, search_params
from gog_edge.retrieval.index import VectorIndex
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors import Rows, VectorShards
from gog_edge.types import Vectors

OnProgress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total
RECALL_K = 10
GROUP = 8  # crops of one picture
TIMED, LEAST = 120, 15  # searches that a median stands on, and at least, when they take long
TIMED_S = 3.0
MAX_QUERIES = 1_024
FURTHER = 4  # values of the parameter that reach the recall and are timed


@dataclass(frozen=True, slots=True)
class Trial:
    """Queries that are not stored, and what exact search finds for them."""

    queries: Vectors  # [n, dim]
    truth: Rows  # [n, k] nearest rows, best first
    held_out: bool


def make_trial(shards: VectorShards, queries: Vectors | None, on_progress: OnProgress | None = None) -> Trial:
    """Search exactly, block by block; stored vectors mixed with others stand in for `queries` that are not there.

    Raises:
        PackError: the queries are of another length than the vectors.
    """
    if queries is not None and (queries.ndim != 2 or queries.shape[1] != shards.dim):
        raise PackError(f"queries of shape {queries.shape}, wanted [n, {shards.dim}]; embed them as the pack was")
    held_out = queries is not None and len(queries) > 0
    asked = queries if queries is not None and held_out else _disturbed(shards)
    asked = np.ascontiguousarray(asked[:MAX_QUERIES], dtype=np.float32)
    return Trial(asked, exact_nearest(shards, asked, min(RECALL_K, len(shards)), on_progress), held_out)


def exact_nearest(shards: VectorShards, queries: Vectors, k: int, on_progress: OnProgress | None = None) -> Rows:
    """The k nearest rows [n, k] of each query, best first; one block of vectors is held at a time."""
    scores, rows = np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1, dtype=np.int64)
    done = 0
    for block in shards.blocks():
        found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([scores, found[0]], axis=1)
        rows = np.concatenate([rows, found[1] + done], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        done += len(block)
        if on_progress is not None:
            on_progress("exact search", done, len(shards))
    return rows


def tuned(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, folder: Path, shards: VectorShards) -> IndexEntry:
    """The entry with the fastest way to search that reaches the recall; with the best recall where none does."""
    points = list(_points(entry, plan, trial, recall, folder / entry.path))
    reached = [point for point in points if point.recall >= recall] or [max(points, key=lambda point: point.recall)]
    return min(measured(reached, trial, folder, shards), key=lambda point: point.p50_ms_8)


def measured(entries: Sequence[IndexEntry], trial: Trial, folder: Path, shards: VectorShards) -> list[IndexEntry]:
    """The same index searched in several ways: recall by ids, and times by turns, alone and in groups of eight."""
    indexes = [VectorIndex.open(folder, entry, shards, tombstones=np.empty(0, dtype=np.int64)) for entry in entries]
    times = _times(indexes, trial.queries, trial.truth.shape[1])
    return [
        replace(entry, recall=_recall(index, trial), p50_ms_1=round(one, 3), p50_ms_8=round(eight, 3))
        for entry, index, (one, eight) in zip(entries, indexes, times, strict=True)
    ]


def _recall(index: VectorIndex, trial: Trial) -> float:
    found = index.search(trial.queries, trial.truth.shape[1]).ids
    wanted = index.shards.ids_of(trial.truth)
    shares = [len(np.intersect1d(f, w)) / len(np.unique(w)) for f, w in zip(found, wanted, strict=True)]
    return round(float(np.mean(shares)), 4)


def _points(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, path: Path) -> Iterator[IndexEntry]:
    """For each value of the parameter, with the fewest candidates that reach the recall."""
    index, further = read_index(path), FURTHER
    for value in plan.values:
        params = {plan.param: value} if plan.param else {}
        most = entry.recall_k if plan.exact else min(entry.rows, value if plan.param == "efSearch" else CANDIDATES[-1])
        found = index.search(trial.queries, most, params=search_params(index, params, count=most))[1]
        places = _places(found, trial.truth)
        counts = [count for count in CANDIDATES if count < most and not plan.exact] + [most]
        reached = [(count, _worse_half(places < count)) for count in counts]
        count, best = next((pair for pair in reached if pair[1] >= recall), reached[-1])
        yield replace(entry, params=params, candidates=0 if plan.exact else count, recall=best)
        further -= best >= recall
        if not further:
            return


def _places(found: Rows, truth: Rows) -> NDArray[np.int64]:
    """Where in `found` [n, c] each true row [n, k] stands; c where it is missing."""
    same = found[:, None, :] == truth[:, :, None]
    return np.asarray(np.where(same.any(axis=2), same.argmax(axis=2), found.shape[1]), dtype=np.int64)


def _worse_half(hit: NDArray[np.bool_]) -> float:
    """The recall of the worse half of the queries: what was chosen on one must hold for the other."""
    halves = [half for half in (hit[::2], hit[1::2]) if len(half)]
    return min(float(half.mean()) for half in halves)


def _times(indexes: Sequence[VectorIndex], queries: Vectors, k: int) -> list[tuple[float, float]]:
    """Medians in milliseconds for one query and for eight. All take turns, so that what disturbs one disturbs all."""
    groups = [queries[at : at + GROUP] for at in range(0, max(1, len(queries) - GROUP + 1), GROUP)]
    spent: list[list[tuple[float, float]]] = [[] for _ in indexes]
    started = time.perf_counter()
    for turn in range(TIMED):
        if turn >= LEAST and time.perf_counter() - started > TIMED_S * len(indexes):
            break
        group = groups[turn % len(groups)]
        eight = np.resize(group, (GROUP, group.shape[1]))
        for index, times in zip(indexes, spent, strict=True):
            times.append((_ms(index, eight[:1], k), _ms(index, eight, k)))
    return [(float(one), float(eight)) for one, eight in (np.median(times, axis=0) for times in spent)]


def _ms(index: VectorIndex, queries: Vectors, k: int) -> float:
    started = time.perf_counter()
    index.search(queries, k)
    return 1e3 * (time.perf_counter() - started)


def _disturbed(shards: VectorShards, count: int = 512) -> Vectors:
    """Stored vectors, each with some of another one: [n, dim] of unit length."""
    rng = np.random.default_rng(0)
    rows = rng.choice(len(shards), min(count, len(shards)), replace=False)
    mixed = shards.take(rows) + np.float32(0.4) * shards.take(rng.permutation(rows))
    return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12), dtype=np.float32)
