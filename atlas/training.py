"""What the training commands share: the learning-rate schedule, resumable state and progress lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WARM_UP = 40  # steps
SMOOTHING = 0.95  # weight of the previous average in the figures of a progress line
REPORT_EVERY = 50  # steps


def cosine_decay(progress: float, floor: float) -> float:
    """Return a factor that falls along a cosine from 1 at `progress` 0 to `floor` at 1 and above."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cosine_rate(step: int, steps: int, peak: float, floor: float = 0.05) -> float:
    """Return the learning rate: linear warm-up to `peak`, then a cosine down to `floor * peak` at the last step."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * cosine_decay((step - WARM_UP) / max(1, steps - WARM_UP), floor)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state atomically: an interrupted write leaves the previous file intact."""
    part = path.with_name(path.name + ".part")
    torch.save(dict(state), part)
    part.replace(path)


class Progress:
    """Exponential moving averages of the figures of each step, printed as a JSON line every REPORT_EVERY steps."""

    def __init__(self) -> None:
        self.averages: dict[str, float] = {}  # by the name of the figure
        self._started = time.monotonic()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of a step; a figure may be missing from some steps."""
        for key, value in figures.items():
            self.averages[key] = SMOOTHING * self.averages.get(key, value) + (1 - SMOOTHING) * value
        if step % REPORT_EVERY == 0:
            line: dict[str, float] = {"step": step, "seconds": round(time.monotonic() - self._started)}
            line |= {key: round(value, 4) for key, value in sorted(self.averages.items())}
            print(json.dumps(line), flush=True)
