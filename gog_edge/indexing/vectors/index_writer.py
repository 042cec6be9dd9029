"""Builds the FAISS index of a space, and chooses the image that checks a pack when it is opened.

The index is the first plan, of those that fit the memory, that reaches the wanted recall. It is trained on a bounded
sample and filled block by block, so that only the index itself grows with the number of vectors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import sync_files
from gog_edge.indexing import OnProgress
from gog_edge.indexing.vectors.index_planning import EXACT_MS, Plan, Trial, make_trial, measure, plan_of, plans, tune
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.vectors.faiss_index import SUPPORTED_TEXT, SUPPORTED_TYPES, VectorIndex, omp_threads
from gog_edge.retrieval.vectors.shards import Ids, VectorShards
from gog_edge.types import Vectors

TRAIN_PER_CENTROID = 32  # vectors
TRAIN_ROWS = (32_768, 262_144)  # bounds of the sample; the upper one is half a gigabyte at 512 dimensions
KMEANS_ITERATIONS = 8  # more did not improve the recall in measurements
# Candidates per wanted centroid whose distance is computed exactly, when the index is filled and when it is searched. A
# vector in a wrong list is lost, so filling compares more.
FILL_K_FACTOR, SEARCH_K_FACTOR = 64, 4
FIXED_CANDIDATES = 128  # when search parameters are given instead of tuned
GOLDEN_SAMPLE = 64  # images


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
    """Write `folder / name`, an index over all rows of `shards`, and return its parameters and measurements.

    Args:
        folder: the pack.
        name: path of the file relative to the pack.
        shards: the vectors.
        queries: [n, dim] vectors that are not stored and resemble the queries to come. Without them stored vectors with
            noise are used, and the entry is marked accordingly.
        memory: bytes that a search may take; no limit by default.
        recall: share of the ten nearest neighbours that a search must return.
        factory: string for FAISS's index_factory to use instead of the plans (inverted lists, HNSW, flat codes).
        params: search parameters to use instead of tuning them, whatever their recall.
        threads: FAISS threads while building; all by default.
        on_progress: called with (stage, done, total).

    Raises:
        PackError: nothing fits the memory or reaches the recall, or the factory is not supported.
        OSError: the disk is full.
    """
    if not len(shards):
        raise PackError("an index needs at least one vector; leave the index out")
    chosen = plans(len(shards), shards.dim, memory) if factory is None else [plan_of(factory)]
    with omp_threads(threads or faiss.omp_get_max_threads()):
        trial = make_trial(shards, queries, on_progress)
        tried = []
        for plan in chosen:
            entry = _build_plan(folder, name, shards, plan, trial, recall, params, on_progress)
            if params is not None or _is_good(entry, plan, recall, chosen):
                return entry
            tried.append(entry)
        if chosen[0].exact:  # slow, but no other index reaches the recall
            return _build_plan(folder, name, shards, chosen[0], trial, recall, params, on_progress)
    (folder / name).unlink()
    best = max(tried, key=lambda entry: entry.recall)
    raise PackError(
        f"no index over {len(shards)} vectors reaches a recall@{best.recall_k} of {recall:.1%}; the best, "
        f"'{best.factory}' with {best.params}, reaches {best.recall:.1%}; allow more memory or a lower recall"
    )


def _is_good(entry: IndexEntry, plan: Plan, recall: float, chosen: Sequence[Plan]) -> bool:
    return entry.recall >= recall and (not plan.exact or entry.p50_ms_8 <= EXACT_MS or len(chosen) == 1)


def _build_plan(
    folder: Path,
    name: str,
    shards: VectorShards,
    plan: Plan,
    trial: Trial,
    recall: float,
    params: Mapping[str, int] | None,
    on_progress: OnProgress | None,
) -> IndexEntry:
    """Write the index of one plan and measure it."""
    _write(_fill_index(shards, plan.factory, on_progress), folder / name)
    k = trial.truth.shape[1]
    candidates = 0 if plan.exact else min(FIXED_CANDIDATES, len(shards))
    entry = IndexEntry(name, plan.factory, dict(params or {}), candidates, len(shards), k, 0.0, 0.0, 0.0,
                       len(trial.queries), trial.held_out)  # fmt: skip
    if on_progress is not None:
        on_progress("measuring", 0, 1)
    if params is None:
        return tune(entry, plan, trial, recall, folder, shards)
    return measure([entry], trial, folder, shards)[0]


def _fill_index(shards: VectorShards, factory: str, on_progress: OnProgress | None) -> Any:
    """Return a trained FAISS index with all rows."""
    try:
        index = faiss.index_factory(shards.dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not isinstance(index, SUPPORTED_TYPES):
            raise PackError(f"the index '{factory}' is a {type(index).__name__}; supported are {SUPPORTED_TEXT}")
        _train(index, shards, on_progress)
        _set_k_factor(index, FILL_K_FACTOR)
        for block in shards.blocks():
            index.add(block)
            if on_progress is not None:
                on_progress("indexing", index.ntotal, len(shards))
        _set_k_factor(index, SEARCH_K_FACTOR)
    except RuntimeError as exc:
        raise PackError(f"the index '{factory}' over {len(shards)} vectors of {shards.dim} cannot be built; FAISS: "
                        f"{exc}") from exc
    return index


def _train(index: Any, shards: VectorShards, on_progress: OnProgress | None) -> None:
    """Train centroids (with spherical k-means), then codes, on a random sample."""
    if index.is_trained:
        return
    inverted = faiss.try_extract_index_ivf(index)
    lists = inverted.nlist if inverted else 0
    rows = min(len(shards), max(TRAIN_ROWS[0], min(TRAIN_ROWS[1], TRAIN_PER_CENTROID * lists)))
    sample = shards.take(np.sort(np.random.default_rng(0).choice(len(shards), rows, replace=False)))
    if on_progress is not None:
        on_progress("training", 0, 1)
    if inverted:
        centroids = _centroids(sample, lists)
        quantizer = faiss.downcast_index(inverted.quantizer)
        quantizer.train(centroids)
        quantizer.add(centroids)
    index.train(sample)


def _set_k_factor(index: Any, factor: int) -> None:
    inverted = faiss.try_extract_index_ivf(index)
    quantizer = faiss.downcast_index(inverted.quantizer) if inverted else None
    if isinstance(quantizer, faiss.IndexRefineFlat):
        quantizer.k_factor = factor


def _centroids(sample: Vectors, count: int) -> Vectors:
    means = faiss.Kmeans(
        sample.shape[1], count, niter=KMEANS_ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1,
        max_points_per_centroid=TRAIN_ROWS[1],
    )  # fmt: skip
    means.train(sample)
    return np.asarray(means.centroids, dtype=np.float32)


def _write(index: Any, path: Path) -> None:
    """Write an index atomically; processes that have mapped the old file keep it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        faiss.write_index(index, str(part))
        sync_files([part])
    except RuntimeError as exc:
        part.unlink(missing_ok=True)
        full = os.strerror(errno.ENOSPC) in str(exc)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"the index cannot be written ({exc})", str(path)) from exc
    part.replace(path)


