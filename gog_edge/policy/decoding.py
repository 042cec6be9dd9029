"""From logits to text: choosing a token, and telling text piece by piece."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
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


RUN = 3  # tokens of the longest runs that are indexed; longer matches are found by looking further back


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """When a draft is made, and of how many tokens: as many as promise most for the time that they take."""

    # (tokens that were said before in the same order, chance that the next guess is right before any was tried).
    matches: tuple[tuple[int, float], ...] = ((1, 0.1), (2, 0.5), (3, 0.8), (5, 0.95))
    weight: float = 3.0  # guesses that these chances count for against those that were tried
    # The price: a step of n + 1 tokens takes (1 + setup + cost * n) times as long as a step of one. Attention over
    # several tokens costs the setup. This is what two cores took once for 2 billion weights in int4 and 1,500 tokens in
    # the cache; `draft_price` measures it where a large decoder runs.
    setup: float = 0.33
    cost: float = 0.24
    most: int = 8  # tokens of one draft

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.matches]
        fits = bool(lengths) and lengths == sorted(set(lengths)) and lengths[0] >= 1 and self.most >= 1
        times = 0 <= self.cost < math.inf and 0 <= self.setup < math.inf and self.weight > 0
        if not fits or not times or not all(0 <= chance < 1 for _, chance in self.matches):
            raise InputError(
                f"{self} makes no drafts; use matches of growing length from 1, with chances from 0 to below 1, "
                "weight > 0, finite setup and cost >= 0, most >= 1"
            )

    def length(self, chance: float) -> int:
        """Guesses of the draft that says most tokens for its time when each is right with `chance`; 0: none pays."""
        best, length, said, all_right = 1.0, 0, 1.0, 1.0
        for count in range(1, self.most + 1):
            all_right *= chance
            said += all_right
            rate = said / (1 + self.setup + self.cost * count)
            if rate > best:
                best, length = rate, count
        return length


class Memory:
    """Where each short run of tokens stood in what was said; grows with it and is forgotten from the end."""

    def __init__(self, barriers: Collection[int]) -> None:
        """No match goes across a barrier: an id that is never drafted."""
        self._barriers = frozenset(barriers)
        self._tokens: list[int] = []
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # run -> where it was followed

    def read(self, said: Sequence[int]) -> None:
        """Take in what was said since the last time."""
        for token in said[len(self._tokens) :]:
            if token not in self._barriers:
                for run in self._runs():
                    self._places[run].append(len(self._tokens))
            self._tokens.append(token)

    def forget(self, length: int) -> None:
        """Go back to the first `length` tokens."""
        while len(self._tokens) > length:
            if self._tokens.pop() not in self._barriers:
                for run in self._runs():
                    self._places[run].pop()

    def following(self, most: int, look_back: int) -> tuple[int, list[int]]:
        """What followed the last tokens when they were said before: at most `most` ids.

        The first figure is the number of tokens that match, as far as `look_back`; 0 when none does.
        """
        for run in reversed(self._runs()):
            if places := self._places.get(run):
                return self._matching(places[-1], len(run), look_back), self._until_barrier(places[-1], most)
        return 0, []

    def _runs(self) -> list[tuple[int, ...]]:
        """The runs at the end, shortest first."""
        runs: list[tuple[int, ...]] = []
        end = len(self._tokens)
        for start in range(end - 1, max(-1, end - 1 - RUN), -1):
            if self._tokens[start] in self._barriers:
                break
            runs.append(tuple(self._tokens[start:]))
        return runs

    def _matching(self, place: int, matching: int, most: int) -> int:
        tokens, end = self._tokens, len(self._tokens)
        while matching < min(most, place) and tokens[place - 1 - matching] == tokens[end - 1 - matching]:
            matching += 1
        return matching

    def _until_barrier(self, start: int, most: int) -> list[int]:
        ids = self._tokens[start : start + most]
        return ids[: next((n for n, token in enumerate(ids) if token in self._barriers), len(ids))]


class Drafter:
    """Makes the drafts of one turn, and learns from them when the next one pays."""

    def __init__(self, config: DraftConfig, memory: Memory) -> None:
        self._config, self._memory = config, memory
        self._right = [chance * config.weight for _, chance in config.matches]  # by kind of match
        self._tried = [config.weight] * len(config.matches)
        self._kind = -1  # of match, of the last proposal
        self.drafted = 0
        self.accepted = 0

    def propose(self, said: Sequence[int], most: int) -> list[int]:
        """Guesses of what follows `said`, at most `most`; often none."""
        self._memory.read(said)
        longest, _ = self._config.matches[-1]
        matching, guesses = self._memory.following(min(most, self._config.most), longest)
        self._kind = sum(matching >= length for length, _ in self._config.matches) - 1
        if self._kind < 0:
            return []
        return guesses[: self._config.length(self._right[self._kind] / self._tried[self._kind])]

    def learn(self, drafted: int, accepted: int) -> None:
        """Of the last proposal `drafted` guesses were computed, and the first `accepted` were right."""
        self.drafted += drafted
        self.accepted += accepted
        self._right[self._kind] += accepted
        self._tried[self._kind] += min(drafted, accepted + 1)
