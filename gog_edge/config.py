"""Every run-time limit with its default, in one place: each class adds what its layer owns.

`Budget` is what a question may cost, `Limits` what a box accepts (the [limits] table of bundle.toml),
`ServeConfig` how it listens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from gog_edge.errors import BundleError, QuestionError
from gog_edge.picture import PictureLimits

_PICTURE = PictureLimits()


@dataclass(frozen=True, slots=True)
class Budget:
    """What one question may cost; the answer is included in each figure."""

    turns: int = 6  # times the policy speaks; the last one is always an answer
    tokens: int = 512  # tokens generated, over all turns
    deadline_ms: int = 20_000  # from the first event to the answer


@dataclass(frozen=True, slots=True)
class GazeConfig:
    """How crops are cut."""

    pad: float = 0.04  # share of each side that is added around a box
    min_side: int = 8  # pixels of the given picture; smaller boxes are grown about their centre
    same_iou: float = 0.9  # boxes that overlap this much are the same gaze
    # Other framings searched in the same call, as (scale, shift in x, shift in y) of the box: a box that is a little
    # too small, too large or beside the thing still finds it.
    framings: tuple[tuple[float, float, float], ...] = (
        (1.3, 0.0, 0.0),
        (0.85, 0.0, 0.0),
        (1.0, -0.15, 0.0),
        (1.0, 0.15, 0.0),
        (1.0, 0.0, -0.15),
        (1.0, 0.0, 0.15),
    )


@dataclass(frozen=True, slots=True)
class Limits(Budget):
    """What a box accepts from anyone who asks."""

    question_chars: int = 2_000
    picture_bytes: int = _PICTURE.max_bytes
    picture_pixels: int = _PICTURE.max_pixels
    concurrent: int = 1  # questions answered at the same time; the others wait or are turned away

    @property
    def budget(self) -> Budget:
        """The part that goes to the loop."""
        return Budget(self.turns, self.tokens, self.deadline_ms)

    @property
    def picture(self) -> PictureLimits:
        """The part that goes to `decode_picture`."""
        return PictureLimits(self.picture_bytes, self.picture_pixels)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, where: str) -> Self:
        """Read [limits]; BundleError names the first key that is unknown or no positive whole number."""
        known = [field.name for field in fields(Limits)]
        for key, value in table.items():
            if key not in known:
                raise BundleError(f"{where}: unknown key '{key}' in [limits]; known are {', '.join(known)}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BundleError(f"{where}: [limits] {key} = {value!r} is no positive whole number")
        return cls(**table)

    def check_question(self, question: str) -> str:
        """The question without outer white space; QuestionError when it is empty, too long or not text."""
        text = question.strip()
        if not text:
            raise QuestionError("the question is empty; ask something about the picture")
        if len(text) > self.question_chars:
            raise QuestionError(f"the question has {len(text)} characters, the limit is {self.question_chars}")
        bad = next((c for c in text if (c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            raise QuestionError(f"the question holds {bad!r}, which is no text; remove it")
        return text


@dataclass(frozen=True, slots=True)
class ServeConfig(Limits):
    """How a box listens and on how many cores it works."""

    host: str = "127.0.0.1"
    port: int = 8080
    threads: int = 0  # 0: one for each core
    traces: Path | None = None  # folder that gets a trace of each episode; None keeps none

    @property
    def cores(self) -> int:
        """The number of threads that an engine gets."""
        return self.threads or os.cpu_count() or 1
