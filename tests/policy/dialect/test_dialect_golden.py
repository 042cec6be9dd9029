"""Every dialect of the package with literal texts: turns to actions, actions to turns, observations to text."""

import dataclasses

import numpy as np
import pytest

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.loader import load_dialect, shipped
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

ALL = ("atlas", "deepeyes", "gog", "mmsearch_r1", "qwen_agent", "sensenova_mars")
IMAGES = ShownImages(given=Size(2000, 1000), resized=Size(504, 252))
CROP = Box(500, 200, 900, 400)
SHOWN = IMAGES.with_crop(CROP, Size(640, 320)).with_crop(Box(0, 0, 100, 100), Size(512, 512))
ZOOM = '{"name": "image_zoom_in_tool", "arguments": '


def call(text):
    return f"<tool_call>\n{text}\n</tool_call>"


def test_every_dialect_of_the_package_is_tested_here():
    assert shipped() == ALL


# --- text to action ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "action"),
    [
        ("gog", "<reason>Left.</reason><img_search>[252, 0, 504, 252]</img_search>",
         GazeSearch(Box(1000, 0, 2000, 1000))),
        ("mmsearch_r1", "<reason>Who?</reason>\n<search><img></search>", ImageSearch()),
        ("mmsearch_r1", "<reason>Who?</reason><text_search>mayor of Lima</text_search>\n", TextSearch("mayor of Lima")),
        ("mmsearch_r1", "<text_search>a</text_search> or <text_search>b</text_search>", TextSearch("b")),
        ("mmsearch_r1", "<search><img></search><text_search>b</text_search>", TextSearch("b")),
        ("mmsearch_r1", "<answer>no</answer><text_search>b</text_search>", TextSearch("b")),
        ("mmsearch_r1", "<answer>Lima</answer> That is all.", Answer("Lima")),
        ("mmsearch_r1", "<answer>Lima</answer><answer>Quito</answer>", Answer("Quito")),
        ("mmsearch_r1", "<text_search>a</text_search> I know: <answer>Lima</answer>", Answer("Lima")),
        ("mmsearch_r1", "<answer>Lima", Answer("Lima")),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [0, 500, 250.5, 1000], "label": "flag", "img_idx": 0}}'),
         GazeSearch(Box(0, 500, 501, 1000))),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [250, 250, 500, 1000], "label": "", "img_idx": 1}}'),
         GazeSearch(Box(600, 250, 700, 400))),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [0, 0, 500, 500], "img_idx": 2.0}}'), GazeSearch(Box(0, 0, 50, 50))),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [0, 0, 1000, 1000]}}'), GazeSearch(Box(0, 0, 2000, 1000))),
        ("qwen_agent", call('{"name": "image_search", "arguments": {"img_idx": 0}}'), ImageSearch()),
        ("qwen_agent", call('{"name": "image_search", "arguments": {"img_idx": 1}}'), GazeSearch(CROP)),
        ("qwen_agent", call('{"name": "image_search"}'), ImageSearch()),
        ("qwen_agent", "Let me see. " + call('{"arguments": {"query": " Lima "}, "name": "web_search"}'),
         TextSearch("Lima")),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": "what is </tool_call> in XML?"}}'),
         TextSearch("what is </tool_call> in XML?")),
        ("qwen_agent", '<tool_call>{"name":"web_search","arguments":{"query":"日本 \\u65e5"}}', TextSearch("日本 日")),
        ("qwen_agent", '<tool_call>{"name":"web_search","arguments":{"query":"a"}}}</tool_call>', TextSearch("a")),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": "a"}}') * 2, TextSearch("a")),
        ("qwen_agent", "It is Lima.", Answer("It is Lima.")),
        ("qwen_agent", "<think>Hm.</think>\n\nIt is Lima.", Answer("It is Lima.")),
        ("qwen_agent", "Answer: Lima", Answer("Lima")),
        ("qwen_agent", "<think>" + call('{"name": "image_search"}') + "</think>Lima", Answer("Lima")),
        ("qwen_agent", "Hm.</think>" + call('{"name": "image_search"}'), ImageSearch()),
        ("sensenova_mars", "<thinking>I <answer>guess</answer></thinking><answer>Lima</answer>", Answer("Lima")),
        ("sensenova_mars", call('{"name": "text_search_tool", "arguments": {"query": "Lima"}}'), TextSearch("Lima")),
        ("sensenova_mars", call('{"name": "image_search_tool", "arguments": {}}'), ImageSearch()),
        # Its own tool cuts the given picture whatever the index.
        ("sensenova_mars", call(ZOOM + '{"bbox_2d": [0, 0, 500, 500], "label": "x", "img_idx": 7}}'),
         GazeSearch(Box(0, 0, 1000, 500))),
        ("deepeyes", "<think>Small.</think>" + call(ZOOM + '{"bbox_2d": [126, 0, 252, 126], "label": "sign"}}'),
         GazeSearch(Box(500, 0, 1000, 500))),
        ("deepeyes", "<think>" + call(ZOOM + '{"bbox_2d": [1, 1, 2, 2]}}') + "</think><answer>a dog</answer>",
         Answer("a dog")),
        ("deepeyes", "<answer>a dog", Answer("a dog")),
    ],
)
def test_turns_are_parsed(name, text, action):
    assert load_dialect(name).parse(text, SHOWN) == action


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("mmsearch_r1", "<text_search>a</text_search> and more", "the text_search does not end the turn"),
        ("mmsearch_r1", "<search><img></search> please", "the image_search does not end the turn"),
        ("mmsearch_r1", "<text_search>never closed", "does not end the turn"),
        ("mmsearch_r1", "<search>[1,2,3,4]</search>", "the image search must be '<img>', got '\\[1,2,3,4\\]'"),
        ("mmsearch_r1", "<text_search> </text_search>", "the text_search is empty"),
        ("mmsearch_r1", "Lima", "it contains no action"),
        ("qwen_agent", "", "it contains no action"),
        ("qwen_agent", "<think>so long", "it ended inside the thinking"),
        ("qwen_agent", "<think>" + call('{"name": "image_search"}'), "it ended inside the thinking"),
        ("qwen_agent", call(""), "the call must be a JSON object"),
        ("qwen_agent", call("[]"), "the call must be a JSON object"),
        ("qwen_agent", call("Peru"), "the call must be a JSON object, got 'Peru'"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": "a"}'), "the call must be a JSON object"),
        ("qwen_agent", call("{'name': 'web_search'}"), "the call must be a JSON object"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": "a", "query": "b"}}'),
         "must be a JSON object"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": ["a"]}}'),
         "'query' must be a string, got .*a"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {}}'), "'query' must be a string, got null"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": " "}}'), "the text_search is empty"),
        ("qwen_agent", call('{"name": "web_search", "arguments": {"query": "\\ud83d"}}'), "half of a surrogate pair"),
        ("qwen_agent", call('{"name": "web_search", "arguments": "Lima"}'), "'arguments' must be a JSON object"),
        ("qwen_agent", call('{"name": "python", "arguments": {}}'),
         'the tool "python" does not exist; available tools are image_zoom_in_tool, '),
        ("qwen_agent", call('{"name": ["web_search"]}'), "does not exist"),
        ("qwen_agent", call('{"arguments": {"query": "a"}}'), "the tool null does not exist"),
        ("qwen_agent", call(ZOOM + '{"img_idx": 0}}'), "'bbox_2d' must be a list of four numbers, got null"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": "[1,2,3,4]", "img_idx": 0}}'), "must be a list of four numbers, got"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3], "img_idx": 0}}'), "four numbers, got 3"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [[1, 2, 3, 4]], "img_idx": 0}}'), "four numbers, got 1"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, "4"], "img_idx": 0}}'), "must contain numbers"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, true], "img_idx": 0}}'), "must contain numbers"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, null], "img_idx": 0}}'), "must contain numbers"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 1e999], "img_idx": 0}}'), "must contain numbers"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 99999999], "img_idx": 0}}'),
         "must contain numbers up to 9999999"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, NaN], "img_idx": 0}}'), "must be a JSON object"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, Infinity], "img_idx": 0}}'), "must be a JSON object"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": 3}}'),
         "image 3 does not exist; images 0 to 2 were shown"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": -1}}'), "image -1 does not exist"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": "0"}}'), "must be the index of an image"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": 0.5}}'), "must be the index of an image"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": 1e999}}'), "must be the index of an image"),
        ("qwen_agent", call(ZOOM + '{"bbox_2d": [1, 2, 3, 4], "img_idx": true}}'), "must be the index of an image"),
        ("sensenova_mars", "Lima", "it contains no action"),
        ("sensenova_mars", "<answer> </answer>", "the answer is empty"),
        ("sensenova_mars", call('{"name": "web_search", "arguments": {"query": "a"}}'),
         'the tool "web_search" does not exist'),
        ("deepeyes", call('{"name": "image_rotate_tool", "arguments": {"angle": 90}}'),
         '"image_rotate_tool" does not exist'),
        ("deepeyes", call('{"a":' * 1500 + "1" + "}" * 1500), "the call has .* characters"),
        ("deepeyes", call("[" * 3000), "the call must be a JSON object"),
        ("deepeyes", call("{" + '"a":[' * 700), "the call must be a JSON object"),
        ("deepeyes", call('{"name": "' + "a" * 10**6 + '"}'), "the call has .* characters, more than 4096"),
        ("deepeyes", call('{"name": ' + "9" * 4000 + "}"), "does not exist"),
        ("deepeyes", "<tool_call>" * 20_000, "the call has"),
        ("deepeyes", call(ZOOM + '{"bbox_2d": [' + "1," * 500 + "1]}}"), "four numbers, got 501"),
    ],
)
def test_malformed_turns_have_a_reason(name, text, reason):
    with pytest.raises(MalformedAction, match=reason) as caught:
        load_dialect(name).parse(text, SHOWN)
    assert len(str(caught.value)) < 250
    str(caught.value).encode()


