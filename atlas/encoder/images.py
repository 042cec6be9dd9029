"""Training of the image tower: every view of a flag is drawn to that flag and away from all others.

Each flag that can be told apart is a class with a learned direction (a proxy), so that every step sees all look-alikes
at once; clean flags are views too, and crops are compared with the clean flags of their batch directly, because that is
what a search does. A common threshold on the cosine is learned beside the ranking, so that a flag of no country scores
low against all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from atlas.encoder.crops import CropMaker, squash
from gog_edge.types import Pixels

SCALE = 20.0  # of cosines in the softmax
MARGIN = 0.15  # that the right flag has to win by
THRESHOLD_SCALE = 16.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one run of image training does."""

    fresh: int = 32  # crops newly drawn each step; the clean flags of these are in the batch too
    kept: int = 64  # crops taken again from the pool
    pool: int = 16_384
    invented_rate: float = 0.4
    nothing_rate: float = 0.1  # crops that show no single flag: they have to stay away from all
    rate: float = 2e-3
    weight_decay: float = 0.02
    average: float = 0.995  # of the moving average of the weights
    small_side: int = 64  # pixels a side in the first part of the run
    small_share: float = 0.45  # of the time


class CropPool:
    """Crops with their labels: some new every time, the rest drawn again from what was made before."""

    def __init__(self, flags: Sequence[Pixels], countries: int, recipe: Recipe, *, side: int, seed: int) -> None:
        self._flags, self._countries, self._recipe, self._side = flags, countries, recipe, side
        self._maker = CropMaker(flags, seed=seed)
        self._rng = np.random.default_rng([seed, 21])
        self._crops = np.zeros((recipe.pool, side, side, 3), dtype=np.uint8)
        self._labels = np.zeros(recipe.pool, dtype=np.int64)
        self._made = 0

    def _label(self) -> int:
        """A flag, or -1 for a crop that shows no single flag."""
        draw = self._rng.random()
        if draw < self._recipe.nothing_rate:
            return -1
        if self._rng.random() < self._recipe.invented_rate and len(self._flags) > self._countries:
            return int(self._rng.integers(self._countries, len(self._flags)))
        return int(self._rng.integers(self._countries))

    def _fill(self) -> int:
        """Draw one new crop; returns its slot."""
        slot = self._made % self._recipe.pool
        label = self._label()
        maker = self._maker
        self._labels[slot] = label
        self._crops[slot] = maker.nothing(self._side) if label < 0 else maker.crop(self._flags[label], self._side)
        self._made += 1
        return slot

    def batch(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """(fresh + kept + fresh) pictures and labels: new crops, kept crops, then the clean flags of the new crops."""
        recipe = self._recipe
        slots = [self._fill() for _ in range(recipe.fresh)]
        slots += self._rng.integers(min(self._made, recipe.pool), size=recipe.kept).tolist()
        own = self._labels[slots[: recipe.fresh]]
        shown = np.where(own < 0, self._rng.integers(self._countries, size=len(own)), own)
        clean = np.stack([squash(self._flags[label], self._side) for label in shown])
        return np.concatenate([self._crops[slots], clean]), np.concatenate([self._labels[slots], shown])


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """[n, side, side, 3] uint8 to [n, 3, side, side] float32 in -1..1, channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def light_change(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A little more variety for crops that are shown again: exposure, contrast and a shift by up to two pixels."""
    n = len(pictures)
    gain = 1 + 0.12 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    offset = 0.1 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(pictures, (dy, dx), (2, 3)) * gain + offset


class FlagLoss(nn.Module):
    """Ranking by softmax over all flags, and one common threshold."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(functional.normalize(torch.randn(classes, dim), dim=-1))
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, features: Tensor, labels: Tensor, clean: int) -> Tensor:
        """`features` [n, dim] of unit length; the last `clean` rows are clean flags, the first are crops.

        A label of -1 (no flag) is no column's: such rows only have to stay away.
        """
        cosines = features @ functional.normalize(self.proxies, dim=-1).T
        columns = torch.arange(cosines.shape[1])
        loss = self._ranked(cosines, labels[:, None] == columns)
        same = labels[:-clean, None] == labels[None, -clean:]
        return loss + 0.5 * self._ranked(features[:-clean] @ features[-clean:].T, same)

    def _ranked(self, cosines: Tensor, same: Tensor) -> Tensor:
        """Rows that have their own column rank it first; all rows stay below the threshold with the others."""
        rest = cosines.masked_fill(same, -1)
        own = cosines.masked_fill(~same, -1).amax(1)
        has = same.any(1)
        logits = SCALE * torch.cat([(own - MARGIN)[has, None], rest[has]], 1)
        ranking = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        return ranking + self._thresholded(own[has], rest.amax(1))

    def _thresholded(self, right: Tensor, wrong: Tensor) -> Tensor:
        low = functional.softplus(-THRESHOLD_SCALE * (right - self.threshold)).mean()
        high = functional.softplus(THRESHOLD_SCALE * (wrong - self.threshold)).mean()
        return (low + high) / 2


def grow(state: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """The image tower's weights for another picture size: only the pooling's positions change."""
    name = "attnpool.positional_embedding"
    whole, cells = state[name][:1], state[name][1:]
    before, after = math.isqrt(len(cells)), side // 32
    grid = cells.T.reshape(1, -1, before, before)
    grid = functional.interpolate(grid, (after, after), mode="bilinear", align_corners=True)
    return state | {name: torch.cat([whole, grid.reshape(-1, after * after).T])}


def averaged(target: nn.Module, source: nn.Module, keep: float) -> None:
    """Move `target` towards `source`, weights and batch statistics alike."""
    with torch.no_grad():
        for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(theirs, 1 - keep)
            else:
                mine.copy_(theirs)


def frozen_copy(tower: nn.Module) -> nn.Module:
    """A copy for the moving average, in evaluation mode."""
    return copy.deepcopy(tower).eval().requires_grad_(False)
