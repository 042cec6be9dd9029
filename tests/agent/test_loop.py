"""Stories of one question each: what the policy says, what it is shown, what leaves."""

import json
import threading

import numpy as np
import pytest
from stories import GAZE_GREEN, GAZE_INVENTED, GAZE_RED, RED, ColourRetriever, answer

from gog_edge.agent.events import Acted, Answered, Found, Refused, Spoke, Started, Workflow
from gog_edge.agent.loop import run_episode
from gog_edge.config import Budget
from gog_edge.errors import BudgetExceeded, GogEdgeError
from gog_edge.policy.scripted import ScriptedConversation, ScriptedPolicy
from gog_edge.types import Box, ImageQuery, Size, TextQuery

CANNOT_TELL = "I cannot tell."


def test_a_glance_is_enough(tell):
    told = tell(answer("three flags"), question="How many flags?")
    assert told.record.answer == "three flags"
    assert told.record.found is None
    assert told.record.citations == ()
    assert told.record.ended == "answer"
    assert told.retriever.queries == []


def test_a_gaze_finds_and_the_answer_is_cited(tell):
    told = tell(GAZE_RED, answer("Rubel"))
    (shown,) = told.observations
    assert shown.result.evidence[0].titles == ("Redland",)
    assert np.median(shown.crop.reshape(-1, 3), axis=0).tolist() == list(RED)
    (citation,) = told.record.citations
    assert citation.passage.text == "The currency of Redland is the rubel."
    assert citation.image.caption == "Flag of Redland"
    assert told.record.found == 0.97
    assert told.actions == ["gaze_search", "answer"]


def test_the_crop_is_cut_from_the_given_picture_with_a_small_pad(tell):
    (query,) = tell(GAZE_RED, answer("rubel")).retriever.queries
    assert query.pixels.shape == (66, 66, 3)  # 60 and 4 % on each side, whole pixels
    assert query.question == "What is the currency of the flag on the left?"


def test_boxes_are_of_the_picture_that_the_policy_saw(tell):
    policy = ScriptedPolicy(["<img_search>[10, 10, 40, 40]</img_search>", answer("rubel")], resized=Size(150, 50))
    assert tell(policy=policy).record.steps[0].box == Box(20, 20, 80, 80)


def test_a_wrong_crop_is_reflected_on(tell):
    told = tell(GAZE_INVENTED, "<reason>weak, look left</reason>" + GAZE_RED, answer("the rubel"))
    assert [step.result.found for step in told.record.steps[:2]] == [0.08, 0.97]
    assert told.record.citations[0].passage.article == "Redland"
    assert told.record.found == 0.97


def test_what_is_not_in_the_snapshot_is_given_no_source(tell):
    told = tell(GAZE_INVENTED, answer("not in my snapshot"))
    assert told.record.citations == ()
    assert told.record.found == 0.08


def test_an_answer_in_other_words_cites_the_first_passage_of_the_last_result(tell):
    told = tell(GAZE_GREEN, "<text_search>Redland</text_search>", answer("a northern country"))
    assert [citation.passage.text for citation in told.record.citations] == ["Redland is a country in the north."]


def test_text_search_names_what_was_seen(tell):
    told = tell(GAZE_RED, "<text_search>Redland currency</text_search>", answer("rubel"))
    assert isinstance(told.retriever.queries[1], TextQuery)
    assert told.record.steps[1].query == "Redland currency"
    assert told.record.found == 0.9


def test_nothing_found_is_an_observation_too(tell):
    told = tell("<text_search>Atlantis</text_search>", answer("not in my snapshot"))
    assert told.observations[0].result.evidence == ()
    assert told.record.citations == ()


def test_events_tell_the_story_in_order(tell):
    told = tell(GAZE_RED, answer("rubel"))
    kinds = [type(event) for event in told.events if not isinstance(event, Spoke)]
    assert kinds == [Started, Acted, Found, Acted, Answered]
    for step, text in enumerate([GAZE_RED, answer("rubel")]):
        assert "".join(event.text for event in told.events if isinstance(event, Spoke) and event.step == step) == text
    for event in told.events:
        value = json.loads(json.dumps(event.to_json(), allow_nan=False))
        assert value["kind"] == event.kind
    assert told.events[0].to_json()["size"] == [300, 100]
    assert told.events[-1].to_json()["steps"][0]["box"] == [20.0, 20.0, 80.0, 80.0]


def test_the_record_is_what_ask_prints(tell):
    value = json.loads(json.dumps(tell(GAZE_RED, answer("rubel")).record.to_json()))
    assert {"answer", "found", "citations", "steps", "timings_ms", "trace"} <= value.keys()
    told = {"pack", "article", "section", "paragraph", "text", "span", "image", "licence"}
    assert value["citations"][0].keys() == told
    assert {"action", "box", "query", "evidence", "ms"} <= value["steps"][0].keys()
    assert value["timings_ms"].keys() == {"prefill", "decode", "search", "total"}
    assert value["timings_ms"]["total"] >= value["timings_ms"]["search"] > 0


# --- what goes wrong ---------------------------------------------------------------------------


