"""Drafts by prompt lookup: what followed the same words earlier is guessed to follow them again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gog_edge.errors import InputError

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
