"""One run of image training: a time budget, growing pictures, checkpoints that can be taken up again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas.encoder.crops import squash
from atlas.encoder.flagset import FlagSet
from atlas.encoder.images import CropPool, FlagLoss, Recipe, averaged, frozen_copy, grow, light_change, to_tensor
from atlas.encoder.measure import SceneCrop, auroc, rank
from gog_edge.errors import ArtifactError
from gog_edge.types import Pixels, Vectors

SIDE = 96  # pixels a side of the finished encoder
REPORT_EVERY = 90.0  # seconds
WARM_UP = 60  # steps
EMBED_BATCH = 64


def build_tower(config: Mapping[str, Any], side: int) -> nn.Module:
    """The image tower of an open_clip `model_cfg`, for pictures of `side` pixels."""
    from open_clip.modified_resnet import ModifiedResNet

    vision = config["vision_cfg"]
    heads = vision["width"] * 32 // vision.get("head_width", 64)
    tower = ModifiedResNet(vision["layers"], config["embed_dim"], heads, side, vision["width"])
    return tower.to(memory_format=torch.channels_last)


def embed_images(tower: nn.Module, pictures: Sequence[Pixels], side: int) -> Vectors:
    """[n, dim] of unit length."""
    parts = []
    for start in range(0, len(pictures), EMBED_BATCH):
        batch = np.stack([squash(picture, side) for picture in pictures[start : start + EMBED_BATCH]])
        with torch.no_grad():
            parts.append(functional.normalize(tower(to_tensor(batch)), dim=-1).numpy())
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Trial:
    """What progress is measured on: crops of stored flags, of flags that are not stored, and of no flag."""

    flagset: FlagSet
    stored: Sequence[SceneCrop]
    unknown: Sequence[Pixels]
    nothing: Sequence[Pixels]

    def score(self, tower: nn.Module, side: int) -> dict[str, float]:
        """Recall at 1, and how well the best cosine tells stored flags from the rest (AUROC)."""
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
            for pictures in (self.unknown, self.nothing)
        )
        return {
            "recall": float(known.right.mean()),
            "unknown": auroc(known.best, other),
            "nothing": auroc(known.best, none),
            "in": float(known.best.mean()),
            "out": float(other.mean()),
        }


class ImageRun:
    """Trains the image tower; `state.pt` in the folder lets a broken run go on, `best.pt` is the best so far."""

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
        """Towers, optimiser and crops for pictures of `side` pixels, from the towers so far."""
        self._side = side
        self._tower, self._mean = build_tower(self._config, side), build_tower(self._config, side)
        if old is None:
            self._mean.load_state_dict(self._tower.state_dict())
        else:
            for new, before in zip((self._tower, self._mean), old, strict=True):
                new.load_state_dict(grow(before.state_dict(), side))
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
        """Begin with the weights of an earlier run's `best.pt`; flags that it had keep their proxies.

        Raises:
            ArtifactError: it cannot be read.
        """
        state = _load(checkpoint)
        for tower in (self._tower, self._mean):
            tower.load_state_dict(grow(state["tower"], self._side))
        with torch.no_grad():
            count = min(len(self._loss.proxies), len(state["loss"]["proxies"]))
            self._loss.proxies[:count] = state["loss"]["proxies"][:count]
            self._loss.threshold.copy_(state["loss"]["threshold"])

    def resume(self) -> None:
        """Go on where `state.pt` stands; a run that never began stays as it is."""
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

    def train(self, seconds: float, trial: Trial, report: Callable[[dict[str, float]], None]) -> None:
        """Train until `seconds` of work are done, those before a break included."""
        began, last, losses = time.monotonic() - self._elapsed, time.monotonic(), []
        generator = torch.Generator().manual_seed(self._seed)
        while self._elapsed < seconds:
            done = self._elapsed / seconds
            if self._side != SIDE and done > self._recipe.small_share:
                self._set_side(SIDE, (self._tower, self._mean))
            losses.append(self._learn(done, generator))
            self._elapsed = time.monotonic() - began
            if time.monotonic() - last > REPORT_EVERY or self._elapsed >= seconds:
                score = trial.score(self._mean, self._side)
                report({"step": self._step, "side": self._side, "done": done, "loss": float(np.mean(losses))} | score)
                self._save(score["recall"] + score["unknown"] + score["nothing"])
                last, losses = time.monotonic(), []

    def _learn(self, done: float, generator: torch.Generator) -> float:
        """One step; returns the loss."""
        recipe = self._recipe
        rate = recipe.rate * min(1.0, (self._step + 1) / WARM_UP) * (0.505 + 0.495 * math.cos(math.pi * done))
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        pictures, labels = self._pool.batch()
        batch = to_tensor(pictures)
        again = slice(recipe.fresh, recipe.fresh + recipe.kept)
        batch[again] = light_change(batch[again], generator)
        self._tower.train()
        features = functional.normalize(self._tower(batch), dim=-1)
        loss = self._loss(features, torch.from_numpy(labels), recipe.fresh)
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._tower.parameters(), 5.0)
        self._optimiser.step()
        averaged(self._mean, self._tower, min(recipe.average, 1 - 10 / (self._step + 20)))
        self._step += 1
        return float(loss.item())

    def _save(self, score: float) -> None:
        better = self._side == SIDE and score >= self._best
        self._best = score if better else self._best
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        numbers = {"side": self._side, "elapsed": self._elapsed, "step": self._step, "best": self._best}
        _store(self._folder / "state.pt", parts | numbers)
        if better:
            _store(self._folder / "best.pt", {"tower": self._mean.state_dict(), "loss": self._loss.state_dict()})


def _store(path: Path, value: Any) -> None:
    beside = path.with_name(path.name + ".part")
    torch.save(value, beside)
    beside.replace(path)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"encoder training: there is no checkpoint '{path}'")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
