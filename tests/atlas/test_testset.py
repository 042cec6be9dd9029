from dataclasses import replace

import numpy as np
import pytest
from atlas_world import TWINS, countries, flags

from atlas.countries import COUNTRIES_FILE, held_out, load_countries
from atlas.flags import TEST_INVENTED, TRAIN_INVENTED, distinguishable_flags, invented_flag, invented_key
from atlas.pack import stored_flags
from atlas.questions import FACT_QUESTIONS, KINDS, PLACES, Question
from atlas.scenes import PlacedFlag, SceneSpec, flags_of_scene, relations
from atlas.testset import QuestionGenerator, SceneQuestion, items_hash, score
from benchmarks.bench_atlas import TEST_SETS, load_test_set
from gog_edge.agent.events import AnswerRecord, Step
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import ArtifactError
from gog_edge.files import read_json
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.types import Box, Citation, Passage, Size

PACK = DEFAULT_BUNDLE / "packs/atlas"
SIZE = Size(1000, 500)
NOT_FOUND = "not in my snapshot"
LEFT, RIGHT = Box(100, 100, 300, 300), Box(600, 100, 800, 300)


@pytest.fixture(scope="module")
def items():
    return QuestionGenerator(countries(), flags(), 3).generate(20)


def of_kind(items, *kinds):
    return [(item.question, item.scene) for item in items if item.question.kind in kinds]


def test_the_hash_depends_on_the_seed(items):
    assert items_hash(QuestionGenerator(countries(), flags(), 3).generate(20)) == items_hash(items)
    assert items_hash(QuestionGenerator(countries(), flags(), 4).generate(20)) != items_hash(items)


def test_a_longer_set_begins_with_the_shorter(items):
    assert QuestionGenerator(countries(), flags(), 3).generate(4) == items[: 4 * len(KINDS)]


def test_the_hash_depends_on_the_facts(items):
    moved = [replace(one, capital=one.capital + "x") for one in countries()]
    assert items_hash(QuestionGenerator(moved, flags(), 3).generate(20)) != items_hash(items)


def test_the_hash_ignores_rounding_errors_only(items):
    item = items[0]

    def shifted(by):
        return [replace(item, scene=replace(item.scene, exposure=round(item.scene.exposure, 4) + by))]

    assert items_hash(shifted(1e-9)) == items_hash(shifted(0)) != items_hash(shifted(1e-5))


def test_every_prefix_is_balanced(items):
    assert [item.question.kind for item in items] == list(KINDS) * 20


def test_only_held_out_countries_are_asked_about(items):
    hidden = {one.flag for one in countries() if one.iso in held_out(countries())}
    seen = set()
    for question, scene in of_kind(items, "whole", "gaze", "two_hops", "reflect"):
        assert question.asked == 0 and question.answers
        seen.add(scene.placed[0].flag)
    assert seen <= hidden and len(seen) > 3
    shown = {one.name for one in countries() if one.flag in hidden}
    for question, _ in of_kind(items, "text"):
        assert any(name in question.text for name in shown) or question.answers[0] in shown


def test_place_words_refer_to_the_flag_asked_about(items):
    for question, scene in of_kind(items, "gaze", "two_hops", "reflect", "invented"):
        if question.relation == "other":
            assert len(scene.placed) == 2 and "the other" in question.text
        elif question.relation:
            assert relations(scene)[question.relation] == 0
            assert any(place in question.text for place in PLACES[question.relation])


