"""Searches begin while the policy still speaks, and nobody can tell but by the clock."""

import threading

import numpy as np
import pytest
from stories import GAZE_GREEN, GAZE_RED, ColourRetriever, answer, without_times

from gog_edge.agent.events import Answered, Found, Spoke, Workflow
from gog_edge.agent.loop import run_episode
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.config import Budget, GazeConfig
from gog_edge.picture import decode_picture
from gog_edge.policy.scripted import ScriptedConversation, ScriptedPolicy
from gog_edge.runtime import open_runtime
from gog_edge.types import Box, GazeSearch, ImageQuery

PATIENCE_S = 30
WHOLE = (100, 300, 3)
LOOK = "<img_search><img></img_search>"


def hold(picture, policy, retriever, *, early=True, **options):
    return list(run_episode(picture, "What is the currency?", policy=policy, retriever=retriever, budget=Budget(),
                            gaze=GazeConfig(early=early), **options))


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("search", "policy"))]


class Slow(ColourRetriever):
    """Says which searches have begun, and ends none before it may."""

    def __init__(self):
        super().__init__()
        self.began = {kind: threading.Event() for kind in ("whole", "crop", "words")}
        self.may_end = threading.Event()

    def search(self, queries):
        (query,) = queries
        image = isinstance(query, ImageQuery)
        self.began["words" if not image else "whole" if query.pixels.shape == WHOLE else "crop"].set()
        assert self.may_end.wait(PATIENCE_S)
        return super().search(queries)


def waiting_for(began, may_end, kind):
    """A conversation that says its last word only when a search of this kind has begun."""

    class Waiting(ScriptedConversation):
        def generate(self, *, on_text, **options):
            def hear(piece):
                if piece.startswith("~"):
                    assert began[kind].wait(PATIENCE_S), f"no {kind} was searched before the turn was over"
                    may_end.set()
                on_text(piece)

            return super().generate(on_text=hear, **options)

    return Waiting


@pytest.mark.parametrize(
    ("kind", "text"),
    [("crop", GAZE_RED), ("words", "<text_search>Redland</text_search>"), ("whole", LOOK), ("whole", "<reason>hm")],
)
def test_a_search_begins_before_the_turn_is_over(picture, kind, text):
    slow = Slow()
    padded = text + " " * (-len(text) % 4) + "~~~~"  # pieces have four letters: the last one is ours
    policy = ScriptedPolicy([padded, answer("rubel")], conversation=waiting_for(slow.began, slow.may_end, kind))
    *_, last = hold(picture, policy, slow)
    assert last.record.answer == "rubel"


def test_the_time_of_a_search_is_split_into_what_was_waited_for_and_what_was_hidden(picture):
    slow = Slow()
    waiting = waiting_for(slow.began, slow.may_end, "whole")
    policy = ScriptedPolicy([f"{LOOK}  ~~~~", answer("rubel")], conversation=waiting)
    *_, last = hold(picture, policy, slow)
    step = last.record.steps[0]
    assert step.hidden_ms >= 0 and step.search_ms > 0
    assert step.to_trace().keys() >= {"search_ms", "hidden_ms"}
    alone = hold(picture, ScriptedPolicy([LOOK, answer("rubel")]), ColourRetriever(), early=False)[-1]
    assert alone.record.steps[0].hidden_ms == 0


class Hasty(ScriptedConversation):
    """Is about to look at the green flag, and then looks elsewhere."""

    def generate(self, *, on_action, **options):
        if on_action is not None:
            on_action(GazeSearch(Box(120, 20, 180, 80)))
        return super().generate(on_action=None, **options)


def test_a_wrong_guess_is_never_shown(picture):
    retriever, policy = ColourRetriever(), ScriptedPolicy([GAZE_RED, answer("rubel")], conversation=Hasty)
    events = hold(picture, policy, retriever)
    assert [event.result.evidence[0].titles for event in events if isinstance(event, Found)] == [("Redland",)]
    assert len(policy.observations) == 1
    plain = hold(picture, ScriptedPolicy([GAZE_RED, answer("rubel")]), ColourRetriever(), early=False)
    assert without_times(events) == without_times(plain)


