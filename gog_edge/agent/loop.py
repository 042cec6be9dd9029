"""The episode loop: the policy chooses actions until it answers or its budget is exhausted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from gog_edge.agent.actions import (
    ActionRefused,
    SearchCache,
    SearchTarget,
    SpeculativeSearch,
    merge_gaze_config,
    resolve_action,
)
from gog_edge.agent.budget import BudgetTracker, EpisodeBudget, SearchLimitReached
from gog_edge.agent.citations import find_sources
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
    action_name,
)
from gog_edge.config import Budget, GazeConfig
from gog_edge.errors import BudgetExceeded, GogEdgeError
from gog_edge.picture import Picture
from gog_edge.policy.base import Policy
from gog_edge.types import Action, Answer, GazeSearch, ImageSearch, Observation, Utterance

if TYPE_CHECKING:
    from gog_edge.agent.trace import TraceWriter
    from gog_edge.retrieval.retriever import Retriever

OnEvent: TypeAlias = Callable[[Event], None]
_GAZE = GazeConfig()
MAX_FAULTS = 2  # consecutive ones: the first is corrected, the second ends the search


class EpisodeClosed(GogEdgeError):
    """Raised by an event callback to stop an episode whose answer is not needed any more."""


def run_episode(
    picture: Picture,
    question: str,
    *,
    policy: Policy,
    retriever: Retriever,
    budget: Budget,
    on_event: OnEvent,
    workflow: Workflow = Workflow.GOG,
    trace: TraceWriter | None = None,
    gaze: GazeConfig = _GAZE,
) -> AnswerRecord:
    """Answer a question about a picture. There is always an answer record, whatever the policy generates.

    The policy runs in the calling thread. `on_event` is called in that thread with each event as it happens: first
    `Started`, last `Answered`. An exception that it raises (`EpisodeClosed`) stops the policy at its next piece of text
    and is passed on, after the conversation was closed.

    `budget` and `gaze` are overridden by the rules of the policy's dialect: searches never exceed what it allows, and
    crops are cut as it asks.

    Raises the errors of policy and retriever; the steps before them are in the trace.
    """
    return _Episode(picture, question, policy, retriever, budget, workflow, trace, gaze, on_event).run()


class _Episode:
    def __init__(self, picture: Picture, question: str, policy: Policy, retriever: Retriever, budget: Budget,
                 workflow: Workflow, trace: TraceWriter | None, gaze: GazeConfig, on_event: OnEvent) -> None:
        self.picture, self.question, self.workflow = picture, question, workflow
        self.policy, self.trace, self.emit = policy, trace, on_event
        self.gaze = merge_gaze_config(gaze, policy.rules.crop)
        self.budget = EpisodeBudget.combine(budget, policy.rules.budget)
        self.final_notice = policy.rules.final_notice  # until it was shown
        self.cache = SearchCache(gaze.same_iou)
        self.steps: list[Step] = []
        self.faults: list[str] = []  # notices of consecutive malformed or refused turns
        self.over_limit = 0  # consecutive searches beyond their limit: not faults, but no progress either
        self.context_full = False
        self.record: AnswerRecord | None = None
        self.searches = SpeculativeSearch(lambda query: retriever.search([query])[0])

    def run(self) -> AnswerRecord:
        self.used = BudgetTracker(self.budget)
        with self.searches:
            with self.trace or nullcontext():
                if self.trace:
                    self.trace.begin(self.picture, self.question, self.policy.name, self.workflow, self.budget,
                                     self.gaze)
                self.emit(Started(self.question, self.picture.size, self.workflow))
                record = self._converse()
                if self.trace:
                    self.trace.finish(record)
            self.emit(Answered(record))  # inside `searches`: the answer does not wait for searches that it did not need
        return record

    def _converse(self) -> AnswerRecord:
        """Open the conversation and take turns until there is an answer."""
        self.conversation = self.policy.begin(self.picture, self.question)
        try:
            whole_picture = ImageSearch()
            if self.workflow is Workflow.FULL_IMAGE:
                target = resolve_action(whole_picture, self.picture, self.question, self.gaze)
                self._search(Step(0, None, action_name(whole_picture)), target)
            elif self.gaze.early and not self._forced_by():
                self._prefetch(whole_picture)  # during the first prefill
            while self.record is None:
                self._turn()
            return self.record
        finally:
            self.conversation.close()

    def _turn(self) -> None:
        """Let the policy generate one turn, and carry out its action."""
        forced_by = self._forced_by()
        forced = bool(forced_by)
        notified = forced and self._show_final_notice()
        step = len(self.steps)
        try:
            utterance = self.conversation.generate(
                max_tokens=self.used.max_tokens(last=forced),
                deadline=self.used.deadline(last=forced),
                force_answer=forced,
                on_text=lambda text: self.emit(Spoke(step, text)),
                on_action=self._prefetch if self.gaze.early and not forced else None,
            )
        except BudgetExceeded:
            self.context_full = True
            if notified:
                return  # the next turn forces the answer without the notice, which may fit
        else:
            self.used.add_turn(utterance)
            self._act(utterance, forced_by)
        if forced and self.record is None:
            self._finish("", forced_by)

    def _show_final_notice(self) -> bool:
        """Show the dialect's notice that an answer is due, once; return whether there was one to show."""
        notice, self.final_notice = self.final_notice, ""
        if notice:
            self._observe(Observation(notice=notice, detail="nothing more can be searched"))
        return bool(notice)

    def _act(self, utterance: Utterance, forced_by: str) -> None:
        """Carry out the action of a turn, or refuse it."""
        step = Step(len(self.steps), utterance, action_name(utterance.action))
        if isinstance(utterance.action, Answer):
            self.emit(Acted(step.index, step.action))
            self._add_step(step)
            self._finish(utterance.action.text.strip(), forced_by or "answer")
            return
        try:
            target = self._resolve(utterance.action, utterance.malformed, forced=bool(forced_by))
        except ActionRefused as refusal:
            self._refuse(step, refusal)
        else:
            self._search(step, target)

    def _prefetch(self, action: Action) -> None:
        """Start the search of an action before the turn that chooses it has ended."""
        try:
            target = self._resolve(action, "", forced=False)
        except ActionRefused:
            return
        if self.cache.get(target.key) is None:
            self.searches.start(target)

    def _resolve(self, action: Action | None, malformed: str, *, forced: bool) -> SearchTarget:
        """Return the target of a search that is allowed now. Raises ActionRefused otherwise."""
        if action is None or isinstance(action, Answer):
            raise ActionRefused("malformed", malformed)
        if forced or (self.workflow is Workflow.FULL_IMAGE and isinstance(action, GazeSearch)):
            raise ActionRefused("action_refused", f"{action_name(action)} is not possible here")
        target = resolve_action(action, self.picture, self.question, self.gaze)
        if self.cache.get(target.key) is None:
            self.used.check_search(target.query)
        return target

    def _forced_by(self) -> str:
        """Return the reason why the next turn must be an answer; "" if the policy may choose."""
        if self.workflow is Workflow.DIRECT:
            return "answer"
        if self.context_full:
            return "context"
        if len(self.faults) >= MAX_FAULTS:
            return self.faults[-1]
        return "searches" if self.over_limit >= MAX_FAULTS else self.used.exhausted

    def _search(self, step: Step, target: SearchTarget) -> None:
        """Search, or take the result from the cache, and show it to the policy."""
        self.faults.clear()
        self.over_limit = 0
        box, text = (None, target.key) if isinstance(target.key, str) else (target.key, None)
        step = replace(step, box=box, query=text, note=target.note)
        self.emit(Acted(step.index, step.action, box, text, target.note))
        started, duration = time.monotonic(), 0.0
        result = self.cache.get(target.key)
        if result is None:
            timed = self.searches.result(target)
            result, duration = timed.result, timed.ms
            self.used.add_search(target.query)
            self.cache.put(target.key, result)
        waited = (time.monotonic() - started) * 1000
        step = replace(step, result=result, search_ms=waited, hidden_ms=max(0.0, duration - waited))
        self._add_step(step)
        self._observe(Observation(result, None if result.cached else target.crop, crop_box=target.crop_box))
        self.emit(Found(step.index, result, step.search_ms))

    def _refuse(self, step: Step, refusal: ActionRefused) -> None:
        """Show the policy why its action was not carried out."""
        if isinstance(refusal, SearchLimitReached):
            self.faults.clear()
            self.over_limit += 1
        else:
            self.faults.append(refusal.notice)
        reason = str(refusal)
        self.emit(Refused(step.index, reason))
        self._add_step(replace(step, note=reason))
        self._observe(Observation(notice=refusal.notice, detail=reason))

    def _observe(self, observation: Observation) -> None:
        try:
            self.conversation.observe(observation)
        except BudgetExceeded:
            self.context_full = True

    def _finish(self, answer: str, ended: str) -> None:
        sources = find_sources(answer, [step.result for step in self.steps if step.result])
        turns = [step.utterance for step in self.steps if step.utterance]
        timings = {
            "prefill": sum(turn.prefill_ms for turn in turns),
            "decode": sum(turn.decode_ms for turn in turns),
            "search": sum(step.search_ms for step in self.steps),
            "total": self.used.elapsed_ms,
        }
        path = str(self.trace.path) if self.trace else None
        self.record = AnswerRecord(answer, sources.found, sources.citations, tuple(self.steps), timings, ended, path,
                                   sources.related)

    def _add_step(self, step: Step) -> None:
        self.steps.append(step)
        if self.trace:
            self.trace.add(step)
