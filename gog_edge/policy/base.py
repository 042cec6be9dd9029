"""What the loop needs of a policy; a local session, a remote server and a script all fit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gog_edge.picture import Picture
from gog_edge.policy.dialect.dialect import LoopRules
from gog_edge.types import Action, Observation, Utterance


class Conversation(Protocol):
    """One question's dialogue. What was said stays said: turns only append."""

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Let the policy speak one turn.

        `deadline` is a `time.monotonic()` value; generation stops there with what it has.
        `force_answer` opens the turn with the dialect's answer tag, so that an Answer must come.
        `on_text` receives pieces of text as they are decoded, `on_action` at most once the action that the turn will
        have, as soon as that is known; the utterance has the last word. Both are called where this was called.
        """

    def observe(self, observation: Observation) -> None:
        """Append what an action brought back; nothing is computed before the next `generate`.

        A notice said on top of what still waits to be answered belongs to its turn.
        """

    def close(self) -> None:
        """Give back the cache slots."""


class Policy(Protocol):
    """Decides where to look and when to search."""

    @property
    def name(self) -> str:
        """Name for traces and /v1/models."""

    @property
    def rules(self) -> LoopRules:
        """What the loop is to keep to beside its own limits."""

    def begin(self, picture: Picture, question: str) -> Conversation:
        """Open a dialogue about a picture; the picture is encoded once."""
