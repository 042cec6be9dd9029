"""A policy that says what it was told to say: for tests of the loop and of the server, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gog_edge.errors import GogEdgeError
from gog_edge.picture import Picture
from gog_edge.policy.base import Conversation, Policy
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, Segment
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import Listener
from gog_edge.types import Action, Observation, Size, Utterance

TOKEN_CHARS = 4  # a script has no tokenizer; its tokens are this many characters
FORCED = "<answer>I cannot tell.</answer>"


@dataclass
class ScriptedConversation:
    """Says the texts in order; keeps what it was shown."""

    texts: Sequence[str]
    forced: str
    dialect: Dialect
    frame: Frame
    pause_s: float
    observations: list[Observation] = field(default_factory=list)
    closed: bool = False
    _said: int = 0

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """The next text, or the forced one, cut to `max_tokens`; GogEdgeError when the script is over."""
        started = time.monotonic()
        if not force_answer and self._said >= len(self.texts):
            raise GogEdgeError(f"the script has {len(self.texts)} texts and all are said; give it more")
        text = self.forced if force_answer else self.texts[self._said]
        self._said += not force_answer
        text = text[: max_tokens * TOKEN_CHARS]
        self._wait(deadline)
        listener = Listener(self.dialect, self.frame, on_text, on_action)
        for start in range(0, len(text), TOKEN_CHARS):
            listener.hear(text[start : start + TOKEN_CHARS])
        action, reason = listener.understood()
        tokens = -(-len(text) // TOKEN_CHARS)
        return Utterance(text, action, reason, 0, tokens, 0.0, (time.monotonic() - started) * 1000)

    def observe(self, observation: Observation) -> None:
        """Keep it for the test to read."""
        self.observations.append(observation)
        self.frame = self.dialect.frame_after(self.frame, observation, lambda size: size)

    def close(self) -> None:
        """Nothing to give back."""
        self.closed = True

    def _wait(self, deadline: float | None) -> None:
        left = self.pause_s if deadline is None else min(self.pause_s, deadline - time.monotonic())
        if left > 0:
            time.sleep(left)


class ScriptedPolicy:
    """Every conversation says `texts` from the beginning, and `forced` when it is made to answer."""

    name = "scripted"

    def __init__(self, texts: Sequence[str], dialect: Dialect | None = None, *, forced: str = FORCED,
                 resized: Size | None = None, pause_s: float = 0.0,
                 conversation: type[ScriptedConversation] = ScriptedConversation) -> None:
        """`dialect`: "gog" by default; `resized`: what its box frame refers to, by default the picture's size."""
        self._conversation = conversation
        self.texts, self.dialect, self.forced = tuple(texts), dialect or load_dialect("gog"), forced
        self.resized, self.pause_s = resized, pause_s
        self.conversations: list[ScriptedConversation] = []

    @property
    def rules(self) -> LoopRules:
        """The dialect's."""
        return self.dialect.loop_rules

    def begin(self, picture: Picture, question: str) -> ScriptedConversation:
        """Open a conversation; it stays readable in `conversations`."""
        frame = Frame(given=picture.size, resized=self.resized or picture.size)
        conversation = self._conversation(self.texts, self.forced, self.dialect, frame, self.pause_s)
        self.conversations.append(conversation)
        return conversation

    @property
    def observations(self) -> list[Observation]:
        """What the latest conversation was shown."""
        return self.conversations[-1].observations


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