@pytest.mark.parametrize("name", ALL)
def test_random_text_gives_an_action_or_a_reason(name):
    dialect = load_dialect(name)
    rng = np.random.default_rng(8)
    parts = [*dialect.syntax.delimiters, *dialect.observation.delimiters, "{", "}", "[", "]", '"', ":", ",", '"name"',
             '"arguments"', '"bbox_2d"', '"img_idx"', '"image_zoom_in_tool"', ZOOM, "[1, 2, 3, 4]", "1e999", "NaN",
             "\\ud800", "\\u0000", "Peru", " ", "\n", "日本", "٣", "-1", "<think>", "Answer:"]
    for _ in range(3000):
        text = "".join(parts[int(k)] for k in rng.integers(0, len(parts), int(rng.integers(0, 16))))
        try:
            action = dialect.parse(text, SHOWN)
        except MalformedAction as exc:
            assert str(exc)
        else:
            assert isinstance(action, (Answer, TextSearch, ImageSearch, GazeSearch))
            assert not isinstance(action, GazeSearch) or np.isfinite(dataclasses.astuple(action.box)).all()


# --- action to text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "action", "text"),
    [
        ("gog", GazeSearch(Box(0, 0, 1000, 500)), "<reason>Left.</reason><img_search>[0, 0, 252, 126]</img_search>"),
        ("mmsearch_r1", ImageSearch(), "<reason>Left.</reason><search><img></search>"),
        ("mmsearch_r1", TextSearch("Lima"), "<reason>Left.</reason><text_search>Lima</text_search>"),
        ("qwen_agent", GazeSearch(Box(20, 0, 500, 1000)), "<think>Left.</think>" + call(
            ZOOM + '{"bbox_2d": [10, 0, 250, 1000], "label": "region", "img_idx": 0}}')),
        ("qwen_agent", ImageSearch(), "<think>Left.</think>" + call('{"name": "image_search", "arguments": '
                                                                   '{"img_idx": 0}}')),
        ("qwen_agent", TextSearch("a <b> 日"), "<think>Left.</think>" + call(
            '{"name": "web_search", "arguments": {"query": "a \\u003cb> 日"}}')),
        ("qwen_agent", Answer("Lima"), "<think>Left.</think>Lima"),
        ("sensenova_mars", ImageSearch(), "<thinking>Left.</thinking>" + call(
            '{"name": "image_search_tool", "arguments": {}}')),
        ("sensenova_mars", Answer("Lima"), "<thinking>Left.</thinking><answer>Lima</answer>"),
        ("deepeyes", GazeSearch(Box(0, 0, 1000, 500)), "<think>Left.</think>" + call(
            ZOOM + '{"bbox_2d": [0, 0, 252, 126], "label": "region"}}')),
    ],
)
def test_actions_are_rendered(name, action, text):
    dialect = load_dialect(name)
    assert dialect.render_action(action, SHOWN, "Left.") == text
    assert dialect.parse(text, SHOWN) == action


