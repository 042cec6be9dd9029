import re

import numpy as np
import pytest

from atlas.countries import held_out
from atlas.policy.teacher import BOX_GRID, Scene, Teacher, scene_of
from atlas.policy.worlds import WORLD_SIZE, gather_names, make_world
from atlas.questions import KINDS
from gog_edge.errors import MalformedAction
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, TextSearch

PICTURE = np.zeros((196, 252, 3), np.uint8)
ONE = Scene(PICTURE, (Box(20, 10, 230, 180),), {})
TWO = Scene(
    PICTURE, (Box(3, 7, 91, 70), Box(133, -4, 259, 84)),
    {"left1": 0, "right1": 1, "smallest": 0, "largest": 1, "left2": 1, "right2": 0},
)  # fmt: skip
THREE = Scene(PICTURE, (*TWO.boxes, Box(100, 120, 180, 190)), {"left1": 0, "right1": 1, "bottom1": 2, "middle": 2})
SCENES = {"whole": (ONE,), "invented": (ONE, TWO, THREE), "glance": (ONE, TWO), "text": (ONE, THREE)}
EACH = 40


@pytest.fixture(scope="module")
def played(names, dialect):
    """Forty trajectories of each kind: (kind, scene, world, turns)."""
    rng = np.random.default_rng(8)
    teacher, found = Teacher(dialect, rng), []
    for kind in KINDS:
        for n in range(EACH):
            scenes = SCENES.get(kind, (TWO, THREE))
            scene, world = scenes[n % len(scenes)], make_world(rng, names)
            found.append((kind, scene, world, teacher.trajectory(scene, world, kind)))
    return found


def text_of(turn):
    return "".join(segment for segment in turn.segments if isinstance(segment, str))


def actions(turns, dialect, frame):
    return [dialect.parse(text_of(turn), frame) for turn in turns if turn.role == "assistant" and turn.learn]


def frame_of(teacher_dialect, scene):
    teacher = Teacher(teacher_dialect, np.random.default_rng(0))
    teacher.begin(scene)
    return teacher.frame


def test_every_labelled_turn_is_an_action_and_the_last_an_answer(played, dialect):
    for _, scene, _, turns in played:
        found = actions(turns, dialect, frame_of(dialect, scene))
        assert isinstance(found[-1], Answer) and not any(isinstance(action, Answer) for action in found[:-1])


def test_turns_alternate_and_begin_with_the_picture(played):
    for _, scene, _, turns in played:
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert turns[0].segments[0] is scene.picture and turns[-1].learn
        assert not any(turn.learn for turn in turns if turn.role == "user")


def test_each_kind_has_its_sequence_of_actions(played, dialect):
    for kind, scene, _, turns in played:
        kinds = [type(action) for action in actions(turns, dialect, frame_of(dialect, scene))]
        match kind:
            case "glance":
                assert kinds == [Answer]
            case "text":
                assert kinds == [TextSearch, Answer]
            case "whole":
                assert kinds in ([ImageSearch, Answer], [ImageSearch, GazeSearch, Answer])
            case "two_hops":
                assert kinds == [GazeSearch, TextSearch, Answer]
            case "gaze":
                assert kinds == [GazeSearch, Answer]
            case "invented":
                assert kinds[1:] == [GazeSearch, Answer]
            case "reflect":
                assert kinds in ([GazeSearch, Answer], [GazeSearch, GazeSearch, Answer])


def test_gazes_are_inside_the_picture_at_a_flag(played, dialect):
    for _, scene, _, turns in played:
        for action in actions(turns, dialect, frame_of(dialect, scene)):
            if isinstance(action, GazeSearch):
                box = action.box
                assert 0 <= box.x0 < box.x1 <= 252 and 0 <= box.y0 < box.y1 <= 196
                assert all(value % BOX_GRID == 0 for value in (box.x0, box.y0, box.x1, box.y1))
                assert max(box.iou(flag) for flag in scene.boxes) > 0.7


