"""What a question has cost so far, and when the policy must answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gog_edge.agent.actions import Refusal
from gog_edge.config import Budget
from gog_edge.policy.dialect.dialect import Allowance
from gog_edge.types import ImageQuery, Query, Utterance

Kind: TypeAlias = Literal["image", "text"]

ANSWER_SHARE = 8  # one part in so many of tokens and time is kept for the last answer


@dataclass(frozen=True, slots=True)
class EpisodeBudget(Budget):
    """What one question may cost with one policy."""

    image_searches: int | None = None  # None: no limit but the turns
    text_searches: int | None = None

    @classmethod
    def of(cls, budget: Budget, allowance: Allowance) -> EpisodeBudget:
        """A question's budget, no larger than what the policy can live with."""
        turns = min(budget.turns, allowance.rounds or budget.turns)
        return cls(turns, budget.tokens, budget.deadline_ms, allowance.image_searches, allowance.text_searches)


class Overdrawn(Refusal):
    """A search beyond its count: rightly said, and no longer to be had."""

    def __init__(self, reason: str) -> None:
        super().__init__("action_refused", reason)


class Spending:
    """Holds one question to its budget. The clock starts when this is made."""

    def __init__(self, budget: EpisodeBudget) -> None:
        self.budget = budget
        self.started = time.monotonic()
        self.turns = 0
        self.tokens = 0
        self._searches: Counter[Kind] = Counter()

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the question was asked."""
        return (time.monotonic() - self.started) * 1000

    def add(self, utterance: Utterance) -> None:
        """Book one turn of the policy."""
        self.turns += 1
        self.tokens += utterance.new_tokens

    def add_search(self, query: Query) -> None:
        """Book one search of the packs."""
        self._searches[_kind(query)] += 1

    def check_search(self, query: Query) -> None:
        """Overdrawn when one more search of this kind would be too many."""
        kind = _kind(query)
        most = self.budget.image_searches if kind == "image" else self.budget.text_searches
        made = self._searches[kind]
        if most is not None and made >= most:
            raise Overdrawn(f"{made} of {most} {kind} searches are made, no more are allowed")

    @property
    def spent(self) -> str:
        """The budget that leaves only one answer: "turns", "tokens", "deadline", or "" when none does."""
        if self.turns >= self.budget.turns - 1:
            return "turns"
        if self.max_tokens(last=False) <= 0:
            return "tokens"
        return "deadline" if time.monotonic() >= self.deadline(last=False) else ""

    def max_tokens(self, *, last: bool) -> int:
        """Tokens the next turn may take; only the last one may take what is kept for the answer."""
        kept = self.budget.tokens // ANSWER_SHARE
        return max(self.budget.tokens - self.tokens, kept, 1) if last else self.budget.tokens - kept - self.tokens

    def deadline(self, *, last: bool) -> float:
        """The `time.monotonic()` value at which the next turn must stop."""
        share = 1.0 if last else 1 - 1 / ANSWER_SHARE
        return self.started + self.budget.deadline_ms / 1000 * share


def _kind(query: Query) -> Kind:
    return "image" if isinstance(query, ImageQuery) else "text"
