"""Measures an index against exact search on queries that it does not hold, and finds how it is searched fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.indexing.index_planner import CANDIDATES, Plan
from gog_edge.retrieval.index import IndexEntry, VectorIndex
from gog_edge.retrieval.vectors import Rows, VectorShards
from gog_edge.types import Vectors

OnProgress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total
Searcher: TypeAlias = Callable[[IndexEntry], VectorIndex]  # opens the written file with an entry
RECALL_K = 10
GROUP = 8  # crops of one picture
TIMED = 120  # searches that a median stands on
FURTHER = 3  # values of the parameter that are tried beyond the first that reaches the recall


@dataclass(frozen=True, slots=True)
class Trial:
    """Queries that are not stored, and what exact search finds for them."""

    queries: Vectors  # [n, dim]
    truth: Rows  # [n, k] nearest rows, best first
    held_out: bool


def make_trial(shards: VectorShards, queries: Vectors | None, on_progress: OnProgress | None = None) -> Trial:
    """Search exactly, block by block; stored vectors mixed with others stand in for `queries` that are not there."""
    held_out = queries is not None and len(queries) > 0
    asked = queries if queries is not None and len(queries) else _disturbed(shards)
    asked = np.ascontiguousarray(asked, dtype=np.float32)
    return Trial(asked, exact_nearest(shards, asked, min(RECALL_K, len(shards)), on_progress), held_out)


def exact_nearest(
    shards: VectorShards, queries: Vectors, k: int, on_progress: OnProgress | None = None
) -> Rows:
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


def fastest(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, opened: Searcher) -> IndexEntry:
    """The entry with the fastest way to search that reaches the recall; with the best recall where none does."""
    points = list(_points(entry, plan, trial, recall, opened))
    reached = [point for point in points if point.recall >= recall]
    if not reached:
        return max(points, key=lambda point: point.recall)
    return measured(min((measured(p, trial, opened) for p in reached), key=lambda p: p.p50_ms_8), trial, opened)


def measured(entry: IndexEntry, trial: Trial, opened: Searcher) -> IndexEntry:
    """The entry with recall and times of searches as they are made: by ids, alone and in groups of eight."""
    index = opened(entry)
    k = trial.truth.shape[1]
    found = index.search(trial.queries, k).ids
    wanted = index.shards.ids_of(trial.truth)
    recall = float(np.mean([len(np.intersect1d(f, w)) / len(np.unique(w)) for f, w in zip(found, wanted, strict=True)]))
    one, eight = _times(index, trial.queries, k)
    return replace(entry, recall_k=k, recall=round(recall, 4), p50_ms_1=one, p50_ms_8=eight)


def _points(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, opened: Searcher) -> Iterator[IndexEntry]:
    """For each value of the parameter, with the fewest candidates that reach the recall."""
    most = min(CANDIDATES[-1], entry.rows)
    further = FURTHER
    for value in plan.values:
        params = {plan.param: value} if plan.param else {}
        index = opened(replace(entry, params=params))
        found = index.propose(trial.queries, trial.truth.shape[1] if plan.exact else most)
        places = _places(found, trial.truth)
        counts = (found.shape[1],) if plan.exact else tuple(c for c in CANDIDATES if c < most) + (most,)
        reached = [(count, _halves(places < count)) for count in counts]
        count, best = next((pair for pair in reached if pair[1] >= recall), reached[-1])
        yield replace(entry, params=params, candidates=0 if plan.exact else count, recall=best)
        further -= best >= recall
        if not further:
            return


def _places(found: Rows, truth: Rows) -> NDArray[np.int64]:
    """Where in `found` [n, c] each true row [n, k] stands; c where it is missing."""
    same = found[:, None, :] == truth[:, :, None]
    return np.where(same.any(axis=2), same.argmax(axis=2), found.shape[1])


def _halves(hit: NDArray[np.bool_]) -> float:
    """The recall of the worse half of the queries: what was chosen on one must hold for the other."""
    halves = [half for half in (hit[::2], hit[1::2]) if len(half)]
    return min(float(half.mean()) for half in halves)


def _times(index: VectorIndex, queries: Vectors, k: int) -> tuple[float, float]:
    """Medians in milliseconds for one query and for eight, by turns."""
    groups = [queries[at : at + GROUP] for at in range(0, max(1, len(queries) - GROUP + 1), GROUP)]
    ones, eights = [], []
    for turn in range(TIMED):
        group = groups[turn % len(groups)]
        ones.append(_ms(index, group[:1], k))
        eights.append(_ms(index, np.resize(group, (GROUP, group.shape[1])), k))
    return round(float(np.median(ones)), 3), round(float(np.median(eights)), 3)


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
