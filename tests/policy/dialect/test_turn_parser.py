"""A turn that is parsed while it is generated: text is passed on at once, the action once it is certain."""

import pytest

from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import TurnParser
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

IMAGES = ShownImages(Size(300, 100), Size(300, 100))


def parse(*pieces):
    """Return the values passed to the callbacks, in order, and the result."""
    received = []
    parser = TurnParser(load_dialect("gog"), IMAGES, received.append, received.append)
    for piece in pieces:
        parser.feed(piece)
    return received, parser.result()


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<reason>so</reason><img_search>[1, 2, 3, 4]</img_search>", GazeSearch(Box(1, 2, 3, 4))),
        ("<img_search><img></img_search>", ImageSearch()),
        ("<text_search>Peru</text_search>", TextSearch("Peru")),
        ("<answer>Peru</answer>", Answer("Peru")),
    ],
)
def test_the_action_is_reported_with_the_character_that_completes_it(text, action):
    received, result = parse(*text, " ", "a", "<answer>b</answer>")
    assert received.index(action) == len(text)
    assert received[: len(text)] == list(text)
    assert [item for item in received if not isinstance(item, str)] == [action]
    assert result == (action, "")


@pytest.mark.parametrize(
    "text", ["", "words", "<answer>never closed", "<img_search>[1, 2]</img_search>", "<reason><answer>x</answer>"])
def test_no_action_is_reported_while_it_is_uncertain(text):
    received, _ = parse(*text)
    assert received == list(text)


def test_a_malformed_turn_has_a_reason():
    assert parse("words")[1] == (None, "it contains no action")


def test_callbacks_are_optional():
    parser = TurnParser(load_dialect("gog"), IMAGES, None, None)
    parser.feed("<answer>x</answer>")
    parser.feed("")
    assert (parser.text, parser.result()) == ("<answer>x</answer>", (Answer("x"), ""))
