"""Synthetic vectors with the statistics of CLIP's image embeddings, for sizes of which no pictures are available.

Properties that determine how hard a search is:

- a cone: all embeddings share a direction; two random pictures have a cosine of about 0.5;
- a power-law spectrum: about a hundred of 512 directions carry the variance (participation ratio 108), in a random
  basis;
- clusters: topics with sizes by Zipf's law, kinds within topics, entities within kinds, of varying density. Two
  pictures of an entity have a cosine of about 0.92, two entities of a kind 0.78, of a topic 0.65;
- order: pictures of one entity are adjacent, as the pictures of an article are; one picture in fifty is nearly equal to
  its predecessor;
- queries are crops: other views of stored pictures, with cosines of 0.75 to 0.95, mixed with their surroundings; a
  quarter show entities that are not stored. The eight crops of a picture are views of three entities on the same
  background, so that some of them overlap.

Uniform or Gaussian vectors have no near neighbours, and plain Gaussian clusters are found in a single list. Vectors are
generated in blocks from a seed: eight million rows take eight gigabytes of disk, and no more memory than a few rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gog_edge.files import write_array
from gog_edge.indexing.vectors.index_planning import exact_nearest
from gog_edge.retrieval.pack import StoredVectors
from gog_edge.retrieval.vectors.shards import VectorShards
from gog_edge.types import Vectors

CONE = 0.5  # fraction of a vector's squared length along the common direction
TOPIC, KIND, ENTITY = 0.30, 0.25, 0.30  # fractions of the rest; what remains differs between pictures of an entity
TOPICS, KINDS = 1_024, 16_384
REPEATED = 0.02  # fraction of pictures that are nearly equal to their predecessor
PICTURES_PER_ENTITY = 3.0  # mean
ABSENT = 0.25  # fraction of the entities in queries that are not stored
CROPS = 8  # per picture
ENTITIES_PER_PICTURE = 3
BLOCK = 65_536  # rows of a shard
PICTURES = 96  # whose crops are the queries
TUNING = 128  # pictures whose crops our planner tunes with
K = 10  # neighbours per query


@dataclass(frozen=True, slots=True)
class SyntheticVectors:
    """A distribution of vectors: directions, topics and kinds. Arrays are float32 unless noted."""

    dim: int
    common: NDArray[np.float32]  # [dim], unit length
    basis: NDArray[np.float32]  # [dim, dim]; standard normal rows times this have the spectrum and mean square 1
    kinds: NDArray[np.float32]  # [KINDS, dim], topic and kind together
    shares: NDArray[np.float64]  # [KINDS] probabilities
    spread: NDArray[np.float32]  # [KINDS] factor on the distance of entities
    seed: int

    @classmethod
    def make(cls, dim: int = 512, seed: int = 0) -> SyntheticVectors:
        """Create a distribution; the same seed gives the same one."""
        rng = np.random.default_rng((seed, 1))
        variances = (1 + np.arange(dim) / 8) ** -1.1
        rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        basis = (np.sqrt(variances / variances.sum())[:, None] * rotation).astype(np.float32)
        common = rng.standard_normal(dim).astype(np.float32)
        topics = rng.standard_normal((TOPICS, dim), dtype=np.float32) @ basis
        topic = np.arange(KINDS) % TOPICS
        shares = 1 / (10.0 + topic) / (1 + np.arange(KINDS) // TOPICS)
        kinds = math.sqrt(TOPIC) * topics[topic]
        kinds += math.sqrt(KIND) * (rng.standard_normal((KINDS, dim), dtype=np.float32) @ basis)
        spread = rng.uniform(0.7, 1.2, KINDS).astype(np.float32)
        return cls(dim, common / np.linalg.norm(common), basis, kinds, shares / shares.sum(), spread, seed)

    def block(self, number: int, rows: int = BLOCK) -> Vectors:
        """Return the stored rows of one block: [rows, dim] of unit length."""
        rng = np.random.default_rng((self.seed, 2, number))
        first = rng.random(rows) < 1 / PICTURES_PER_ENTITY
        entity = np.cumsum(first)
        count = int(entity[-1]) + 1
        kind = rng.choice(KINDS, count, p=self.shares)
        entities = self.kinds[kind] + math.sqrt(ENTITY) * self.spread[kind, None] * self._noise(rng, count)
        view = math.sqrt(1 - TOPIC - KIND - ENTITY) * self._noise(rng, rows)
        repeated = np.flatnonzero(rng.random(rows) < REPEATED)
        repeated = repeated[repeated > 0]
        view[repeated] = view[repeated - 1] + 0.2 * view[repeated]
        entity[repeated] = entity[repeated - 1]
        return self._into_cone(entities[entity] + view)

    def crops(self, stored: Vectors, rng: np.random.Generator) -> Vectors:
        """Return the crops of a picture [CROPS, dim] that shows the entities of stored rows [3, dim]."""
        entities = self._without_common(stored)
        absent = rng.random(len(entities)) < ABSENT
        kind = rng.choice(KINDS, len(entities), p=self.shares)
        new = _unit(self.kinds[kind] + self._noise(rng, len(entities)) * math.sqrt(1 - TOPIC - KIND))
        entities[absent] = new[absent]
        background = _unit(self.kinds[rng.choice(KINDS, 1, p=self.shares)] + self._noise(rng, 1))
        cosine = rng.uniform(0.5, 0.9, (CROPS, 1)).astype(np.float32)
        other = _unit(background + _unit(self._noise(rng, CROPS)))
        mixed = cosine * entities[np.arange(CROPS) % len(entities)] + np.sqrt(1 - cosine**2) * other
        return self._into_cone(mixed.astype(np.float32, copy=False))

    def pictures(self, shards: StoredVectors, count: int, seed: int) -> NDArray[np.float32]:
        """Return the crops of pictures [count, CROPS, dim] that show stored and other entities; no crop is stored."""
        rng = np.random.default_rng((self.seed, 3, seed))
        rows = rng.integers(0, len(shards), (count, ENTITIES_PER_PICTURE))
        stored = shards.take(rows.ravel()).reshape(count, ENTITIES_PER_PICTURE, self.dim)
        return np.stack([self.crops(entities, rng) for entities in stored])

    def _noise(self, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, self.dim), dtype=np.float32) @ self.basis

    def _into_cone(self, vectors: NDArray[np.float32]) -> Vectors:
        """Add the common direction; return unit vectors."""
        return _unit(math.sqrt(CONE) * self.common + math.sqrt(1 - CONE) * vectors)

    def _without_common(self, vectors: Vectors) -> NDArray[np.float32]:
        """Remove the common direction; return unit vectors."""
        return _unit(vectors - (vectors @ self.common)[:, None] * self.common)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def write_shards(source: SyntheticVectors, rows: int, folder: Path) -> list[tuple[Path, Path]]:
    """Write float16 shards of BLOCK rows with ids from 0; return (vectors, ids) files. Existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_shard(source, start, min(BLOCK, rows - start), folder) for start in range(0, rows, BLOCK)]


