"""What is read and said in the races: token ids as words come, by Zipf's law, drawn from a seed.

A model with random weights says nothing that quotes. So what our engine says is a script with the form of real turns:
a call, whose syntax the grammar forces, or an answer that quotes the passage just read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from benchmarks.peers.base import Answer

FIRST, WORDS = 256, 20_000  # ids of words; below are bytes, above is what this vocabulary seldom uses
ZIPF = 1.1
QUOTES = (12, 25, 8, 17)  # tokens of the verbatim spans, in turn: answers of one length bear one load
QUOTED = 0.75  # share of an answer that stands in the passage
FORCED = 0.5  # share of a call that is syntax: tags, keys, quotes, brackets; the rest is thought, names and numbers


class Writer:
    """Draws texts, the same ones for the same seed."""

    def __init__(self, seed: int, vocab: int) -> None:
        """`vocab`: ids that the model knows."""
        self._random = np.random.default_rng(seed)
        count = min(WORDS, vocab - FIRST)
        chances = 1 / np.arange(1, count + 1) ** ZIPF
        self._chances = chances / chances.sum()

    def words(self, count: int) -> list[int]:
        """Running text."""
        return [int(FIRST + word) for word in self._random.choice(len(self._chances), count, p=self._chances)]

    def opening(self, count: int) -> list[int]:
        """A prompt whose first token is of its own: no prompt cache knows it from before."""
        return [FIRST + int(self._random.integers(len(self._chances))), *self.words(count - 1)]

    def quoting(self, passage: Sequence[int], count: int) -> Answer:
        """An answer: own words, then a span of the passage, and so on; `QUOTED` of it are spans."""
        tokens: list[int] = []
        for span in cycle(min(span, len(passage)) for span in QUOTES):
            if len(tokens) >= count:
                break
            start = int(self._random.integers(len(passage) - span + 1))
            tokens += self.words(max(1, round(span * (1 - QUOTED) / QUOTED)))
            tokens += passage[start : start + span]
        return Answer(tuple(tokens[:count]))

    def call(self, count: int) -> Answer:
        """A tool call: thought, then syntax and values by turns."""
        thought, part = count // 4, max(1, count // 8)
        forced = [place for place in range(thought, count) if (place - thought) // part % 3 != 2]
        return Answer(tuple(self.words(count)), frozenset(forced[: round(count * FORCED)]))
