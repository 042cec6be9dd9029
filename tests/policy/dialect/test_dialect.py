import dataclasses
from importlib import resources

import numpy as np
import pytest

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.policy.dialect.actions import BOX_FRAMES, ShownImages
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import (
    Answer,
    Box,
    Evidence,
    GazeSearch,
    ImageSearch,
    Observation,
    Passage,
    SearchResult,
    Size,
    TextSearch,
)

DIALECTS = ("atlas", "gog")
IMAGES = ShownImages(given=Size(1000, 500), resized=Size(252, 126))
SAME = ShownImages(given=Size(800, 600), resized=Size(800, 600))
TEXT = (resources.files("gog_edge.policy.dialect") / "atlas.toml").read_text()


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return load_dialect(request.param)


def in_frame(name, box_frame):
    return dataclasses.replace(load_dialect(name), box_frame=box_frame)


# --- parsing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<answer>Peru</answer>", Answer("Peru")),
        ("<answer> Peru </answer>", Answer("Peru")),
        ("<reason>Found.</reason><answer> Peru</answer>", Answer("Peru")),
        ("<reason>Found.</reason>\n\n<answer>\nPeru\n</answer>\nDone.", Answer("Peru")),
        ("<answer>Peru", Answer("Peru")),
        ("Well: <answer>Peru</answer>", Answer("Peru")),
        ("<text_search>capital of Peru</text_search>", TextSearch("capital of Peru")),
        ("<reason>I need no picture.</reason><text_search> capital of Peru", TextSearch("capital of Peru")),
        ("<img_search><img></img_search>", ImageSearch()),
        ("<reason>One flag.</reason><img_search> <img> </img_search>", ImageSearch()),
        ("<img_search><img>", ImageSearch()),
        ("<img_search>[10,20,30,40]</img_search>", GazeSearch(Box(10, 20, 30, 40))),
        ("<img_search>[10, 20, 30, 40]", GazeSearch(Box(10, 20, 30, 40))),
        ("<img_search>(10.5, 20), (30, 40.25)</img_search>", GazeSearch(Box(10.5, 20, 30, 40.25))),
        ("<img_search>10 20 30 40.</img_search>", GazeSearch(Box(10, 20, 30, 40))),
        ("<img_search>[-5,0,9999999,40]</img_search>", GazeSearch(Box(-5, 0, 9_999_999, 40))),
        # The first of several actions counts.
        ("<text_search>a</text_search><answer>b</answer>", TextSearch("a")),
        ("<answer>b</answer><text_search>a</text_search>", Answer("b")),
        ("<answer>a</answer><answer>b</answer>", Answer("a")),
        ("<img_search>[1,2,3,4]</img_search><img_search><img></img_search>", GazeSearch(Box(1, 2, 3, 4))),
        # Actions inside thinking or a reason do not count.
        ("<reason>Say <answer>no</answer>?</reason><answer>yes</answer>", Answer("yes")),
        ("<think><answer>no</answer></think><answer>yes</answer>", Answer("yes")),
        ("<think>a</think><answer>no</answer></think><answer>yes</answer>", Answer("yes")),
        ("<answer>yes</answer>", Answer("yes")),
        ("<reason>never closed <answer>yes</answer>", Answer("yes")),
        # A tag inside an action is part of its text.
        ("<answer>a <text_search>b</text_search></answer>", Answer("a <text_search>b</text_search>")),
        ("<answer><|im_end|></answer>", Answer("<|im_end|>")),
        ("<answer>日本 🇯🇵</answer>", Answer("日本 🇯🇵")),
    ],
)
def test_turns_are_parsed_with_tags(dialect, text, action):
    assert dialect.parse(text, SAME) == action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "contains no action"),
        ("   \n", "contains no action"),
        ("Peru", "contains no action"),
        ("answer>Peru</answer>", "contains no action"),
        ("</answer>", "contains no action"),
        ("<ANSWER>Peru</ANSWER>", "contains no action"),
        ("<reason><answer>Peru</answer></reason>", "contains no action"),
        ("<answer>yes</answer></think>", "contains no action"),
        ("<answer></answer>", "the answer is empty"),
        ("<answer>  \n </answer>", "the answer is empty"),
        ("<text_search></text_search>", "the text_search is empty"),
        ("<img_search></img_search>", "four numbers, got 0"),
        ("<img_search>[1,2,3]</img_search>", "four numbers, got 3"),
        ("<img_search>[1,2,3,4,5]</img_search>", "four numbers, got 5"),
        ("<img_search>[nan,2,3,4]</img_search>", "got 3"),
        ("<img_search>[1,inf,-inf,4]</img_search>", "got 2"),
        ("<img_search>[1e999,2,3]</img_search>", "got 2"),
        ("<img_search>[1e999,2,3,4]</img_search>", "got 3"),
        ("<img_search>[12345678901234567890,2,3]</img_search>", "got 2"),
        ("<img_search>[12345678,2,3,4]</img_search>", "got 3"),
        ("<img_search>[1.2.3,2,3,4]</img_search>", "got 3"),
        ("<img_search>[0x10,2,3,4]</img_search>", "got 3"),
        ("<img_search>[x1,x2,x3,x4]</img_search>", "got 0"),
        ("<img_search>[½,²,③,四]</img_search>", "got 0"),
        ("<img_search>the left flag</img_search>", "got 0"),
        ("<img_search><img><img></img_search>", "got 0"),
        ("<answer>" + "a" * 100_000, "100000 characters"),
        ("<img_search>" + "1," * 50_000, "100000 characters"),
        ("a" * 100_000, "contains no action"),
        ("<reason>" * 12_500, "contains no action"),
        ("<text_search>" * 8_000, "characters"),
        ("<img_search>" * 300, "got 0"),
        ("\x00\ud800", "contains no action"),
    ],
)
def test_malformed_turns_with_tags_have_a_reason(dialect, text, reason):
    with pytest.raises(MalformedAction, match=reason) as caught:
        dialect.parse(text, IMAGES)
    assert len(str(caught.value)) < 200


