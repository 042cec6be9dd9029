"""The interface between the agent loop and a policy; local, remote and recorded policies implement it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gog_edge.picture import Picture
from gog_edge.policy.dialect.dialect import LoopRules
from gog_edge.types import Action, Observation, Utterance


class Conversation(Protocol):
    """The conversation of one question. It is only ever appended to."""

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Generate one turn of the policy.

        Args:
            max_tokens: upper limit of generated tokens.
            deadline: a value of `time.monotonic()` at which generation stops with what it has.
            force_answer: open the turn with the dialect's answer tag, so that it must be an answer.
            on_text: called with each piece of text as it is decoded.
            on_action: called at most once, as soon as the action of the turn is certain. The action of the utterance
                is authoritative.

        Both callbacks run in the calling thread.

        Raises:
            BudgetExceeded: the context is full.
            BackendError: the engine or server failed.
        """

    def observe(self, observation: Observation) -> None:
        """Append the result of an action; nothing is computed before the next `generate`.

        A notice that follows another observation without a `generate` between them becomes part of its turn.
        """

    def close(self) -> None:
        """Release the KV cache."""


class Policy(Protocol):
    """A model that decides where to look and what to search for."""

    @property
    def name(self) -> str:
        """Return the name for traces and /v1/models."""

    @property
    def rules(self) -> LoopRules:
        """Return what the policy requires of the agent loop, in addition to the loop's own limits."""

    def begin(self, picture: Picture, question: str) -> Conversation:
        """Start a conversation about a picture."""
