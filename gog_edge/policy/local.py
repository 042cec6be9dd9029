"""What a turn is heard with: its words are passed on as they come, its action as soon as that is certain."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from gog_edge.engines.registry import EngineSet
from gog_edge.errors import BudgetExceeded, GogEdgeError, MalformedAction
from gog_edge.picture import Picture
from gog_edge.policy.decoding import Constraint, DraftConfig, Sampling, Unconstrained
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, Segment
from gog_edge.policy.dialect.grammar import Grammar, ThinkBudget
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.draft_cost import drafts_here
from gog_edge.policy.manifest import DIALECT, ChatFormat
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session, prefill_kept
from gog_edge.types import Action, Observation, Utterance


class Listener:
    """Hears one turn, piece by piece."""

    def __init__(self, dialect: Dialect, frame: Frame, on_text: Callable[[str], None] | None,
                 on_action: Callable[[Action], None] | None) -> None:
        self._dialect, self._frame = dialect, frame
        self._on_text, self._on_action = on_text, on_action
        self.text = ""

    def hear(self, piece: str) -> None:
        """Take what was said next."""
        if not piece:
            return
        self.text += piece
        if self._on_text is not None:
            self._on_text(piece)
        if self._on_action is not None:
            action = self._dialect.closed_action(self.text, self._frame)
            if action is not None:
                tell, self._on_action = self._on_action, None
                tell(action)

    def understood(self) -> tuple[Action | None, str]:
        """The action of the whole turn; None and the reason when there is none."""
        try:
            return self._dialect.parse(self.text, self._frame), ""
        except MalformedAction as exc:
            return None, str(exc)


ACTION_ROOM = 64  # tokens of a turn that a thought may not use
ANSWER_ROOM = 96  # tokens of the context that only a forced answer may use
_DRAFTS = DraftConfig()


@dataclass(frozen=True, slots=True)
class Markup:
    """One of the chat format's strings: only these may hold special tokens."""

    text: str


