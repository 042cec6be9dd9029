"""What a question has cost so far, and when the policy must answer."""

from __future__ import annotations

import time

from gog_edge.config import Budget
from gog_edge.types import Utterance

ANSWER_SHARE = 8  # one part in so many of tokens and time is kept for the last answer


class Spending:
    """Holds one question to its budget. The clock starts when this is made."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.started = time.monotonic()
        self.turns = 0
        self.tokens = 0

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the question was asked."""
        return (time.monotonic() - self.started) * 1000

    def add(self, utterance: Utterance) -> None:
        """Book one turn of the policy."""
        self.turns += 1
        self.tokens += utterance.new_tokens

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
