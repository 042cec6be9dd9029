"""A policy that runs in this process: conversations over live sessions of one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from gog_edge.engines.registry import EngineSet
from gog_edge.errors import BudgetExceeded, GogEdgeError
from gog_edge.picture import Picture
from gog_edge.policy.decoding import Constraint, DraftConfig, SamplingParams, ThinkingBudget, Unconstrained
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, TurnParser, TurnPart
from gog_edge.policy.dialect.grammar import Grammar
from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
from gog_edge.policy.draft_cost import load_draft_config
from gog_edge.policy.manifest import ChatFormat
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.prompt_cache import prefill_cached
from gog_edge.policy.session import Session
from gog_edge.types import Action, Observation, Utterance

ACTION_RESERVE = 64  # tokens of a turn that thinking may not use
ANSWER_RESERVE = 96  # tokens of the context that only a forced answer may use
_DEFAULT_DRAFTS = DraftConfig()


@dataclass(frozen=True, slots=True)
class TemplateText:
    """One of the strings of the chat format, the only text that may contain special tokens."""

    text: str


class LocalConversation:
    """One conversation about a picture. Observations are queued and computed by the next `generate`."""

    def __init__(self, policy: LocalPolicy, session: Session, images: ShownImages, question: str) -> None:
        self._policy = policy
        self._chat: ChatFormat = policy.model.manifest.chat
        self._session = session
        self._images = images
        self._question = question
        self._queued: list[TurnPart | TemplateText] = []
        self._max_pixels = policy.model.manifest.vision.max_pixels  # of the next image; the first is the whole picture
        self._closed = False

    def queue(self, *parts: TurnPart | TemplateText) -> None:
        """Add text and images to what the next `generate` appends."""
        self._queued.extend(parts)

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Generate one turn; see `Conversation.generate`.

        Raises:
            BudgetExceeded: what was queued does not fit; it is dropped, and an answer can still be forced.
        """
        started = time.monotonic()
        opening = self._policy.dialect.answer_open if force_answer else ""
        reserve = 0 if force_answer else ANSWER_RESERVE
        self._append([*self._queued, TemplateText(self._chat.assistant_open), opening], reserve)
        max_tokens = min(max_tokens, self._session.remaining - reserve)
        parser = TurnParser(self._policy.dialect, self._images, on_text, on_action)
        parser.feed(opening)
        appended = time.monotonic()
        turn = self._session.generate(
            max_tokens=max_tokens,
            sampling=self._policy.sampling,
            constraint=self._policy.constraint(max_tokens, force_answer=force_answer),
            drafts=self._policy.drafts,
            deadline=deadline,
            on_text=parser.feed,
        )
        self._queued.append(TemplateText(self._chat.assistant_close))
        action, reason = parser.result()
        prefill_ms = turn.prefill_ms + 1e3 * (appended - started)
        return Utterance(parser.text, action, reason, turn.prompt_tokens, len(turn.tokens), prefill_ms, turn.decode_ms)

    def observe(self, observation: Observation) -> None:
        """Queue a user turn with the result of an action; see `Conversation.observe`."""
        dialect, vision = self._policy.dialect, self._policy.model.vision
        parts = dialect.render_observation(observation, self._question)
        self._images = dialect.images_after(self._images, observation, vision.resized_crop)
        opening: TurnPart | TemplateText = TemplateText(self._chat.user_open)
        if observation.notice is not None and any(not isinstance(queued, TemplateText) for queued in self._queued):
            self._queued.pop()  # reopen the queued user turn: the notice becomes its last line
            opening = "\n"
        self.queue(opening, *parts, TemplateText(self._chat.user_close))

    def close(self) -> None:
        """Return the session to the policy; the conversation cannot continue."""
        if not self._closed:
            self._closed = True
            self._policy.release(self._session)

    def _append(self, parts: list[TurnPart | TemplateText], reserve: int) -> None:
        """Append all parts if more than `reserve` tokens remain after them, else none."""
        savepoint = self._session.savepoint()
        self._queued = []
        try:
            for part in parts:
                self._append_part(part)
            if self._session.remaining <= reserve:
                raise BudgetExceeded(
                    f"the context is full: the conversation has {len(self._session.tokens)} tokens, and of its "
                    f"capacity of {self._session.capacity} the last {reserve} are reserved for the answer; answer now, "
                    "or open the policy with a larger context"
                )
        except GogEdgeError:
            self._session.rollback(savepoint)
            # Keep the end of the policy's last turn, which precedes all that was dropped.
            self._queued = [part for part in parts[:1] if isinstance(part, TemplateText)]
            raise

    def _append_part(self, part: TurnPart | TemplateText) -> None:
        if isinstance(part, str):
            self._session.append_text(part)
        elif isinstance(part, TemplateText):
            self._session.append_template(part.text)
        else:
            self._session.append_template(self._chat.image_open)
            self._session.append_image(self._policy.model.vision.encode(part, self._max_pixels))
            self._max_pixels = self._policy.model.manifest.vision.crop_max_pixels
            self._session.append_template(self._chat.image_close)