def answers_about(n):
    """Return the answers to questions about country `n` of atlas_world, spelled out."""
    codes = [*(f"A{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "BA", "BB", "BC", "BD", "AA"]
    code, after = codes[n], codes[n + 1]
    return {
        "name": f"Land {code}", "capital": f"City {code}", "continent": "Europe", "area": f"1,0{n:02}",
        "population": "10,000,000" if n == 0 else f"9,999,9{100 - n:02}", "phone": f"+1{n:02}",
        "currency": ("Crown", "Shell", "Bead", "Coin")[n % 4], "domain": f".{code.lower()}",
        "languages": ("Latin", "Latin and Greek", "Latin, Greek and Maltese")[n % 3], "bordering": f"City {after}",
    }  # fmt: skip


def test_answers_are_the_facts(items):
    number = {one.flag: n for n, one in enumerate(countries())}
    facts = set()
    for question, scene in of_kind(items, "whole", "gaze", "reflect", "two_hops"):
        n = number[scene.placed[0].flag]
        same = TWINS if n in TWINS else (n,)
        facts.add(question.fact)
        if question.fact == "same currency":
            users = [m for m in range(len(countries())) if m not in same and m % 4 in {one % 4 for one in same}]
            assert question.answers == tuple(answers_about(m)["name"] for m in users)
        else:
            assert set(question.answers) == {answers_about(m)[question.fact] for m in same}
    assert facts == {*FACT_QUESTIONS, "bordering", "same currency"}


def test_glance_questions_are_answered_by_the_scene(items):
    facts = set()
    for question, scene in of_kind(items, "glance"):
        facts.add(question.fact)
        if question.fact == "count":
            assert question.answers == (str(len(scene.placed)),)
            continue
        meant = relations(scene)
        side = {"left": "left1", "right": "right1", "upper": "top1", "lower": "bottom1"}[question.answers[0]]
        assert meant[side] == meant["largest"] and question.answers[0] in question.text
    assert facts == {"count", "larger"}


def test_invented_flags_differ_from_those_of_training(items):
    assert not set(TRAIN_INVENTED) & set(TEST_INVENTED)
    for question, scene in of_kind(items, "invented"):
        assert question.answers == ()
        word, seed = scene.placed[0].flag.split()
        assert word == "invented" and int(seed) in TEST_INVENTED
    assert not any(item.flag.startswith("invented") for _, scene in of_kind(items, "gaze") for item in scene.placed)


def test_scenes_contain_no_indistinguishable_flags(items):
    twins = {countries()[n].flag for n in TWINS}
    for item in items:
        shown = [placed.flag for placed in item.scene.placed]
        assert len(set(shown)) == len(shown) and not twins <= set(shown)


def test_indistinguishable_flags_share_their_answers():
    (first, second), alike = (countries()[n] for n in TWINS), distinguishable_flags(flags())
    assert second.flag not in alike[first.flag] and first.flag not in alike[second.flag]
    assert all(one not in others for one, others in alike.items())
    assert second.iso in held_out(countries())
    asked = [
        item.question for item in QuestionGenerator(countries(), flags(), 10).generate(60)
        if item.question.kind in ("whole", "gaze") and item.scene.placed[0].flag == second.flag
    ]  # fmt: skip
    capitals = {question.answers for question in asked if question.fact in ("name", "capital")}
    assert capitals == {("Land AC", "Land AE"), ("City AC", "City AE")}


def test_a_set_of_identical_flags_is_refused():
    same = {key: np.full((240, 320, 3), 90, np.uint8) for key in flags()}
    with pytest.raises(ArtifactError, match="no scene satisfies the conditions"):
        QuestionGenerator(countries(), same, 1).generate(1)


def test_distinguishable_flags_are_sorted_by_similarity():
    plain = {name: np.full((240, 320, 3), value, np.uint8) for name, value in (("a", 0), ("b", 200), ("c", 100))}
    plain["d"] = plain["a"] + np.uint8(9)  # no eye sees it
    assert distinguishable_flags(plain)["a"] == ["c", "b"] and distinguishable_flags(plain)["b"] == ["c", "d", "a"]


def test_flags_of_a_scene_include_invented_ones():
    _, scene = of_kind(QuestionGenerator(countries(), flags(), 3).generate(1), "invented")[0]
    found = flags_of_scene(scene, flags())
    key = scene.placed[0].flag
    assert set(found) == {item.flag for item in scene.placed} and key == invented_key(int(key.split()[1]))
    assert np.array_equal(found[key], invented_flag(int(key.split()[1])))


@pytest.mark.skipif(not (PACK / COUNTRIES_FILE).exists(), reason="the atlas pack is not here")
def test_the_committed_sets_have_the_committed_hash():
    facts = load_countries(PACK / COUNTRIES_FILE)
    pack = Pack.open(PACK, Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1))
    stored = stored_flags(pack, facts)
    pack.close()
    for name, fixed in read_json(TEST_SETS, what="test sets").items():
        assert len(load_test_set(name, facts, stored)) == fixed["per_kind"] * len(KINDS)


# --- scoring --------------------------------------------------------------------------------


def placed(box):
    x0, x1, y0, y1 = box.x0 / SIZE.width, box.x1 / SIZE.width, box.y0 / SIZE.height, box.y1 / SIZE.height
    return PlacedFlag("x", ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), 1.0)