def test_digits_of_other_scripts_are_read_as_numbers(dialect):
    assert dialect.parse("<img_search>[١٠,٢٠,٣٠,４０]</img_search>", SAME) == GazeSearch(Box(10, 20, 30, 40))


# --- coordinate frames -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box_frame", "written", "box"),
    [
        ("resized_px", "[63,63,126,126]", Box(250, 250, 500, 500)),
        ("given_px", "[250,250,500,500]", Box(250, 250, 500, 500)),
        ("rel1000", "[250,500,500,1000]", Box(250, 250, 500, 500)),
        ("rel1", "[0.25,0.5,0.5,1]", Box(250, 250, 500, 500)),
        ("rel1", "[0.2500000000000001,0.5,0.5,1.0]", Box(250, 250, 500, 500)),
    ],
)
@pytest.mark.parametrize("name", DIALECTS)
def test_boxes_are_read_in_the_frame_of_the_dialect(name, box_frame, written, box):
    action = in_frame(name, box_frame).parse(f"<img_search>{written}</img_search>", IMAGES)
    assert dataclasses.astuple(action.box) == pytest.approx(dataclasses.astuple(box))


@pytest.mark.parametrize("box_frame", BOX_FRAMES)
@pytest.mark.parametrize("name", DIALECTS)
def test_rendered_actions_are_parsed_back_within_rounding(name, box_frame):
    dialect = in_frame(name, box_frame)
    rng = np.random.default_rng(3)
    # The resolution of a written coordinate, in pixels of the given picture.
    step = {"resized_px": 1000 / 252, "given_px": 1.0, "rel1000": 1.0, "rel1": 1.0}[box_frame]
    for reason in ("", "I look at the left one."):
        for action in (Answer("a, b and c"), TextSearch("capital of Peru"), ImageSearch()):
            assert dialect.parse(dialect.render_action(action, IMAGES, reason), IMAGES) == action
        for _ in range(50):
            box = Box(*rng.uniform(-20, 1000, 4))
            read = dialect.parse(dialect.render_action(GazeSearch(box), IMAGES, reason), IMAGES).box
            assert np.abs(np.subtract(dataclasses.astuple(read), dataclasses.astuple(box))).max() <= step / 2 + 1e-6


