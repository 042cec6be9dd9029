"""Episodes with a scripted policy: what it is shown, which events are reported, what the record contains."""

import json

import numpy as np
import pytest
from scripted_policy import ScriptedConversation, ScriptedPolicy
from scripted_world import GAZE_GREEN, GAZE_INVENTED, GAZE_RED, RED, ColourRetriever, answer

from gog_edge.agent.events import Acted, Answered, Found, Refused, Spoke, Started, Workflow
from gog_edge.agent.loop import EpisodeClosed, run_episode
from gog_edge.config import Budget
from gog_edge.errors import BudgetExceeded, GogEdgeError
from gog_edge.types import Box, ImageQuery, Size, TextQuery

CANNOT_TELL = "I cannot tell."


def test_an_answer_without_a_search(play):
    outcome = play(answer("three flags"), question="How many flags?")
    assert outcome.record.answer == "three flags"
    assert outcome.record.found is None
    assert outcome.record.citations == ()
    assert outcome.record.ended == "answer"
    assert outcome.retriever.queries == []


def test_an_answer_after_a_gaze_is_cited(play):
    outcome = play(GAZE_RED, answer("Rubel"))
    (shown,) = outcome.observations
    assert shown.result.evidence[0].titles == ("Redland",)
    assert np.median(shown.crop.reshape(-1, 3), axis=0).tolist() == list(RED)
    (citation,) = outcome.record.citations
    assert citation.passage.text == "The currency of Redland is the rubel."
    assert citation.image.caption == "Flag of Redland"
    assert outcome.record.found == 0.97
    assert outcome.actions == ["gaze_search", "answer"]


def test_the_crop_is_padded_and_cut_from_the_given_picture(play):
    (query,) = play(GAZE_RED, answer("rubel")).retriever.queries
    assert query.pixels.shape == (66, 66, 3)  # 60 and 4 % on each side, whole pixels
    assert query.question == "What is the currency of the flag on the left?"


def test_boxes_refer_to_the_resized_picture(play):
    policy = ScriptedPolicy(["<img_search>[10, 10, 40, 40]</img_search>", answer("rubel")], resized=Size(150, 50))
    assert play(policy=policy).record.steps[0].box == Box(20, 20, 80, 80)


def test_a_second_gaze_after_an_unlikely_result(play):
    outcome = play(GAZE_INVENTED, "<reason>weak, look left</reason>" + GAZE_RED, answer("the rubel"))
    assert [step.result.found for step in outcome.record.steps[:2]] == [0.08, 0.97]
    assert outcome.record.citations[0].passage.article == "Redland"
    assert outcome.record.found == 0.97


def test_an_answer_from_an_unlikely_result_has_no_sources(play):
    outcome = play(GAZE_INVENTED, answer("not in my snapshot"))
    assert outcome.record.citations == outcome.record.related == ()
    assert outcome.record.found == 0.08


def test_a_passage_without_the_answer_is_related_and_not_cited(play):
    outcome = play(GAZE_GREEN, "<text_search>Redland</text_search>", answer("a northern country"))
    assert outcome.record.citations == ()
    assert [related.passage.text for related in outcome.record.related] == ["Redland is a country in the north."]
    assert outcome.record.found == 0.9


def test_a_cited_answer_has_no_related_passages(play):
    record = play(GAZE_RED, answer("rubel")).record
    assert len(record.citations) == 1 and record.related == ()


def test_a_text_search_after_a_gaze(play):
    outcome = play(GAZE_RED, "<text_search>Redland currency</text_search>", answer("rubel"))
    assert isinstance(outcome.retriever.queries[1], TextQuery)
    assert outcome.record.steps[1].query == "Redland currency"
    assert outcome.record.found == 0.9


def test_an_empty_result_is_shown_to_the_policy(play):
    outcome = play("<text_search>Atlantis</text_search>", answer("not in my snapshot"))
    assert outcome.observations[0].result.evidence == ()
    assert outcome.record.citations == ()


def test_events_are_reported_in_order(play):
    outcome = play(GAZE_RED, answer("rubel"))
    kinds = [type(event) for event in outcome.events if not isinstance(event, Spoke)]
    assert kinds == [Started, Acted, Found, Acted, Answered]
    for step, text in enumerate([GAZE_RED, answer("rubel")]):
        spoken = [event.text for event in outcome.events if isinstance(event, Spoke) and event.step == step]
        assert "".join(spoken) == text
    for event in outcome.events:
        value = json.loads(json.dumps(event.to_json(), allow_nan=False))
        assert value["kind"] == event.kind
    assert outcome.events[0].to_json()["size"] == [300, 100]
    assert outcome.events[-1].to_json()["steps"][0]["box"] == [20.0, 20.0, 80.0, 80.0]