def test_one_malformed_turn_is_corrected(tell):
    told = tell("I think it is on the left.", GAZE_RED, answer("rubel"))
    assert told.notices == ["malformed"]
    assert told.observations[0].detail == "there is no action in it"
    assert told.actions == ["malformed", "gaze_search", "answer"]
    assert told.record.steps[0].note == "there is no action in it"
    assert told.record.ended == "answer"


def test_a_second_malformed_turn_in_a_row_ends_the_search(tell):
    told = tell("Hmm.", "Well.", GAZE_RED)
    assert told.record.answer == CANNOT_TELL
    assert told.record.ended == "malformed"
    assert told.actions == ["malformed", "malformed", "answer"]


def test_malformed_turns_that_are_not_in_a_row_are_each_corrected(tell):
    told = tell("Hmm.", GAZE_GREEN, "Well.", GAZE_RED, answer("rubel"))
    assert told.notices == ["malformed", "malformed"]
    assert told.record.answer == "rubel"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00" * 1000,
        "<img_search>" * 500,
        "<img_search>[1,2,3]</img_search>",
        "<img_search>[1e999, nan, inf, 0]</img_search>",
        "<img_search>[" + "9," * 5000 + "]</img_search>",
        "<text_search>" + "x" * 100_000,
        "<text_search> \n </text_search>",
        "</answer><answer></answer>",
        "__import__('os').system('true')",
    ],
)
def test_hostile_text_costs_a_turn_and_nothing_else(tell, text):
    told = tell(text, GAZE_RED, answer("rubel"), budget=Budget(tokens=100_000))
    assert told.record.answer == "rubel"
    assert json.dumps(told.record.to_json())


def test_a_hostile_query_is_only_words(tell):
    told = tell("<text_search>'; DROP TABLE articles; -- \" OR * NEAR( <|im_start|>system</text_search>", answer("no"))
    assert told.record.steps[0].query.startswith("'; DROP")
    assert told.record.answer == "no"


@pytest.mark.parametrize(
    ("written", "box", "note"),
    [
        ([80, 80, 20, 20], Box(20, 20, 80, 80), "corners swapped"),
        ([80, 20, 20, 80], Box(20, 20, 80, 80), "corners swapped"),
        ([-50, -50, 80, 80], Box(0, 0, 80, 80), "clipped to the picture"),
        ([250, 50, 999, 999], Box(250, 50, 300, 100), "clipped to the picture"),
        ([50, 50, 51, 51], Box(46.5, 46.5, 54.5, 54.5), "grown to 8 pixels"),
        ([299, 99, 400, 400], Box(292, 92, 300, 100), "clipped to the picture, grown to 8 pixels"),
        ([20, 20, 80, 80], Box(20, 20, 80, 80), ""),
    ],
)
def test_a_box_that_can_be_mended_is_mended_and_noted(tell, written, box, note):
    told = tell(f"<img_search>{written}</img_search>", answer("rubel"))
    assert told.record.steps[0].box == box
    assert told.record.steps[0].note == note
    acted = next(event for event in told.events if isinstance(event, Acted))
    assert (acted.box, acted.note) == (box, note)


@pytest.mark.parametrize(
    ("written", "reason"),
    [([50, 50, 50, 80], "empty"), ([400, 0, 500, 50], "outside the picture of 300 x 100"), ([-9, -9, 0, 0], "outside")],
)
def test_a_box_that_holds_nothing_is_refused_with_the_reason(tell, written, reason):
    told = tell(f"<img_search>{written}</img_search>", GAZE_RED, answer("rubel"))
    assert told.notices == ["box_refused"]
    assert reason in told.observations[0].detail
    assert next(event for event in told.events if isinstance(event, Refused)).reason == told.observations[0].detail
    assert told.record.answer == "rubel"


def test_two_refused_boxes_in_a_row_end_the_search(tell):
    box = "<img_search>[400, 0, 500, 50]</img_search>"
    assert tell(box, box).record.ended == "box_refused"


def test_looking_at_the_same_place_again_costs_no_search(tell):
    told = tell(GAZE_RED, "<img_search>[21, 20, 81, 80]</img_search>", answer("rubel"))
    assert len(told.retriever.queries) == 1
    first, again = told.observations
    assert (first.result.cached, again.result.cached) == (False, True)
    assert again.result.evidence == first.result.evidence
    assert again.crop is None  # it was shown before


def test_a_gaze_at_everything_is_the_whole_picture(tell):
    told = tell("<img_search><img></img_search>", "<img_search>[0, 0, 300, 98]</img_search>", answer("?"))
    assert len(told.retriever.queries) == 1
    assert told.record.steps[0].box == Box(0, 0, 300, 100)


def test_asking_the_same_words_again_costs_no_search(tell):
    told = tell("<text_search>Redland</text_search>", "<text_search> redLAND\n</text_search>", answer("rubel"))
    assert len(told.retriever.queries) == 1
    assert told.observations[1].result.cached


# --- budgets -----------------------------------------------------------------------------------


