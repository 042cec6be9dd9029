"""Chooses, builds and measures the FAISS index of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from gog_edge.retrieval.index import Ids
from gog_edge.retrieval.pack import IndexEntry
from gog_edge.types import Vectors

RECALL_K = 10
RECALL_QUERIES = 1_000
EXACT_ROWS = 10_000  # below, exact search costs less than any index
GRAPH_ROWS = 1_000_000  # below, a graph over half-precision vectors fits a small box


def choose_factory(rows: int) -> tuple[str, dict[str, int]]:
    """FAISS factory string and search parameters for a number of images."""
    if rows < EXACT_ROWS:
        return "Flat", {}
    if rows < GRAPH_ROWS:
        return "HNSW32,SQfp16", {"efSearch": 64}
    lists = 1 << round(np.log2(16 * np.sqrt(rows)))
    return f"IVF{lists}_HNSW32,SQ8", {"nprobe": 64}


def build_index(
    root: Path, name: str, ids: Ids, vectors: Vectors, factory: str | None = None, params: dict[str, int] | None = None
) -> IndexEntry:
    """Write `root / name` and measure its recall against exact search.

    `ids` [n] int64, `vectors` [n, dim] of unit length, n > 0. Without `factory` the size decides.
    """
    chosen, usual = choose_factory(len(ids)) if factory is None else (factory, {})
    params = usual if params is None else params
    # Inverted lists hold ids themselves; everything else gets an id map around it.
    spec = chosen if chosen.startswith("IVF") or ",IVF" in chosen else f"IDMap2,{chosen}"
    index = faiss.index_factory(vectors.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(root / name))
    for key, value in params.items():
        faiss.ParameterSpace().set_index_parameter(index, key, value)
    k = min(RECALL_K, len(ids))
    return IndexEntry(name, chosen, dict(params), k, round(_recall(index, ids, vectors, k), 4))


def _recall(index: Any, ids: Ids, vectors: Vectors, k: int) -> float:
    """Share of the k exactly nearest that the index finds, for stored vectors as queries."""
    queries = vectors[np.linspace(0, len(ids) - 1, min(RECALL_QUERIES, len(ids))).astype(np.int64)]
    exact = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    exact.add_with_ids(vectors, ids)
    wanted, found = (one.search(queries, k)[1] for one in (exact, index))
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(wanted, found, strict=True)]))