@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_rendered_actions_are_parsed_back(name, prefilled):
    dialect = load_dialect(name)
    if prefilled and not dialect.thinking.open:
        pytest.skip("a dialect without thinking")
    dialect = dialect.for_template("<|im_start|>assistant\n<think>\n" if prefilled else "<|im_start|>assistant\n")
    assert dialect.thinking.prefilled == prefilled
    actions = [Answer("a, b and c"), TextSearch('the "capital"\n of Peru \\'), ImageSearch(),
               GazeSearch(Box(-40, 0, 2000, 1000)), GazeSearch(Box(1000, 500, 1500, 800))]
    for action in actions:
        for reason in ("", "I look at the left one."):
            try:
                text = dialect.render_action(action, SHOWN, reason)
            except DialectError:
                assert (name, type(action)) in UNSUPPORTED
                continue
            assert (name, type(action)) not in UNSUPPORTED
            read = dialect.parse(text, SHOWN)
            if isinstance(action, GazeSearch):
                off = np.subtract(dataclasses.astuple(read.box), dataclasses.astuple(action.box))
                assert np.abs(off).max() <= 2000 / 504 / 2 + 1e-6
            else:
                assert read == action


UNSUPPORTED = {("mmsearch_r1", GazeSearch), ("deepeyes", TextSearch), ("deepeyes", ImageSearch)}


