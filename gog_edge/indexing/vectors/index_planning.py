"""Plans the FAISS index of a space: which indexes fit the memory, and with which parameters they reach the recall.

Recall and times are measured with queries that are not stored, against an exact search that holds one block of vectors
at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.indexing import OnProgress
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors.faiss_index import VectorIndex, read_index, search_params
from gog_edge.retrieval.vectors.shards import Rows, VectorShards
from gog_edge.types import Vectors

# --- plans --------------------------------------------------------------------------------------

EXACT_ROWS = 300_000  # up to this size exact search is tried first, and kept if it is fast enough
EXACT_MS = 5.0  # for eight queries at once
HNSW_LINKS = 32
FLAT_LISTS = 512  # more centroids are compressed, searched by their codes, and the best of them compared exactly
SHARD_ROW_BYTES = 9  # per row of the shards in memory: an id, and whether it is deleted
NPROBES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
EF_SEARCHES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
CANDIDATES = (12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class Plan:
    """An index that could be built."""

    factory: str  # string for FAISS's index_factory
    param: str  # search parameter to tune: "nprobe", "efSearch", or "" for none
    bytes: int  # memory of a search, without the stored vectors, which are read from disk
    exact: bool = False

    @property
    def values(self) -> tuple[int, ...]:
        """Return the values of the parameter to try, ascending."""
        return {"nprobe": NPROBES, "efSearch": EF_SEARCHES, "": (0,)}[self.param]


def plans(rows: int, dim: int, memory: int | None = None) -> list[Plan]:
    """Return the indexes over `rows` vectors of `dim` that fit `memory` (bytes; None: no limit), best first.

    Raises:
        PackError: none fits; the message states the memory of the smallest.
    """
    candidates = list(_all_plans(rows, dim))
    fitting = [plan for plan in candidates if memory is None or plan.bytes <= memory]
    if not fitting:
        smallest = min(plan.bytes for plan in candidates)
        raise PackError(
            f"no index over {rows} vectors of {dim} fits {memory} bytes of memory; the smallest takes {smallest}; "
            "allow more memory, or leave images out"
        )
    return fitting


def plan_of(factory: str) -> Plan:
    """Return the plan for a factory string that the user gave; its memory is unknown."""
    param = "nprobe" if factory.startswith("IVF") else "efSearch" if factory.startswith("HNSW") else ""
    return Plan(factory, param, 0, exact=factory in ("Flat", "SQfp16"))


def list_count(rows: int) -> int:
    """Return the number of inverted lists: the power of two nearest to 4 sqrt(rows), at least 16 rows each."""
    return int(min(65_536, max(1, 2 ** round(math.log2(4 * math.sqrt(max(1, rows))))), max(1, rows // 16)))


def exact_bytes(rows: int, dim: int) -> int:
    """Return the memory of an exact search over float16 vectors."""
    return rows * (2 * dim + SHARD_ROW_BYTES)


def ivf_bytes(rows: int, dim: int, code: int) -> int:
    """Return the memory of inverted lists with codes of `code` bytes.

    Codes are stored in blocks of 32, of which the last of each list is half empty on average. To these come an id of 8
    bytes per row, the centroids as float32, and half a byte for four of their dimensions.
    """
    lists = list_count(rows)
    return (rows + 16 * lists) * code + rows * (8 + SHARD_ROW_BYTES) + lists * (4 * dim + dim // 8)


def hnsw_bytes(rows: int, dim: int) -> int:
    """Return the memory of an HNSW graph over int8 vectors.

    The graph has 2 M links of 4 bytes per row on the base level, M on each higher level that one row in M reaches, an
    offset of 8 bytes and a level of 4 bytes.
    """
    return rows * (dim + 4 * (2 * HNSW_LINKS + 1) + 12 + SHARD_ROW_BYTES)


def _all_plans(rows: int, dim: int) -> Iterator[Plan]:
    if rows <= EXACT_ROWS:
        yield Plan("SQfp16", "", exact_bytes(rows, dim), exact=True)
    if dim % 8 == 0 and rows >= 1_024:
        for code, size in (
            (f"PQ{dim // 2}x4fsr", dim // 4), (f"PQ{dim // 4}x4fsr", dim // 8), ("RaBitQfs", dim // 8 + 8)
        ):  # fmt: skip
            yield Plan(f"{_ivf(rows, dim)},{code}", "nprobe", ivf_bytes(rows, dim, size))
    yield Plan(f"HNSW{HNSW_LINKS},SQ8", "efSearch", hnsw_bytes(rows, dim))


def _ivf(rows: int, dim: int) -> str:
    lists = list_count(rows)
    return f"IVF{lists}" if lists <= FLAT_LISTS else f"IVF{lists}(PQ{dim // 4}x4fs,RFlat)"


# --- measurements -------------------------------------------------------------------------------

RECALL_K = 10
GROUP = 8  # queries of one search: crops of one picture
MAX_SEARCHES, MIN_SEARCHES = 120, 15  # that a median is computed from; fewer when searches are slow
TIMING_S = 3.0  # per index
MAX_QUERIES = 1_024
MAX_POINTS = 4  # parameter values that reach the recall and are timed


@dataclass(frozen=True, slots=True)
class Trial:
    """Queries that are not stored, and their exact nearest neighbours."""

    queries: Vectors  # [n, dim]
    truth: Rows  # [n, k] nearest rows, best first
    held_out: bool  # False: stored vectors with noise


def make_trial(shards: VectorShards, queries: Vectors | None, on_progress: OnProgress | None = None) -> Trial:
    """Search the queries exactly. Without queries, stored vectors mixed with others are used.

    Raises:
        PackError: the queries have another dimension than the vectors.
    """
    if queries is not None and (queries.ndim != 2 or queries.shape[1] != shards.dim):
        raise PackError(f"queries must have shape [n, {shards.dim}], got {queries.shape}; embed them with the pack's "
                        "encoder")
    held_out = queries is not None and len(queries) > 0
    used = queries if queries is not None and held_out else _noisy_vectors(shards)
    used = np.ascontiguousarray(used[:MAX_QUERIES], dtype=np.float32)
    return Trial(used, exact_nearest(shards, used, min(RECALL_K, len(shards)), on_progress), held_out)


def exact_nearest(shards: VectorShards, queries: Vectors, k: int, on_progress: OnProgress | None = None) -> Rows:
    """Return the k nearest rows [n, k] of each query by inner product, best first.

    One block of vectors is held in memory at a time.
    """
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


def tune(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, folder: Path, shards: VectorShards) -> IndexEntry:
    """Return the entry with the fastest parameters that reach the recall, or with the highest recall if none does."""
    points = list(_operating_points(entry, plan, trial, recall, folder / entry.path))
    reached = [point for point in points if point.recall >= recall] or [max(points, key=lambda point: point.recall)]
    return min(measure(reached, trial, folder, shards), key=lambda point: point.p50_ms_8)


def measure(entries: Sequence[IndexEntry], trial: Trial, folder: Path, shards: VectorShards) -> list[IndexEntry]:
    """Return entries of one index with different parameters, with their recall (by id) and median times."""
    indexes = [VectorIndex.open(folder, entry, shards, tombstones=np.empty(0, dtype=np.int64)) for entry in entries]
    times = _median_times(indexes, trial.queries, trial.truth.shape[1])
    return [
        replace(entry, recall=_recall(index, trial), p50_ms_1=round(one, 3), p50_ms_8=round(eight, 3))
        for entry, index, (one, eight) in zip(entries, indexes, times, strict=True)
    ]


def _recall(index: VectorIndex, trial: Trial) -> float:
    found = index.search(trial.queries, trial.truth.shape[1]).ids
    wanted = index.shards.ids_of(trial.truth)
    shares = [len(np.intersect1d(f, w)) / len(np.unique(w)) for f, w in zip(found, wanted, strict=True)]
    return round(float(np.mean(shares)), 4)


def _operating_points(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, path: Path) -> Iterator[IndexEntry]:
    """Yield for each parameter value the entry with the fewest candidates that reach the recall."""
    index, remaining = read_index(path), MAX_POINTS
    for value in plan.values:
        params = {plan.param: value} if plan.param else {}
        most = entry.recall_k if plan.exact else min(entry.rows, value if plan.param == "efSearch" else CANDIDATES[-1])
        found = index.search(trial.queries, most, params=search_params(index, params, count=most))[1]
        positions = _positions(found, trial.truth)
        counts = [count for count in CANDIDATES if count < most and not plan.exact] + [most]
        recalls = [(count, _recall_of_worse_half(positions < count)) for count in counts]
        count, best = next((pair for pair in recalls if pair[1] >= recall), recalls[-1])
        yield replace(entry, params=params, candidates=0 if plan.exact else count, recall=best)
        remaining -= best >= recall
        if not remaining:
            return


def _positions(found: Rows, truth: Rows) -> NDArray[np.int64]:
    """Return the position in `found` [n, c] of each true row [n, k]; c if it is missing."""
    same = found[:, None, :] == truth[:, :, None]
    return np.asarray(np.where(same.any(axis=2), same.argmax(axis=2), found.shape[1]), dtype=np.int64)


def _recall_of_worse_half(hit: NDArray[np.bool_]) -> float:
    """Return the recall of the worse half of the queries, so that a lucky choice on one half does not pass."""
    halves = [half for half in (hit[::2], hit[1::2]) if len(half)]
    return min(float(half.mean()) for half in halves)


def _median_times(indexes: Sequence[VectorIndex], queries: Vectors, k: int) -> list[tuple[float, float]]:
    """Return the median milliseconds for one query and for eight. The indexes take turns, for equal disturbance."""
    groups = [queries[at : at + GROUP] for at in range(0, max(1, len(queries) - GROUP + 1), GROUP)]
    times: list[list[tuple[float, float]]] = [[] for _ in indexes]
    begin = time.perf_counter()
    for turn in range(MAX_SEARCHES):
        if turn >= MIN_SEARCHES and time.perf_counter() - begin > TIMING_S * len(indexes):
            break
        group = groups[turn % len(groups)]
        eight = np.resize(group, (GROUP, group.shape[1]))
        for index, own in zip(indexes, times, strict=True):
            own.append((_search_ms(index, eight[:1], k), _search_ms(index, eight, k)))
    return [(float(one), float(eight)) for one, eight in (np.median(own, axis=0) for own in times)]


def _search_ms(index: VectorIndex, queries: Vectors, k: int) -> float:
    begin = time.perf_counter()
    index.search(queries, k)
    return 1e3 * (time.perf_counter() - begin)


def _noisy_vectors(shards: VectorShards, count: int = 512) -> Vectors:
    """Return stored vectors, each mixed with another one: [n, dim] of unit length."""
    rng = np.random.default_rng(0)
    rows = rng.choice(len(shards), min(count, len(shards)), replace=False)
    mixed = shards.take(rows) + np.float32(0.4) * shards.take(rng.permutation(rows))
    return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12), dtype=np.float32)
