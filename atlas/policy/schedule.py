"""Learning rates and resumable state, shared by the stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

WARM_UP = 40  # steps


def cosine_rate(step: int, steps: int, peak: float, floor: float = 0.05) -> float:
    """Linear warm-up, then a cosine from `peak` down to `floor * peak` at the last step."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    progress = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename: a cut-off run leaves the state before."""
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)
