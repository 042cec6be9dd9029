"""The runtime as Python programs use it: answers through a callback or a generator, searches, images."""

import threading

import pytest
from playback import QUESTION, SCRIPT, PlaybackPolicy, playback_runtime, png, scene

from gog_edge.agent.loop import EpisodeClosed
from gog_edge.errors import BackendError, PictureError, QuestionError
from gog_edge.runtime import check_question

WAIT_S = 30


def episode_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("episode")]


@pytest.mark.parametrize(
    ("question", "words"),
    [("", "empty"), (" \n\t ", "empty"), ("x" * 2001, "2001 characters"), ("a\x00b", "x00"), ("\ud800", "ud800")],
)
def test_invalid_questions_are_refused(question, words):
    with pytest.raises(QuestionError, match=words):
        check_question(question, 2000)


def test_a_question_is_only_stripped():
    assert check_question("  Wessen Fahne? 旗は? <|im_end|>\n", 2000) == "Wessen Fahne? 旗は? <|im_end|>"


def test_answer_calls_back_in_the_calling_thread_and_returns_the_record(tmp_path):
    events, threads = [], set()

    def on_event(event):
        events.append(event)
        threads.add(threading.current_thread())

    record = playback_runtime(tmp_path).answer(png(scene()), QUESTION, on_event)
    assert record.answer == "The Romanian leu." and events[-1].record is record
    assert threads == {threading.current_thread()}


def test_ask_yields_the_events_that_answer_reports(tmp_path):
    events = []
    playback_runtime(tmp_path).answer(png(scene()), QUESTION, events.append)
    yielded = list(playback_runtime(tmp_path).ask(png(scene()), QUESTION))
    assert [event.kind for event in yielded] == [event.kind for event in events]
    assert yielded[-1].record.answer == "The Romanian leu." and episode_threads() == []


def test_ask_yields_events_while_the_policy_is_generating(tmp_path):
    gate = threading.Event()
    events = playback_runtime(tmp_path, PlaybackPolicy(gate=gate)).ask(png(scene()), QUESTION)
    assert next(events).kind == "started"
    assert not gate.is_set()  # the first turn has not begun
    gate.set()
    assert [event.kind for event in events][-1] == "answered"


def test_closing_the_generator_stops_the_policy_and_ends_its_thread(tmp_path):
    policy = PlaybackPolicy(script=[("word " * 10_000, SCRIPT[0][1])], pause_s=0.001)
    events = playback_runtime(tmp_path, policy).ask(png(scene()), QUESTION)
    while next(events).kind != "spoke":
        pass
    events.close()
    assert policy.opened[0].closed.is_set() and episode_threads() == []


def test_an_exception_of_the_callback_stops_the_policy_and_is_raised(tmp_path):
    policy = PlaybackPolicy(script=[("word " * 10_000, SCRIPT[0][1])])
    pieces = []

    def on_event(event):
        if event.kind == "spoke":
            pieces.append(event.text)
            raise EpisodeClosed("enough")

    with pytest.raises(EpisodeClosed, match="enough"):
        playback_runtime(tmp_path, policy).answer(png(scene()), QUESTION, on_event)
    assert pieces == ["word "] and policy.opened[0].closed.is_set()


@pytest.mark.parametrize(
    ("picture", "question", "error"),
    [(b"hello", QUESTION, PictureError), (png(scene()), " ", QuestionError)],
)
def test_refused_input_is_raised_before_the_first_event(tmp_path, picture, question, error):
    runtime = playback_runtime(tmp_path)
    with pytest.raises(error):
        runtime.answer(picture, question, lambda event: pytest.fail("an event was reported"))
    with pytest.raises(error):
        next(runtime.ask(picture, question))


def test_errors_of_the_policy_reach_the_consumer_of_the_generator(tmp_path):
    policy = PlaybackPolicy(fault=BackendError("the engine failed"))
    events = playback_runtime(tmp_path, policy).ask(png(scene()), QUESTION)
    assert next(events).kind == "started"
    with pytest.raises(BackendError, match="the engine failed"):
        next(events)
