"""From logits to text: choosing a token, and telling text piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats
from gog_edge.errors import InputError

Chances: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]

UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not yet a character


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise InputError(
                f"sampling with temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k} and "
                f"repetition_penalty {self.repetition_penalty} is impossible; use temperature >= 0, 0 < top_p <= 1, "
                "top_k >= 0, penalty > 0"
            )


class Chooser(Protocol):
    """Chooses the tokens of one turn."""

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """Next token id from logits [vocab]; `said` is the whole context, which only grows.

        Asked once for each token, in order, and once more, with what is not allowed at -inf, when the first choice was
        not allowed.
        """


class Sampler:
    """Chooses tokens, repeatably for one seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._penalised: Ids = np.empty(0, np.int64)  # each id that was said, once
        self._read = 0  # tokens of `said` that are among them

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """Next token id from logits [vocab]; `said` are the ids of the whole context, for the repetition penalty."""
        if self._sampling.repetition_penalty != 1.0:
            logits = penalise(logits, self._ids(said), self._sampling.repetition_penalty)
        if self._sampling.temperature == 0.0:
            return int(np.argmax(logits))
        return self._draw(logits)

    def _ids(self, said: Sequence[int]) -> Ids:
        fresh = np.setdiff1d(np.asarray(said[self._read :], np.int64), self._penalised)
        if len(fresh):
            self._penalised = np.concatenate([self._penalised, fresh])
        self._read = len(said)
        return self._penalised

    def _draw(self, logits: Floats) -> int:
        # One random number a token, however it is used: drafts and single steps then draw the same tokens.
        ids, chances = shortlist(logits, self._sampling)
        at = int(np.searchsorted(np.cumsum(chances), self._random.random(), side="right"))
        return int(ids[min(at, len(ids) - 1)])


def penalise(logits: Floats, ids: Ids, penalty: float) -> Floats:
    """A copy of logits [vocab]; those of `ids`, which differ, divided (positive) or multiplied (negative)."""
    changed = logits.copy()
    values = changed[ids]
    changed[ids] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def shortlist(logits: Floats, sampling: Sampling) -> tuple[Ids, Chances]:
    """The ids that may be drawn from logits [vocab], in order, and their chances, which sum to 1.

    Temperature first, then the `top_k` likeliest, then of these the fewest that hold `top_p`.
    """
    ids: Ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = logits[ids].astype(np.float64) / sampling.temperature
    chances = np.exp(scaled - scaled[0])
    chances /= chances.sum()
    kept = np.flatnonzero(np.cumsum(chances) - chances < sampling.top_p)
    # By id: which of two equals is the likelier is a matter of rounding, and must not decide what is drawn.
    kept = kept[np.argsort(ids[kept])]
    return ids[kept], chances[kept] / chances[kept].sum()


class Constraint(Protocol):
    """What one turn may still say."""

    @property
    def done(self) -> bool:
        """Nothing may follow, not even an end token: the turn is over."""

    def forced(self) -> Sequence[int]:
        """Ids that must follow now, as the tokenizer would write them; none where there is a choice."""

    def admits(self, ids: Sequence[int]) -> int:
        """How many of these ids, from the first, may follow one another now."""

    def mask(self, logits: Floats) -> None:
        """Set logits [vocab] of what may not follow to -inf, in place."""

    def accept(self, token: int) -> None:
        """Go on to what may follow `token`. DialectError where it may not be said."""


class Unconstrained:
    """Anything may be said."""

    done = False

    def forced(self) -> Sequence[int]:
        """Nothing must follow."""
        return ()

    def admits(self, ids: Sequence[int]) -> int:
        """All of them."""
        return len(ids)

    def mask(self, logits: Floats) -> None:
        """Leave all as it is."""

    def accept(self, token: int) -> None:
        """Anything may follow anything."""


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


@dataclass(slots=True)
class Speech:
    """What is being said, passed on as whole characters."""

    stream: TextStream
    listener: Callable[[str], None] | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        """Say one more token."""
        self.tokens.append(token)
        self._tell(self.stream.push(token))

    def finish(self) -> str:
        """All text, what was held back included."""
        self._tell(self.stream.finish())
        return self.text

    def _tell(self, piece: str) -> None:
        self.text += piece
        if piece and self.listener is not None:
            self.listener(piece)