def gaze_question(*answers, kind="gaze", relation="left1", asked=0):
    question = Question(kind, "?", "capital", relation, asked, answers)
    return SceneQuestion(question, SceneSpec(0, 2.0, (placed(LEFT), placed(RIGHT)), 0.0, 1.0))


def record(answer, *boxes, passage="", actions=("answer",)):
    steps = [Step(n, None, "gaze_search", box=box) for n, box in enumerate(boxes)]
    steps += [Step(len(steps), None, action) for action in actions]
    cited = (Citation(Passage("atlas", "Peru", "", 1, passage, "CC0"), None),) if passage else ()
    return AnswerRecord(answer, None, cited, tuple(steps), {"total": 12.5}, "answer")


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("Lima", True), ("lima.", True), ("The Lima", True), ("Callao", True), ("Limassol", False), ("Lima Callao", False),
     ("", False), (NOT_FOUND, False)],
)  # fmt: skip
def test_answers_are_normalised_before_they_are_compared(answer, correct):
    assert score(gaze_question("Lima", "Callao"), record(answer), SIZE, NOT_FOUND).correct is correct


def test_numbers_match_with_and_without_commas():
    assert score(gaze_question("1,285,220"), record("1285220"), SIZE, NOT_FOUND).correct
    assert not score(gaze_question("1,285,220"), record("128522"), SIZE, NOT_FOUND).correct


@pytest.mark.parametrize(("answer", "correct"), [("Not in my snapshot.", True), ("Lima", False), ("", False)])
def test_questions_about_invented_flags_require_a_refusal(answer, correct):
    scored = score(gaze_question(kind="invented"), record(answer), SIZE, NOT_FOUND)
    assert scored.correct is correct and scored.refused is correct


def test_refusing_a_stored_flag_is_incorrect():
    scored = score(gaze_question("Lima"), record(NOT_FOUND), SIZE, NOT_FOUND)
    assert scored.refused and not scored.correct


def test_gazes_are_compared_with_the_flag_asked_about():
    half = Box(100, 100, 200, 300)
    scored = score(gaze_question("Lima"), record("Lima", half, LEFT, RIGHT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == scored.strict_ious == pytest.approx((0.5, 1.0, 0.0))
    assert scored.actions == ("gaze_search",) * 3 + ("answer",) and scored.ms == 12.5


def test_the_first_gaze_for_the_other_flag_may_be_at_either():
    asked = gaze_question("Lima", kind="reflect", relation="other")
    scored = score(asked, record("Lima", RIGHT, LEFT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == pytest.approx((1.0, 1.0)) and scored.strict_ious == pytest.approx((0.0, 1.0))
    scored = score(asked, record("Lima", RIGHT, RIGHT), SIZE, NOT_FOUND)
    assert scored.gaze_ious == pytest.approx((1.0, 0.0))


def test_gazes_do_not_count_for_questions_about_no_flag():
    scored = score(gaze_question("2", kind="glance", relation="", asked=None), record("2", LEFT), SIZE, NOT_FOUND)
    assert scored.correct and scored.gaze_ious == scored.strict_ious == ()
    assert score(gaze_question("Lima"), record("Lima"), SIZE, NOT_FOUND).gaze_ious == ()


@pytest.mark.parametrize(
    ("answer", "passage", "cited"),
    [("Lima", "The capital of Peru is Lima.", True), ("Lima", "The capital of Peru is Cusco.", False),
     ("Niger", "The capital of Nigeria is Abuja.", False), ("Lima", "", False), ("", "Anything.", False)],
)  # fmt: skip
def test_cited_requires_a_passage_that_contains_the_answer(answer, passage, cited):
    assert score(gaze_question("Lima"), record(answer, passage=passage), SIZE, NOT_FOUND).cited is cited
