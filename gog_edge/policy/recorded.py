"""A policy that keeps what its conversations were told: episodes to hold again elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from gog_edge.picture import Picture
from gog_edge.policy.base import Conversation, Policy
from gog_edge.policy.dialect import Dialect, Segment
from gog_edge.policy.dialect_rules import LoopRules
from gog_edge.types import Action, Observation, Utterance


class RecordedConversation:
    """Passes everything on, and keeps the segments of each user turn."""

    def __init__(self, inner: Conversation, dialect: Dialect, picture: Picture, question: str) -> None:
        self._inner, self._dialect, self._question = inner, dialect, question
        self.turns: list[tuple[Segment, ...]] = [dialect.render_question(picture.pixels, question)]

    def generate(
        self,
        *,
        max_tokens: int,
        deadline: float | None,
        force_answer: bool = False,
        on_text: Callable[[str], None] | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> Utterance:
        """See `Conversation.generate`."""
        return self._inner.generate(
            max_tokens=max_tokens, deadline=deadline, force_answer=force_answer, on_text=on_text, on_action=on_action
        )

    def observe(self, observation: Observation) -> None:
        """See `Conversation.observe`."""
        self.turns.append(self._dialect.render_observation(observation, self._question))
        self._inner.observe(observation)

    def close(self) -> None:
        """See `Conversation.close`."""
        self._inner.close()


class RecordedPolicy:
    """Wraps a policy; `conversations` holds every dialogue, oldest first."""

    def __init__(self, inner: Policy, dialect: Dialect) -> None:
        self._inner, self._dialect = inner, dialect
        self.conversations: list[RecordedConversation] = []

    @property
    def name(self) -> str:
        """The wrapped policy's."""
        return self._inner.name

    @property
    def rules(self) -> LoopRules:
        """The wrapped policy's."""
        return self._inner.rules

    def begin(self, picture: Picture, question: str) -> RecordedConversation:
        """See `Policy.begin`."""
        inner = self._inner.begin(picture, question)
        self.conversations.append(RecordedConversation(inner, self._dialect, picture, question))
        return self.conversations[-1]