class LocalConversation:
    """One question's dialogue; turns are appended to the session and computed when the policy speaks next."""

    def __init__(self, policy: LocalPolicy, session: Session, frame: Frame, question: str) -> None:
        self._policy = policy
        self._chat: ChatFormat = policy.model.manifest.chat
        self._session = session
        self._frame = frame
        self._question = question
        self._queued: list[Segment | Markup] = []  # said to the policy, not yet appended
        self._pixel_budget = policy.model.manifest.vision.max_pixels  # of the next picture: the first is the whole one
        self._closed = False

    def say(self, *segments: Segment | Markup) -> None:
        """Queue text and pictures; nothing is computed before the next `generate`."""
        self._queued.extend(segments)

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Let the policy speak one turn; see `Conversation.generate`.

        BudgetExceeded when what was queued does not fit: it is dropped, and room is left to force an answer.
        """
        started = time.monotonic()
        opening = self._policy.dialect.answer_open if force_answer else ""
        reserve = 0 if force_answer else ANSWER_ROOM
        self._append([*self._queued, Markup(self._chat.assistant_open), opening], reserve)
        max_tokens = min(max_tokens, self._session.room - reserve)
        listener = Listener(self._policy.dialect, self._frame, on_text, on_action)
        listener.hear(opening)
        appended = time.monotonic()
        said = self._session.generate(
            max_tokens=max_tokens,
            sampling=self._policy.sampling,
            constraint=self._policy.constraint(max_tokens, force_answer=force_answer),
            drafts=self._policy.drafts,
            deadline=deadline,
            on_text=listener.hear,
        )
        self._queued.append(Markup(self._chat.assistant_close))
        action, reason = listener.understood()
        prefill_ms = said.prefill_ms + 1e3 * (appended - started)
        return Utterance(listener.text, action, reason, said.prefilled, len(said.tokens), prefill_ms, said.decode_ms)

    def observe(self, observation: Observation) -> None:
        """Queue a turn that shows what an action brought back."""
        dialect, vision = self._policy.dialect, self._policy.model.vision
        segments = dialect.render_observation(observation, self._question)
        self._frame = dialect.frame_after(self._frame, observation, vision.resized_crop)
        opening: Segment | Markup = Markup(self._chat.user_open)
        if observation.notice is not None and any(not isinstance(waits, Markup) for waits in self._queued):
            self._queued.pop()  # the end of the turn that waits
            opening = "\n"
        self.say(opening, *segments, Markup(self._chat.user_close))

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


class LocalPolicy:
    """A policy folder on this box. Several conversations may go on at once, one thread each."""

    def __init__(self, model: PolicyModel, dialect: Dialect, sampling: Sampling, *, grammar: bool = True,
                 drafts: DraftConfig | None = _DRAFTS) -> None:
        """`grammar`: turns are held to the dialect. `drafts`: None computes one token a step."""
        self.model = model
        self.dialect = dialect.after(model.manifest.chat.assistant_open)
        self.sampling = sampling
        self.drafts = drafts
        self._idle: list[Session] = []
        self._lock = Lock()
        chat = model.manifest.chat
        self._prefix = Session(model.decoder)
        self._prefix.append_markup(chat.system_open)
        self._prefix.append_text(dialect.system_prompt)
        self._prefix.append_markup(chat.system_close)
        self._prefix.append_markup(chat.user_open)
        prefill_kept(self._prefix, model.cache, model.form)
        # A real vocabulary takes a third of a second, in which no other thread runs Python: the first picture is
        # computed meanwhile.
        self._grammar = _beside(self._read_grammar) if grammar else None

    @classmethod
    def open(cls, folder: Path, threads: int | None = None, *, context: int | None = None,
             sampling: Sampling | None = None, engines: EngineSet | None = None,
             drafts: DraftConfig | None = None) -> LocalPolicy:
        """Verify and load a policy folder, and compute the system prompt once.

        `threads`: one for each physical core when None. `context`: tokens of one conversation. `sampling`: the
        checkpoint's own when None. `engines`: built ones that run in place of the folder's graphs. `drafts`: the
        usual ones when None, at the price measured here. Raises ArtifactError, DialectError or BackendError.
        """
        model = PolicyModel.open(folder, threads=threads, context=context, engines=engines)
        defaults = model.manifest.generation
        chosen = sampling or Sampling(**asdict(defaults))
        dialect = load_dialect(folder / DIALECT)
        return cls(model, dialect, chosen, drafts=drafts or drafts_here(model))

    @property
    def name(self) -> str:
        """Name for traces and /v1/models."""
        return self.model.manifest.name

    @property
    def rules(self) -> LoopRules:
        """The dialect's."""
        return self.dialect.loop_rules

    def begin(self, picture: Picture, question: str) -> LocalConversation:
        """Open a dialogue about a picture; picture and question are computed at the first `generate`."""
        frame = Frame(given=picture.size, resized=self.model.vision.resized(picture.size))
        conversation = LocalConversation(self, self._take(), frame, question)
        opening = self.dialect.render_question(picture.pixels, question)
        conversation.say(*opening, Markup(self.model.manifest.chat.user_close))
        return conversation

    def constraint(self, max_tokens: int, *, force_answer: bool) -> Constraint:
        """What the next turn may say; a forced answer has been opened. A thought leaves room for an action."""
        grammar = self._grammar.result() if self._grammar else None
        if force_answer:
            return grammar.answer() if grammar else Unconstrained()
        turn = grammar.turn() if grammar else Unconstrained()
        if not self.dialect.thinking.open:
            return turn
        most = max(max_tokens - ACTION_ROOM, max_tokens // 2)
        return ThinkBudget(turn, self.dialect, self.model.decoder.tokenizer, most)

    def _read_grammar(self) -> Grammar:
        decoder = self.model.decoder
        return Grammar(self.dialect, decoder.tokenizer, self.model.manifest.text.vocab, decoder.eos)

    def give_back(self, session: Session) -> None:
        """Keep a session's cache for the next conversation."""
        with self._lock:
            self._idle.append(session)

    def _take(self) -> Session:
        with self._lock:
            session = self._idle.pop() if self._idle else None
        session = session or Session(self.model.decoder)
        session.fork_from(self._prefix)
        return session


def _beside(work: Callable[[], Grammar]) -> Future[Grammar]:
    """Work begun in a thread of its own."""
    threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
    begun = threads.submit(work)
    threads.shutdown(wait=False)
    return begun
