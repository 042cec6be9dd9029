"""An action is known as soon as more text cannot change it, and never before."""

import dataclasses

import numpy as np
import pytest

from gog_edge.errors import MalformedAction
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import TurnRules
from gog_edge.policy.dialect.loader import load_dialect, shipped
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

FRAME = Frame(Size(1000, 1000), Size(1000, 1000)).showing(Box(0, 0, 500, 500), Size(280, 280))
ZOOM = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}'


@pytest.mark.parametrize(
    ("name", "certain", "rest", "action"),
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
def test_an_action_is_known_with_its_last_character(name, certain, rest, action):
    dialect = load_dialect(name)
    for end in range(len(certain)):
        assert dialect.closed_action(certain[:end], FRAME) is None, certain[:end]
    for end in range(len(certain), len(certain + rest) + 1):
        assert dialect.closed_action((certain + rest)[:end], FRAME) == action
    assert dialect.parse(certain + rest, FRAME) == action


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mmsearch_r1", "<search><img></search>"),  # the last one counts
        ("mmsearch_r1", "<answer>Lima</answer>"),
        ("qwen_agent", "The answer is Lima."),  # a call may follow
        ("qwen_agent", "<think>" + ZOOM),
        ("gog", "<think>Maybe <answer>no</answer></think>"),
        ("gog", "<reason>Say <answer>no</answer>"),
        ("atlas", "<img_search>[1,2,3]</img_search>"),  # closed, and not to be read
        ("atlas", "<answer></answer>"),
        ("qwen_agent", "<tool_call>[]</tool_call>"),
        ("qwen_agent", '<tool_call>{"name": "rm"}</tool_call>'),
        ("qwen_agent", "<tool_call>" + "[" * 5000),
    ],
)
def test_what_is_not_certain_is_not_told(name, text):
    assert load_dialect(name).closed_action(text, FRAME) is None


def test_inside_a_thought_that_the_template_opened_nothing_is_certain():
    dialect = load_dialect("deepeyes").after("<|im_start|>assistant\n<think>\n")
    assert dialect.closed_action("maybe <answer>a</answer>", FRAME) is None
    assert dialect.closed_action("maybe <answer>a</answer></think><answer>b</answer>", FRAME) == Answer("b")


def test_the_first_of_several_that_must_end_the_turn_is_not_certain_either():
    dialect = dataclasses.replace(load_dialect("gog"), turn=TurnRules(action_at_end=True))
    text = "<text_search>a</text_search>"
    assert dialect.closed_action(text, FRAME) is None
    assert dialect.parse(text, FRAME) == TextSearch("a")
    with pytest.raises(MalformedAction, match="does not end the turn"):
        dialect.parse(text + ".", FRAME)


@pytest.mark.parametrize("name", shipped())
def test_what_is_known_early_is_what_is_read_at_the_end(name):
    dialect = load_dialect(name)
    rng = np.random.default_rng(4)
    takes_back = {dialect.syntax.skip_until, *dialect.syntax.reason}
    parts = [mark for mark in dialect.syntax.marks if mark not in takes_back]
    parts += [ZOOM, "\n</tool_call>", "[1,2,3,4]", "<img>", "Peru", " ", "{", "}", "12"]
    known = 0
    for _ in range(2000):
        pieces = [parts[int(k)] for k in rng.integers(0, len(parts), int(rng.integers(1, 10)))]
        text = "".join(pieces)
        early = [dialect.closed_action("".join(pieces[:n]), FRAME) for n in range(len(pieces) + 1)]
        told = [action for action in early if action is not None]
        known += bool(told)
        assert all(action == told[0] for action in told), text
        if told:
            assert dialect.parse(text, FRAME) == told[0], text
    assert (known > 0) == (name != "mmsearch_r1")
