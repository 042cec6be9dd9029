"""What a dialect asks of the loop: how crops are cut, how often it may search, what it is told at the end."""

from dataclasses import replace

import pytest
from stories import GAZE_GREEN, GAZE_INVENTED, GAZE_RED, ColourRetriever, answer

from gog_edge.agent.events import Refused, Workflow
from gog_edge.agent.loop import run_episode
from gog_edge.agent.trace import TraceWriter, read_trace
from gog_edge.config import Budget
from gog_edge.errors import BudgetExceeded
from gog_edge.policy.dialect.dialect import GIVE_UP, Allowance, CropRules, LoopRules
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.scripted import FORCED, RecordedPolicy, ScriptedConversation, ScriptedPolicy
from gog_edge.types import Box, GazeSearch, ImageSearch, TextQuery, TextSearch

CANNOT_TELL = "I cannot tell."
WORDS = "<text_search>Greenia</text_search>"
LOOK = "<img_search><img></img_search>"


def dialect(*, give_up="", **rules):
    plain = load_dialect("gog")
    return replace(plain, notices={**plain.notices, **({GIVE_UP: give_up} if give_up else {})}, **rules)


@pytest.fixture
def ruled(tell):
    """Tell a story under a dialect's rules."""

    def run(*texts, forced=FORCED, conversation=ScriptedConversation, budget=None, crop=None, allowed=None, give_up="",
            **options):
        rules = {"crop": crop or CropRules(), "budget": allowed or Allowance()}
        policy = ScriptedPolicy(texts, dialect(give_up=give_up, **rules), forced=forced, conversation=conversation)
        return tell(policy=policy, budget=budget or Budget(), **options)

    return run


def test_most_dialects_ask_for_nothing():
    assert load_dialect("atlas").loop_rules == load_dialect("gog").loop_rules == LoopRules()
    rules = load_dialect("mmsearch_r1").loop_rules
    assert (rules.budget.rounds, rules.last_notice) == (3, GIVE_UP)


def test_a_recorded_policy_keeps_the_rules_of_the_one_it_records():
    inner = ScriptedPolicy([], load_dialect("deepeyes"))
    assert RecordedPolicy(inner, load_dialect("gog")).rules == inner.rules == load_dialect("deepeyes").loop_rules


# --- crops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "side"), [(CropRules(), 66), (CropRules(pad=0.0), 60), (CropRules(pad=0.1), 72)])
def test_a_crop_has_the_pad_that_the_dialect_states(ruled, crop, side):
    told = ruled(GAZE_RED, answer("rubel"), crop=crop)
    assert told.observations[0].crop.shape == told.retriever.queries[0].pixels.shape == (side, side, 3)


def test_a_small_box_is_grown_as_the_dialect_states(ruled):
    step, _ = ruled("<img_search>[40, 40, 50, 60]</img_search>", answer("?"), crop=CropRules(min_side=28)).record.steps
    assert (step.box, step.note) == (Box(31, 36, 59, 64), "grown to 28 pixels")


# --- turns and searches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "rounds", "spoken"), [(6, 3, 3), (2, 3, 2), (6, None, 5)])
def test_the_smaller_number_of_turns_counts(ruled, turns, rounds, spoken):
    told = ruled(GAZE_RED, GAZE_GREEN, GAZE_INVENTED, WORDS, answer("leaf"), budget=Budget(turns=turns),
                 allowed=Allowance(rounds=rounds))
    assert len(told.actions) == spoken
    assert told.record.ended == ("turns" if rounds else "answer")


def test_a_search_beyond_its_count_is_refused_with_the_reason(ruled):
    told = ruled(GAZE_RED, GAZE_GREEN, answer("rubel"), allowed=Allowance(image_searches=1))
    assert told.notices == ["action_refused"]
    (refused,) = (event for event in told.events if isinstance(event, Refused))
    assert refused.reason == told.observations[1].detail == "1 of 1 image searches are made, no more are allowed"
    assert told.actions == ["gaze_search", "gaze_search", "answer"]
    assert len(told.retriever.queries) == 1
    assert (told.record.answer, told.record.ended) == ("rubel", "answer")


def test_searches_with_pictures_and_with_words_are_counted_apart(ruled):
    told = ruled(GAZE_RED, GAZE_GREEN, WORDS, "<text_search>Redland</text_search>", answer("leaf"),
                 allowed=Allowance(image_searches=1, text_searches=1))
    assert [isinstance(query, TextQuery) for query in told.retriever.queries] == [False, True]
    assert told.notices == ["action_refused"] * 2 and "1 of 1 text searches" in told.observations[3].detail
    assert told.record.answer == "leaf"


def test_what_is_remembered_costs_no_search(ruled):
    told = ruled(GAZE_RED, GAZE_RED, WORDS, WORDS, answer("leaf"), allowed=Allowance(None, 1, 1))
    assert told.notices == [] and [shown.result.cached for shown in told.observations] == [False, True] * 2


def test_a_search_beyond_its_count_is_no_fault(ruled):
    told = ruled(GAZE_RED, "Hmm.", GAZE_GREEN, "Well.", answer("rubel"), allowed=Allowance(image_searches=1))
    assert told.notices == ["malformed", "action_refused", "malformed"]
    assert (told.record.answer, told.record.ended) == ("rubel", "answer")


