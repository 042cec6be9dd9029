"""The policy speaks in its own thread, so that its words can be passed on while it still speaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol

from gog_edge.agent.actions import Ahead, Memory, Refusal, Target, aim, gaze_of
from gog_edge.agent.budget import EpisodeBudget, Overdrawn, Spending
from gog_edge.agent.citations import cite
from gog_edge.agent.events import (
    Acted,
    Answered,
    AnswerRecord,
    Event,
    Found,
    Refused,
    Spoke,
    Started,
    Step,
    Workflow,
    name_of,
)
from gog_edge.agent.trace import TraceWriter
from gog_edge.config import Budget, GazeConfig
from gog_edge.errors import BudgetExceeded, GogEdgeError
from gog_edge.picture import Picture
from gog_edge.policy.base import Conversation, Policy
from gog_edge.types import Action, Answer, GazeSearch, ImageSearch, Observation, Query, SearchResult, Utterance


class EpisodeClosed(GogEdgeError):
    """Nobody listens any more; stops a policy in the middle of a turn."""


class Voice:
    """Runs the turns of one conversation, all in one thread; leaving it closes the conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def __enter__(self) -> Voice:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()  # waits: a cache must not be given back while a turn writes to it
        self._conversation.close()

    def speak(self, step: int, *, max_tokens: int, deadline: float, force_answer: bool,
              on_action: Callable[[Action], None] | None = None) -> Generator[Spoke, None, Utterance]:
        """Yield the pieces of one turn as they come; the turn itself is the generator's value.

        Closing the generator stops the policy at its next piece. `on_action` is called in the policy's thread.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        closed = threading.Event()

        def hear(text: str) -> None:
            if closed.is_set():
                raise EpisodeClosed("the episode was closed")
            pieces.put(text)

        turn = self._thread.submit(self._conversation.generate, max_tokens=max_tokens, deadline=deadline,
                                   force_answer=force_answer, on_text=hear, on_action=on_action)
        turn.add_done_callback(lambda _: pieces.put(None))
        try:
            for text in iter(pieces.get, None):
                yield Spoke(step, text)
        finally:
            closed.set()
        return turn.result()


__all__ = ["Budget", "Event", "Searcher", "Workflow", "run_episode"]
_GAZE = GazeConfig()
MAX_FAULTS = 2  # in a row: the first is corrected, the second ends the search


class Searcher(Protocol):
    """What the loop needs of a retriever."""

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """One result for each query, in order."""


def run_episode(
    picture: Picture,
    question: str,
    *,
    policy: Policy,
    retriever: Searcher,
    budget: Budget,
    workflow: Workflow = Workflow.GOG,
    trace: TraceWriter | None = None,
    gaze: GazeConfig = _GAZE,
) -> Generator[Event, None, None]:
    """Answer a question about a picture, telling what happens as it happens.

    `budget` and `gaze` hold as far as the policy has no rules of its own: no more than it allows, crops as it asks.
    The first event is `Started`, the last `Answered`: there is always an answer record, whatever the policy says.
    Errors of policy or retriever are raised, after the steps before them were written to the trace. Closing the
    iterator stops the policy and gives its cache back.
    """
    return _Episode(picture, question, policy, retriever, budget, workflow, trace or TraceWriter(None), gaze).run()


class _Episode:
    def __init__(self, picture: Picture, question: str, policy: Policy, retriever: Searcher, budget: Budget,
                 workflow: Workflow, trace: TraceWriter, gaze: GazeConfig) -> None:
        self.picture, self.question, self.workflow = picture, question, workflow
        self.policy, self.retriever, self.trace = policy, retriever, trace
        self.gaze = gaze_of(gaze, policy.rules.crop)
        self.budget = EpisodeBudget.of(budget, policy.rules.budget)
        self.last_notice = policy.rules.last_notice  # not yet shown
        self.memory = Memory(gaze.same_iou)
        self.steps: list[Step] = []
        self.faults: list[str] = []  # in a row
        self.overdrawn = 0  # searches beyond their count since the last that was not: no faults, but no progress either
        self.full = False  # nothing more fits the policy's context
        self.record: AnswerRecord | None = None
        self.ahead = Ahead(lambda query: retriever.search([query])[0])

    def run(self) -> Generator[Event, None, None]:
        self.spending = Spending(self.budget)
        with self.ahead:
            with self.trace:
                self.trace.begin(self.picture, self.question, self.policy.name, self.workflow, self.budget, self.gaze)
                yield Started(self.question, self.picture.size, self.workflow)
                self.conversation = self.policy.begin(self.picture, self.question)
                with Voice(self.conversation) as self.voice:
                    record = yield from self._turns()
                self.trace.finish(record)
            yield Answered(record)  # before `ahead` is left: no answer waits for a search that it did not need

    def _turns(self) -> Generator[Event, None, AnswerRecord]:
        """Until there is an answer."""
        first = ImageSearch()
        if self.workflow is Workflow.FULL_IMAGE:
            target = aim(first, self.picture, self.question, self.gaze)
            yield from self._search(Step(0, None, name_of(first)), target)
        elif self.gaze.early and not self._forced_by():
            self._foresee(first)  # beside the first prefill
        while self.record is None:
            yield from self._turn()
        return self.record

    def _turn(self) -> Iterator[Event]:
        """One utterance and what follows from it."""
        forced_by = self._forced_by()
        forced = bool(forced_by)
        asked = forced and self._ask_to_answer()
        try:
            utterance = yield from self.voice.speak(
                len(self.steps),
                max_tokens=self.spending.max_tokens(last=forced),
                deadline=self.spending.deadline(last=forced),
                force_answer=forced,
                on_action=self._foresee if self.gaze.early and not forced else None,
            )
        except BudgetExceeded:
            self.full = True
            if asked:
                return  # the answer is forced again, without asking: that may fit
        else:
            self.spending.add(utterance)
            yield from self._follow(utterance, forced_by)
        if forced and self.record is None:
            self._finish("", forced_by)

    def _ask_to_answer(self) -> bool:
        """Tell a policy that wants to be told, once, that it must answer."""
        notice, self.last_notice = self.last_notice, ""
        if notice:
            self._show(Observation(notice=notice, detail="nothing more can be searched"))
        return bool(notice)

    def _follow(self, utterance: Utterance, forced_by: str) -> Iterator[Event]:
        """Do what was said."""
        step = Step(len(self.steps), utterance, name_of(utterance.action))
        if isinstance(utterance.action, Answer):
            yield Acted(step.index, step.action)
            self._keep(step)
            self._finish(utterance.action.text.strip(), forced_by or "answer")
            return
        try:
            target = self._target(utterance.action, utterance.malformed, forced=bool(forced_by))
        except Refusal as refusal:
            yield from self._refuse(step, refusal)
        else:
            yield from self._search(step, target)

    def _foresee(self, action: Action) -> None:
        """Begin what the policy is about to ask for, in its own thread, while it closes its turn."""
        try:
            target = self._target(action, "", forced=False)
        except Refusal:
            return
        if self.memory.recall(target.key) is None:
            self.ahead.begin(target)

    def _target(self, action: Action | None, malformed: str, *, forced: bool) -> Target:
        if action is None or isinstance(action, Answer):
            raise Refusal("malformed", malformed)
        if forced or (self.workflow is Workflow.FULL_IMAGE and isinstance(action, GazeSearch)):
            raise Refusal("action_refused", f"{name_of(action)} is not possible here")
        target = aim(action, self.picture, self.question, self.gaze)
        if self.memory.recall(target.key) is None:
            self.spending.check_search(target.query)
        return target

    def _forced_by(self) -> str:
        """Why the next turn must be an answer; "" when the policy is free."""
        if self.workflow is Workflow.DIRECT:
            return "answer"
        if self.full:
            return "context"
        if len(self.faults) >= MAX_FAULTS:
            return self.faults[-1]
        return "searches" if self.overdrawn >= MAX_FAULTS else self.spending.spent

    def _search(self, step: Step, target: Target) -> Iterator[Event]:
        """Search, or remember; then show the policy what came back."""
        self.faults.clear()
        self.overdrawn = 0
        box, words = (None, target.key) if isinstance(target.key, str) else (target.key, None)
        step = replace(step, box=box, query=words, note=target.note)
        yield Acted(step.index, step.action, box, words, target.note)
        started, took = time.monotonic(), 0.0
        result = self.memory.recall(target.key)
        if result is None:
            timed = self.ahead.take(target)
            result, took = timed.result, timed.ms
            self.spending.add_search(target.query)
            self.memory.keep(target.key, result)
        waited = (time.monotonic() - started) * 1000
        step = replace(step, result=result, search_ms=waited, hidden_ms=max(0.0, took - waited))
        self._keep(step)
        self._show(Observation(result, None if result.cached else target.crop, crop_box=target.crop_box))
        yield Found(step.index, result, step.search_ms)

    def _refuse(self, step: Step, refusal: Refusal) -> Iterator[Event]:
        """Tell the policy why nothing was done."""
        if isinstance(refusal, Overdrawn):
            self.faults.clear()
            self.overdrawn += 1
        else:
            self.faults.append(refusal.notice)
        reason = str(refusal)
        yield Refused(step.index, reason)
        self._keep(replace(step, note=reason))
        self._show(Observation(notice=refusal.notice, detail=reason))

    def _show(self, observation: Observation) -> None:
        try:
            self.conversation.observe(observation)
        except BudgetExceeded:
            self.full = True

    def _finish(self, answer: str, ended: str) -> None:
        citations, found = cite(answer, [step.result for step in self.steps if step.result])
        spoken = [step.utterance for step in self.steps if step.utterance]
        timings = {
            "prefill": sum(utterance.prefill_ms for utterance in spoken),
            "decode": sum(utterance.decode_ms for utterance in spoken),
            "search": sum(step.search_ms for step in self.steps),
            "total": self.spending.elapsed_ms,
        }
        path = str(self.trace.path) if self.trace.path else None
        self.record = AnswerRecord(answer, found, citations, tuple(self.steps), timings, ended, path)

    def _keep(self, step: Step) -> None:
        self.steps.append(step)
        self.trace.add(step)