def test_delimiters_inside_the_arguments_of_a_call_are_text():
    dialect = load_dialect("sensenova_mars")
    for words in ("</tool_call>", "</think>", "<answer>no</answer>", "<thinking>", '"}}', "a\u2028b", "{x0}"):
        assert dialect.parse(dialect.render_action(TextSearch(words), IMAGES), IMAGES) == TextSearch(words)


@pytest.mark.parametrize(
    ("name", "prefilled", "opening"),
    [
        ("atlas", False, "<answer>"),
        ("mmsearch_r1", False, "<answer>"),
        ("qwen_agent", False, "Answer:"),
        ("qwen_agent", True, "</think>\n\nAnswer:"),
        ("sensenova_mars", False, "<answer>"),
        ("deepeyes", True, "</think>\n\n<answer>"),
    ],
)
def test_a_forced_answer_is_parsed_as_an_answer(name, prefilled, opening):
    dialect = load_dialect(name).for_template("<think>" if prefilled else "")
    assert dialect.answer_open == opening
    assert dialect.parse(opening + " Lima", IMAGES) == Answer("Lima")


def test_a_turn_that_begins_inside_thinking_has_no_action_before_the_closing_tag():
    dialect = load_dialect("deepeyes").for_template("<|im_start|>assistant\n<think>\n")
    with pytest.raises(MalformedAction, match="ended inside the thinking"):
        dialect.parse("maybe <answer>a dog</answer>", IMAGES)
    assert dialect.parse("maybe <answer>a dog</answer></think><answer>a cat</answer>", IMAGES) == Answer("a cat")
    atlas = load_dialect("atlas")
    assert atlas.for_template("<think>") is atlas  # it has no thinking


# --- observations to text -------------------------------------------------------------------


def found(*, strong, crop=None, cached=False):
    texts = ("Lima is its capital.", "It is big.")
    passages = tuple(Passage("p", "Peru", "", n, text, "CC0") for n, text in enumerate(texts))
    evidence = (Evidence(("Peru",), passages, None, 0.9), Evidence(("Chad", "Romania"), (), None, 0.5))
    return Observation(SearchResult(evidence, 0.9 if strong else 0.1, cached), crop)


@pytest.mark.parametrize(
    ("name", "observation", "text"),
    [
        ("gog", found(strong=True), "<information>\nMatch: strong.\n[1] Peru: Lima is its capital. It is big.\n"
                                    "[2] Chad, Romania\n</information>"),
        ("mmsearch_r1", found(strong=True),
         "Searched results: <information>\nThe best match is a good one.\n1. Peru: Lima is its capital. It is big.\n"
         "2. Chad, Romania\n</information>\nOriginal user's question: Which?\n"
         "Think about what was found, then search or answer as before."),
        ("qwen_agent", found(strong=False, cached=True),
         "<tool_response>\nYou looked there before.\nMatch: weak.\n[1] Peru\n[2] Chad, Romania\n</tool_response>"),
        ("sensenova_mars", found(strong=True),
         "<tool_response>\nThe best match is a good one.\n1. Peru: Lima is its capital. It is big.\n"
         "2. Chad, Romania\n</tool_response>"),
        ("deepeyes", found(strong=False),
         "<tool_response>Match: weak.\n[1] Peru\n[2] Chad, Romania\n</tool_response>Look at it and go on: call the "
         "function again, or answer inside <answer></answer>."),
        ("mmsearch_r1", Observation(notice="malformed", detail="it contains no action"),
         "That turn did not end with a search or an answer: it contains no action. End it with one of the tags."),
        ("qwen_agent", Observation(notice="box_refused", detail="it is empty"),
         "<tool_response>\nError: that region cannot be cropped: it is empty.\n</tool_response>"),
        ("sensenova_mars", Observation(notice="malformed", detail='the tool "a" does not exist'),
         '<tool_response>\nError: the tool "a" does not exist.\n</tool_response>'),
        ("deepeyes", Observation(notice="give_up"),
         "No more calls are left. Answer now, inside <answer></answer>."),
    ],
)
def test_observations_are_rendered(name, observation, text):
    assert load_dialect(name).render_observation(observation, "Which?") == (text,)


