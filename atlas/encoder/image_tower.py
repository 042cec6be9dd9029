"""Training of the image tower by metric learning with a proxy per flag (as in Proxy-NCA, Movshovitz-Attias 2017).

Every flag that can be told apart is a class with a learned direction, so that each step contrasts all similar flags.
Crops are also compared with the clean flags of their batch, as in a search. A common threshold on the cosine is learned
with the ranking, so that what is not stored scores low against all flags.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from atlas.encoder.crops import CropMaker, squash
from atlas.encoder.evaluation import SceneCrop, auroc, rank
from atlas.encoder.flagset import FlagSet
from atlas.training import save_state
from gog_edge.errors import ArtifactError
from gog_edge.types import Pixels, Vectors

SCALE = 20.0  # factor on cosines in the softmax
MARGIN = 0.15  # subtracted from the cosine of the right flag
THRESHOLD_SCALE = 16.0  # factor on cosines in the threshold loss
SIDE = 96  # pixels per side of the finished encoder's input
REPORT_EVERY = 90.0  # seconds
WARM_UP = 60  # steps
EMBED_BATCH = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a training run."""

    fresh: int = 32  # new crops per step; their clean flags are added to the batch
    reused: int = 64  # crops per step sampled from the pool
    pool: int = 16_384  # crops kept for reuse
    invented_rate: float = 0.4  # probability of an invented or altered flag
    negative_rate: float = 0.1  # probability of a crop that shows no single flag
    rate: float = 2e-3  # highest learning rate
    weight_decay: float = 0.02
    average: float = 0.995  # decay of the moving average of the weights
    small_side: int = 64  # pixels per side in the first part of the run
    small_share: float = 0.45  # length of that part, as a fraction of the time


