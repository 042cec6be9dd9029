from dataclasses import replace

import numpy as np
import pytest
from atlas_world import TWINS, countries, flags, names

from atlas.articles import fact_value
from atlas.countries import COUNTRIES_FILE, held_out, load_countries
from atlas.flags import invented_flag
from atlas.pack import stored_flags
from atlas.questions import KINDS, PLACES
from atlas.scenes import relations
from atlas.testset import TEST_INVENTED, TRAIN_INVENTED, SetMaker, invented_key, items_hash, look_alikes, scene_flags
from benchmarks.bench_atlas import TEST_SETS, load_test_set
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import ArtifactError
from gog_edge.files import read_json
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack

PACK = DEFAULT_BUNDLE / "packs/atlas"


@pytest.fixture(scope="module")
def items():
    return SetMaker(countries(), flags(), 3).make(20)


def of_kind(items, *kinds):
    return [(item.question, item.scene) for item in items if item.question.kind in kinds]


def test_a_seed_fixes_the_set(items):
    assert items_hash(SetMaker(countries(), flags(), 3).make(20)) == items_hash(items)
    assert items_hash(SetMaker(countries(), flags(), 4).make(20)) != items_hash(items)


def test_a_longer_set_begins_with_the_shorter(items):
    assert SetMaker(countries(), flags(), 3).make(4) == items[: 4 * len(KINDS)]


def test_other_facts_give_another_hash(items):
    moved = [replace(one, capital=one.capital + "x") for one in countries()]
    assert items_hash(SetMaker(moved, flags(), 3).make(20)) != items_hash(items)


def test_the_hash_forgives_the_last_digits_only(items):
    item = items[0]

    def shifted(by):
        return [replace(item, scene=replace(item.scene, exposure=round(item.scene.exposure, 4) + by))]

    assert items_hash(shifted(1e-9)) == items_hash(shifted(0)) != items_hash(shifted(1e-5))


def test_any_first_part_is_balanced(items):
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


def test_questions_name_a_place_that_means_the_asked_flag(items):
    for question, scene in of_kind(items, "gaze", "two_hops", "reflect", "invented"):
        if question.relation == "other":
            assert len(scene.placed) == 2 and "the other" in question.text
        elif question.relation:
            assert relations(scene)[question.relation] == 0
            assert any(place in question.text for place in PLACES[question.relation])


def test_answers_are_the_facts(items):
    by_flag = {one.flag: one for one in countries()}
    twins = {countries()[n].flag for n in TWINS}
    for question, scene in of_kind(items, "whole", "gaze", "reflect"):
        country = by_flag[scene.placed[0].flag]
        value = country.name if question.fact == "name" else fact_value(country, question.fact, names())
        assert value in question.answers and (len(question.answers) == 1 or country.flag in twins)
    for question, scene in of_kind(items, "two_hops"):
        country = by_flag[scene.placed[0].flag]
        if question.fact == "bordering":
            assert next(one for one in countries() if one.iso == country.neighbours[0]).capital in question.answers
        else:
            users = {one.name for one in countries() if one.currency_code == country.currency_code} - {country.name}
            assert users & set(question.answers) and country.name not in question.answers


def test_glances_are_answered_by_the_scene(items):
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


def test_invented_flags_of_tests_are_never_trained_on(items):
    assert not set(TRAIN_INVENTED) & set(TEST_INVENTED)
    for question, scene in of_kind(items, "invented"):
        assert question.answers == ()
        word, seed = scene.placed[0].flag.split()
        assert word == "invented" and int(seed) in TEST_INVENTED
    assert not any(item.flag.startswith("invented") for _, scene in of_kind(items, "gaze") for item in scene.placed)


def test_a_scene_shows_no_twins(items):
    twins = {countries()[n].flag for n in TWINS}
    for item in items:
        shown = [placed.flag for placed in item.scene.placed]
        assert len(set(shown)) == len(shown) and not twins <= set(shown)


def test_flags_nobody_can_tell_apart_share_their_answers():
    (first, second), alike = (countries()[n] for n in TWINS), look_alikes(flags())
    assert second.flag not in alike[first.flag] and first.flag not in alike[second.flag]
    assert all(one not in others for one, others in alike.items())
    assert second.iso in held_out(countries())
    asked = [
        item.question for item in SetMaker(countries(), flags(), 10).make(60)
        if item.question.kind in ("whole", "gaze") and item.scene.placed[0].flag == second.flag
    ]  # fmt: skip
    capitals = {question.answers for question in asked if question.fact in ("name", "capital")}
    assert capitals == {("Land AC", "Land AE"), ("City AC", "City AE")}


def test_flags_that_all_look_alike_fill_no_scene():
    same = {key: np.full((240, 320, 3), 90, np.uint8) for key in flags()}
    with pytest.raises(ArtifactError, match="no scene fitted"):
        SetMaker(countries(), same, 1).make(1)


def test_look_alikes_come_most_alike_first():
    plain = {name: np.full((240, 320, 3), value, np.uint8) for name, value in (("a", 0), ("b", 200), ("c", 100))}
    plain["d"] = plain["a"] + np.uint8(9)  # no eye sees it
    assert look_alikes(plain)["a"] == ["c", "b"] and look_alikes(plain)["b"] == ["c", "d", "a"]


def test_a_scene_gets_its_flags():
    _, scene = of_kind(SetMaker(countries(), flags(), 3).make(1), "invented")[0]
    found = scene_flags(scene, flags())
    key = scene.placed[0].flag
    assert set(found) == {item.flag for item in scene.placed} and key == invented_key(int(key.split()[1]))
    assert np.array_equal(found[key], invented_flag(int(key.split()[1])))


@pytest.mark.skipif(not (PACK / COUNTRIES_FILE).exists(), reason="the atlas pack is not here")
def test_the_committed_sets_are_drawn_from_the_shipped_pack():
    facts = load_countries(PACK / COUNTRIES_FILE)
    pack = Pack.open(PACK, Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1))
    stored = stored_flags(pack, facts)
    pack.close()
    for name, fixed in read_json(TEST_SETS, what="test sets").items():
        assert len(load_test_set(name, facts, stored)) == fixed["per_kind"] * len(KINDS)
