"""Pictures that are like what a pack holds and yet not in it: its own images, seen as a policy looks at things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from PIL import Image

from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.index import VectorIndex
from gog_edge.retrieval.segment import SegmentReader
from gog_edge.retrieval.vectors import Ids, VectorShards
from gog_edge.types import Pixels, Vectors

BATCH = 32
LEAST_SHARE = 0.55  # of each side that a look shows
ISOLATED_SAMPLE = 64


def sample_images(readers: Sequence[SegmentReader], dead: Ids, count: int, seed: int = 0) -> Ids:
    """Up to `count` ids of live images, evenly drawn, sorted."""
    live = np.setdiff1d(np.concatenate([np.empty(0, np.int64), *(reader.image_ids() for reader in readers)]), dead)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(live, min(count, len(live)), replace=False))


def look_at(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Another look at what a picture shows: a part of it, in other light, taken with fewer pixels."""
    height, width = pixels.shape[:2]
    share = rng.uniform(LEAST_SHARE, 1.0, 2)
    h, w = (max(1, int(side * part)) for side, part in zip((height, width), share, strict=True))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    light, tint = rng.normal(1.0, 0.12), rng.normal(1.0, 0.04, 3)
    lit = np.clip(pixels[y : y + h, x : x + w] * (light * tint), 0, 255).astype(np.uint8)
    scale = rng.uniform(0.5, 1.0)
    size = max(1, int(w * scale)), max(1, int(h * scale))
    return np.asarray(Image.fromarray(lit).resize(size, Image.Resampling.BILINEAR))


def heldout_crops(readers: Sequence[SegmentReader], dead: Ids, encoder: Encoder, count: int) -> Vectors | None:
    """Vectors [n, dim] of looks at up to `count` stored images; None where there is no image."""
    rng = np.random.default_rng(1)
    looks = []
    for image in sample_images(readers, dead, count).tolist():
        stored = next(found for reader in readers if (found := reader.picture(image)) is not None)
        looks.append(look_at(decode_picture(stored.data).pixels, rng))
    if not looks:
        return None
    return np.concatenate([encoder.embed_images(looks[at : at + BATCH]) for at in range(0, len(looks), BATCH)])


def golden_image(index: VectorIndex, dead: Ids, before: int | None) -> int | None:
    """The live image that every opening asks for: it must find itself.

    That of `before` where it still does, or else the one, of a sample, that is farthest from all others: only its own
    encoder brings it back. None where no image of the sample finds itself.
    """
    shards = index.shards
    kept = [] if before is None or before in dead else [before]
    for image in chain(kept, _lonely(shards, dead)):
        row = shards.first_rows(np.array([image], dtype=np.int64))
        if row[0] >= 0 and int(index.search(shards.take(row), 1).ids[0, 0]) == image:
            return image
    return None


def _lonely(shards: VectorShards, dead: Ids) -> Iterator[int]:
    """Live images of a sample, the one that is farthest from all others first."""
    rows = np.unique(np.linspace(0, len(shards) - 1, min(ISOLATED_SAMPLE, len(shards))).astype(np.int64))
    ids = shards.ids_of(rows)
    rows, ids = rows[~np.isin(ids, dead)], ids[~np.isin(ids, dead)]
    if not len(rows):
        return
    mine = shards.take(rows)
    nearest = np.full(len(rows), -1.0, dtype=np.float32)
    at = 0
    for block in shards.blocks():
        own = shards.ids_of(np.arange(at, at + len(block), dtype=np.int64))
        cosines = np.where(ids[:, None] == own[None, :], -1.0, mine @ block.T)  # [sample, block]
        nearest = np.maximum(nearest, cosines.max(axis=1))
        at += len(block)
    yield from ids[np.argsort(nearest, kind="stable")].tolist()