@pytest.mark.parametrize(
    ("name", "layout", "shape", "shown"),
    [
        ("gog", "image_text", (10, 40), (10, 40)),
        ("deepeyes", "image_text", (10, 40), (10, 40)),
        ("qwen_agent", "image_text", (100, 400), (256, 1024)),  # enlarged to 256 tokens of 32 x 32
        ("qwen_agent", "text_image", (600, 600), (600, 600)),
        ("sensenova_mars", "image_text", (1, 1), (256, 256)),
        ("mmsearch_r1", "image_text", (10, 40), None),
    ],
)
def test_crops_are_placed_and_enlarged_as_the_dialect_requires(name, layout, shape, shown):
    dialect = load_dialect(name)
    dialect = dataclasses.replace(dialect, observation=dataclasses.replace(dialect.observation, layout=layout))
    segments = dialect.render_observation(found(strong=False, crop=np.zeros((*shape, 3), np.uint8)))
    places = [n for n, segment in enumerate(segments) if not isinstance(segment, str)]
    if shown is None:
        assert len(segments) == 1
        return
    assert places == [1] and segments[1].shape == (*shown, 3) and segments[1].dtype == np.uint8
    delimiters = (dialect.observation.open, dialect.observation.close)
    assert (segments[0] == delimiters[0]) == (layout == "image_text")
    assert (segments[2] == delimiters[1]) == (layout == "text_image")


@pytest.mark.parametrize("name", ALL)
def test_delimiters_in_titles_passages_and_details_are_escaped(name):
    dialect = load_dialect(name)
    delimiters = (*dialect.syntax.delimiters, *dialect.observation.delimiters)
    plain = dialect.render_observation(found(strong=True), "Which?")[0]
    for delimiter in delimiters:
        for fake in (delimiter, delimiter.upper(), f"x{delimiter}\n[2] Peru: {delimiter}", "<" + delimiter + delimiter):
            evidence = (Evidence((fake,), (Passage("p", "a", "", 1, fake, "CC0"),), None, 0.9),)
            (text,) = dialect.render_observation(Observation(SearchResult(evidence, 0.9)), "Which?")
            for each in delimiters:
                assert text.lower().count(each.lower()) == plain.lower().count(each.lower()), fake
            assert text.count("\n") <= plain.count("\n")
            (notice,) = dialect.render_observation(Observation(notice="malformed", detail=fake))
            bare = dialect.notices["malformed"]
            assert all(notice.lower().count(each.lower()) == bare.lower().count(each.lower()) for each in delimiters)


def test_line_breaks_in_passages_are_replaced():
    text = "a\nb\r\nc\u2028d\x85e"
    evidence = (Evidence(("T",), (Passage("p", "a", "", 1, text, "CC0"),), None, 0.9),)
    (rendered,) = load_dialect("gog").render_observation(Observation(SearchResult(evidence, 0.9)))
    assert "[1] T: a b c d e\n" in rendered


# --- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("qwen_agent", "sensenova_mars", "deepeyes"))
def test_the_prompt_lists_the_tools_and_a_valid_example(name):
    dialect = load_dialect(name)
    assert "{tools}" not in dialect.system_prompt
    for tool in dialect.syntax.tools:
        assert f'"name": "{tool.name}"' in dialect.system_prompt and tool.about in dialect.system_prompt
    example = "<tool_call>" + dialect.system_prompt.split("<tool_call>")[1].split("</tool_call>")[0]
    assert isinstance(dialect.parse(example, IMAGES), (TextSearch, GazeSearch))


def test_search_limits_are_read_from_the_file():
    assert dataclasses.astuple(load_dialect("mmsearch_r1").budget) == (3, 1, 2)
    assert load_dialect("qwen_agent").budget.rounds == 20 and load_dialect("sensenova_mars").budget.rounds == 10
    assert dataclasses.astuple(load_dialect("atlas").budget) == (None, None, None)


def test_tags_require_a_dialect_with_tags():
    assert load_dialect("mmsearch_r1").tags.image_search == ("<search>", "</search>")
    with pytest.raises(DialectError, match="deepeyes has tool calls instead of tags"):
        _ = load_dialect("deepeyes").tags
