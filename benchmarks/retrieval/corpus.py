"""The vectors of one size on disk, crops to search with, and what exact search finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.retrieval.vectors import CROPS, World, write_shards
from gog_edge.files import write_array
from gog_edge.indexing.index_planning import exact_nearest
from gog_edge.retrieval.vectors.shards import VectorShards

PICTURES = 96  # whose crops are searched with
TUNING = 128  # pictures whose crops our planner tunes with
K = 10


@dataclass(frozen=True, slots=True)
class Corpus:
    """A folder that the engines' processes read."""

    folder: Path
    rows: int
    truth: NDArray[np.int64]  # [PICTURES, CROPS, K] ids, nearest first

    def recall(self, ids: NDArray[np.int64], k: int = K) -> float:
        """Share of the k exactly nearest among the first k ids [pictures, crops, >= k] of the first pictures."""
        wanted = self.truth[: len(ids), : ids.shape[1], :k]
        return float((wanted[..., :, None] == ids[..., None, :k]).any(axis=-1).mean())


def make_corpus(world: World, rows: int, work: Path) -> Corpus:
    """Write what is not there yet; sizes share their full shards."""
    folder = work / f"{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(world, rows, work / "vectors")
    (folder / "shards.json").write_text(json.dumps([[str(v.resolve()), str(i.resolve())] for v, i in files]))
    truth = folder / "truth.npy"
    if not truth.exists():
        shards = VectorShards.open(files, world.dim)
        write_array(folder / "tuning.npy", world.pictures(shards, TUNING, seed=1))
        queries = world.pictures(shards, PICTURES, seed=2)
        write_array(folder / "queries.npy", queries)
        nearest = exact_nearest(shards, queries.reshape(-1, world.dim), K)
        write_array(truth, shards.ids_of(nearest).reshape(PICTURES, CROPS, K))
    return Corpus(folder, rows, np.load(truth))