class CropPool:
    """Batches of labelled crops: some are new, the rest are sampled from earlier ones."""

    def __init__(self, flags: Sequence[Pixels], countries: int, recipe: Recipe, *, side: int, seed: int) -> None:
        self._flags, self._countries, self._recipe, self._side = flags, countries, recipe, side
        self._maker = CropMaker(flags, seed=seed)
        self._rng = np.random.default_rng([seed, 21])
        self._crops = np.zeros((recipe.pool, side, side, 3), dtype=np.uint8)
        self._labels = np.zeros(recipe.pool, dtype=np.int64)
        self._count = 0

    def _label(self) -> int:
        """Sample the index of a flag, or -1 for a crop that shows no single flag."""
        draw = self._rng.random()
        if draw < self._recipe.negative_rate:
            return -1
        if self._rng.random() < self._recipe.invented_rate and len(self._flags) > self._countries:
            return int(self._rng.integers(self._countries, len(self._flags)))
        return int(self._rng.integers(self._countries))

    def _fill(self) -> int:
        """Draw a new crop into the pool; return its slot."""
        slot = self._count % self._recipe.pool
        label = self._label()
        maker = self._maker
        self._labels[slot] = label
        self._crops[slot] = maker.negative(self._side) if label < 0 else maker.crop(self._flags[label], self._side)
        self._count += 1
        return slot

    def batch(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images [n, side, side, 3] uint8 and labels [n] with n = fresh + reused + fresh.

        They are new crops, reused crops, then the clean flags of the new crops; a random clean flag for a negative.
        """
        recipe = self._recipe
        slots = [self._fill() for _ in range(recipe.fresh)]
        slots += self._rng.integers(min(self._count, recipe.pool), size=recipe.reused).tolist()
        own = self._labels[slots[: recipe.fresh]]
        shown = np.where(own < 0, self._rng.integers(self._countries, size=len(own)), own)
        clean = np.stack([squash(self._flags[label], self._side) for label in shown])
        return np.concatenate([self._crops[slots], clean]), np.concatenate([self._labels[slots], shown])


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert [n, side, side, 3] uint8 to [n, 3, side, side] float32 in -1..1, channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Vary reused crops: brightness, contrast and a shift of up to two pixels."""
    n = len(pictures)
    gain = 1 + 0.12 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    offset = 0.1 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(pictures, (dy, dx), (2, 3)) * gain + offset


class FlagLoss(nn.Module):
    """Softmax over all flags with a margin, plus a loss on a common threshold of the cosine."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(functional.normalize(torch.randn(classes, dim), dim=-1))
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, features: Tensor, labels: Tensor, clean: int) -> Tensor:
        """Return the loss.

        Args:
            features: [n, dim] of unit length; the last `clean` rows are clean flags, the others are crops.
            labels: [n] indices of flags; -1 for rows that must be below the threshold for all flags.
            clean: the number of clean flags.
        """
        cosines = features @ functional.normalize(self.proxies, dim=-1).T
        columns = torch.arange(cosines.shape[1])
        loss = self._ranked(cosines, labels[:, None] == columns)
        same = labels[:-clean, None] == labels[None, -clean:]
        return loss + 0.5 * self._ranked(features[:-clean] @ features[-clean:].T, same)

    def _ranked(self, cosines: Tensor, same: Tensor) -> Tensor:
        """Rank the column with the row's own flag first, if it has one, and keep all others below the threshold."""
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


def resize_positions(state: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Return the weights of the image tower for another input size: interpolate the positions of its pooling."""
    name = "attnpool.positional_embedding"
    whole, cells = state[name][:1], state[name][1:]
    before, after = math.isqrt(len(cells)), side // 32
    grid = cells.T.reshape(1, -1, before, before)
    grid = functional.interpolate(grid, (after, after), mode="bilinear", align_corners=True)
    return state | {name: torch.cat([whole, grid.reshape(-1, after * after).T])}


def update_average(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Update the moving average `target` in place with the weights and batch statistics of `source`."""
    with torch.no_grad():
        for mean, value in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def frozen_copy(tower: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that needs no gradients."""
    return copy.deepcopy(tower).eval().requires_grad_(False)


def build_tower(config: Mapping[str, Any], side: int) -> nn.Module:
    """Build the image tower of an open_clip `model_cfg` for an input of `side` x `side` pixels."""
    from open_clip.modified_resnet import ModifiedResNet

    vision = config["vision_cfg"]
    heads = vision["width"] * 32 // vision.get("head_width", 64)
    tower: Any = ModifiedResNet(vision["layers"], config["embed_dim"], heads, side, vision["width"])
    built: nn.Module = tower.to(memory_format=torch.channels_last)
    return built


def embed_images(tower: nn.Module, pictures: Sequence[Pixels], side: int) -> Vectors:
    """Embed pictures of any size: [n, dim] float32 of unit length."""
    parts = []
    for start in range(0, len(pictures), EMBED_BATCH):
        batch = np.stack([squash(picture, side) for picture in pictures[start : start + EMBED_BATCH]])
        with torch.no_grad():
            parts.append(functional.normalize(tower(to_tensor(batch)), dim=-1).numpy())
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """Crops for progress reports: of stored flags, of flags that are not stored, and of no single flag."""

    flagset: FlagSet
    stored: Sequence[SceneCrop]
    unknown: Sequence[Pixels]
    negative: Sequence[Pixels]

    def score(self, tower: nn.Module, side: int) -> dict[str, float]:
        """Return recall@1 and the AUROC of the best cosine between stored flags and the rest."""
        groups = self.flagset.groups
        clean = embed_images(tower, self.flagset.flags, side)
        known = rank(
            embed_images(tower, [crop.pixels for crop in self.stored], side),
            clean,
            groups,
            [groups[crop.flag] for crop in self.stored],
        )
        other, none = (
            rank(embed_images(tower, pictures, side), clean, groups, [-1] * len(pictures)).best
            for pictures in (self.unknown, self.negative)
        )
        return {
            "recall": float(known.correct.mean()),
            "unknown": auroc(known.best, other),
            "nothing": auroc(known.best, none),
            "in": float(known.best.mean()),
            "out": float(other.mean()),
        }


class ImageTraining:
    """A training run of the image tower. Its folder keeps `state.pt`, to resume from, and the best weights `best.pt`.

    Args:
        config: `model_cfg` of the open_clip model.
        flags: the classes: one clean picture each.
        countries: how many of them, from the first on, are flags of countries; the others are invented or altered.
        recipe: hyperparameters.
        folder: for the two files.
        seed: of weights and crops.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        flags: Sequence[Pixels],
        countries: int,
        recipe: Recipe,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self._config, self._flags, self._countries, self._recipe = config, flags, countries, recipe
        self._folder, self._seed = folder, seed
        torch.manual_seed(seed)
        self._loss = FlagLoss(len(flags), config["embed_dim"])
        self._elapsed, self._step, self._best = 0.0, 0, 0.0
        self._set_side(recipe.small_side if recipe.small_share > 0 else SIDE, None)

    def _set_side(self, side: int, old: tuple[nn.Module, nn.Module] | None) -> None:
        """Create towers, optimiser and crops for an input of `side` pixels, with the weights of the old towers."""
        self._side = side
        self._tower, self._mean = build_tower(self._config, side), build_tower(self._config, side)
        if old is None:
            self._mean.load_state_dict(self._tower.state_dict())
        else:
            for new, before in zip((self._tower, self._mean), old, strict=True):
                new.load_state_dict(resize_positions(before.state_dict(), side))
        self._mean = frozen_copy(self._mean)
        self._optimiser = torch.optim.AdamW(
            [
                {"params": list(self._tower.parameters()), "scale": 1.0},
                {"params": list(self._loss.parameters()), "scale": 3.0, "weight_decay": 0.0},
            ],
            lr=self._recipe.rate,
            weight_decay=self._recipe.weight_decay,
        )
        self._pool = CropPool(self._flags, self._countries, self._recipe, side=side, seed=self._seed + side)

    def start_from(self, checkpoint: Path) -> None:
        """Initialise the weights from `best.pt` of another run, proxies included as far as the flags are the same.

        Raises:
            ArtifactError: the file does not exist.
        """
        state = _load(checkpoint)
        for tower in (self._tower, self._mean):
            tower.load_state_dict(resize_positions(state["tower"], self._side))
        with torch.no_grad():
            count = min(len(self._loss.proxies), len(state["loss"]["proxies"]))
            self._loss.proxies[:count] = state["loss"]["proxies"][:count]
            self._loss.threshold.copy_(state["loss"]["threshold"])

    def resume(self) -> None:
        """Continue from `state.pt`, if it exists."""
        path = self._folder / "state.pt"
        if not path.is_file():
            return
        state = _load(path)
        if state["side"] != self._side:
            self._set_side(state["side"], (self._tower, self._mean))
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._elapsed, self._step, self._best = state["elapsed"], state["step"], state["best"]

    def _parts(self) -> dict[str, Any]:
        return {"tower": self._tower, "mean": self._mean, "loss": self._loss, "optimiser": self._optimiser}

    def train(self, seconds: float, validation: ValidationSet, report: Callable[[dict[str, float]], None]) -> None:
        """Train until `seconds` have been spent, including those before an interruption."""
        began, last, losses = time.monotonic() - self._elapsed, time.monotonic(), []
        generator = torch.Generator().manual_seed(self._seed)
        while self._elapsed < seconds:
            done = self._elapsed / seconds
            if self._side != SIDE and done > self._recipe.small_share:
                self._set_side(SIDE, (self._tower, self._mean))
            losses.append(self._step_once(done, generator))
            self._elapsed = time.monotonic() - began
            if time.monotonic() - last > REPORT_EVERY or self._elapsed >= seconds:
                score = validation.score(self._mean, self._side)
                report({"step": self._step, "side": self._side, "done": done, "loss": float(np.mean(losses))} | score)
                self._save(score["recall"] + score["unknown"] + score["nothing"])
                last, losses = time.monotonic(), []

    def _step_once(self, done: float, generator: torch.Generator) -> float:
        """Take one optimiser step; return the loss. `done` is the elapsed fraction of the time."""
        recipe = self._recipe
        rate = recipe.rate * min(1.0, (self._step + 1) / WARM_UP) * (0.505 + 0.495 * math.cos(math.pi * done))
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        pictures, labels = self._pool.batch()
        batch = to_tensor(pictures)
        reused = slice(recipe.fresh, recipe.fresh + recipe.reused)
        batch[reused] = augment(batch[reused], generator)
        self._tower.train()
        features = functional.normalize(self._tower(batch), dim=-1)
        loss = self._loss(features, torch.from_numpy(labels), recipe.fresh)
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._tower.parameters(), 5.0)
        self._optimiser.step()
        update_average(self._mean, self._tower, min(recipe.average, 1 - 10 / (self._step + 20)))
        self._step += 1
        return float(loss.item())

    def _save(self, score: float) -> None:
        better = self._side == SIDE and score >= self._best
        self._best = score if better else self._best
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        numbers = {"side": self._side, "elapsed": self._elapsed, "step": self._step, "best": self._best}
        save_state(self._folder / "state.pt", parts | numbers)
        if better:
            save_state(self._folder / "best.pt", {"tower": self._mean.state_dict(), "loss": self._loss.state_dict()})


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"encoder training: the checkpoint '{path}' does not exist")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
