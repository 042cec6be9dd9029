"""FAISS files of packs, which may come from anywhere: read within limits, searched with parameters of their kind."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors.shards import Ids, Rows, VectorShards
from gog_edge.types import Vectors

_faiss: Any = faiss  # its type stubs lack the search parameters
KINDS = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlatCodes)  # that are searched
KINDS_SAID = "inverted lists, HNSW graphs and flat codes, nothing around them"
LISTS = b"Iw"  # how files of inverted lists begin, whatever their codes
_READING = threading.Lock()  # FAISS's limits are the process's


def read_index(path: Path) -> Any:
    """Open a FAISS index, mapped where its kind can be searched so.

    Raises:
        PackError: it is no index, claims to hold more than the file has bytes, is of a kind that is not searched here,
            does not compare by inner product, or its parts are not of each other.
    """
    try:
        with _READING, _limits(path.stat().st_size):
            index = faiss.read_index(str(path), 0 if _has_lists(path) else faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError, MemoryError) as exc:
        raise PackError(f"pack: '{path}' is no index that can be opened ({exc}); build the pack again") from exc
    if not isinstance(index, KINDS):
        raise PackError(f"pack: '{path}' is a {type(index).__name__}; searched are {KINDS_SAID}; build the pack again")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise PackError(f"pack: '{path}' does not compare by inner product; build the pack again")
    _check_parts(path, index)
    if isinstance(index, faiss.IndexIVFFastScan):
        index.implem = 10  # query by query: a sixth quicker here than list by list, FAISS's choice for batches
    return index


def _has_lists(path: Path) -> bool:
    """Whether it is one of inverted lists: those are copied from a mapping, which then stays in memory beside them."""
    with path.open("rb") as file:
        return file.read(len(LISTS)) == LISTS


def _check_parts(path: Path, index: Any) -> None:
    """What FAISS itself looks at differs from release to release; where parts disagree it reads memory not its own."""
    if isinstance(index, faiss.IndexIVF):
        _agree(path, "lists with centroids", index.nlist, index.quantizer.ntotal)
        _agree(path, "dimensions of centroids", index.d, index.quantizer.d)
    elif isinstance(index, faiss.IndexHNSW):
        _agree(path, "vectors in its graph", index.ntotal, index.storage.ntotal)
        _agree(path, "dimensions in its graph", index.d, index.storage.d)
        _check_parts(path, faiss.downcast_index(index.storage))
    elif isinstance(index, faiss.IndexFlatCodes):
        _agree(path, "bytes of codes", index.ntotal * index.code_size, index.codes.size())


def _agree(path: Path, what: str, said: int, held: int) -> None:
    if said != held:
        raise PackError(f"pack: '{path}' says that it has {said} {what}, and has {held}; copy or build the pack again")


def search_params(
    index: Any, params: Mapping[str, int], *, selector: Any = None, wider: int = 1, count: int = 1
) -> Any:
    """Search parameters of the index's own kind, for one call; `wider` multiplies what is looked at.

    Raises:
        PackError: the index does not know a parameter, or it is not positive.
    """
    known = "nprobe" if isinstance(index, faiss.IndexIVF) else "efSearch" if isinstance(index, faiss.IndexHNSW) else ""
    if any(name != known or value < 1 for name, value in params.items()):
        raise PackError(f"pack: search parameters {dict(params)} for a {type(index).__name__}; it takes '{known}' >= 1")
    if known == "nprobe":
        lists = wider * params.get(known, index.nprobe)
        return _faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nlist, lists))
    if known == "efSearch":
        effort = wider * params.get(known, index.hnsw.efSearch)
        return _faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort, count))
    return _faiss.SearchParameters(sel=selector)


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """OpenMP teams of this many for what this thread calls inside."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _limits(size: int) -> Iterator[None]:
    """Nothing read inside may be longer than the file that it stands in.

    Bytes have eight times that: FAISS makes room beside product codes for tables that no file holds.
    """
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(8 * size)
    faiss.set_deserialization_loop_limit(size)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])


MAX_K = 1024  # a bound on what one query may ask for; FAISS on a GPU allows no more than 2048
BATCH = 64  # queries that are compared exactly at once
SLICE = 4  # queries from which another thread is worth its waking
MAX_THREADS = 4
THOROUGH = 32_768  # most candidates of a query, when many of the nearest are hidden or share their ids
Scores = NDArray[np.float32]
Found = tuple[Scores, Rows]  # [n, c] each; -inf and -1 where there is none


@dataclass(frozen=True, slots=True)
class Hits:
    """The nearest of each query, best first, each id once."""

    scores: Scores  # [n, k] cosine; -inf where there is none
    ids: Ids  # [n, k]; -1 where there is none


