"""A policy that records the conversations of another one, for checks against a reference."""

from __future__ import annotations

from collections.abc import Callable

from gog_edge.picture import Picture
from gog_edge.policy.base import Conversation, Policy
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, TurnPart
from gog_edge.types import Action, Observation, Utterance


class RecordedConversation:
    """A conversation that forwards to another one and keeps the parts of each user turn."""

    def __init__(self, inner: Conversation, dialect: Dialect, picture: Picture, question: str) -> None:
        self._inner, self._dialect, self._question = inner, dialect, question
        self.turns: list[tuple[TurnPart, ...]] = [dialect.render_question(picture.pixels, question)]

    def generate(
        self,
        *,
        max_tokens: int,
        deadline: float | None,
        force_answer: bool = False,
        on_text: Callable[[str], None] | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> Utterance:
        """Forward to the recorded conversation; see `Conversation.generate`."""
        return self._inner.generate(
            max_tokens=max_tokens, deadline=deadline, force_answer=force_answer, on_text=on_text, on_action=on_action
        )

    def observe(self, observation: Observation) -> None:
        """Record the turn and forward it; see `Conversation.observe`."""
        self.turns.append(self._dialect.render_observation(observation, self._question))
        self._inner.observe(observation)

    def close(self) -> None:
        """Forward to the recorded conversation; see `Conversation.close`."""
        self._inner.close()


class RecordedPolicy:
    """A policy that forwards to another one and keeps every conversation."""

    def __init__(self, inner: Policy, dialect: Dialect) -> None:
        self._inner, self._dialect = inner, dialect
        self.conversations: list[RecordedConversation] = []  # oldest first

    @property
    def name(self) -> str:
        """Return the name of the recorded policy."""
        return self._inner.name

    @property
    def rules(self) -> LoopRules:
        """Return the rules of the recorded policy."""
        return self._inner.rules

    def begin(self, picture: Picture, question: str) -> RecordedConversation:
        """Start a conversation and add it to `conversations`; see `Policy.begin`."""
        inner = self._inner.begin(picture, question)
        self.conversations.append(RecordedConversation(inner, self._dialect, picture, question))
        return self.conversations[-1]