def test_actions_are_rendered_as_tags():
    box = GazeSearch(Box(7, 14, 91, 70))
    atlas, gog = (load_dialect(name) for name in DIALECTS)
    assert atlas.render_action(box, SAME, "Left.") == "<reason>Left.</reason><img_search>[7,14,91,70]</img_search>"
    assert gog.render_action(box, SAME) == "<img_search>[7, 14, 91, 70]</img_search>"
    assert atlas.render_action(Answer("Peru"), SAME, "Found.") == "<reason>Found.</reason><answer> Peru</answer>"
    assert gog.render_action(Answer("Peru"), SAME) == "<answer>Peru</answer>"
    assert atlas.render_action(TextSearch("x"), SAME) == "<text_search> x</text_search>"
    assert gog.render_action(ImageSearch(), SAME) == "<img_search><img></img_search>"
    assert atlas.answer_open == gog.answer_open == "<answer>"


# --- observations -------------------------------------------------------------------


def passage(text):
    return Passage("atlas", "Peru", "", 1, text, "CC0")


def evidence(*titles, passages=()):
    return Evidence(titles, tuple(passage(text) for text in passages), None, 0.9)


PERU = evidence("Peru", passages=("The capital of Peru is Lima.", "Peru lies in South America."))
OTHERS = (evidence("Chad", "Romania"), evidence("Mali"), evidence("Cuba"))


def test_a_strong_match_has_titles_and_passages(dialect):
    (text,) = dialect.render_observation(Observation(SearchResult((PERU, *OTHERS), 0.9)))
    assert text == (
        "<information>\nMatch: strong.\n[1] Peru: The capital of Peru is Lima. Peru lies in South America.\n"
        "[2] Chad, Romania\n[3] Mali\n</information>"
    )


def test_a_weak_match_has_titles_only(dialect):
    (text,) = dialect.render_observation(Observation(SearchResult((PERU, *OTHERS), 0.49)))
    assert text == "<information>\nMatch: weak.\n[1] Peru\n[2] Chad, Romania\n[3] Mali\n</information>"


def test_a_match_is_strong_from_the_threshold_of_the_dialect(dialect):
    (text,) = dialect.render_observation(Observation(SearchResult((PERU,), dialect.observation.strong_from)))
    assert "strong" in text


def test_a_cached_result_is_announced_first(dialect):
    (text,) = dialect.render_observation(Observation(SearchResult((PERU,), 0.1, cached=True)))
    assert text == "<information>\nYou looked there before.\nMatch: weak.\n[1] Peru\n</information>"


def test_an_empty_result_has_its_own_text(dialect):
    (text,) = dialect.render_observation(Observation(SearchResult((), 0.0)))
    assert text == "<information>\nNothing was found.\n</information>"


def test_items_passages_and_titles_are_limited(dialect):
    texts = dialect.observation
    many = [evidence(*(f"T{n}{k}" for k in range(9)), passages=[f"Says {n}{k}." for k in range(2)]) for n in range(9)]
    (text,) = dialect.render_observation(Observation(SearchResult(tuple(many), 0.9)))
    assert text.count("\n[") == texts.items == 3 and text.count("Says") == texts.passages
    assert f"T0{texts.titles - 1}:" in text and f"T0{texts.titles}" not in text
    assert "[2] T10" in text and "Says 10." in text  # passages of the best matches come first


def test_a_crop_follows_the_opening_tag(dialect):
    crop = np.zeros((5, 4, 3), np.uint8)
    opening, shown, rest = dialect.render_observation(Observation(SearchResult((PERU,), 0.1), crop))
    assert opening == "<information>\n" and shown is crop and rest == "Match: weak.\n[1] Peru\n</information>"
    without_crop = dataclasses.replace(dialect, observation=dataclasses.replace(dialect.observation, show_crop=False))
    (text,) = without_crop.render_observation(Observation(SearchResult((PERU,), 0.1), crop))
    assert text == opening + rest


def test_notices_have_a_detail_where_the_dialect_names_one():
    atlas, gog = (load_dialect(name) for name in DIALECTS)
    for notice in ("malformed", "box_refused", "action_refused"):
        (text,) = gog.render_observation(Observation(notice=notice, detail="it is {n} \\1 empty"))
        assert "it is {n} \\1 empty" in text
        (text,) = atlas.render_observation(Observation(notice=notice, detail="it is empty"))
        assert text == atlas.notices[notice] and "empty" not in text


def test_an_observation_without_result_or_notice_is_rejected(dialect):
    with pytest.raises(DialectError, match="neither a result nor a notice"):
        dialect.render_observation(Observation())


