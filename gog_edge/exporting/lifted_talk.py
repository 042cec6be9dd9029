"""One conversation that does with a cache all that serving does: said by one decoder, said after it by another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gog_edge.engines.base import DecoderEngine, Floats
from gog_edge.exporting.recording import recorded
from gog_edge.policy.chat import ChatFormat
from gog_edge.policy.session import Decoder, Session
from gog_edge.policy.vision import ImageTokens

ANSWER = 4  # tokens of an answer: each is a step of its own, and those of large models take seconds
GUESSES = 6  # tokens of a draft


@dataclass(frozen=True, slots=True)
class Talk:
    """What is said to the policy."""

    system: str
    texts: Sequence[str]  # taken in turns
    images: Sequence[ImageTokens]  # a whole picture and a crop

    def text(self, turn: int) -> str:
        """What is asked in a turn."""
        return self.texts[turn % len(self.texts)]


@dataclass(slots=True)
class Script:
    """A chooser that takes the likeliest token, and on a second reading says the same tokens again."""

    never: frozenset[int]  # an end token would end the first reading, and not the second
    tokens: list[int] = field(default_factory=list)
    place: int = 0

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """The next token, written down if it is new."""
        if self.place == len(self.tokens):
            allowed = logits.copy()
            allowed[list(self.never)] = -np.inf
            self.tokens.append(int(allowed.argmax()))
        self.place += 1
        return self.tokens[self.place - 1]


def hold(decoder: Decoder, talk: Talk, script: Script, engine: DecoderEngine | None = None) -> Floats:
    """Hold the conversation on the decoder's own engine or another -> logits [rows, vocab] of all steps, in order.

    Prompt with a picture; decoding; a passage that is taken back; a crop after it; a draft of several rows; a fork
    that goes on, and the first conversation beside it.
    """
    twin, recorder = recorded(decoder, engine)
    chat = decoder.manifest.chat
    script.place = 0
    session = Session(twin, recorder.new_cache())
    session.append_markup(chat.system_open)
    session.append_text(talk.system)
    session.append_markup(chat.system_close)
    _ask(session, chat, talk.text(0), talk.images[0])
    _answer(session, chat, script)
    mark = session.mark()
    _ask(session, chat, talk.text(1))
    session.prefill()
    session.rollback(mark)
    _ask(session, chat, talk.text(2), talk.images[-1])
    session.look_ahead(decoder.encode(talk.text(2))[:GUESSES])
    _ask(session, chat, talk.text(3))
    _answer(session, chat, script)
    fork = Session(twin, recorder.new_cache())
    fork.fork_from(session)
    for branch, turn in ((fork, 4), (session, 5)):
        _ask(branch, chat, talk.text(turn))
        _answer(branch, chat, script)
    return np.concatenate([logits for _, logits in recorder.steps])


def _ask(session: Session, chat: ChatFormat, text: str, image: ImageTokens | None = None) -> None:
    session.append_markup(chat.user_open)
    if image is not None:
        session.append_markup(chat.image_open)
        session.append_image(image)
        session.append_markup(chat.image_close)
    session.append_text(text)
    session.append_markup(chat.user_close)
    session.append_markup(chat.assistant_open)


def _answer(session: Session, chat: ChatFormat, script: Script) -> None:
    session.generate(max_tokens=ANSWER, chooser=script)
    session.append_markup(chat.assistant_close)