# --- the golden image ---------------------------------------------------------------------------


def golden_image(index: VectorIndex, deleted: Ids, previous: int | None) -> int | None:
    """Return the live image that checks the pack when it is opened: its own vector must find it.

    That is `previous` if it is live and still finds itself, else the image of a sample that is farthest from all
    others, because only the encoder of the pack finds it again. None if no image of the sample finds itself.
    """
    shards = index.shards
    first = [] if previous is None or previous in deleted else [previous]
    for image in chain(first, _isolated_images(shards, deleted)):
        row = shards.first_rows(np.array([image], dtype=np.int64))
        if row[0] >= 0 and int(index.search(shards.take(row), 1).ids[0, 0]) == image:
            return image
    return None


def _isolated_images(shards: VectorShards, deleted: Ids) -> Iterator[int]:
    """Yield the live images of a sample, those with the most distant nearest neighbour first."""
    rows = np.unique(np.linspace(0, len(shards) - 1, min(GOLDEN_SAMPLE, len(shards))).astype(np.int64))
    ids = shards.ids_of(rows)
    rows, ids = rows[~np.isin(ids, deleted)], ids[~np.isin(ids, deleted)]
    if not len(rows):
        return
    sample = shards.take(rows)
    nearest = np.full(len(rows), -1.0, dtype=np.float32)
    at = 0
    for block in shards.blocks():
        block_ids = shards.ids_of(np.arange(at, at + len(block), dtype=np.int64))
        cosines = np.where(ids[:, None] == block_ids[None, :], -1.0, sample @ block.T)  # [sample, block]
        nearest = np.maximum(nearest, cosines.max(axis=1))
        at += len(block)
    yield from ids[np.argsort(nearest, kind="stable")].tolist()
