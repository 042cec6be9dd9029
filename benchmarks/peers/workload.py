"""The scripted workload of the comparisons: token ids that follow Zipf's law, drawn from a seed.

A model with random weights generates nothing that quotes. Therefore the tokens that our engine generates are scripted,
in the form of real turns: a call whose syntax the grammar forces, or an answer that quotes the passage just read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from gog_edge.engines.base import Floats
from gog_edge.policy.decoding import Unconstrained

FIRST, WORDS = 256, 20_000  # ids of words; ids below are bytes, ids above are rare in this vocabulary
ZIPF = 1.1
QUOTES = (12, 25, 8, 17)  # lengths of the verbatim spans in rotation, so that answers of one length cost the same
QUOTED = 0.75  # fraction of an answer that is quoted from the passage
FORCED = 0.5  # fraction of a call that is syntax (tags, keys, quotes, brackets); the rest is thought, names, numbers


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens to generate in a turn."""

    tokens: tuple[int, ...]
    forced: frozenset[int] = frozenset()  # indices of the tokens that the syntax of a call determines


class Writer:
    """Draws texts; the same seed gives the same texts.

    Args:
        seed: of the texts.
        vocab: number of token ids of the model.
    """

    def __init__(self, seed: int, vocab: int) -> None:
        self._random = np.random.default_rng(seed)
        count = min(WORDS, vocab - FIRST)
        weights = 1 / np.arange(1, count + 1) ** ZIPF
        self._probabilities = weights / weights.sum()

    def words(self, count: int) -> list[int]:
        """Return running text."""
        chosen = self._random.choice(len(self._probabilities), count, p=self._probabilities)
        return [int(FIRST + word) for word in chosen]

    def opening(self, count: int) -> list[int]:
        """Return a prompt with a random first token, so that no prompt cache contains it."""
        return [FIRST + int(self._random.integers(len(self._probabilities))), *self.words(count - 1)]

    def quoting(self, passage: Sequence[int], count: int) -> Answer:
        """Return an answer in which own words and spans of the passage alternate; `QUOTED` of it are spans."""
        tokens: list[int] = []
        for span in cycle(min(span, len(passage)) for span in QUOTES):
            if len(tokens) >= count:
                break
            start = int(self._random.integers(len(passage) - span + 1))
            tokens += self.words(max(1, round(span * (1 - QUOTED) / QUOTED)))
            tokens += passage[start : start + span]
        return Answer(tuple(tokens[:count]))

    def call(self, count: int) -> Answer:
        """Return a tool call: a thought, then syntax and values in alternation."""
        thought, part = count // 4, max(1, count // 8)
        forced = [place for place in range(thought, count) if (place - thought) // part % 3 != 2]
        return Answer(tuple(self.words(count)), frozenset(forced[: round(count * FORCED)]))


@dataclass(frozen=True, slots=True)
class ScriptedSampler:
    """A sampler that returns the tokens of an answer; the logits of random weights are meaningless."""

    start: int  # tokens of the conversation before the answer
    answer: Answer

    def sample(self, logits: Floats, tokens: Sequence[int]) -> int:
        """Return the next token of the answer."""
        return self.answer.tokens[len(tokens) - self.start]


@dataclass(slots=True)
class ScriptedConstraint(Unconstrained):
    """A constraint in place of a dialect's grammar: it forces the tokens that the answer marks as forced."""

    answer: Answer
    place: int = 0  # tokens accepted so far

    def forced_tokens(self) -> Sequence[int]:
        """Return the forced tokens that come next."""
        end = self.place
        while end in self.answer.forced:
            end += 1
        return self.answer.tokens[self.place : end]

    def accept_token(self, token: int) -> None:
        """Advance by one token."""
        self.place += 1
