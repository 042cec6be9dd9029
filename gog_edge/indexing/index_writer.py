"""Builds the FAISS index of a space: the first plan, of those that fit the memory, that reaches the wanted recall.

Nothing here grows with the number of vectors but the index itself: it is trained on a bounded sample, filled block by
block, and compared with an exact search that holds one block at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import sync_files
from gog_edge.indexing.index_planner import EXACT_MS, Plan, plan_of, plans
from gog_edge.indexing.index_tuning import OnProgress, Trial, fastest, make_trial, measured
from gog_edge.retrieval.faiss_file import omp_threads
from gog_edge.retrieval.index import IndexEntry, VectorIndex
from gog_edge.retrieval.vectors import VectorShards
from gog_edge.types import Vectors

POINTS = 32  # vectors for each centroid that is learnt
TRAIN_ROWS = (32_768, 262_144)  # at least, where there are so many, and at most: half a gigabyte of 512 dimensions
ROUNDS = 8  # of k-means; more gain nothing that was measured
NO_IDS = np.empty(0, dtype=np.int64)


def build_index(
    folder: Path,
    name: str,
    shards: VectorShards,
    queries: Vectors | None,
    *,
    memory: int | None = None,
    recall: float = 0.95,
    factory: str | None = None,
    params: Mapping[str, int] | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> IndexEntry:
    """Write `folder / name`, an index over all rows of `shards`, and say how it is best searched and what that gives.

    Args:
        queries: [n, dim] vectors that are not stored, as like as can be to what will be asked; without them stored
            vectors with noise stand in, and the entry says so.
        memory: bytes that searching may take, or no bound.
        recall: share of the ten nearest that must be found.
        factory: build just this, of FAISS's index_factory (inverted lists, HNSW, flat codes).
        params: search it just so, whatever recall that gives.
        threads: of FAISS while building; all by default.

    Raises:
        PackError: nothing fits the memory or reaches the recall, or FAISS does not know the factory.
        OSError: the disk is full.
    """
    if not len(shards):
        raise PackError("there are no vectors to make an index of; leave the index out")
    chosen = plans(len(shards), shards.dim, memory) if factory is None else [plan_of(factory)]
    with omp_threads(threads or faiss.omp_get_max_threads()):
        trial = make_trial(shards, queries, on_progress)
        best: IndexEntry | None = None
        for plan in chosen:
            entry = _build(folder, name, shards, plan, trial, recall, params, on_progress)
            if _good(entry, plan, recall, alone=plan is chosen[-1] or params is not None):
                return entry
            best = entry if best is None or entry.recall > best.recall else best
    (folder / name).unlink(missing_ok=True)
    raise PackError(
        f"no index over {len(shards)} vectors reached recall@{RECALL_SAID} {recall}; the best, "
        f"'{best.factory if best else None}', reached {best.recall if best else 0}; allow more memory or a lower recall"
    )
