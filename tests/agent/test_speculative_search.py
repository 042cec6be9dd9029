"""Searches start while the policy is still generating, and change nothing but the timings."""

import threading

import numpy as np
import pytest
from scripted_policy import ScriptedConversation, ScriptedPolicy
from scripted_world import GAZE_GREEN, GAZE_RED, ColourRetriever, answer, without_timings

from gog_edge.agent.events import Answered, Found, Spoke, Workflow
from gog_edge.agent.loop import EpisodeClosed, run_episode
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.config import Budget, GazeConfig
from gog_edge.picture import decode_picture
from gog_edge.runtime import open_runtime
from gog_edge.types import Box, GazeSearch, ImageQuery

TIMEOUT_S = 30
WHOLE = (100, 300, 3)
WHOLE_PICTURE = "<img_search><img></img_search>"


def events_of(picture, policy, retriever, *, early=True, **options):
    events = []
    run_episode(picture, "What is the currency?", policy=policy, retriever=retriever, on_event=events.append,
                gaze=GazeConfig(early=early), **{"budget": Budget(), **options})
    return events


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("search")]


class Slow(ColourRetriever):
    """A retriever that reports which searches have started, and returns when it is allowed to."""

    def __init__(self):
        super().__init__()
        self.started = {kind: threading.Event() for kind in ("whole", "crop", "words")}
        self.may_return = threading.Event()

    def search(self, queries):
        (query,) = queries
        image = isinstance(query, ImageQuery)
        self.started["words" if not image else "whole" if query.pixels.shape == WHOLE else "crop"].set()
        assert self.may_return.wait(TIMEOUT_S)
        return super().search(queries)


def waiting_for(started, may_return, kind):
    """A conversation that generates its last piece only after a search of this kind has started."""

    class Waiting(ScriptedConversation):
        def generate(self, *, on_text, **options):
            def wait_before_last(piece):
                if piece.startswith("~"):
                    assert started[kind].wait(TIMEOUT_S), f"no {kind} was searched before the end of the turn"
                    may_return.set()
                on_text(piece)

            return super().generate(on_text=wait_before_last, **options)

    return Waiting


@pytest.mark.parametrize(
    ("kind", "text"),
    [("crop", GAZE_RED), ("words", "<text_search>Redland</text_search>"), ("whole", WHOLE_PICTURE),
     ("whole", "<reason>hm")],
)
def test_a_search_starts_before_the_end_of_the_turn(picture, kind, text):
    slow = Slow()
    padded = text + " " * (-len(text) % 4) + "~~~~"  # pieces have four characters; this is the last one
    policy = ScriptedPolicy([padded, answer("rubel")], conversation=waiting_for(slow.started, slow.may_return, kind))
    *_, last = events_of(picture, policy, slow)
    assert last.record.answer == "rubel"


def test_the_duration_of_a_search_is_split_into_waiting_and_hidden_time(picture):
    slow = Slow()
    waiting = waiting_for(slow.started, slow.may_return, "whole")
    policy = ScriptedPolicy([f"{WHOLE_PICTURE}  ~~~~", answer("rubel")], conversation=waiting)
    *_, last = events_of(picture, policy, slow)
    step = last.record.steps[0]
    assert step.hidden_ms >= 0 and step.search_ms > 0
    assert step.to_trace().keys() >= {"search_ms", "hidden_ms"}
    alone = events_of(picture, ScriptedPolicy([WHOLE_PICTURE, answer("rubel")]), ColourRetriever(), early=False)[-1]
    assert alone.record.steps[0].hidden_ms == 0


class WrongPrediction(ScriptedConversation):
    """A conversation that announces a gaze at the green flag and then chooses another action."""

    def generate(self, *, on_action, **options):
        if on_action is not None:
            on_action(GazeSearch(Box(120, 20, 180, 80)))
        return super().generate(on_action=None, **options)


def test_an_unused_result_is_never_shown(picture):
    retriever, policy = ColourRetriever(), ScriptedPolicy([GAZE_RED, answer("rubel")], conversation=WrongPrediction)
    events = events_of(picture, policy, retriever)
    assert [event.result.evidence[0].titles for event in events if isinstance(event, Found)] == [("Redland",)]
    assert len(policy.observations) == 1
    plain = events_of(picture, ScriptedPolicy([GAZE_RED, answer("rubel")]), ColourRetriever(), early=False)
    assert without_timings(events) == without_timings(plain)