class Part(Protocol):
    """Consecutive rows that are searched in their own way."""

    @property
    def candidates(self) -> int:
        """Not 0 where what it finds must be compared exactly with the stored vectors."""

    def ask(self, k: int, crowd: float) -> float:
        """How many rows to ask for, to know the nearest `k` ids well, `crowd` rows each on average."""

    def find(self, queries: Vectors, count: int, *, without: Rows | None = None, wider: int = 1) -> Found:
        """Up to `count` rows of each query, by its own scores; never one of `without`."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A FAISS index over consecutive rows."""

    index: Any
    first: int  # row of its number 0
    params: Mapping[str, int]
    candidates: int = 0
    recall_k: int = 0

    def ask(self, k: int, crowd: float) -> float:
        return self.candidates + 2 * max(0, k - self.recall_k) if self.candidates else k * crowd

    def find(self, queries: Vectors, count: int, *, without: Rows | None = None, wider: int = 1) -> Found:
        selector = None if without is None else self._selector(without)
        params = search_params(self.index, self.params, selector=selector, wider=wider, count=count)
        with omp_threads(1):
            scores, rows = self.index.search(queries, min(count, self.index.ntotal), params=params)
        missing = rows < 0
        return np.where(missing, np.float32(-np.inf), scores), np.where(missing, -1, rows + self.first)

    def _selector(self, without: Rows) -> Any:
        here = without[(without >= self.first) & (without < self.first + self.index.ntotal)] - self.first
        bits = np.zeros(-(-self.index.ntotal // 8) * 8, dtype=bool)
        bits[here] = True
        return _faiss.IDSelectorNot(_faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little")))


class VectorIndex:
    """Nearest vectors by cosine; may be searched from several threads."""

    def __init__(self, base: Part | None, delta: Part | None, shards: VectorShards, tombstones: Ids, *,
                 threads: int = MAX_THREADS) -> None:
        self.shards = shards
        self._parts = [part for part in (base, delta) if part is not None]
        self._dead = shards.rows_of(tombstones)
        self._hidden = np.zeros(len(shards), dtype=bool)
        self._hidden[self._dead] = True
        self._distinct = shards.distinct - len(np.unique(shards.ids_of(self._dead)))
        self._threads = min(threads, os.cpu_count() or 1)
        self._helpers = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="search")

    @classmethod
    def open(cls, folder: Path, entry: IndexEntry | None, shards: VectorShards, *, tombstones: Ids) -> VectorIndex:
        """Open what `build_index` wrote; rows beyond `entry.rows`, all of them without an entry, are searched exactly.

        Raises:
            PackError: the file is no FAISS index, is of a kind that is not searched here, compares otherwise than by
                inner product, or holds other rows than the entry and the shards say.
        """
        base = None if entry is None else _open_base(folder / entry.path, entry, shards)
        start = 0 if entry is None else entry.rows
        return cls(base, _delta(shards, start), shards, tombstones)

    def __len__(self) -> int:
        """Rows that can be found."""
        return len(self.shards) - len(self._dead)

    def close(self) -> None:
        """End the threads that help searching; nobody may be searching. A second time does nothing."""
        self._helpers.shutdown()

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """The k nearest ids of each query [n, dim]; what is dead, or in `without`, is never among them.

        k is cut to MAX_K and to the number of ids there are. What a query finds does not depend on the others.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        hidden, k = self._hidden, min(k, MAX_K, self._distinct)
        if without is not None and len(without):
            rows = self.shards.rows_of(without)
            rows = rows[~hidden[rows]]
            hidden = hidden.copy()
            hidden[rows] = True
            k = min(k, self._distinct - len(np.unique(self.shards.ids_of(rows))))
        if k <= 0 or not len(queries):
            return _no_hits(len(queries), max(0, k))
        parts = [self._search(queries[at : at + BATCH], k, hidden) for at in range(0, len(queries), BATCH)]
        return parts[0] if len(parts) == 1 else Hits(
            np.concatenate([part.scores for part in parts]), np.concatenate([part.ids for part in parts])
        )  # fmt: skip

    def _search(self, queries: Vectors, k: int, hidden: NDArray[np.bool_]) -> Hits:
        """First without looking at what is hidden, which is quick; then, for queries that lack hits, thoroughly."""
        crowd, alive = len(self.shards) / self.shards.distinct, len(self) / len(self.shards)
        counts = [math.ceil(part.ask(k, crowd) / alive) for part in self._parts]
        found = [self._find(part, queries, count) for part, count in zip(self._parts, counts, strict=True)]
        hits = self._distinct_hits(queries, found, k, hidden)
        ask, wider = max(counts), 1
        lacking = np.flatnonzero((hits.ids[:, -1] < 0) | self._mostly_hidden(found, hidden))
        while len(lacking) and ask < min(THOROUGH, 8 * len(self.shards)):
            ask, wider = 8 * ask, 8 * wider
            some, without = queries[lacking], np.flatnonzero(hidden)
            found = [part.find(some, ask, without=without, wider=wider) for part in self._parts]
            better = self._distinct_hits(some, found, k, hidden)
            hits.scores[lacking], hits.ids[lacking] = better.scores, better.ids
            lacking = lacking[better.ids[:, -1] < 0]
        return hits

    @staticmethod
    def _mostly_hidden(found: list[Found], hidden: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of which queries most that was found is hidden: the few others need not be the nearest."""
        rows = np.concatenate([rows for _, rows in found], axis=1)
        return np.asarray(2 * np.count_nonzero(hidden[rows] & (rows >= 0), axis=1) > rows.shape[1])

    def _find(self, part: Part, queries: Vectors, count: int) -> Found:
        """Candidates, by several threads of our own where there are enough queries."""
        parts = min(self._threads, len(queries) // SLICE)
        if parts < 2:
            return part.find(queries, count)
        slices = np.array_split(queries, parts)
        later = [self._helpers.submit(part.find, some, count) for some in slices[1:]]
        found = [part.find(slices[0], count), *(one.result() for one in later)]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def _distinct_hits(self, queries: Vectors, found: list[Found], k: int, hidden: NDArray[np.bool_]) -> Hits:
        exact = [
            (self._compare(queries, rows), rows) if part.candidates else (scores, rows)
            for part, (scores, rows) in zip(self._parts, found, strict=True)
        ]
        scores = np.concatenate([scores for scores, _ in exact], axis=1)
        rows = np.concatenate([rows for _, rows in exact], axis=1)
        scores = np.where(hidden[rows] | (rows < 0), np.float32(-np.inf), scores)
        scores, ids = _sorted(scores, self.shards.ids_of(rows))
        if self.shards.repeats:
            scores, ids = _sorted(np.where(_seen_before(ids), np.float32(-np.inf), scores), ids)
        hits = _no_hits(len(queries), k)
        hits.scores[:, : scores.shape[1]] = scores[:, :k]
        hits.ids[:, : scores.shape[1]] = np.where(np.isneginf(scores[:, :k]), -1, ids[:, :k])
        return hits

    def _compare(self, queries: Vectors, rows: Rows) -> Scores:
        """Cosines [n, c] of queries and stored rows; -inf for row -1. Rows that queries share are read once."""
        unique, places = np.unique(rows, return_inverse=True)
        none = int(np.searchsorted(unique, 0))  # 1 where there is a -1
        stored, places = self.shards.take(unique[none:]), places.reshape(rows.shape) - none
        scores = np.empty(rows.shape, dtype=np.float32)
        with omp_threads(1):
            _faiss.fvec_inner_products_by_idx(
                *map(_faiss.swig_ptr, (scores, queries, stored, np.ascontiguousarray(places))),
                queries.shape[1], len(queries), rows.shape[1],
            )  # fmt: skip
        return scores


def _open_base(path: Path, entry: IndexEntry, shards: VectorShards) -> _Part:
    index = read_index(path)
    if index.d != shards.dim or index.ntotal != entry.rows or entry.rows > len(shards):
        raise PackError(
            f"pack: '{path}' holds {index.ntotal} vectors of {index.d}, its entry says {entry.rows}, the shards hold "
            f"{len(shards)} of {shards.dim}; build the pack again"
        )
    search_params(index, entry.params)
    return _Part(index, 0, entry.params, entry.candidates, entry.recall_k)


def _delta(shards: VectorShards, start: int) -> _Part | None:
    if start == len(shards):
        return None
    index = faiss.index_factory(shards.dim, "SQfp16" if shards.half else "Flat", faiss.METRIC_INNER_PRODUCT)
    for block in shards.blocks(start):
        index.add(block)
    return _Part(index, start, {})


def _no_hits(queries: int, k: int) -> Hits:
    return Hits(np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64))


def _sorted(scores: Scores, ids: Ids) -> tuple[Scores, Ids]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _seen_before(ids: Ids) -> NDArray[np.bool_]:
    """Where [n, c] an id stands that stands further left in its row too."""
    order = np.argsort(ids, axis=1, kind="stable")
    together = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], together[:, 1:] == together[:, :-1], axis=1)
    return again
