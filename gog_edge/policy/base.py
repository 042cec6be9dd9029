"""What the loop needs of a policy; a local session, a remote server and a script all fit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gog_edge.picture import Picture
from gog_edge.types import Observation, Utterance


class Conversation(Protocol):
    """One question's dialogue. What was said stays said: turns only append."""

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None) -> Utterance:
        """Let the policy speak one turn.

        `deadline` is a `time.monotonic()` value; generation stops there with what it has.
        `force_answer` opens the turn with the dialect's answer tag, so that an Answer must come.
        `on_text` receives pieces of text as they are decoded.
        """

    def observe(self, observation: Observation) -> None:
        """Append what an action brought back; nothing is computed before the next `generate`."""

    def close(self) -> None:
        """Give back the cache slots."""


class Policy(Protocol):
    """Decides where to look and when to search."""

    @property
    def name(self) -> str:
        """Name for traces and /v1/models."""

    def begin(self, picture: Picture, question: str) -> Conversation:
        """Open a dialogue about a picture; the picture is encoded once."""
