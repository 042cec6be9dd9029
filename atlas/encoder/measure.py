"""How good an encoder is: which flag a crop of a scene finds, and whether a flag of no country is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlas import scenes
from atlas.encoder.crops import crop_padded
from gog_edge.types import Box, Pixels, Size, Vectors

SCENE_WIDTH = 640  # pixels
BOX_ERROR = 4.0  # pixels a side, at that width
Embed = Callable[[Sequence[Pixels]], Vectors]


@dataclass(frozen=True, slots=True)
class SceneCrop:
    """A flag cut out of a drawn scene."""

    pixels: Pixels
    flag: int  # index into the flags given
    width: float  # pixels, of the flag in the scene
    occluded: bool


def scene_crops(flags: Sequence[Pixels], *, per_flag: int, seed: int, width: int = SCENE_WIDTH) -> list[SceneCrop]:
    """Every flag about `per_flag` times, in scenes of one to six flags, its box a little off on each side."""
    rng = np.random.default_rng([seed, 31])
    order = np.concatenate([rng.permutation(len(flags)) for _ in range(per_flag)]).tolist()
    keyed = {str(index): flag for index, flag in enumerate(flags)}
    error = BOX_ERROR * width / SCENE_WIDTH
    crops, at = [], 0
    while at < len(order):
        chosen = list(dict.fromkeys(order[at : at + int(rng.integers(1, scenes.MAX_FLAGS + 1))]))
        at += len(chosen)
        spec = scenes.make_spec(int(rng.integers(2**31)), [str(index) for index in chosen])
        picture = scenes.draw_scene(spec, keyed, width)
        size = Size(picture.shape[1], picture.shape[0])
        for place, index in enumerate(chosen):
            box = spec.box(place, size)
            near = Box(*(np.array([box.x0, box.y0, box.x1, box.y1]) + rng.uniform(-1, 1, 4) * error).tolist())
            occluded = spec.placed[place].occluder is not None
            crops.append(SceneCrop(crop_padded(picture, near), index, box.width, occluded))
    return crops


def auroc(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    both = np.concatenate([positive, negative])
    order = both.argsort(kind="stable")
    ranks = np.empty(len(both))
    ranks[order] = np.arange(1, len(both) + 1)
    for value in np.unique(both[np.isin(both, negative)]):
        equal = both == value
        ranks[equal] = ranks[equal].mean()
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search over the stored flags gives for each crop; flags that cannot be told apart count as one."""

    right: NDArray[np.bool_]  # [n] the first hit is the crop's flag
    right5: NDArray[np.bool_]  # [n] one of the first five is
    best: NDArray[np.float32]  # [n] cosine of the first hit
    margin: NDArray[np.float32]  # [n] to the next flag
    first: NDArray[np.int64]  # [n] group of the first hit


def rank(crops: Vectors, stored: Vectors, groups: Sequence[int], wanted: Sequence[int]) -> Ranking:
    """Search `crops` [n, dim] in `stored` [m, dim], whose flags belong to `groups` [m]; `wanted` [n] is a group."""
    cosines = crops @ stored.T
    count = max(groups) + 1
    by_group = np.full((len(crops), count), -1.0, dtype=np.float32)
    for column, group in enumerate(groups):
        by_group[:, group] = np.maximum(by_group[:, group], cosines[:, column])
    order = np.argsort(-by_group, axis=1)[:, :5]
    top = np.take_along_axis(by_group, order, axis=1)
    hit = order == np.asarray(wanted)[:, None]
    return Ranking(hit[:, 0], hit.any(1), top[:, 0], top[:, 0] - top[:, 1], order[:, 0])
