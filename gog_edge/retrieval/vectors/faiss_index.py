"""Search a space with FAISS on the CPU. Index files may come from anywhere and are read within limits."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors.shards import Ids, Rows, VectorShards
from gog_edge.types import Vectors

MAX_K = 1024  # neighbours of one query; FAISS on a GPU allows up to 2048
QUERY_BATCH = 64  # queries that are rescored at once
QUERIES_PER_THREAD = 4  # with fewer, starting another thread costs more than it saves
MAX_THREADS = 4
MAX_ROWS_FETCHED = 32_768  # per query, if many of the nearest rows are hidden or share their ids
Scores: TypeAlias = NDArray[np.float32]
RowHits: TypeAlias = tuple[Scores, Rows]  # scores and rows, [n, c] each, padded with -inf and -1
_faiss: Any = faiss  # its type stubs lack the search parameters


@dataclass(frozen=True, slots=True)
class Hits:
    """The nearest ids of n queries, best first, each id once."""

    scores: Scores  # [n, k] cosine, padded with -inf
    ids: Ids  # [n, k], padded with -1


class IndexPart(Protocol):
    """An index over some rows of a space: `FaissPart` on the CPU, `GpuPart` on a GPU."""

    @property
    def candidates(self) -> int:
        """Return the number of rows to rescore with the stored vectors; 0 if the part's own scores are exact."""

    def fetch_count(self, k: int, rows_per_id: float) -> float:
        """Return how many rows to fetch for the nearest `k` ids, with `rows_per_id` rows each on average."""

    def search(self, queries: Vectors, count: int, *, without: Rows | None = None, effort: int = 1) -> RowHits:
        """Return up to `count` rows per query that are not in `without`; `effort` multiplies the search parameter."""


