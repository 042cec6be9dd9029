"""Made vectors with the statistics of CLIP's image embeddings, for sizes at which no pictures are at hand.

What is imitated, since it decides how hard a search is:

- a cone: all embeddings share a direction, two random pictures have a cosine of about 0.5;
- a power-law spectrum: some hundred of 512 directions carry the variance (participation ratio 108), in a random basis;
- clusters: topics with Zipf's sizes, kinds within topics, things within kinds; some kinds are dense, some loose. Two
  pictures of a thing have a cosine of about 0.92, two things of a kind 0.78, of a topic 0.65;
- order: pictures of one thing stand in a row, as the pictures of an article do; one picture in fifty is nearly the one
  before it;
- queries are crops: another view of a stored picture, at a cosine of 0.75 to 0.95 to it, mixed with what stands around
  it; a quarter show things that are not stored. Eight crops of one picture are views of three things before the same
  background, so some of them overlap.

Uniform or Gaussian vectors would have no near neighbours at all; plain Gaussian clusters would be found by one list.
All is made block by block from a seed: eight million rows take eight gigabytes of disk and no more memory than a few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gog_edge.retrieval.vectors.shards import VectorShards
from gog_edge.types import Vectors

CONE = 0.5  # share of a vector's squared length along the common direction
TOPIC, KIND, THING = 0.30, 0.25, 0.30  # shares of the rest; what is left differs between pictures of one thing
TOPICS, KINDS = 1_024, 16_384
REPEATED = 0.02  # pictures that are nearly the one before
PICTURES_OF_A_THING = 3.0  # on average
ABSENT = 0.25  # crops of things that are not stored
CROPS = 8  # of one picture
THINGS_OF_A_PICTURE = 3
BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class World:
    """The fixed part: directions, topics and kinds. Rows are float32 [dim]."""

    dim: int
    common: NDArray[np.float32]  # [dim], unit length
    basis: NDArray[np.float32]  # [dim, dim]: standard normal rows times this have the wanted spectrum, mean square 1
    kinds: NDArray[np.float32]  # [KINDS, dim] topic and kind together
    shares: NDArray[np.float64]  # [KINDS] how often
    spread: NDArray[np.float32]  # [KINDS] how loose
    seed: int

    @classmethod
    def make(cls, dim: int = 512, seed: int = 0) -> World:
        """The same for the same seed."""
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
        """Stored rows [rows, dim] of one block."""
        rng = np.random.default_rng((self.seed, 2, number))
        first = rng.random(rows) < 1 / PICTURES_OF_A_THING
        thing = np.cumsum(first)
        count = int(thing[-1]) + 1
        kind = rng.choice(KINDS, count, p=self.shares)
        things = self.kinds[kind] + math.sqrt(THING) * self.spread[kind, None] * self._noise(rng, count)
        view = math.sqrt(1 - TOPIC - KIND - THING) * self._noise(rng, rows)
        again = np.flatnonzero(rng.random(rows) < REPEATED)
        again = again[again > 0]
        view[again] = view[again - 1] + 0.2 * view[again]
        thing[again] = thing[again - 1]
        return self._cone(things[thing] + view)

    def crops(self, stored: Vectors, rng: np.random.Generator) -> Vectors:
        """One picture's crops [CROPS, dim] of its things, given by stored rows [THINGS_OF_A_PICTURE, dim]."""
        things = self._rest(stored)
        absent = rng.random(len(things)) < ABSENT
        kind = rng.choice(KINDS, len(things), p=self.shares)
        new = self._unit(self.kinds[kind] + self._noise(rng, len(things)) * math.sqrt(1 - TOPIC - KIND))
        things[absent] = new[absent]
        around = self._unit(self.kinds[rng.choice(KINDS, 1, p=self.shares)] + self._noise(rng, 1))
        near = rng.uniform(0.5, 0.9, (CROPS, 1)).astype(np.float32)
        other = self._unit(around + self._unit(self._noise(rng, CROPS)))
        return self._cone(near * things[np.arange(CROPS) % len(things)] + np.sqrt(1 - near**2) * other)

    def pictures(self, shards: VectorShards, count: int, seed: int) -> NDArray[np.float32]:
        """Crops [count, CROPS, dim] of pictures that show stored things and others. No crop is stored."""
        rng = np.random.default_rng((self.seed, 3, seed))
        rows = rng.integers(0, len(shards), (count, THINGS_OF_A_PICTURE))
        stored = shards.take(rows.ravel()).reshape(count, THINGS_OF_A_PICTURE, self.dim)
        return np.stack([self.crops(things, rng) for things in stored])

    def _noise(self, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, self.dim), dtype=np.float32) @ self.basis

    def _cone(self, rest: NDArray[np.float32]) -> Vectors:
        """Into the cone: unit vectors."""
        return self._unit(math.sqrt(CONE) * self.common + math.sqrt(1 - CONE) * rest)

    def _rest(self, vectors: Vectors) -> NDArray[np.float32]:
        """What a vector is beside the common direction, of unit length."""
        return self._unit(vectors - (vectors @ self.common)[:, None] * self.common)

    @staticmethod
    def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_shards(world: World, rows: int, folder: Path) -> list[tuple[Path, Path]]:
    """Write float16 shards of BLOCK rows, ids from 0; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_shard(world, start, min(BLOCK, rows - start), folder) for start in range(0, rows, BLOCK)]


def _write_shard(world: World, start: int, rows: int, folder: Path) -> tuple[Path, Path]:
    stem = folder / f"part-{start // BLOCK:06d}-{rows}"
    vectors, ids = stem.with_suffix(".npy"), stem.with_suffix(".ids.npy")
    if not ids.exists():
        np.save(vectors, world.block(start // BLOCK, rows).astype(np.float16))
        np.save(ids, np.arange(start, start + rows, dtype=np.int64))
    return vectors, ids
