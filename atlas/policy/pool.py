"""The pool of training scenes on disk: shards of pictures of one size with their ground truth."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atlas.flags import TRAIN_INVENTED, invented_flag
from atlas.scenes import MAX_FLAGS, RELATIONS, draw_scene, make_spec, relations
from gog_edge.types import Pixels, Size

# (picture size, aspect of the scene, fraction of the shards): 4:3, 3:4, 1:1 and 16:9 within the pixel budget.
GRIDS = (
    (Size(252, 196), 4 / 3, 0.7),
    (Size(196, 252), 3 / 4, 0.1),
    (Size(224, 224), 1.0, 0.1),
    (Size(280, 168), 16 / 9, 0.1),
)
COUNT_WEIGHTS = (0.1, 0.25, 0.25, 0.18, 0.12, 0.1)  # probabilities of one to six flags
SHARD = 256  # scenes
OVERDRAW = 1.5  # scenes are drawn larger and then downscaled, as a photo is


@dataclass(frozen=True, slots=True)
class Shard:
    """Pictures of one size with their ground truth."""

    pictures: NDArray[np.uint8]  # [n, H, W, 3] RGB
    boxes: NDArray[np.float32]  # [n, 6, 4] in pixels; rows beyond `counts` are 0
    counts: NDArray[np.int64]  # [n] number of flags, 1..6
    relations: NDArray[np.int64]  # [n, 14] index of the flag that each of RELATIONS refers to; -1 if ambiguous
    occluded: NDArray[np.bool_]  # [n, 6]

    def __len__(self) -> int:
        return len(self.pictures)

    def rows(self, rows: NDArray[np.int64]) -> Shard:
        """Return the scenes with the given indices."""
        return Shard(*(getattr(self, name)[rows] for name in Shard.__slots__))


def _pick_grid(rng: np.random.Generator) -> int:
    return int(rng.choice(len(GRIDS), p=[grid[2] for grid in GRIDS]))


def draw_shard(number: int, flags: Mapping[str, Pixels], keys: Sequence[str], size: int = SHARD) -> Shard:
    """Draw shard `number`, which alone determines the size of the pictures and their content.

    Args:
        number: of the shard.
        flags: pixels by flag key.
        keys: the flags to show; a fifth of those shown are replaced by invented flags.
        size: number of scenes.
    """
    rng = np.random.default_rng([number, 11])
    resized, aspect, _ = GRIDS[_pick_grid(rng)]
    pictures = np.zeros((size, resized.height, resized.width, 3), np.uint8)
    boxes = np.zeros((size, MAX_FLAGS, 4), np.float32)
    counts = np.zeros(size, np.int64)
    meant = np.full((size, len(RELATIONS)), -1, np.int64)
    occluded = np.zeros((size, MAX_FLAGS), np.bool_)
    for row in range(size):
        count = int(rng.choice(MAX_FLAGS, p=COUNT_WEIGHTS)) + 1
        names = [str(name) for name in rng.choice(np.array(keys), count, replace=False)]
        cloths = dict(flags)
        for index in np.flatnonzero(rng.random(count) < 0.2).tolist():
            names[index] = f"invented {rng.choice(TRAIN_INVENTED)}"
            cloths[names[index]] = invented_flag(int(names[index].split()[1]))
        spec = make_spec(number * SHARD + row, names, aspect=aspect)
        drawn = Image.fromarray(draw_scene(spec, cloths, round(resized.width * OVERDRAW)))
        pictures[row] = np.asarray(drawn.resize((resized.width, resized.height), Image.Resampling.BICUBIC))
        counts[row] = count
        for index, item in enumerate(spec.placed):
            box = spec.box(index, resized)
            boxes[row, index] = (box.x0, box.y0, box.x1, box.y1)
            occluded[row, index] = item.occluder is not None
        for name, index in relations(spec).items():
            meant[row, RELATIONS.index(name)] = index
    return Shard(pictures, boxes, counts, meant, occluded)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"scenes-{number:04d}.npz"


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Write a shard atomically: to a temporary file that is then renamed."""
    path = shard_path(folder, number)
    part = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(part, **{name: getattr(shard, name) for name in Shard.__slots__})
    part.replace(path)


def read_shard(path: Path) -> Shard:
    """Read a shard."""
    with np.load(path) as arrays:
        return Shard(**{name: arrays[name] for name in Shard.__slots__})


def stream(folder: Path, seed: int, batch: int, *, skip: int = 0, most: int = MAX_FLAGS) -> Iterator[Shard]:
    """Yield batches without end, each of one picture size, from the shards on disk at the time.

    Args:
        folder: of the shards.
        seed: of the order.
        batch: scenes per batch.
        skip: leave out the first shards, for example for validation.
        most: leave out scenes of more flags.
    """
    rng = np.random.default_rng([seed, 12])
    while True:
        paths = sorted(folder.glob("scenes-????.npz"))[skip:]
        for index in rng.permutation(len(paths)):
            shard = read_shard(paths[index])
            order = rng.permutation(np.flatnonzero(shard.counts <= most))
            for start in range(0, len(order) - batch + 1, batch):
                yield shard.rows(order[start : start + batch])