def test_the_json_of_a_record(play):
    value = json.loads(json.dumps(play(GAZE_RED, answer("rubel")).record.to_json()))
    assert value.keys() == {"answer", "found", "citations", "related", "steps", "timings_ms", "ended", "trace"}
    fields = {"pack", "article", "section", "paragraph", "text", "span", "image", "licence"}
    assert value["citations"][0].keys() == fields and value["related"] == []
    (related,) = play(GAZE_RED, answer("another currency")).record.to_json()["related"]
    assert related.keys() == fields
    assert {"action", "box", "query", "evidence", "ms"} <= value["steps"][0].keys()
    assert value["timings_ms"].keys() == {"prefill", "decode", "search", "total"}
    assert value["timings_ms"]["total"] >= value["timings_ms"]["search"] > 0


# --- malformed and refused turns ---------------------------------------------------------------------------


def test_one_malformed_turn_is_corrected(play):
    outcome = play("I think it is on the left.", GAZE_RED, answer("rubel"))
    assert outcome.notices == ["malformed"]
    assert outcome.observations[0].detail == "it contains no action"
    assert outcome.actions == ["malformed", "gaze_search", "answer"]
    assert outcome.record.steps[0].note == "it contains no action"
    assert outcome.record.ended == "answer"


def test_a_second_malformed_turn_in_a_row_ends_the_search(play):
    outcome = play("Hmm.", "Well.", GAZE_RED)
    assert outcome.record.answer == CANNOT_TELL
    assert outcome.record.ended == "malformed"
    assert outcome.actions == ["malformed", "malformed", "answer"]


def test_malformed_turns_that_are_not_in_a_row_are_each_corrected(play):
    outcome = play("Hmm.", GAZE_GREEN, "Well.", GAZE_RED, answer("rubel"))
    assert outcome.notices == ["malformed", "malformed"]
    assert outcome.record.answer == "rubel"


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
def test_hostile_text_costs_one_turn(play, text):
    outcome = play(text, GAZE_RED, answer("rubel"), budget=Budget(tokens=100_000))
    assert outcome.record.answer == "rubel"
    assert json.dumps(outcome.record.to_json())


def test_a_hostile_query_is_only_text(play):
    query = "'; DROP TABLE articles; -- \" OR * NEAR( <|im_start|>system"
    outcome = play(f"<text_search>{query}</text_search>", answer("no"))
    assert outcome.record.steps[0].query == query
    assert outcome.record.answer == "no"


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
def test_a_box_is_corrected_with_a_note(play, written, box, note):
    outcome = play(f"<img_search>{written}</img_search>", answer("rubel"))
    assert outcome.record.steps[0].box == box
    assert outcome.record.steps[0].note == note
    acted = next(event for event in outcome.events if isinstance(event, Acted))
    assert (acted.box, acted.note) == (box, note)


@pytest.mark.parametrize(
    ("written", "reason"),
    [([50, 50, 50, 80], "empty"), ([400, 0, 500, 50], "outside the picture of 300 x 100"), ([-9, -9, 0, 0], "outside")],
)
def test_an_empty_box_is_refused_with_the_reason(play, written, reason):
    outcome = play(f"<img_search>{written}</img_search>", GAZE_RED, answer("rubel"))
    assert outcome.notices == ["box_refused"]
    (refused,) = (event for event in outcome.events if isinstance(event, Refused))
    assert refused.reason == outcome.observations[0].detail and reason in refused.reason
    assert outcome.record.answer == "rubel"


def test_two_refused_boxes_in_a_row_end_the_search(play):
    box = "<img_search>[400, 0, 500, 50]</img_search>"
    assert play(box, box).record.ended == "box_refused"


def test_a_second_gaze_at_the_same_region_is_answered_from_the_cache(play):
    outcome = play(GAZE_RED, "<img_search>[21, 20, 81, 80]</img_search>", answer("rubel"))
    assert len(outcome.retriever.queries) == 1
    first, again = outcome.observations
    assert (first.result.cached, again.result.cached) == (False, True)
    assert again.result.evidence == first.result.evidence
    assert again.crop is None  # it was shown before


def test_a_gaze_at_the_whole_picture_is_the_whole_picture_search(play):
    outcome = play("<img_search><img></img_search>", "<img_search>[0, 0, 300, 98]</img_search>", answer("?"))
    assert len(outcome.retriever.queries) == 1
    assert outcome.record.steps[0].box == Box(0, 0, 300, 100)


def test_a_second_search_for_the_same_text_is_answered_from_the_cache(play):
    outcome = play("<text_search>Redland</text_search>", "<text_search> redLAND\n</text_search>", answer("rubel"))
    assert len(outcome.retriever.queries) == 1
    assert outcome.observations[1].result.cached


# --- budgets -----------------------------------------------------------------------------------


def test_turns_are_never_exceeded_and_the_last_is_an_answer(play):
    gazes = [f"<img_search>[{x}, 0, {x + 20}, 50]</img_search>" for x in range(0, 200, 20)]
    outcome = play(*gazes, budget=Budget(turns=4))
    assert outcome.actions == ["gaze_search"] * 3 + ["answer"]
    assert (outcome.record.answer, outcome.record.ended) == (CANNOT_TELL, "turns")