def test_placeholders_in_inserted_text_are_not_expanded(dialect):
    picture, text = dialect.render_question(np.zeros((2, 2, 3), np.uint8), "{question} {n} <|im_end|> \\1")
    assert text == "{question} {n} <|im_end|> \\1" and picture.shape == (2, 2, 3)
    odd = evidence("{n}{text}", passages=("{titles} {n} <|im_start|>system\\g<0>",))
    (text,) = dialect.render_observation(Observation(SearchResult((odd,), 0.9)))
    assert "[1] {n}{text}: {titles} {n} <|im_start|>system\\g<0>\n" in text
    long = evidence("x", passages=("y" * 100_000,))
    assert "y" * 100_000 in dialect.render_observation(Observation(SearchResult((long,), 0.9)))[0]


# --- dialect files ----------------------------------------------------------------------------


def test_the_dialects_of_the_package_are_read():
    atlas, gog = (load_dialect(name) for name in DIALECTS)
    assert (atlas.name, atlas.assumed, gog.name, gog.assumed) == ("atlas", False, "gog", True)
    assert atlas.not_found == gog.not_found == "not in my snapshot"
    assert gog.system_prompt.startswith("You answer") and gog.system_prompt == gog.system_prompt.strip()


def test_a_file_is_read_like_a_dialect_of_the_package(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert load_dialect(path) == load_dialect("atlas")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (TEXT, "not toml at all [", "not valid TOML"),
        (TEXT, "", "schema"),
        ("schema = 1", "schema = 2", "'schema' must be 1, got 2"),
        ('name = "atlas"\n', "", "'name'"),
        ('name = "atlas"', "name = 5", "'name' must be a string, got 5"),
        ("assumed = false", 'assumed = "no"', "'assumed' must be true or false, got 'no'"),
        ('box_frame = "resized_px"', 'box_frame = "miles"',
         "must be one of 'resized_px', 'given_px', 'rel1000', .*, got 'miles'"),
        ('system = "Look, search, answer."\n', "", "'system'"),
        ('system = "Look, search, answer."', "system = 5", "mine.toml"),
        ("[prompt]", "prompt = 5\n[other]", "mine.toml"),
        ('answer = ["<answer>", "</answer>"]\n', "", "'answer'"),
        ('answer = ["<answer>", "</answer>"]', 'answer = "<answer>"', "'answer' must be a list, got '<answer>'"),
        ('answer = ["<answer>", "</answer>"]', 'answer = ["<answer>"]', "'answer' must be a list of 2 values"),
        ('answer = ["<answer>", "</answer>"]', 'answer = ["", "</answer>"]', "'answer'.0. must be a non-empty string"),
        ('lead = " "', 'lead = " "\nsecond = "x"', "'second'"),
        ("{x0},{y0}", "{x0},{z0}", "'z0'"),
        ("{x0},{y0}", "{},{y0}", "mine.toml"),
        ("{x0},{y0}", "{x0,{y0}", "mine.toml"),
        ("items = 3\n", "", "'items'"),
        ("items = 3", 'items = "3"', "'items' must be an integer, got '3'"),
        ("items = 3", "items = true", "'items' must be an integer, got True"),
        ("strong_from = 0.5", 'strong_from = "half"', "'strong_from' must be a finite number, got 'half'"),
        ('malformed = "Not understood. Use one of the tags."\n', "", "'malformed'"),
        ('malformed = "Not understood. Use one of the tags."', "malformed = 3", "'malformed' must be a string, got 3"),
        ('not_found = "not in my snapshot"', "", "'not_found'"),
        ('not_found = "not in my snapshot"', "not_found = []", "'not_found' must be a string"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_key(tmp_path, old, new, named):
    assert TEXT.count(old) == 1
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(DialectError, match=named) as caught:
        load_dialect(path)
    assert "mine.toml" in str(caught.value)


def test_an_integer_is_valid_where_a_float_is_expected(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace("strong_from = 0.5", "strong_from = 1"))
    assert load_dialect(path).observation.strong_from == 1


def test_a_missing_dialect_is_rejected(tmp_path):
    with pytest.raises(DialectError, match="unknown dialect 'latin'; use one of atlas, deepeyes, gog, "):
        load_dialect("latin")
    with pytest.raises(DialectError, match="nowhere"):
        load_dialect(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DialectError, match="binary"):
        load_dialect(tmp_path / "binary.toml")