class Broken(ColourRetriever):
    """Cannot search with whole pictures."""

    def search(self, queries):
        if queries[0].pixels.shape == WHOLE:
            raise OSError("the disk went away")
        return super().search(queries)


@pytest.mark.parametrize("texts", [[answer("three")], [GAZE_RED, answer("rubel")]])
def test_the_error_of_a_search_that_nobody_needs_is_nobodys(picture, texts):
    assert isinstance(hold(picture, ScriptedPolicy(texts), Broken())[-1], Answered)


def test_the_error_of_a_search_that_is_needed_is_raised(picture):
    with pytest.raises(OSError, match="disk went away"):
        hold(picture, ScriptedPolicy([GAZE_RED, LOOK, answer("rubel")]), Broken())
    assert threads() == []


@pytest.mark.parametrize(
    ("options", "texts"),
    [({"workflow": Workflow.DIRECT}, [answer("x")]), ({"budget": Budget(turns=1)}, [answer("x")])],
)
def test_where_no_search_is_allowed_none_begins(picture, options, texts):
    retriever = ColourRetriever()
    options = {"budget": Budget(), **options}
    *_, last = run_episode(picture, "?", policy=ScriptedPolicy(texts), retriever=retriever, **options)
    assert isinstance(last, Answered) and retriever.queries == []


def test_a_full_image_workflow_searches_no_crop_ahead(picture):
    retriever = ColourRetriever()
    hold(picture, ScriptedPolicy([GAZE_RED, answer("x")]), retriever, workflow=Workflow.FULL_IMAGE)
    assert [query.pixels.shape for query in retriever.queries] == [WHOLE]


@pytest.mark.parametrize("text", [LOOK, "<img_search>[0, 0, 300, 98]</img_search>"])
def test_the_whole_picture_is_searched_once_however_it_is_asked_for(picture, text):
    retriever = ColourRetriever()
    *_, last = hold(picture, ScriptedPolicy([text, answer("x")]), retriever)
    assert [query.pixels.shape for query in retriever.queries] == [WHOLE]
    assert last.record.steps[0].box == Box(0, 0, 300, 100)


def test_what_is_remembered_is_not_searched_ahead(picture):
    retriever = ColourRetriever()
    hold(picture, ScriptedPolicy([GAZE_RED, GAZE_RED, answer("rubel")]), retriever)
    assert len([query for query in retriever.queries if query.pixels.shape != WHOLE]) == 1


def test_a_refused_box_begins_nothing(picture):
    retriever = ColourRetriever()
    hold(picture, ScriptedPolicy(["<img_search>[400, 0, 500, 50]</img_search>", answer("x")]), retriever)
    assert {query.pixels.shape for query in retriever.queries} <= {WHOLE}


def test_leaving_early_leaves_no_thread(picture):
    slow = Slow()
    slow.may_end.set()
    episode = run_episode(picture, "?", policy=ScriptedPolicy([GAZE_RED, GAZE_GREEN, answer("x")]), retriever=slow,
                          budget=Budget())
    while not isinstance(next(episode), Spoke):
        pass
    episode.close()
    assert threads() == []


def test_the_answer_does_not_wait_for_a_search_that_it_did_not_need(picture):
    slow = Slow()
    episode = run_episode(picture, "?", policy=ScriptedPolicy([answer("three")]), retriever=slow, budget=Budget())
    *_, last = _until_answered(episode)
    assert last.record.answer == "three" and not slow.may_end.is_set()
    slow.may_end.set()
    episode.close()
    assert threads() == []


def _until_answered(episode):
    for event in episode:
        yield event
        if isinstance(event, Answered):
            return


@pytest.fixture(scope="module")
def atlas():
    return open_runtime(DEFAULT_BUNDLE, threads=1)


def test_the_atlas_says_the_same_with_and_without(atlas):
    for sample in atlas.samples:
        picture = decode_picture(sample.picture.read_bytes())
        with atlas.packs.lease() as retriever:
            told = [list(run_episode(picture, sample.questions[0], policy=atlas.policy, retriever=retriever,
                                     budget=Budget(deadline_ms=600_000), gaze=GazeConfig(early=early)))
                    for early in (True, False)]
        assert without_times(told[0]) == without_times(told[1])
        assert np.isfinite(told[0][-1].record.timings_ms["search"])
