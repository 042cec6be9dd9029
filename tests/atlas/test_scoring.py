import pytest

from atlas.questions import Question
from atlas.scenes import PlacedFlag, SceneSpec
from atlas.scoring import score
from atlas.testset import AskedScene
from gog_edge.agent.events import AnswerRecord, Step
from gog_edge.types import Box, Citation, Passage, Size

SIZE = Size(1000, 500)
NOT_FOUND = "not in my snapshot"
LEFT, RIGHT = Box(100, 100, 300, 300), Box(600, 100, 800, 300)


def placed(box):
    x0, x1, y0, y1 = box.x0 / SIZE.width, box.x1 / SIZE.width, box.y0 / SIZE.height, box.y1 / SIZE.height
    return PlacedFlag("x", ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), 1.0)


def item(*answers, kind="gaze", relation="left1", asked=0):
    question = Question(kind, "?", "capital", relation, asked, answers)
    return AskedScene(question, SceneSpec(0, 2.0, (placed(LEFT), placed(RIGHT)), 0.0, 1.0))


def record(answer, *boxes, passage="", actions=("answer",)):
    steps = [Step(n, None, "gaze_search", box=box) for n, box in enumerate(boxes)]
    steps += [Step(len(steps), None, action) for action in actions]
    cited = (Citation(Passage("atlas", "Peru", "", 1, passage, "CC0"), None),) if passage else ()
    return AnswerRecord(answer, None, cited, tuple(steps), {"total": 12.5}, "answer")


@pytest.mark.parametrize(
    ("said", "right"),
    [("Lima", True), ("lima.", True), ("The Lima", True), ("Callao", True), ("Limassol", False), ("Lima Callao", False),
     ("", False), (NOT_FOUND, False)],
)  # fmt: skip
def test_any_accepted_answer_is_right_whatever_its_dress(said, right):
    assert score(item("Lima", "Callao"), record(said), SIZE, NOT_FOUND).right is right


def test_figures_match_with_and_without_commas():
    assert score(item("1,285,220"), record("1285220"), SIZE, NOT_FOUND).right
    assert not score(item("1,285,220"), record("128522"), SIZE, NOT_FOUND).right


@pytest.mark.parametrize(("said", "right"), [("Not in my snapshot.", True), ("Lima", False), ("", False)])
def test_what_no_pack_holds_must_be_refused(said, right):
    scored = score(item(kind="invented"), record(said), SIZE, NOT_FOUND)
    assert scored.right is right and scored.refused is right


def test_a_refusal_of_what_is_there_is_wrong():
    scored = score(item("Lima"), record(NOT_FOUND), SIZE, NOT_FOUND)
    assert scored.refused and not scored.right


def test_gazes_are_held_against_the_asked_flag():
    half = Box(100, 100, 200, 300)
    scored = score(item("Lima"), record("Lima", half, LEFT, RIGHT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == scored.strict_ious == pytest.approx((0.5, 1.0, 0.0))
    assert scored.actions == ("gaze_search",) * 3 + ("answer",) and scored.ms == 12.5


def test_the_first_look_for_the_other_flag_may_be_at_either():
    asked = item("Lima", kind="reflect", relation="other")
    scored = score(asked, record("Lima", RIGHT, LEFT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == pytest.approx((1.0, 1.0)) and scored.strict_ious == pytest.approx((0.0, 1.0))
    scored = score(asked, record("Lima", RIGHT, RIGHT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == pytest.approx((1.0, 0.0))


def test_no_gaze_counts_where_none_is_asked():
    scored = score(item("2", kind="glance", relation="", asked=None), record("2", LEFT), SIZE, NOT_FOUND)
    assert scored.right and scored.gaze_ious == scored.strict_ious == ()
    assert score(item("Lima"), record("Lima"), SIZE, NOT_FOUND).gaze_ious == ()


@pytest.mark.parametrize(
    ("answer", "passage", "cited"),
    [("Lima", "The capital of Peru is Lima.", True), ("Lima", "The capital of Peru is Cusco.", False),
     ("Niger", "The capital of Nigeria is Abuja.", False), ("Lima", "", False), ("", "Anything.", False)],
)  # fmt: skip
def test_cited_is_what_stands_in_a_cited_passage(answer, passage, cited):
    assert score(item("Lima"), record(answer, passage=passage), SIZE, NOT_FOUND).cited is cited
