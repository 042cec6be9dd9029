"""A pool of drawn scenes on disk, shared by the stages: shards of pictures of one grid with their truth."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atlas.flags import invented_flag
from atlas.scenes import MAX_FLAGS, RELATIONS, draw_scene, make_spec, relations
from atlas.testset import TRAIN_INVENTED
from gog_edge.types import Pixels, Size

# (resized picture, aspect it is drawn with, share of the pool): 4:3, 3:4, 1:1 and 16:9 under the pixel budget.
GRIDS = (
    (Size(252, 196), 4 / 3, 0.7),
    (Size(196, 252), 3 / 4, 0.1),
    (Size(224, 224), 1.0, 0.1),
    (Size(280, 168), 16 / 9, 0.1),
)
COUNT_WEIGHTS = (0.1, 0.25, 0.25, 0.18, 0.12, 0.1)  # one to six flags
SHARD = 256
OVERDRAW = 1.5  # drawn larger than the model sees, then reduced, as a real picture is


@dataclass(frozen=True, slots=True)
class Shard:
    """Pictures of one grid with their truth."""

    pictures: NDArray[np.uint8]  # [n, H, W, 3] RGB
    boxes: NDArray[np.float32]  # [n, 6, 4] pixels of the picture; rows beyond `counts` are 0
    counts: NDArray[np.int64]  # [n] 1..6
    relations: NDArray[np.int64]  # [n, 14] index of the flag each word of RELATIONS means, -1 where it means none
    occluded: NDArray[np.bool_]  # [n, 6]

    def __len__(self) -> int:
        return len(self.pictures)


def _pick_grid(rng: np.random.Generator) -> int:
    return int(rng.choice(len(GRIDS), p=[grid[2] for grid in GRIDS]))


def draw_shard(number: int, flags: Mapping[str, Pixels], keys: Sequence[str], size: int = SHARD) -> Shard:
    """Draw shard `number`: its seed, its grid and its flags follow from the number alone."""
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
        for index in np.flatnonzero(rng.random(count) < 0.2):
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
    """File of one shard."""
    return folder / f"scenes-{number:04d}.npz"


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Write beside and rename, so that a reader never meets half a shard."""
    path = shard_path(folder, number)
    beside = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(beside, **{name: getattr(shard, name) for name in Shard.__slots__})
    beside.replace(path)


def read_shard(path: Path) -> Shard:
    """Read one shard."""
    with np.load(path) as arrays:
        return Shard(**{name: arrays[name] for name in Shard.__slots__})


def stream(folder: Path, seed: int, batch: int, *, skip: int = 0, most: int = MAX_FLAGS) -> Iterator[Shard]:
    """Endless batches of one grid each, from the shards that are on disk at the time (from number `skip` on).

    Pictures of more than `most` flags are left out.
    """
    rng = np.random.default_rng([seed, 12])
    while True:
        paths = sorted(folder.glob("scenes-????.npz"))[skip:]
        for index in rng.permutation(len(paths)):
            shard = read_shard(paths[index])
            order = rng.permutation(np.flatnonzero(shard.counts <= most))
            for start in range(0, len(order) - batch + 1, batch):
                rows = order[start : start + batch]
                yield Shard(*(getattr(shard, name)[rows] for name in Shard.__slots__))