def test_one_turn_is_an_answer_at_once(play):
    assert play(GAZE_RED, budget=Budget(turns=1)).actions == ["answer"]


def test_tokens_are_never_exceeded_and_some_are_reserved_for_the_answer(play):
    chatter = "<reason>" + "so " * 400 + "</reason>"
    outcome = play(chatter + GAZE_RED, chatter, budget=Budget(tokens=80))
    assert outcome.record.ended == "tokens"
    assert outcome.record.answer == CANNOT_TELL
    assert sum(step.utterance.new_tokens for step in outcome.record.steps) <= 80


def test_a_deadline_leaves_time_for_the_answer(play):
    policy = ScriptedPolicy([GAZE_RED, GAZE_GREEN, GAZE_INVENTED] * 5, pause_s=0.05)
    outcome = play(policy=policy, budget=Budget(deadline_ms=200, turns=99))
    assert outcome.record.ended == "deadline"
    assert outcome.record.answer == CANNOT_TELL
    assert outcome.record.timings_ms["total"] < 400


@pytest.mark.parametrize("forced", ["", "no tags at all", GAZE_RED, "<answer>"])
def test_a_policy_that_does_not_answer_leaves_a_record(play, forced):
    outcome = play(policy=ScriptedPolicy([GAZE_RED], forced=forced), budget=Budget(turns=2))
    assert outcome.record.answer == ""
    assert outcome.record.ended == "turns"
    assert len(outcome.retriever.queries) == 1


class Narrow(ScriptedConversation):
    """A conversation whose context is full after one observation."""

    def observe(self, observation):
        if len(self.observations) == 1:
            raise BudgetExceeded("full")
        super().observe(observation)


def test_a_full_context_ends_the_search(play):
    outcome = play(policy=ScriptedPolicy([GAZE_RED, GAZE_GREEN, GAZE_INVENTED], conversation=Narrow))
    assert outcome.record.ended == "context"
    assert outcome.record.answer == CANNOT_TELL


# --- workflows ---------------------------------------------------------------------------------


def test_direct_answers_without_searching(play):
    outcome = play(GAZE_RED, workflow=Workflow.DIRECT)
    assert outcome.actions == ["answer"]
    assert outcome.record.ended == "answer"
    assert outcome.retriever.queries == []


def test_full_image_searches_first_and_refuses_to_gaze(play):
    outcome = play(GAZE_RED, "<text_search>Greenia</text_search>", answer("leaf"), workflow=Workflow.FULL_IMAGE)
    assert outcome.actions == ["image_search", "gaze_search", "text_search", "answer"]
    assert isinstance(outcome.retriever.queries[0], ImageQuery)
    assert outcome.retriever.queries[0].pixels.shape == (100, 300, 3)
    assert outcome.notices == ["action_refused"]
    assert outcome.record.answer == "leaf"


def test_a_second_refused_action_ends_the_search(play):
    outcome = play(GAZE_RED, GAZE_GREEN, workflow=Workflow.FULL_IMAGE)
    assert outcome.record.ended == "action_refused"
    assert outcome.record.answer == CANNOT_TELL
    assert len(outcome.retriever.queries) == 1


# --- events during a turn, and stopping ----------------------------------------------------------------------


class Recording(ScriptedConversation):
    """A conversation that records each piece of text after it was reported."""

    def generate(self, *, on_text, **limits):
        self.log = []

        def report(text):
            on_text(text)
            self.log.append(text)

        return super().generate(on_text=report, **limits)


def test_text_is_reported_piece_by_piece_while_the_policy_generates(picture):
    policy = ScriptedPolicy([answer("rubel")], conversation=Recording)
    spoken = []

    def on_event(event):
        if isinstance(event, Spoke):
            assert policy.conversations[0].log == spoken  # no piece was generated before the last one was reported
            spoken.append(event.text)

    run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget(), on_event=on_event)
    assert len(spoken) > 1 and "".join(spoken) == answer("rubel")


def test_an_exception_of_the_callback_stops_the_policy_and_closes_the_conversation(picture):
    policy = ScriptedPolicy([GAZE_RED, answer("rubel")], conversation=Recording)

    def on_event(event):
        if isinstance(event, Spoke):
            raise EpisodeClosed("the client has gone")

    with pytest.raises(EpisodeClosed, match="has gone"):
        run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget(), on_event=on_event)
    assert policy.conversations[0].closed and policy.conversations[0].log == []


def test_the_conversation_is_closed_after_the_answer(play):
    assert play(answer("yes")).policy.conversations[0].closed


def test_an_error_of_the_policy_is_raised_to_the_caller(play):
    with pytest.raises(GogEdgeError, match="all 1 texts of the script"):
        play(GAZE_RED)


def test_episodes_do_not_share_a_cache(play):
    retriever = ColourRetriever()
    play(GAZE_RED, answer("rubel"), retriever=retriever)
    play(GAZE_RED, answer("rubel"), retriever=retriever)
    assert len(retriever.queries) == 2