class VectorIndex:
    """The nearest vectors of a space by cosine; may be searched from several threads."""

    def __init__(self, base: IndexPart | None, delta: IndexPart | None, shards: VectorShards, tombstones: Ids, *,
                 threads: int = MAX_THREADS) -> None:
        """Combine the parts of a space: `base` over its first rows, `delta` over the others."""
        self.shards = shards
        self._parts = [part for part in (base, delta) if part is not None]
        self._deleted_rows = shards.rows_of(tombstones)
        self._hidden = np.zeros(len(shards), dtype=bool)
        self._hidden[self._deleted_rows] = True
        self._live_ids = shards.id_count - len(np.unique(shards.ids_of(self._deleted_rows)))
        self._threads = min(threads, os.cpu_count() or 1)
        self._helpers = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="search")

    @classmethod
    def open(cls, folder: Path, entry: IndexEntry | None, shards: VectorShards, *, tombstones: Ids) -> VectorIndex:
        """Open an index that `build_index` wrote. Rows beyond `entry.rows`, or all without an entry, are scanned.

        Raises:
            PackError: The file cannot be read (see `read_index`), or disagrees with the entry or the shards.
        """
        base = None if entry is None else _open_base(folder / entry.path, entry, shards)
        return cls(base, _open_delta(shards, 0 if entry is None else entry.rows), shards, tombstones)

    def __len__(self) -> int:
        """Return the number of rows that are not deleted."""
        return len(self.shards) - len(self._deleted_rows)

    def close(self) -> None:
        """Stop the helper threads. No search may be running; further calls do nothing."""
        self._helpers.shutdown()

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """Return the k nearest ids of each query, without deleted ones. The result of a query is independent of others.

        Args:
            queries: [n, dim].
            k: Clipped to MAX_K and to the number of ids that can be found.
            without: Ids to ignore.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        hidden, k = self._hidden, min(k, MAX_K, self._live_ids)
        if without is not None and len(without):
            rows = self.shards.rows_of(without)
            rows = rows[~hidden[rows]]
            hidden = hidden.copy()
            hidden[rows] = True
            k = min(k, self._live_ids - len(np.unique(self.shards.ids_of(rows))))
        if k <= 0 or not len(queries):
            return _no_hits(len(queries), max(0, k))
        batches = [self._search(queries[start : start + QUERY_BATCH], k, hidden)
                   for start in range(0, len(queries), QUERY_BATCH)]
        return batches[0] if len(batches) == 1 else Hits(
            np.concatenate([hits.scores for hits in batches]), np.concatenate([hits.ids for hits in batches])
        )  # fmt: skip

    def _search(self, queries: Vectors, k: int, hidden: NDArray[np.bool_]) -> Hits:
        """Search without a filter first, which is fast; then, with a filter, for queries that lack hits."""
        rows_per_id, live = len(self.shards) / self.shards.id_count, len(self) / len(self.shards)
        counts = [math.ceil(part.fetch_count(k, rows_per_id) / live) for part in self._parts]
        found = [self._fetch(part, queries, count) for part, count in zip(self._parts, counts, strict=True)]
        hits = self._nearest_ids(queries, found, k, hidden)
        count, effort = max(counts), 1
        lacking = np.flatnonzero((hits.ids[:, -1] < 0) | _mostly_hidden(found, hidden))
        while len(lacking) and count < min(MAX_ROWS_FETCHED, 8 * len(self.shards)):
            count, effort = 8 * count, 8 * effort
            some, without = queries[lacking], np.flatnonzero(hidden)
            found = [part.search(some, count, without=without, effort=effort) for part in self._parts]
            better = self._nearest_ids(some, found, k, hidden)
            hits.scores[lacking], hits.ids[lacking] = better.scores, better.ids
            lacking = lacking[better.ids[:, -1] < 0]
        return hits

    def _fetch(self, part: IndexPart, queries: Vectors, count: int) -> RowHits:
        """Search a part, in several threads if there are enough queries."""
        threads = min(self._threads, len(queries) // QUERIES_PER_THREAD)
        if threads < 2:
            return part.search(queries, count)
        slices = np.array_split(queries, threads)
        others = [self._helpers.submit(part.search, some, count) for some in slices[1:]]
        found = [part.search(slices[0], count), *(one.result() for one in others)]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def _nearest_ids(self, queries: Vectors, found: list[RowHits], k: int, hidden: NDArray[np.bool_]) -> Hits:
        """Rescore the rows of all parts where needed, drop hidden ones, and keep the best row of each id."""
        exact = [
            (self._rescore(queries, rows), rows) if part.candidates else (scores, rows)
            for part, (scores, rows) in zip(self._parts, found, strict=True)
        ]
        scores = np.concatenate([scores for scores, _ in exact], axis=1)
        rows = np.concatenate([rows for _, rows in exact], axis=1)
        scores = np.where(hidden[rows] | (rows < 0), np.float32(-np.inf), scores)
        scores, ids = _sorted(scores, self.shards.ids_of(rows))
        if self.shards.has_repeated_ids:
            scores, ids = _sorted(np.where(_repeated(ids), np.float32(-np.inf), scores), ids)
        hits = _no_hits(len(queries), k)
        hits.scores[:, : scores.shape[1]] = scores[:, :k]
        hits.ids[:, : scores.shape[1]] = np.where(np.isneginf(scores[:, :k]), -1, ids[:, :k])
        return hits

    def _rescore(self, queries: Vectors, rows: Rows) -> Scores:
        """Return the cosines [n, c] of queries and stored rows, -inf for row -1. Each distinct row is read once."""
        unique, places = np.unique(rows, return_inverse=True)
        first = int(np.searchsorted(unique, 0))  # 1 if row -1 is present
        stored, places = self.shards.take(unique[first:]), places.reshape(rows.shape) - first
        scores = np.empty(rows.shape, dtype=np.float32)
        with omp_threads(1):
            _faiss.fvec_inner_products_by_idx(  # -inf for a negative index
                *map(_faiss.swig_ptr, (scores, queries, stored, np.ascontiguousarray(places))),
                queries.shape[1], len(queries), rows.shape[1],
            )  # fmt: skip
        return scores


def _no_hits(queries: int, k: int) -> Hits:
    return Hits(np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64))


def _mostly_hidden(found: list[RowHits], hidden: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return, per query, whether most rows found are hidden: the few others may not be the nearest ones."""
    rows = np.concatenate([rows for _, rows in found], axis=1)
    return np.asarray(2 * np.count_nonzero(hidden[rows] & (rows >= 0), axis=1) > rows.shape[1])


