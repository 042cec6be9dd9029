"""Words are passed on as they come, the action once, as soon as it is certain."""

import pytest

from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import Listener
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

FRAME = Frame(Size(300, 100), Size(300, 100))


def listen(*pieces):
    """What was told, in order, and what was understood at the end."""
    told = []
    listener = Listener(load_dialect("gog"), FRAME, told.append, told.append)
    for piece in pieces:
        listener.hear(piece)
    return told, listener.understood()


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<reason>so</reason><img_search>[1, 2, 3, 4]</img_search>", GazeSearch(Box(1, 2, 3, 4))),
        ("<img_search><img></img_search>", ImageSearch()),
        ("<text_search>Peru</text_search>", TextSearch("Peru")),
        ("<answer>Peru</answer>", Answer("Peru")),
    ],
)
def test_the_action_is_told_with_the_letter_that_closes_it(text, action):
    told, (understood, reason) = listen(*text, " ", "a", "<answer>b</answer>")
    assert told.index(action) == len(text)
    assert told[: len(text)] == list(text)
    assert [item for item in told if not isinstance(item, str)] == [action]
    assert (understood, reason) == (action, "")


@pytest.mark.parametrize(
    "text", ["", "words", "<answer>never closed", "<img_search>[1, 2]</img_search>", "<reason><answer>x</answer>"])
def test_what_is_not_certain_is_not_told(text):
    told, _ = listen(*text)
    assert told == list(text)


def test_what_cannot_be_understood_says_why():
    assert listen("words")[1] == (None, "there is no action in it")


def test_nobody_need_listen():
    listener = Listener(load_dialect("gog"), FRAME, None, None)
    listener.hear("<answer>x</answer>")
    listener.hear("")
    assert (listener.text, listener.understood()) == ("<answer>x</answer>", (Answer("x"), ""))
