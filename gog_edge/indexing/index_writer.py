"""Builds the FAISS index of a space: the first plan, of those that fit the memory, that reaches the wanted recall.

Nothing here grows with the number of vectors but the index itself: it is trained on a bounded sample, filled block by
block, and compared with an exact search that holds one block at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import sync_files
from gog_edge.indexing.index_planning import (
    EXACT_MS,
    OnProgress,
    Plan,
    Trial,
    make_trial,
    measured,
    plan_of,
    plans,
    tuned,
)
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors.faiss_index import KINDS, KINDS_SAID, omp_threads
from gog_edge.retrieval.vectors.shards import VectorShards
from gog_edge.types import Vectors

POINTS = 32  # vectors for each centroid that is learnt
TRAIN_ROWS = (32_768, 262_144)  # at least, where there are so many, and at most: half a gigabyte of 512 dimensions
ROUNDS = 8  # of k-means; more gain nothing that was measured
# Scanned centroids that are compared exactly, for each that is wanted: a vector that is stored in a wrong list is lost.
FILLING, SEARCHING = 64, 4
GIVEN_CANDIDATES = 128  # where parameters are given, not found


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
        tried = []
        for plan in chosen:
            entry = _build(folder, name, shards, plan, trial, recall, params, on_progress)
            if params is not None or _good(entry, plan, recall, chosen):
                return entry
            tried.append(entry)
        if chosen[0].exact:  # slow, but nothing else finds what is wanted
            return _build(folder, name, shards, chosen[0], trial, recall, params, on_progress)
    (folder / name).unlink()
    best = max(tried, key=lambda entry: entry.recall)
    raise PackError(
        f"no index over {len(shards)} vectors finds {recall:.0%} of the {best.recall_k} nearest; the best, "
        f"'{best.factory}' with {best.params}, finds {best.recall:.1%}; allow more memory or a lower recall"
    )


def _good(entry: IndexEntry, plan: Plan, recall: float, chosen: Sequence[Plan]) -> bool:
    return entry.recall >= recall and (not plan.exact or entry.p50_ms_8 <= EXACT_MS or len(chosen) == 1)


def _build(
    folder: Path,
    name: str,
    shards: VectorShards,
    plan: Plan,
    trial: Trial,
    recall: float,
    params: Mapping[str, int] | None,
    on_progress: OnProgress | None,
) -> IndexEntry:
    """Write one plan's index and measure it."""
    _write(_filled(shards, plan.factory, on_progress), folder / name)
    k = trial.truth.shape[1]
    candidates = 0 if plan.exact else min(GIVEN_CANDIDATES, len(shards))
    entry = IndexEntry(name, plan.factory, dict(params or {}), candidates, len(shards), k, 0.0, 0.0, 0.0,
                       len(trial.queries), trial.held_out)  # fmt: skip
    if on_progress is not None:
        on_progress("measuring", 0, 1)
    if params is None:
        return tuned(entry, plan, trial, recall, folder, shards)
    return measured([entry], trial, folder, shards)[0]


def _filled(shards: VectorShards, factory: str, on_progress: OnProgress | None) -> Any:
    """A trained index that holds all rows."""
    try:
        index = faiss.index_factory(shards.dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not isinstance(index, KINDS):
            raise PackError(f"no index '{factory}': it is a {type(index).__name__}; searched are {KINDS_SAID}")
        _train(index, shards, on_progress)
        _refine_lists(index, FILLING)
        for block in shards.blocks():
            index.add(block)
            if on_progress is not None:
                on_progress("indexing", index.ntotal, len(shards))
        _refine_lists(index, SEARCHING)
    except RuntimeError as exc:
        raise PackError(f"no index '{factory}' over {len(shards)} vectors of {shards.dim}: FAISS says {exc}") from exc
    return index


def _train(index: Any, shards: VectorShards, on_progress: OnProgress | None) -> None:
    """Learn centroids and codes from a sample; centroids first, with vectors kept on the sphere."""
    if index.is_trained:
        return
    inverted = faiss.try_extract_index_ivf(index)
    lists = inverted.nlist if inverted else 0
    rows = min(len(shards), max(TRAIN_ROWS[0], min(TRAIN_ROWS[1], POINTS * lists)))
    sample = shards.take(np.sort(np.random.default_rng(0).choice(len(shards), rows, replace=False)))
    if on_progress is not None:
        on_progress("training", 0, 1)
    if inverted:
        centroids = _centroids(sample, lists)
        quantiser = faiss.downcast_index(inverted.quantizer)
        quantiser.train(centroids)
        quantiser.add(centroids)
    index.train(sample)


def _refine_lists(index: Any, factor: int) -> None:
    inverted = faiss.try_extract_index_ivf(index)
    quantiser = faiss.downcast_index(inverted.quantizer) if inverted else None
    if isinstance(quantiser, faiss.IndexRefineFlat):
        quantiser.k_factor = factor


def _centroids(sample: Vectors, count: int) -> Vectors:
    means = faiss.Kmeans(
        sample.shape[1], count, niter=ROUNDS, spherical=True, seed=0, min_points_per_centroid=1,
        max_points_per_centroid=TRAIN_ROWS[1],
    )  # fmt: skip
    means.train(sample)
    return np.asarray(means.centroids, dtype=np.float32)


def _write(index: Any, path: Path) -> None:
    """Beside, to the disk, then by rename: who has the old file mapped keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        faiss.write_index(index, str(beside))
        sync_files([beside])
    except RuntimeError as exc:
        beside.unlink(missing_ok=True)
        full = os.strerror(errno.ENOSPC) in str(exc)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"the index cannot be written ({exc})", str(path)) from exc
    beside.replace(path)
