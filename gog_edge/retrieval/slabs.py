"""Rows of a space in several FAISS indexes, one after the other: each small enough to grow beside itself.

FAISS on a GPU moves all that an index holds with each addition (`FlatIndex::add`), and takes no more than `MOST`
neighbours of a query (`faiss/gpu/utils/DeviceDefs.cuh`). What a query may not ask of them is found in the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import faiss
import numpy as np

from gog_edge.retrieval.faiss_file import omp_threads
from gog_edge.retrieval.index import Found, Scores
from gog_edge.retrieval.vectors import BLOCK_ROWS, Rows, VectorShards
from gog_edge.types import Vectors

_faiss: Any = faiss  # its type stubs lack `knn`
MOST = 2048  # neighbours of a query, and lists that are looked into
SLAB_ROWS = 8 * BLOCK_ROWS
MARGIN = 8  # rows beyond those wanted: queries are rounded to halves there, so the last places may be swapped
Call: TypeAlias = Callable[[Callable[[], Any]], Any]  # does FAISS's work where it may be done


@dataclass(frozen=True, slots=True)
class Slab:
    """A FAISS index over consecutive rows."""

    index: Any
    first: int  # row of its number 0


@dataclass(frozen=True, slots=True)
class SlabPart:
    """All rows of some shards; an `index.Part`."""

    shards: VectorShards
    call: Call
    slabs: list[Slab] = field(default_factory=list)
    candidates: int = MARGIN  # that there are any: scores are those of the stored vectors, as on the CPU

    @classmethod
    def filled(cls, shards: VectorShards, new: Callable[[], Any], call: Call) -> SlabPart:
        """Read all rows into indexes that `new` gives, `SLAB_ROWS` into each. What fails leaves nothing behind."""
        part, at = cls(shards, call), 0
        try:
            for block in shards.blocks():
                if at % SLAB_ROWS == 0:
                    part.slabs.append(Slab(call(new), at))
                call(partial(part.slabs[-1].index.add, block))
                at += len(block)
        except BaseException:
            part.clear()
            raise
        return part

    def ask(self, k: int, crowd: float) -> float:
        """How many rows to ask for, to know the nearest `k` ids, `crowd` rows each on average."""
        return k * crowd + MARGIN

    def find(self, queries: Vectors, count: int, *, without: Rows | None = None, wider: int = 1) -> Found:
        """The nearest `count` rows of each query, or `MOST`; never one of `without`, then all the `count` there are."""
        if without is not None:
            return nearest_rows(self.shards, queries, count, without)
        found: Found = self.call(lambda: search_slabs(self.slabs, queries, min(count, MOST)))
        return found

    def clear(self) -> None:
        """Drop the indexes, where FAISS's work is done. A second time does nothing."""
        if self.slabs:
            self.call(self.slabs.clear)


def search_slabs(slabs: Sequence[Slab], queries: Vectors, count: int) -> Found:
    """The nearest `count` rows of each query [n, dim] over all slabs, in no order: [n, at most count] each."""
    found = [(*slab.index.search(queries, min(count, slab.index.ntotal)), slab.first) for slab in slabs]
    scores = np.concatenate([scores for scores, _, _ in found], axis=1)
    rows = np.concatenate([np.where(rows < 0, -1, rows + first) for _, rows, first in found], axis=1)
    return _best(np.where(rows < 0, np.float32(-np.inf), scores), rows, count)


def nearest_rows(shards: VectorShards, queries: Vectors, count: int, without: Rows) -> Found:
    """As `search_slabs`, from the stored vectors and never one of `without`: all of them are read."""
    hidden = np.zeros(len(shards), dtype=bool)
    hidden[without] = True
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    at = 0
    for block in shards.blocks():
        seen = np.flatnonzero(~hidden[at : at + len(block)])
        if len(seen):
            with omp_threads(1):
                near, numbers = _faiss.knn(queries, block[seen], min(count, len(seen)), faiss.METRIC_INNER_PRODUCT)
            near, numbers = np.concatenate([scores, near], axis=1), np.concatenate([rows, seen[numbers] + at], axis=1)
            scores, rows = _best(near, numbers, count)
        at += len(block)
    return scores, rows


def _best(scores: Scores, rows: Rows, count: int) -> Found:
    """The `count` best columns of each row of two arrays [n, c]."""
    if scores.shape[1] <= count:
        return scores, rows
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
