"""The policy on this box: dialect and chat strings around a live session."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Self

from gog_edge.errors import BudgetExceeded, GogEdgeError, MalformedAction
from gog_edge.picture import Picture
from gog_edge.policy.chat import ChatFormat
from gog_edge.policy.decode import Sampling
from gog_edge.policy.dialect import Dialect, Frame, Segment, load_dialect
from gog_edge.policy.manifest import DIALECT
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.types import Action, Observation, Utterance

ANSWER_ROOM = 96  # tokens of the context that only a forced answer may use


@dataclass(frozen=True, slots=True)
class Markup:
    """One of the chat format's strings: only these may hold special tokens."""

    text: str


class LocalConversation:
    """One question's dialogue; turns are appended to the session and computed when the policy speaks next."""

    def __init__(self, policy: LocalPolicy, session: Session, frame: Frame) -> None:
        self._policy = policy
        self._chat: ChatFormat = policy.model.manifest.chat
        self._session = session
        self._frame = frame
        self._queued: list[Segment | Markup] = []  # said to the policy, not yet appended
        self._pixel_budget = policy.model.manifest.vision.max_pixels  # of the next picture: the first is the whole one
        self._closed = False

    def say(self, *segments: Segment | Markup) -> None:
        """Queue text and pictures; nothing is computed before the next `generate`."""
        self._queued.extend(segments)

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None) -> Utterance:
        """Let the policy speak one turn; see `Conversation.generate`.

        BudgetExceeded when what was queued does not fit: it is dropped, and room is left to force an answer.
        """
        started = time.monotonic()
        opening = self._policy.dialect.answer_open if force_answer else ""
        reserve = 0 if force_answer else ANSWER_ROOM
        self._append([*self._queued, Markup(self._chat.assistant_open), opening], reserve)
        max_tokens = min(max_tokens, self._session.room - reserve)
        if opening and on_text is not None:
            on_text(opening)
        appended = time.monotonic()
        said = self._session.generate(
            max_tokens=max_tokens, sampling=self._policy.sampling, deadline=deadline, on_text=on_text
        )
        self._queued.append(Markup(self._chat.assistant_close))
        text = opening + said.text
        action, reason = self._parse(text)
        prefill_ms = said.prefill_ms + 1e3 * (appended - started)
        return Utterance(text, action, reason, said.prefilled, len(said.tokens), prefill_ms, said.decode_ms)

    def observe(self, observation: Observation) -> None:
        """Queue a turn that shows what an action brought back."""
        segments = self._policy.dialect.render_observation(observation)
        self.say(Markup(self._chat.user_open), *segments, Markup(self._chat.user_close))

    def close(self) -> None:
        """Give the cache back; the conversation cannot go on."""
        if not self._closed:
            self._closed = True
            self._policy.give_back(self._session)

    def _append(self, segments: list[Segment | Markup], reserve: int) -> None:
        """Append all segments with more than `reserve` tokens to spare, or nothing at all."""
        mark = self._session.mark()
        self._queued = []
        try:
            for segment in segments:
                self._append_one(segment)
            if self._session.room <= reserve:
                raise BudgetExceeded(
                    f"{len(self._session.tokens)} of {self._session.capacity} tokens said, {reserve} are kept for the "
                    "answer; answer now, or open the policy with a larger context"
                )
        except GogEdgeError:
            self._session.rollback(mark)
            self._queued = [segment for segment in segments[:1] if isinstance(segment, Markup)]  # the last turn's end
            raise

    def _append_one(self, segment: Segment | Markup) -> None:
        if isinstance(segment, str):
            self._session.append_text(segment)
        elif isinstance(segment, Markup):
            self._session.append_markup(segment.text)
        else:
            self._session.append_markup(self._chat.image_open)
            self._session.append_image(self._policy.model.vision.encode(segment, self._pixel_budget))
            self._pixel_budget = self._policy.model.manifest.vision.crop_max_pixels
            self._session.append_markup(self._chat.image_close)

    def _parse(self, text: str) -> tuple[Action | None, str]:
        try:
            return self._policy.dialect.parse(text, self._frame), ""
        except MalformedAction as exc:
            return None, str(exc)


class LocalPolicy:
    """A policy folder on this box. Several conversations may go on at once, one thread each."""

    def __init__(self, model: PolicyModel, dialect: Dialect, sampling: Sampling) -> None:
        self.model = model
        self.dialect = dialect
        self.sampling = sampling
        self._idle: list[Session] = []
        self._lock = Lock()
        chat = model.manifest.chat
        self._prefix = model.new_session()
        self._prefix.append_markup(chat.system_open)
        self._prefix.append_text(dialect.system_prompt)
        self._prefix.append_markup(chat.system_close)
        self._prefix.append_markup(chat.user_open)
        self._prefix.prefill()

    @classmethod
    def open(cls, folder: Path, threads: int | None = None, *, context: int | None = None,
             sampling: Sampling | None = None) -> Self:
        """Verify and load a policy folder, and compute the system prompt once.

        `threads`: one for each physical core when None. `context`: tokens of one conversation. `sampling`: the
        checkpoint's own when None. Raises ArtifactError, DialectError or BackendError.
        """
        model = PolicyModel.open(folder, threads=threads, context=context)
        defaults = model.manifest.generation
        chosen = sampling or Sampling(defaults.temperature, defaults.top_p, defaults.repetition_penalty)
        return cls(model, load_dialect(folder / DIALECT), chosen)

    @property
    def name(self) -> str:
        """Name for traces and /v1/models."""
        return self.model.manifest.name

    def begin(self, picture: Picture, question: str) -> LocalConversation:
        """Open a dialogue about a picture; picture and question are computed at the first `generate`."""
        frame = Frame(given=picture.size, resized=self.model.vision.resized(picture.size))
        conversation = LocalConversation(self, self._take(), frame)
        opening = self.dialect.render_question(picture.pixels, question)
        conversation.say(*opening, Markup(self.model.manifest.chat.user_close))
        return conversation

    def give_back(self, session: Session) -> None:
        """Keep a session's cache for the next conversation."""
        with self._lock:
            self._idle.append(session)

    def _take(self) -> Session:
        with self._lock:
            session = self._idle.pop() if self._idle else None
        session = session or self.model.new_session()
        session.fork_from(self._prefix)
        return session
