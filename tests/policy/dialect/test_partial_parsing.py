"""Actions of incomplete turns: reported once further text cannot change them, and not earlier."""

import dataclasses

import numpy as np
import pytest

from gog_edge.errors import MalformedAction
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import TurnRules
from gog_edge.policy.dialect.loader import load_dialect, shipped
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

IMAGES = ShownImages(Size(1000, 1000), Size(1000, 1000)).with_crop(Box(0, 0, 500, 500), Size(280, 280))
ZOOM = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}'


@pytest.mark.parametrize(
    ("name", "complete", "rest", "action"),
    [
        ("atlas", "<reason>One.</reason><img_search>[1,2,3,4]</img_search>", "", GazeSearch(Box(1, 2, 3, 4))),
        ("atlas", "<text_search> Lima</text_search>", "<answer>x</answer>", TextSearch("Lima")),
        ("atlas", "<answer>Lima</answer>", " Done.", Answer("Lima")),
        ("gog", "<img_search><img></img_search>", "<reason>Why?</reason>", ImageSearch()),
        ("gog", "<think>a</think><answer>Lima</answer>", "", Answer("Lima")),
        ("qwen_agent", ZOOM, "\n</tool_call>", GazeSearch(Box(1, 2, 3, 4))),
        ("qwen_agent", ZOOM, "}\n</tool_call>" + ZOOM, GazeSearch(Box(1, 2, 3, 4))),
        ("qwen_agent", '<think>x</think>\n<tool_call>{"name": "web_search", "arguments": {"query": "</tool_call>"}}',
         "</tool_call>", TextSearch("</tool_call>")),
        ("sensenova_mars", '<thinking>x</thinking><tool_call>{"name": "image_search_tool"}', "", ImageSearch()),
        ("deepeyes", "<think><answer>a</answer></think><answer>b</answer>", "<answer>c</answer>", Answer("b")),
    ],
)
def test_an_action_is_reported_with_its_last_character(name, complete, rest, action):
    dialect = load_dialect(name)
    for end in range(len(complete)):
        assert dialect.parse_partial(complete[:end], IMAGES) is None, complete[:end]
    for end in range(len(complete), len(complete + rest) + 1):
        assert dialect.parse_partial((complete + rest)[:end], IMAGES) == action
    assert dialect.parse(complete + rest, IMAGES) == action


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mmsearch_r1", "<search><img></search>"),  # the last action of a turn counts
        ("mmsearch_r1", "<answer>Lima</answer>"),
        ("qwen_agent", "The answer is Lima."),  # a call may follow
        ("qwen_agent", "<think>" + ZOOM),
        ("gog", "<think>Maybe <answer>no</answer></think>"),
        ("gog", "<reason>Say <answer>no</answer>"),
        ("atlas", "<img_search>[1,2,3]</img_search>"),  # closed, but malformed
        ("atlas", "<answer></answer>"),
        ("qwen_agent", "<tool_call>[]</tool_call>"),
        ("qwen_agent", '<tool_call>{"name": "rm"}</tool_call>'),
        ("qwen_agent", "<tool_call>" + "[" * 5000),
    ],
)
def test_uncertain_actions_are_not_reported(name, text):
    assert load_dialect(name).parse_partial(text, IMAGES) is None


def test_actions_inside_prefilled_thinking_are_not_reported():
    dialect = load_dialect("deepeyes").for_template("<|im_start|>assistant\n<think>\n")
    assert dialect.parse_partial("maybe <answer>a</answer>", IMAGES) is None
    assert dialect.parse_partial("maybe <answer>a</answer></think><answer>b</answer>", IMAGES) == Answer("b")


def test_an_action_that_must_end_the_turn_is_not_reported_early():
    dialect = dataclasses.replace(load_dialect("gog"), turn=TurnRules(action_at_end=True))
    text = "<text_search>a</text_search>"
    assert dialect.parse_partial(text, IMAGES) is None
    assert dialect.parse(text, IMAGES) == TextSearch("a")
    with pytest.raises(MalformedAction, match="does not end the turn"):
        dialect.parse(text + ".", IMAGES)


@pytest.mark.parametrize("name", shipped())
def test_an_early_action_is_the_action_of_the_complete_turn(name):
    dialect = load_dialect(name)
    rng = np.random.default_rng(4)
    retracting = {dialect.syntax.skip_until, *dialect.syntax.reason}
    parts = [text for text in dialect.syntax.delimiters if text not in retracting]
    parts += [ZOOM, "\n</tool_call>", "[1,2,3,4]", "<img>", "Peru", " ", "{", "}", "12"]
    count = 0
    for _ in range(2000):
        pieces = [parts[int(k)] for k in rng.integers(0, len(parts), int(rng.integers(1, 10)))]
        text = "".join(pieces)
        early = [dialect.parse_partial("".join(pieces[:n]), IMAGES) for n in range(len(pieces) + 1)]
        reported = [action for action in early if action is not None]
        count += bool(reported)
        assert all(action == reported[0] for action in reported), text
        if reported:
            assert dialect.parse(text, IMAGES) == reported[0], text
    assert (count > 0) == (name != "mmsearch_r1")
