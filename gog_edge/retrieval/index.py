"""Vectors of a pack and the nearest among them: append-only shards, one immutable FAISS index, a searched delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.types import Vectors

Ids = NDArray[np.int64]  # [n] int64, ids of image rows
_faiss: Any = faiss  # its type stubs lack the search parameters
MAX_K = 1024  # a bound on what one query may ask for; FAISS on a GPU allows no more than 2048


@dataclass(frozen=True, slots=True)
class Hits:
    """The nearest images of each query, best first."""

    scores: NDArray[np.float32]  # [n, k] cosine; -inf where there is none
    ids: Ids  # [n, k]; -1 where there is none


class VectorShards:
    """All vectors of a pack, memory-mapped, found by image id."""

    def __init__(self, parts: Sequence[tuple[Ids, NDArray[Any]]], dim: int) -> None:
        """`parts` are (ids [n], vectors [n, dim] float16 or float32) of each shard, in the order they were written."""
        self._dim = dim
        self._parts = [vectors for _, vectors in parts]
        ids = np.concatenate([ids for ids, _ in parts]) if parts else np.empty(0, dtype=np.int64)
        self._starts = np.cumsum([0] + [len(vectors) for vectors in self._parts])
        self._order = np.argsort(ids, kind="stable")
        self.ids: Ids = ids[self._order]  # sorted

    @classmethod
    def open(cls, shards: Sequence[tuple[Path, Path]], dim: int) -> VectorShards:
        """Map (vectors, ids) files.

        Raises:
            PackError: shapes or types are not what a shard holds, or an id stands twice.
        """
        opened = cls([_open_shard(vectors, ids, dim) for vectors, ids in shards], dim)
        twice = opened.ids[1:][opened.ids[1:] == opened.ids[:-1]]
        if len(twice):
            raise PackError(f"pack: image {int(twice[0])} has two vectors; build the pack again")
        return opened

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, ids: Sequence[int] | Ids) -> Vectors:
        """Vectors [n, dim] float32 of images that are known to be there."""
        rows = self._order[np.searchsorted(self.ids, np.asarray(ids, dtype=np.int64))]
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty((len(rows), self._dim), dtype=np.float32)
        for part in np.unique(parts):
            here = parts == part
            found[here] = self._parts[part][rows[here] - self._starts[part]]
        return found


def _open_shard(vectors_file: Path, ids_file: Path, dim: int) -> tuple[Ids, NDArray[Any]]:
    try:
        vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
        ids = np.load(ids_file, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise PackError(f"pack: '{vectors_file}' or its ids are no arrays ({exc}); copy or build it again") from exc
    if vectors.dtype not in (np.float16, np.float32) or vectors.ndim != 2 or vectors.shape[1] != dim:
        raise PackError(f"pack: '{vectors_file}' holds {vectors.dtype} {vectors.shape}, wanted float [n, {dim}]")
    if ids.dtype != np.int64 or ids.shape != (len(vectors),):
        raise PackError(f"pack: '{ids_file}' holds {ids.dtype} {ids.shape}, wanted int64 [{len(vectors)}]")
    return ids, vectors


class ImageIndex:
    """Nearest images by cosine; may be searched from several threads."""

    def __init__(
        self,
        base: Any,
        shards: VectorShards,
        *,
        delta: Ids,
        tombstones: Ids,
    ) -> None:
        """`base` is a FAISS inner-product index with image ids; `delta` are ids it does not hold yet."""
        self._shards = shards
        self._tombstones = tombstones
        self._searched = [base]
        if len(delta):
            recent = faiss.IndexIDMap2(faiss.IndexFlatIP(base.d))
            recent.add_with_ids(shards.take(delta), delta)
            self._searched.append(recent)
        self._selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(tombstones)) if len(tombstones) else None

    @classmethod
    def open(
        cls,
        path: Path,
        params: Mapping[str, int],
        shards: VectorShards,
        *,
        delta: Ids,
        tombstones: Ids,
    ) -> ImageIndex:
        """Map a FAISS file and set its search parameters (`nprobe`, `efSearch`).

        Raises:
            PackError: not a FAISS index, of another metric, or it holds other images than the shards.
        """
        try:
            base = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            for name, value in params.items():
                faiss.ParameterSpace().set_index_parameter(base, name, value)
        except RuntimeError as exc:
            raise PackError(f"pack: '{path}' is no index that can be opened ({exc}); build the pack again") from exc
        if base.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise PackError(f"pack: '{path}' does not compare by inner product; build the pack again")
        if base.ntotal + len(delta) != len(shards):
            raise PackError(
                f"pack: '{path}' holds {base.ntotal} vectors and {len(delta)} came later, but the shards hold "
                f"{len(shards)}; build the pack again"
            )
        return cls(base, shards, delta=delta, tombstones=tombstones)

    def __len__(self) -> int:
        return len(self._shards) - len(self._tombstones)

    @property
    def ids(self) -> Ids:
        """Ids of all vectors, sorted, tombstones included."""
        return self._shards.ids

    def search(self, queries: Vectors, k: int) -> Hits:
        """The k nearest live images of each query [n, dim]; k is cut to MAX_K and to what the pack holds."""
        k = max(0, min(k, MAX_K, len(self)))
        if k == 0 or len(queries) == 0:
            shape = (len(queries), k)
            return Hits(np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64))
        found = [self._search_one(index, queries, k) for index in self._searched]
        if len(found) == 1:
            return Hits(*found[0])
        scores, ids = np.concatenate([s for s, _ in found], axis=1), np.concatenate([i for _, i in found], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1))

    def take(self, ids: Sequence[int] | Ids) -> Vectors:
        """Stored vectors [n, dim] float32 of images."""
        return self._shards.take(ids)

    def _search_one(self, index: Any, queries: Vectors, k: int) -> tuple[NDArray[np.float32], Ids]:
        params = None if self._selector is None else _with_selector(index, self._selector)
        scores, ids = index.search(np.ascontiguousarray(queries), k, params=params)
        return np.where(ids < 0, -np.inf, scores).astype(np.float32), ids


def _with_selector(index: Any, selector: Any) -> Any:
    """Search parameters of the index's own kind: FAISS refuses others, and its defaults would hide our nprobe."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    if isinstance(inner, faiss.IndexIVF):
        return _faiss.SearchParametersIVF(sel=selector, nprobe=inner.nprobe)
    if isinstance(inner, faiss.IndexHNSW):
        return _faiss.SearchParametersHNSW(sel=selector, efSearch=inner.hnsw.efSearch)
    return _faiss.SearchParameters(sel=selector)
