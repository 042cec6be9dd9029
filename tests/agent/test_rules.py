"""Rules of a dialect for the loop: how crops are cut, how many searches are allowed, the notice before the answer."""

from dataclasses import replace

import pytest
from scripted_policy import FORCED_ANSWER, ScriptedConversation, ScriptedPolicy
from scripted_world import GAZE_GREEN, GAZE_INVENTED, GAZE_RED, ColourRetriever, answer

from benchmarks.support.recorded_policy import RecordedPolicy
from gog_edge.agent.events import Refused, Workflow
from gog_edge.agent.loop import run_episode
from gog_edge.agent.trace import TraceWriter, read_trace
from gog_edge.config import Budget
from gog_edge.errors import BudgetExceeded
from gog_edge.policy.dialect.dialect import GIVE_UP, CropRules, LoopRules, SearchLimits
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Box, GazeSearch, ImageSearch, TextQuery, TextSearch

CANNOT_TELL = "I cannot tell."
WORDS = "<text_search>Greenia</text_search>"
LOOK = "<img_search><img></img_search>"


def dialect(*, give_up="", **rules):
    plain = load_dialect("gog")
    return replace(plain, notices={**plain.notices, **({GIVE_UP: give_up} if give_up else {})}, **rules)


@pytest.fixture
def ruled(play):
    """Play an episode under the rules of a dialect."""

    def run(*texts, forced=FORCED_ANSWER, conversation=ScriptedConversation, budget=None, crop=None, allowed=None,
            give_up="", **options):
        rules = {"crop": crop or CropRules(), "budget": allowed or SearchLimits()}
        policy = ScriptedPolicy(texts, dialect(give_up=give_up, **rules), forced=forced, conversation=conversation)
        return play(policy=policy, budget=budget or Budget(), **options)

    return run


def test_most_dialects_have_no_rules():
    assert load_dialect("atlas").loop_rules == load_dialect("gog").loop_rules == LoopRules()
    rules = load_dialect("mmsearch_r1").loop_rules
    assert (rules.budget.rounds, rules.final_notice) == (3, GIVE_UP)


def test_a_recorded_policy_keeps_the_rules_of_the_one_it_records():
    inner = ScriptedPolicy([], load_dialect("deepeyes"))
    assert RecordedPolicy(inner, load_dialect("gog")).rules == inner.rules == load_dialect("deepeyes").loop_rules


# --- crops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "side"), [(CropRules(), 66), (CropRules(pad=0.0), 60), (CropRules(pad=0.1), 72)])
def test_a_crop_has_the_pad_that_the_dialect_states(ruled, crop, side):
    outcome = ruled(GAZE_RED, answer("rubel"), crop=crop)
    assert outcome.observations[0].crop.shape == outcome.retriever.queries[0].pixels.shape == (side, side, 3)


def test_a_small_box_is_enlarged_as_the_dialect_states(ruled):
    step, _ = ruled("<img_search>[40, 40, 50, 60]</img_search>", answer("?"), crop=CropRules(min_side=28)).record.steps
    assert (step.box, step.note) == (Box(31, 36, 59, 64), "grown to 28 pixels")


# --- turns and searches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "rounds", "spoken"), [(6, 3, 3), (2, 3, 2), (6, None, 5)])
def test_the_smaller_number_of_turns_counts(ruled, turns, rounds, spoken):
    outcome = ruled(GAZE_RED, GAZE_GREEN, GAZE_INVENTED, WORDS, answer("leaf"), budget=Budget(turns=turns),
                 allowed=SearchLimits(rounds=rounds))
    assert len(outcome.actions) == spoken
    assert outcome.record.ended == ("turns" if rounds else "answer")


def test_a_search_beyond_its_count_is_refused_with_the_reason(ruled):
    outcome = ruled(GAZE_RED, GAZE_GREEN, answer("rubel"), allowed=SearchLimits(image_searches=1))
    assert outcome.notices == ["action_refused"]
    (refused,) = (event for event in outcome.events if isinstance(event, Refused))
    assert refused.reason == outcome.observations[1].detail == "1 of 1 image searches are used, no more are allowed"
    assert outcome.actions == ["gaze_search", "gaze_search", "answer"]
    assert len(outcome.retriever.queries) == 1
    assert (outcome.record.answer, outcome.record.ended) == ("rubel", "answer")


def test_image_and_text_searches_are_counted_separately(ruled):
    outcome = ruled(GAZE_RED, GAZE_GREEN, WORDS, "<text_search>Redland</text_search>", answer("leaf"),
                 allowed=SearchLimits(image_searches=1, text_searches=1))
    assert [isinstance(query, TextQuery) for query in outcome.retriever.queries] == [False, True]
    assert outcome.notices == ["action_refused"] * 2 and "1 of 1 text searches" in outcome.observations[3].detail
    assert outcome.record.answer == "leaf"


def test_cached_results_count_as_no_search(ruled):
    outcome = ruled(GAZE_RED, GAZE_RED, WORDS, WORDS, answer("leaf"), allowed=SearchLimits(None, 1, 1))
    assert outcome.notices == [] and [shown.result.cached for shown in outcome.observations] == [False, True] * 2