@pytest.mark.parametrize("between", [[], ["Hmm."]])
def test_who_asks_again_for_what_is_not_to_be_had_must_answer(ruled, between):
    told = ruled(GAZE_RED, GAZE_GREEN, *between, GAZE_INVENTED, WORDS, allowed=Allowance(image_searches=1))
    assert (told.record.answer, told.record.ended) == (CANNOT_TELL, "searches")


def test_after_a_search_that_was_to_be_had_it_is_told_once_more(ruled):
    told = ruled(GAZE_RED, GAZE_GREEN, WORDS, GAZE_INVENTED, answer("leaf"), allowed=Allowance(image_searches=1))
    assert told.notices == ["action_refused"] * 2 and told.record.ended == "answer"


def test_the_search_that_a_workflow_makes_is_not_refused(ruled):
    told = ruled(LOOK, answer("?"), workflow=Workflow.FULL_IMAGE, allowed=Allowance(image_searches=0))
    assert told.actions == ["image_search", "image_search", "answer"] and told.notices == []


def ahead(picture, *texts, **allowed):
    """What was searched where searches begin early."""
    retriever = ColourRetriever()
    policy = ScriptedPolicy(texts, dialect(budget=Allowance(**allowed)))
    list(run_episode(picture, "?", policy=policy, retriever=retriever, budget=Budget()))
    return [query.pixels.shape[:2] for query in retriever.queries]


def test_nothing_is_searched_ahead_that_would_be_refused(picture):
    assert ahead(picture, GAZE_RED, answer("?"), image_searches=0) == []
    assert ahead(picture, GAZE_RED, GAZE_GREEN, answer("?"), image_searches=1).count((66, 66)) == 1


def test_a_search_ahead_that_nobody_asked_for_is_not_counted(picture):
    assert ahead(picture, GAZE_RED, answer("?"), image_searches=1).count((66, 66)) == 1


# --- before the last answer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "ended"),
    [
        ([GAZE_RED], {"budget": Budget(turns=2)}, "turns"),
        ([GAZE_RED], {"allowed": Allowance(rounds=2)}, "turns"),
        (["Hmm.", "Well."], {}, "malformed"),
        ([], {"workflow": Workflow.DIRECT}, "answer"),
    ],
)
def test_a_dialect_can_be_told_to_give_up(ruled, texts, options, ended):
    told = ruled(*texts, give_up="Answer now.", **options)
    assert told.notices[-1] == GIVE_UP and told.notices.count(GIVE_UP) == 1
    assert (told.record.answer, told.record.ended) == (CANNOT_TELL, ended)
    assert GIVE_UP not in ruled(*texts, **options).notices


def test_who_answers_freely_is_not_told(ruled):
    assert ruled(GAZE_RED, answer("rubel"), give_up="Answer now.").notices == []


class Full(ScriptedConversation):
    """Its context takes no word beside what was found."""

    def generate(self, **options):
        if self.observations and self.observations[-1].notice == GIVE_UP:
            self.observations.pop()
            raise BudgetExceeded("full")
        return super().generate(**options)


def test_where_it_does_not_fit_the_answer_is_forced_without_it(ruled):
    told = ruled(GAZE_RED, budget=Budget(turns=2), give_up="Answer now.", conversation=Full)
    assert told.record.answer == CANNOT_TELL and told.notices == []


# --- the trace ---------------------------------------------------------------------------------------


def test_a_trace_says_what_was_in_force(ruled, tmp_path):
    path = tmp_path / "trace.json"
    ruled(GAZE_RED, answer("?"), crop=CropRules(pad=0.0, min_side=28), allowed=Allowance(3, 1, 2),
          trace=TraceWriter(path))
    trace = read_trace(path)
    assert trace["budget"] == {"turns": 3, "tokens": 512, "deadline_ms": 20_000, "image_searches": 1,
                               "text_searches": 2}
    assert (trace["gaze"]["pad"], trace["gaze"]["min_side"], trace["gaze"]["same_iou"]) == (0.0, 28, 0.9)


def gazes():
    return [GazeSearch(Box(10 * n, 10, 10 * n + 50, 60)) for n in range(20)]


@pytest.mark.parametrize("name", ["deepeyes", "mmsearch_r1", "qwen_agent", "sensenova_mars"])
def test_every_shipped_dialect_ends_where_it_says(picture, name):
    spoken = load_dialect(name)
    frame = ScriptedPolicy([], spoken).begin(picture, "?").frame
    looks = [ImageSearch(), TextSearch("Greenia")] if name == "mmsearch_r1" else gazes()
    turns = [spoken.render_action(look, frame) for look in looks]
    policy = ScriptedPolicy(turns, spoken, forced=spoken.syntax.answer_open + "three")
    *_, last = run_episode(picture, "?", policy=policy, retriever=ColourRetriever(),
                           budget=Budget(turns=50, tokens=100_000))
    assert len(last.record.steps) == spoken.budget.rounds and last.record.ended == "turns"
    assert [shown.notice for shown in policy.observations if shown.notice] == [GIVE_UP]