def _sorted(scores: Scores, ids: Ids) -> tuple[Scores, Ids]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _repeated(ids: Ids) -> NDArray[np.bool_]:
    """Return where in [n, c] an id also occurs further left in its row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    repeated = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated


# --- parts of an index ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaissPart:
    """A FAISS index over consecutive rows of a space."""

    index: Any
    first: int  # its first row
    params: Mapping[str, int]
    candidates: int = 0
    recall_k: int = 0

    def fetch_count(self, k: int, rows_per_id: float) -> float:
        """Return how many rows to fetch: two more for each id beyond the k that `candidates` was tuned for."""
        return self.candidates + 2 * max(0, k - self.recall_k) if self.candidates else k * rows_per_id

    def search(self, queries: Vectors, count: int, *, without: Rows | None = None, effort: int = 1) -> RowHits:
        """Return up to `count` rows per query with FAISS's scores."""
        selector = None if without is None else self._selector(without)
        params = search_params(self.index, self.params, selector=selector, effort=effort, count=count)
        with omp_threads(1):
            try:
                scores, rows = self.index.search(queries, min(count, self.index.ntotal), params=params)
            except (RuntimeError, AssertionError) as exc:
                raise PackError(f"pack: an index cannot be searched ({exc}); copy or build the pack again") from exc
        missing = rows < 0
        return np.where(missing, np.float32(-np.inf), scores), np.where(missing, -1, rows + self.first)

    def _selector(self, without: Rows) -> Any:
        here = without[(without >= self.first) & (without < self.first + self.index.ntotal)] - self.first
        bits = np.zeros(-(-self.index.ntotal // 8) * 8, dtype=bool)
        bits[here] = True
        return _faiss.IDSelectorNot(_faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little")))


def _open_base(path: Path, entry: IndexEntry, shards: VectorShards) -> FaissPart:
    index = read_index(path)
    if index.d != shards.dim or index.ntotal != entry.rows or entry.rows > len(shards):
        raise PackError(
            f"pack: '{path}' has {index.ntotal} vectors of {index.d} dimensions, its entry lists {entry.rows}, the "
            f"shards have {len(shards)} of {shards.dim}; build the pack again"
        )
    search_params(index, entry.params)
    return FaissPart(index, 0, entry.params, entry.candidates, entry.recall_k)


def _open_delta(shards: VectorShards, start: int) -> FaissPart | None:
    """Return an exact index in memory over the rows from `start` on; None if there are none."""
    if start == len(shards):
        return None
    index = faiss.index_factory(shards.dim, "SQfp16" if shards.is_float16 else "Flat", faiss.METRIC_INNER_PRODUCT)
    for block in shards.blocks(start):
        index.add(block)
    return FaissPart(index, start, {})


# --- FAISS ------------------------------------------------------------------------------------

SUPPORTED_TYPES = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlatCodes)
SUPPORTED_TEXT = "inverted lists (IVF), HNSW and flat codes, without wrappers"
_IVF_PREFIX = b"Iw"  # of the type codes of IVF index files
_READ_LOCK = threading.Lock()  # FAISS's deserialization limits are global


def read_index(path: Path) -> Any:
    """Open a FAISS index, memory-mapped if its type can be searched that way.

    Raises:
        PackError: The file is not an index, claims to be longer than it is, has a type that is not supported or another
            metric than the inner product, or has parts that disagree.
    """
    try:
        with _READ_LOCK, _limits(path.stat().st_size):
            index = faiss.read_index(str(path)) if _is_ivf(path) else _map_index(path)
    except (OSError, RuntimeError, ValueError, MemoryError) as exc:
        raise PackError(f"pack: '{path}' cannot be read as a FAISS index ({exc}); build the pack again") from exc
    if not isinstance(index, SUPPORTED_TYPES):
        raise PackError(f"pack: '{path}' is a {type(index).__name__}; supported are {SUPPORTED_TEXT}; build the pack "
                        "again")
    if not index.is_trained:
        raise PackError(f"pack: '{path}' is not trained; build the pack again")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise PackError(f"pack: '{path}' must use the inner product as metric; build the pack again")
    _check_parts(path, index)
    if isinstance(index, faiss.IndexIVFFastScan):
        index.implem = 10  # query by query: a sixth faster here than list by list, FAISS's default for batches
    return index


def _is_ivf(path: Path) -> bool:
    """Return whether the file is an IVF index: FAISS copies these from a mapping, which would double the memory."""
    with path.open("rb") as file:
        return file.read(len(_IVF_PREFIX)) == _IVF_PREFIX


def _map_index(path: Path) -> Any:
    """Return an index whose codes stay in the mapped file.

    FAISS's own reader of mapped files ends the process if a file is cut within a number; this one raises RuntimeError.
    """
    data = np.memmap(path, np.uint8, "r")
    index = _faiss.read_index(_faiss.ZeroCopyIOReader(_faiss.swig_ptr(data), len(data)), faiss.IO_FLAG_MMAP_IFC)
    index.referenced_objects = [data]  # as long as the index lives
    return index


def _check_parts(path: Path, index: Any) -> None:
    """Check that the parts of an index agree; otherwise FAISS reads out of bounds. Its own checks vary by release."""
    if isinstance(index, faiss.IndexIVF):
        _check_equal(path, "lists and centroids", index.nlist, index.quantizer.ntotal)
        _check_equal(path, "dimensions and dimensions of centroids", index.d, index.quantizer.d)
        _check_list_ids(path, index)
    elif isinstance(index, faiss.IndexHNSW):
        _check_equal(path, "graph nodes and vectors", index.ntotal, index.storage.ntotal)
        _check_equal(path, "dimensions and dimensions of vectors", index.d, index.storage.d)
        _check_parts(path, faiss.downcast_index(index.storage))
    elif isinstance(index, faiss.IndexFlatCodes):
        _check_equal(path, "bytes of codes and stored bytes", index.ntotal * index.code_size, index.codes.size())


def _check_list_ids(path: Path, index: Any) -> None:
    """Check that the inverted lists hold as many rows as the index has, and none beyond."""
    lists, rows = index.invlists, 0
    for number in range(index.nlist):
        size = lists.list_size(number)
        if size:
            ids = _faiss.rev_swig_ptr(lists.get_ids(number), size)
            rows += size
            if ids.min() < 0 or ids.max() >= index.ntotal:
                raise PackError(f"pack: '{path}': list {number} must have rows from 0 to {index.ntotal - 1}, got "
                                f"{ids.min()} to {ids.max()}; copy or build the pack again")
    _check_equal(path, "vectors and rows in lists", index.ntotal, rows)


def _check_equal(path: Path, what: str, first: int, second: int) -> None:
    if first != second:
        raise PackError(f"pack: '{path}': {what} must be equal, got {first} and {second}; copy or build the pack again")


def search_params(
    index: Any, params: Mapping[str, int], *, selector: Any = None, effort: int = 1, count: int = 1
) -> Any:
    """Return FAISS search parameters of the index's type for one call; `effort` multiplies nprobe or efSearch.

    Raises:
        PackError: The index does not know a parameter, or its value is not positive.
    """
    known = "nprobe" if isinstance(index, faiss.IndexIVF) else "efSearch" if isinstance(index, faiss.IndexHNSW) else ""
    if any(name != known or value < 1 for name, value in params.items()):
        expected = f"'{known}' of at least 1" if known else "none"
        raise PackError(f"pack: search parameters of a {type(index).__name__} must be {expected}, got {dict(params)}; "
                        "build the pack again")
    if known == "nprobe":
        lists = effort * params.get(known, index.nprobe)
        return _faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nlist, lists))
    if known == "efSearch":
        width = effort * params.get(known, index.hnsw.efSearch)
        return _faiss.SearchParametersHNSW(sel=selector, efSearch=max(width, count))
    return _faiss.SearchParameters(sel=selector)


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """Set the number of OpenMP threads that FAISS uses for calls from this thread, until the end of the block."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _limits(size: int) -> Iterator[None]:
    """Limit what FAISS reads inside the block to the size of the file.

    Byte vectors have eight times that limit: for product codes, FAISS allocates tables that the file does not contain.
    """
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(8 * size)
    faiss.set_deserialization_loop_limit(size)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])