def test_a_search_beyond_its_count_is_not_a_fault(ruled):
    outcome = ruled(GAZE_RED, "Hmm.", GAZE_GREEN, "Well.", answer("rubel"), allowed=SearchLimits(image_searches=1))
    assert outcome.notices == ["malformed", "action_refused", "malformed"]
    assert (outcome.record.answer, outcome.record.ended) == ("rubel", "answer")


@pytest.mark.parametrize("between", [[], ["Hmm."]])
def test_a_second_search_beyond_its_count_forces_the_answer(ruled, between):
    outcome = ruled(GAZE_RED, GAZE_GREEN, *between, GAZE_INVENTED, WORDS, allowed=SearchLimits(image_searches=1))
    assert (outcome.record.answer, outcome.record.ended) == (CANNOT_TELL, "searches")


def test_an_allowed_search_in_between_resets_the_count(ruled):
    outcome = ruled(GAZE_RED, GAZE_GREEN, WORDS, GAZE_INVENTED, answer("leaf"), allowed=SearchLimits(image_searches=1))
    assert outcome.notices == ["action_refused"] * 2 and outcome.record.ended == "answer"


def test_the_search_of_the_workflow_is_not_refused(ruled):
    outcome = ruled(LOOK, answer("?"), workflow=Workflow.FULL_IMAGE, allowed=SearchLimits(image_searches=0))
    assert outcome.actions == ["image_search", "image_search", "answer"] and outcome.notices == []


def searched(picture, *texts, **allowed):
    """The shapes of all pictures that were searched, with speculative searches."""
    retriever = ColourRetriever()
    policy = ScriptedPolicy(texts, dialect(budget=SearchLimits(**allowed)))
    run_episode(picture, "?", policy=policy, retriever=retriever, budget=Budget(), on_event=lambda _: None)
    return [query.pixels.shape[:2] for query in retriever.queries]


def test_no_speculative_search_that_would_be_refused(picture):
    assert searched(picture, GAZE_RED, answer("?"), image_searches=0) == []
    assert searched(picture, GAZE_RED, GAZE_GREEN, answer("?"), image_searches=1).count((66, 66)) == 1


def test_an_unused_speculative_search_is_not_counted(picture):
    assert searched(picture, GAZE_RED, answer("?"), image_searches=1).count((66, 66)) == 1


# --- before the last answer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "ended"),
    [
        ([GAZE_RED], {"budget": Budget(turns=2)}, "turns"),
        ([GAZE_RED], {"allowed": SearchLimits(rounds=2)}, "turns"),
        (["Hmm.", "Well."], {}, "malformed"),
        ([], {"workflow": Workflow.DIRECT}, "answer"),
    ],
)
def test_the_final_notice_is_shown_once(ruled, texts, options, ended):
    outcome = ruled(*texts, give_up="Answer now.", **options)
    assert outcome.notices[-1] == GIVE_UP and outcome.notices.count(GIVE_UP) == 1
    assert (outcome.record.answer, outcome.record.ended) == (CANNOT_TELL, ended)
    assert GIVE_UP not in ruled(*texts, **options).notices


def test_a_free_answer_needs_no_final_notice(ruled):
    assert ruled(GAZE_RED, answer("rubel"), give_up="Answer now.").notices == []


class Full(ScriptedConversation):
    """A conversation whose context has no room for the final notice."""

    def generate(self, **options):
        if self.observations and self.observations[-1].notice == GIVE_UP:
            self.observations.pop()
            raise BudgetExceeded("full")
        return super().generate(**options)


def test_without_room_for_the_notice_the_answer_is_forced_without_it(ruled):
    outcome = ruled(GAZE_RED, budget=Budget(turns=2), give_up="Answer now.", conversation=Full)
    assert outcome.record.answer == CANNOT_TELL and outcome.notices == []


# --- the trace ---------------------------------------------------------------------------------------


def test_a_trace_contains_the_rules_in_force(ruled, tmp_path):
    path = tmp_path / "trace.json"
    ruled(GAZE_RED, answer("?"), crop=CropRules(pad=0.0, min_side=28), allowed=SearchLimits(3, 1, 2),
          trace=TraceWriter(path))
    trace = read_trace(path)
    assert trace["budget"] == {"turns": 3, "tokens": 512, "deadline_ms": 20_000, "image_searches": 1,
                               "text_searches": 2}
    assert (trace["gaze"]["pad"], trace["gaze"]["min_side"], trace["gaze"]["same_iou"]) == (0.0, 28, 0.9)


def gazes():
    return [GazeSearch(Box(10 * n, 10, 10 * n + 50, 60)) for n in range(20)]


@pytest.mark.parametrize("name", ["deepeyes", "mmsearch_r1", "qwen_agent", "sensenova_mars"])
def test_every_shipped_dialect_ends_after_its_rounds(picture, name):
    spoken = load_dialect(name)
    frame = ScriptedPolicy([], spoken).begin(picture, "?").images
    looks = [ImageSearch(), TextSearch("Greenia")] if name == "mmsearch_r1" else gazes()
    turns = [spoken.render_action(look, frame) for look in looks]
    policy = ScriptedPolicy(turns, spoken, forced=spoken.syntax.answer_open + "three")
    record = run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), on_event=lambda _: None,
                         budget=Budget(turns=50, tokens=100_000))
    assert len(record.steps) == spoken.budget.rounds and record.ended == "turns"
    assert [shown.notice for shown in policy.observations if shown.notice] == [GIVE_UP]