def _write_shard(source: SyntheticVectors, start: int, rows: int, folder: Path) -> tuple[Path, Path]:
    stem = folder / f"part-{start // BLOCK:06d}-{rows}"
    vectors, ids = stem.with_suffix(".npy"), stem.with_suffix(".ids.npy")
    if not ids.exists():
        np.save(vectors, source.block(start // BLOCK, rows).astype(np.float16))
        np.save(ids, np.arange(start, start + rows, dtype=np.int64))
    return vectors, ids


@dataclass(frozen=True, slots=True)
class Corpus:
    """A folder that the processes of the engines read: vectors, queries and the exact result."""

    folder: Path
    rows: int
    truth: NDArray[np.int64]  # [PICTURES, CROPS, K] ids, nearest first

    def recall(self, ids: NDArray[np.int64], k: int = K) -> float:
        """Return the fraction of the k nearest that are among the first k ids.

        Args:
            ids: [pictures, crops, >= k], of the first pictures and their first crops.
            k: up to K.
        """
        wanted = self.truth[: len(ids), : ids.shape[1], :k]
        return float((wanted[..., :, None] == ids[..., None, :k]).any(axis=-1).mean())


def make_corpus(source: SyntheticVectors, rows: int, work: Path) -> Corpus:
    """Write what does not exist yet; corpora of different sizes share their full shards."""
    folder = work / f"{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(source, rows, work / "vectors")
    (folder / "shards.json").write_text(json.dumps([[str(v.resolve()), str(i.resolve())] for v, i in files]))
    truth = folder / "truth.npy"
    if not truth.exists():
        shards = VectorShards.open(files, source.dim)
        write_array(folder / "tuning.npy", source.pictures(shards, TUNING, seed=1))
        queries = source.pictures(shards, PICTURES, seed=2)
        write_array(folder / "queries.npy", queries)
        nearest = exact_nearest(shards, queries.reshape(-1, source.dim), K)
        write_array(truth, shards.ids_of(nearest).reshape(PICTURES, CROPS, K))
    return Corpus(folder, rows, np.load(truth))