class LocalPolicy:
    """A policy folder that is open in this process. Conversations may run in parallel, one thread each."""

    def __init__(self, model: PolicyModel, dialect: Dialect, sampling: SamplingParams, *, grammar: bool = True,
                 drafts: DraftConfig | None = _DEFAULT_DRAFTS) -> None:
        """`grammar`: constrain turns to the dialect's syntax. `drafts`: None disables speculation."""
        self.model = model
        self.dialect = dialect.for_template(model.manifest.chat.assistant_open)
        self.sampling = sampling
        self.drafts = drafts
        self._idle: list[Session] = []
        self._lock = Lock()
        chat = model.manifest.chat
        self._prefix = Session(model.decoder)  # the system prompt, computed once; conversations are forked from it
        self._prefix.append_template(chat.system_open)
        self._prefix.append_text(dialect.system_prompt)
        self._prefix.append_template(chat.system_close)
        self._prefix.append_template(chat.user_open)
        prefill_cached(self._prefix, model.cache_dir, model.kernels)
        # In the background: a large vocabulary takes a third of a second, and the first turn needs it last.
        self._grammar = _in_background(self._compile_grammar) if grammar else None

    @classmethod
    def open(cls, folder: Path, threads: int | None = None, *, context: int | None = None,
             sampling: SamplingParams | None = None, engines: EngineSet | None = None,
             drafts: DraftConfig | None = None) -> LocalPolicy:
        """Verify and load a policy folder, and compute the system prompt.

        Args:
            folder: the policy folder.
            threads: upper limit of CPU threads, by default the number of physical cores.
            context: tokens per conversation, by default as in the manifest.
            sampling: by default as the checkpoint recommends.
            engines: engines that were built from the folder's graphs, to run instead of these graphs.
            drafts: by default with the costs measured on this machine.

        Raises:
            ArtifactError: a file is missing, altered or inconsistent.
            DialectError: the dialect cannot be used.
            BackendError: the graphs cannot run on this machine.
        """
        model = PolicyModel.open(folder, threads=threads, context=context, engines=engines)
        dialect = load_dialect(folder / DIALECT_FILE)
        params = sampling or SamplingParams(**asdict(model.manifest.generation))
        return cls(model, dialect, params, drafts=drafts or load_draft_config(model))

    @property
    def name(self) -> str:
        """Return the name for traces and /v1/models."""
        return self.model.manifest.name

    @property
    def rules(self) -> LoopRules:
        """Return what the dialect requires of the agent loop."""
        return self.dialect.loop_rules

    def begin(self, picture: Picture, question: str) -> LocalConversation:
        """Start a conversation about a picture; picture and question are computed by the first `generate`."""
        images = ShownImages(given=picture.size, resized=self.model.vision.resized(picture.resolution))
        conversation = LocalConversation(self, self._acquire(), images, question)
        opening = self.dialect.render_question(picture.pixels, question)
        conversation.queue(*opening, TemplateText(self.model.manifest.chat.user_close))
        return conversation

    def constraint(self, max_tokens: int, *, force_answer: bool) -> Constraint:
        """Return the constraint of the next turn; thinking leaves at least `ACTION_RESERVE` tokens for the action.

        `force_answer`: the text that opens an answer was appended already.
        """
        grammar = self._grammar.result() if self._grammar else None
        if force_answer:
            return grammar.answer() if grammar else Unconstrained()
        turn = grammar.turn() if grammar else Unconstrained()
        if not self.dialect.thinking.open:
            return turn
        thinking_tokens = max(max_tokens - ACTION_RESERVE, max_tokens // 2)
        return ThinkingBudget(turn, self.dialect, self.model.decoder.tokenizer, thinking_tokens)

    def release(self, session: Session) -> None:
        """Keep a session, and its KV cache, for the next conversation."""
        with self._lock:
            self._idle.append(session)

    def _acquire(self) -> Session:
        with self._lock:
            session = self._idle.pop() if self._idle else None
        session = session or Session(self.model.decoder)
        session.fork_from(self._prefix)
        return session

    def _compile_grammar(self) -> Grammar:
        decoder = self.model.decoder
        return Grammar(self.dialect, decoder.tokenizer, self.model.manifest.text.vocab, decoder.eos)


def _in_background(work: Callable[[], Grammar]) -> Future[Grammar]:
    executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
    future = executor.submit(work)
    executor.shutdown(wait=False)
    return future
