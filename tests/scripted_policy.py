"""A policy that generates given texts, so that the agent loop is tested without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gog_edge.errors import GogEdgeError
from gog_edge.picture import Picture
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, TurnParser
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Action, Observation, Size, Utterance

CHARS_PER_TOKEN = 4  # a script has no tokenizer
FORCED_ANSWER = "<answer>I cannot tell.</answer>"


@dataclass
class ScriptedConversation:
    """A conversation that generates the given texts in order and keeps the observations."""

    texts: Sequence[str]
    forced: str
    dialect: Dialect
    images: ShownImages
    pause_s: float
    observations: list[Observation] = field(default_factory=list)
    closed: bool = False
    _next: int = 0

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Return the next text, or the forced answer, cut to `max_tokens`.

        Raises:
            GogEdgeError: all texts were generated.
        """
        started = time.monotonic()
        if not force_answer and self._next >= len(self.texts):
            raise GogEdgeError(f"all {len(self.texts)} texts of the script were generated; add more")
        text = self.forced if force_answer else self.texts[self._next]
        self._next += not force_answer
        text = text[: max_tokens * CHARS_PER_TOKEN]
        self._pause(deadline)
        parser = TurnParser(self.dialect, self.images, on_text, on_action)
        for start in range(0, len(text), CHARS_PER_TOKEN):
            parser.feed(text[start : start + CHARS_PER_TOKEN])
        action, reason = parser.result()
        tokens = -(-len(text) // CHARS_PER_TOKEN)
        return Utterance(text, action, reason, 0, tokens, 0.0, (time.monotonic() - started) * 1000)

    def observe(self, observation: Observation) -> None:
        """Add to `observations`."""
        self.observations.append(observation)
        self.images = self.dialect.images_after(self.images, observation, lambda size: size)

    def close(self) -> None:
        """Set `closed`."""
        self.closed = True

    def _pause(self, deadline: float | None) -> None:
        remaining = self.pause_s if deadline is None else min(self.pause_s, deadline - time.monotonic())
        if remaining > 0:
            time.sleep(remaining)


class ScriptedPolicy:
    """A policy whose conversations all generate `texts` from the start, and `forced` when an answer is forced."""

    name = "scripted"

    def __init__(self, texts: Sequence[str], dialect: Dialect | None = None, *, forced: str = FORCED_ANSWER,
                 resized: Size | None = None, pause_s: float = 0.0,
                 conversation: type[ScriptedConversation] = ScriptedConversation) -> None:
        """`dialect`: by default "gog". `resized`: size of the picture as the policy sees it, by default its own."""
        self._conversation = conversation
        self.texts, self.dialect, self.forced = tuple(texts), dialect or load_dialect("gog"), forced
        self.resized, self.pause_s = resized, pause_s
        self.conversations: list[ScriptedConversation] = []  # oldest first

    @property
    def rules(self) -> LoopRules:
        """Return what the dialect requires of the agent loop."""
        return self.dialect.loop_rules

    def begin(self, picture: Picture, question: str) -> ScriptedConversation:
        """Start a conversation and add it to `conversations`."""
        images = ShownImages(given=picture.size, resized=self.resized or picture.size)
        conversation = self._conversation(self.texts, self.forced, self.dialect, images, self.pause_s)
        self.conversations.append(conversation)
        return conversation

    @property
    def observations(self) -> list[Observation]:
        """Return the observations of the latest conversation."""
        return self.conversations[-1].observations