def test_answers_occur_in_the_search_results(played, dialect):
    for kind, scene, _, turns in played:
        (answer,) = [a.text for a in actions(turns, dialect, frame_of(dialect, scene)) if isinstance(a, Answer)]
        results = [text_of(turn) for turn in turns[2:] if turn.role == "user" and "Match:" in text_of(turn)]
        if kind == "glance":
            assert answer in (str(len(scene.boxes)), "left", "right", "upper", "lower")
            continue
        if kind == "invented":
            assert answer == dialect.not_found
        if answer == dialect.not_found:
            assert kind in ("invented", "text") and "Match: weak." in results[-1]
        else:
            assert "Match: strong." in results[-1] and answer in results[-1]


def test_mistakes_have_no_labels(played, dialect):
    wrong = malformed = 0
    for _, scene, _, turns in played:
        for n, turn in enumerate(turns):
            if turn.role != "assistant" or turn.learn:
                continue
            try:
                assert isinstance(dialect.parse(text_of(turn), frame_of(dialect, scene)), GazeSearch)
                assert "Match: weak." in text_of(turns[n + 1])
                wrong += 1
            except MalformedAction:
                assert text_of(turns[n + 1]) == dialect.notices["malformed"]
                malformed += 1
    assert wrong > 5 and malformed > 0


def test_kinds_fit_the_scene(names, dialect):
    rng = np.random.default_rng(2)
    teacher = Teacher(dialect, rng)
    for scene in (ONE, TWO, THREE, Scene(PICTURE, TWO.boxes, {})):
        for _ in range(30):
            turns = teacher.trajectory(scene, make_world(rng, names))
            assert turns[-1].learn
            if scene is not ONE:
                assert not any("<img>" in text_of(turn) for turn in turns if turn.role == "assistant") or (
                    not scene.relations
                )


def test_trajectories_are_deterministic(names, dialect):
    def play():
        rng = np.random.default_rng(4)
        turns = Teacher(dialect, rng).trajectory(TWO, make_world(rng, names))
        return [(turn.role, text_of(turn), turn.learn) for turn in turns]

    assert play() == play()


def test_worlds_contain_no_held_out_country(geonames, names):
    hidden = held_out(geonames)
    secret = {one.name for one in geonames if one.iso in hidden}
    capitals = {one.capital for one in geonames if one.iso in hidden and one.capital}
    assert not hidden & {one.iso for one in names.real} and not secret & {one.name for one in names.real}
    assert len(names.real) + len(hidden) == len(geonames) and len(names.places) > 5000
    assert not (secret | capitals) & set(names.places)
    rng = np.random.default_rng(1)
    for _ in range(100):
        world = make_world(rng, names)
        assert not secret & {one.name for one in world.countries}
    assert gather_names(geonames) == names


def test_worlds_support_every_question(names):
    rng = np.random.default_rng(6)
    for _ in range(50):
        world = make_world(rng, names)
        asked, *others = world.countries
        keys = set(world.names)
        assert len(keys) == WORLD_SIZE and asked.neighbours
        assert any(other.currency_code == asked.currency_code for other in others)
        for one in world.countries:
            assert set(one.neighbours) <= keys - {one.iso} and one.name and one.capital and one.languages
            assert re.fullmatch(r"\.[a-z]{2}", one.domain) and re.fullmatch(r"\+\d{1,3}(-\d{3})?", one.phone)


def test_a_row_of_the_pool_becomes_a_scene():
    meant = np.full(14, -1)
    meant[0], meant[3] = 1, 0
    scene = scene_of(PICTURE, np.arange(24, dtype=np.float32).reshape(6, 4), 2, meant)
    assert scene.boxes == (Box(0, 1, 2, 3), Box(4, 5, 6, 7)) and scene.relations == {"left1": 1, "right1": 0}