class Broken(ColourRetriever):
    """A retriever that fails for the whole picture."""

    def search(self, queries):
        if queries[0].pixels.shape == WHOLE:
            raise OSError("the disk went away")
        return super().search(queries)


@pytest.mark.parametrize("texts", [[answer("three")], [GAZE_RED, answer("rubel")]])
def test_the_error_of_an_unused_search_is_ignored(picture, texts):
    assert isinstance(events_of(picture, ScriptedPolicy(texts), Broken())[-1], Answered)


def test_the_error_of_a_used_search_is_raised(picture):
    with pytest.raises(OSError, match="disk went away"):
        events_of(picture, ScriptedPolicy([GAZE_RED, WHOLE_PICTURE, answer("rubel")]), Broken())
    assert threads() == []


@pytest.mark.parametrize(
    ("options", "texts"),
    [({"workflow": Workflow.DIRECT}, [answer("x")]), ({"budget": Budget(turns=1)}, [answer("x")])],
)
def test_no_search_starts_if_none_is_allowed(picture, options, texts):
    retriever = ColourRetriever()
    *_, last = events_of(picture, ScriptedPolicy(texts), retriever, **options)
    assert isinstance(last, Answered) and retriever.queries == []


def test_the_full_image_workflow_has_no_speculative_crops(picture):
    retriever = ColourRetriever()
    events_of(picture, ScriptedPolicy([GAZE_RED, answer("x")]), retriever, workflow=Workflow.FULL_IMAGE)
    assert [query.pixels.shape for query in retriever.queries] == [WHOLE]


@pytest.mark.parametrize("text", [WHOLE_PICTURE, "<img_search>[0, 0, 300, 98]</img_search>"])
def test_the_whole_picture_is_searched_once(picture, text):
    retriever = ColourRetriever()
    *_, last = events_of(picture, ScriptedPolicy([text, answer("x")]), retriever)
    assert [query.pixels.shape for query in retriever.queries] == [WHOLE]
    assert last.record.steps[0].box == Box(0, 0, 300, 100)


def test_cached_results_are_not_searched_again(picture):
    retriever = ColourRetriever()
    events_of(picture, ScriptedPolicy([GAZE_RED, GAZE_RED, answer("rubel")]), retriever)
    assert len([query for query in retriever.queries if query.pixels.shape != WHOLE]) == 1


def test_a_refused_box_starts_no_search(picture):
    retriever = ColourRetriever()
    events_of(picture, ScriptedPolicy(["<img_search>[400, 0, 500, 50]</img_search>", answer("x")]), retriever)
    assert {query.pixels.shape for query in retriever.queries} <= {WHOLE}


def test_stopping_an_episode_ends_its_threads(picture):
    slow = Slow()
    slow.may_return.set()

    def on_event(event):
        if isinstance(event, Spoke):
            raise EpisodeClosed("the client has gone")

    with pytest.raises(EpisodeClosed):
        run_episode(picture, "?", policy=ScriptedPolicy([GAZE_RED, GAZE_GREEN, answer("x")]), retriever=slow,
                    budget=Budget(), on_event=on_event)
    assert threads() == []


def test_the_answer_does_not_wait_for_an_unused_search(picture):
    slow = Slow()
    answers = []

    def on_event(event):
        if isinstance(event, Answered):
            assert not slow.may_return.is_set()
            answers.append(event.record.answer)
            slow.may_return.set()

    run_episode(picture, "?", policy=ScriptedPolicy([answer("three")]), retriever=slow, budget=Budget(),
                on_event=on_event)
    assert answers == ["three"] and threads() == []


@pytest.fixture(scope="module")
def atlas():
    return open_runtime(DEFAULT_BUNDLE, threads=1)


def test_the_atlas_answers_alike_with_and_without_speculative_search(atlas):
    for sample in atlas.samples:
        picture = decode_picture(sample.picture.read_bytes())
        with atlas.packs.lease() as retriever:
            speculative, sequential = [], []
            for early, events in ((True, speculative), (False, sequential)):
                run_episode(picture, sample.questions[0], policy=atlas.policy, retriever=retriever,
                            budget=Budget(deadline_ms=600_000), gaze=GazeConfig(early=early), on_event=events.append)
        assert without_timings(speculative) == without_timings(sequential)
        assert np.isfinite(speculative[-1].record.timings_ms["search"])
