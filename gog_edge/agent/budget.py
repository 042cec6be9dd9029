"""The budget of an episode: what it has used so far, and when the policy must answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gog_edge.agent.actions import ActionRefused
from gog_edge.config import Budget
from gog_edge.policy.dialect.dialect import SearchLimits
from gog_edge.types import ImageQuery, Query, Utterance

SearchKind: TypeAlias = Literal["image", "text"]

RESERVE_DIVISOR = 8  # 1/8 of the tokens and of the time is reserved for the final answer


@dataclass(frozen=True, slots=True)
class EpisodeBudget(Budget):
    """The limits of one question with one policy."""

    image_searches: int | None = None  # None: limited only by the number of turns
    text_searches: int | None = None

    @classmethod
    def combine(cls, budget: Budget, limits: SearchLimits) -> EpisodeBudget:
        """Return the limits of the question, tightened by those of the policy's dialect."""
        turns = min(budget.turns, limits.rounds or budget.turns)
        return cls(turns, budget.tokens, budget.deadline_ms, limits.image_searches, limits.text_searches)


class SearchLimitReached(ActionRefused):
    """A valid search beyond the number of searches that the policy's dialect allows."""

    def __init__(self, reason: str) -> None:
        """Set the reason, which is shown to the policy."""
        super().__init__("action_refused", reason)


class BudgetTracker:
    """Counts what one question has used. The clock starts when the tracker is created."""

    def __init__(self, budget: EpisodeBudget) -> None:
        self.budget = budget
        self.started = time.monotonic()
        self.turns = 0
        self.tokens = 0
        self._searches: Counter[SearchKind] = Counter()

    @property
    def elapsed_ms(self) -> float:
        """Return the milliseconds since the question was asked."""
        return (time.monotonic() - self.started) * 1000

    def add_turn(self, utterance: Utterance) -> None:
        """Count one turn of the policy."""
        self.turns += 1
        self.tokens += utterance.new_tokens

    def add_search(self, query: Query) -> None:
        """Count one search."""
        self._searches[_kind(query)] += 1

    def check_search(self, query: Query) -> None:
        """Raise SearchLimitReached if no further search of this kind is allowed."""
        kind = _kind(query)
        limit = self.budget.image_searches if kind == "image" else self.budget.text_searches
        used = self._searches[kind]
        if limit is not None and used >= limit:
            raise SearchLimitReached(f"{used} of {limit} {kind} searches are used, no more are allowed")

    @property
    def exhausted(self) -> str:
        """Return which limit leaves only the final answer: "turns", "tokens", "deadline", or "" for none."""
        if self.turns >= self.budget.turns - 1:
            return "turns"
        if self.max_tokens(last=False) <= 0:
            return "tokens"
        return "deadline" if time.monotonic() >= self.deadline(last=False) else ""

    def max_tokens(self, *, last: bool) -> int:
        """Return the number of tokens for the next turn; only the last turn may use the reserve."""
        reserve = self.budget.tokens // RESERVE_DIVISOR
        if last:
            return max(self.budget.tokens - self.tokens, reserve, 1)
        return self.budget.tokens - reserve - self.tokens

    def deadline(self, *, last: bool) -> float:
        """Return the `time.monotonic()` value at which the next turn must stop; only the last may use the reserve."""
        fraction = 1.0 if last else 1 - 1 / RESERVE_DIVISOR
        return self.started + self.budget.deadline_ms / 1000 * fraction


def _kind(query: Query) -> SearchKind:
    return "image" if isinstance(query, ImageQuery) else "text"
