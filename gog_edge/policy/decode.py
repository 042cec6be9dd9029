"""From logits to text: choosing a token, and telling text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats
from gog_edge.errors import InputError

Chances: TypeAlias = NDArray[np.float64]  # [vocab], sums to 1

UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not yet a character


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise InputError(
                f"sampling with temperature {self.temperature}, top_p {self.top_p} and repetition_penalty "
                f"{self.repetition_penalty} is impossible; use temperature >= 0, 0 < top_p <= 1, penalty > 0"
            )


class Sampler:
    """Chooses tokens, repeatably for one seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """Next token id from logits [vocab]; `said` are the ids of the whole context, for the repetition penalty."""
        if self._sampling.repetition_penalty != 1.0:
            logits = penalise(logits, said, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0.0:
            return int(np.argmax(logits))
        return self._draw(logits)

    def _draw(self, logits: Floats) -> int:
        scaled = logits.astype(np.float64) / self._sampling.temperature
        chances = np.exp(scaled - scaled.max())
        chances /= chances.sum()
        if self._sampling.top_p < 1.0:
            chances = nucleus(chances, self._sampling.top_p)
        return int(self._random.choice(len(chances), p=chances))


def penalise(logits: Floats, said: Sequence[int], penalty: float) -> Floats:
    """Logits with those of tokens already said divided (positive) or multiplied (negative) by `penalty`."""
    ids = np.unique(np.asarray(said, np.int64))
    changed = logits.copy()
    values = changed[ids]
    changed[ids] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def nucleus(chances: Chances, top_p: float) -> Chances:
    """Chances [vocab] of the smallest likeliest set that holds `top_p`, others 0, summing to 1."""
    order = np.argsort(-chances, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    kept = np.zeros_like(chances)
    inside = order[before < top_p]
    kept[inside] = chances[inside]
    kept /= kept.sum()
    return kept


@dataclass(slots=True)
class TextStream:
    """Turns ids into text piece by piece; bytes that are not yet a character are held back."""

    tokenizer: Tokenizer
    _context: list[int] = field(default_factory=list)  # ids of the piece told last: some decoders look back
    _waiting: list[int] = field(default_factory=list)

    def push(self, token: int) -> str:
        """Take one id; returns the text it completes, often one piece, sometimes none."""
        self._waiting.append(token)
        return self._tell(finish=False)

    def finish(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""
        return self._tell(finish=True)

    def _tell(self, *, finish: bool) -> str:
        before = self._decode(self._context)
        piece = self._decode(self._context + self._waiting)[len(before) :]
        if not self._waiting or (piece.endswith(UNFINISHED) and not finish):
            return ""
        self._context, self._waiting = self._waiting, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        # Special tokens stay: a dialect's tags may be among them.
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))