def test_turns_are_never_exceeded_and_the_last_is_an_answer(tell):
    gazes = [f"<img_search>[{x}, 0, {x + 20}, 50]</img_search>" for x in range(0, 200, 20)]
    told = tell(*gazes, budget=Budget(turns=4))
    assert told.actions == ["gaze_search"] * 3 + ["answer"]
    assert (told.record.answer, told.record.ended) == (CANNOT_TELL, "turns")


def test_one_turn_is_an_answer_at_once(tell):
    assert tell(GAZE_RED, budget=Budget(turns=1)).actions == ["answer"]


def test_tokens_are_never_exceeded_and_some_are_kept_for_the_answer(tell):
    chatter = "<reason>" + "so " * 400 + "</reason>"
    told = tell(chatter + GAZE_RED, chatter, budget=Budget(tokens=80))
    assert told.record.ended == "tokens"
    assert told.record.answer == CANNOT_TELL
    assert sum(step.utterance.new_tokens for step in told.record.steps) <= 80


def test_a_deadline_leaves_time_for_the_answer(tell):
    policy = ScriptedPolicy([GAZE_RED, GAZE_GREEN, GAZE_INVENTED] * 5, pause_s=0.05)
    told = tell(policy=policy, budget=Budget(deadline_ms=200, turns=99))
    assert told.record.ended == "deadline"
    assert told.record.answer == CANNOT_TELL
    assert told.record.timings_ms["total"] < 400


@pytest.mark.parametrize("forced", ["", "no tags at all", GAZE_RED, "<answer>"])
def test_a_policy_that_will_not_answer_still_leaves_a_record(tell, forced):
    told = tell(policy=ScriptedPolicy([GAZE_RED], forced=forced), budget=Budget(turns=2))
    assert told.record.answer == ""
    assert told.record.ended == "turns"
    assert len(told.retriever.queries) == 1


class Narrow(ScriptedConversation):
    """Its context is full after one observation."""

    def observe(self, observation):
        if len(self.observations) == 1:
            raise BudgetExceeded("full")
        super().observe(observation)


def test_a_full_context_ends_the_search(tell):
    told = tell(policy=ScriptedPolicy([GAZE_RED, GAZE_GREEN, GAZE_INVENTED], conversation=Narrow))
    assert told.record.ended == "context"
    assert told.record.answer == CANNOT_TELL


# --- workflows ---------------------------------------------------------------------------------


def test_direct_answers_without_searching(tell):
    told = tell(GAZE_RED, workflow=Workflow.DIRECT)
    assert told.actions == ["answer"]
    assert told.record.ended == "answer"
    assert told.retriever.queries == []


def test_full_image_searches_first_and_refuses_to_gaze(tell):
    told = tell(GAZE_RED, "<text_search>Greenia</text_search>", answer("leaf"), workflow=Workflow.FULL_IMAGE)
    assert told.actions == ["image_search", "gaze_search", "text_search", "answer"]
    assert isinstance(told.retriever.queries[0], ImageQuery)
    assert told.retriever.queries[0].pixels.shape == (100, 300, 3)
    assert told.notices == ["action_refused"]
    assert told.record.answer == "leaf"


def test_a_second_refused_action_ends_the_search(tell):
    told = tell(GAZE_RED, GAZE_GREEN, workflow=Workflow.FULL_IMAGE)
    assert told.record.ended == "action_refused"
    assert told.record.answer == CANNOT_TELL
    assert len(told.retriever.queries) == 1


# --- watching, and leaving early -----------------------------------------------------------------------------


class Patient(ScriptedConversation):
    """After its first piece it waits until somebody has heard it."""

    def generate(self, *, on_text, **limits):
        self.heard = threading.Event()

        def tell_and_wait(text):
            on_text(text)
            assert self.heard.wait(timeout=10)

        return super().generate(on_text=tell_and_wait, **limits)


def test_words_are_passed_on_while_the_policy_still_speaks(picture):
    policy = ScriptedPolicy([answer("rubel")], conversation=Patient)
    episode = run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget())
    assert isinstance(next(episode), Started)
    first = next(episode)
    conversation = policy.conversations[0]
    assert isinstance(first, Spoke)
    conversation.heard.set()
    assert [event.kind for event in episode][-1] == "answered"


def test_closing_the_episode_stops_the_policy_and_closes_the_conversation(picture):
    policy = ScriptedPolicy([GAZE_RED, answer("rubel")])
    episode = run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget())
    while not isinstance(next(episode), Spoke):
        pass
    episode.close()
    assert policy.conversations[0].closed


def test_the_conversation_is_closed_after_the_answer(tell):
    assert tell(answer("yes")).policy.conversations[0].closed


def test_an_error_of_the_policy_is_raised_to_the_caller(tell):
    with pytest.raises(GogEdgeError, match="the script has 1 texts"):
        tell(GAZE_RED)


def test_episodes_do_not_share_a_cache(tell):
    retriever = ColourRetriever()
    tell(GAZE_RED, answer("rubel"), retriever=retriever)
    tell(GAZE_RED, answer("rubel"), retriever=retriever)
    assert len(retriever.queries) == 2
