"""What the numbers of a box mean, on the given picture and on crops of it."""

import dataclasses

import numpy as np
import pytest

from gog_edge.agent.loop import Budget, run_episode
from gog_edge.config import GazeConfig
from gog_edge.picture import Picture
from gog_edge.policy.dialect.actions import FRAMES, Frame, View
from gog_edge.policy.dialect.dialect import CropRules
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.scripted import ScriptedPolicy
from gog_edge.types import Box, GazeSearch, ImageSearch, Observation, SearchResult, Size

FRAME = Frame(Size(2000, 1000), Size(500, 250)).showing(Box(400, 100, 800, 300), Size(100, 50))


@pytest.mark.parametrize(
    ("box_frame", "corners"),
    [
        ("resized_px", (25, 0, 50, 25)),
        ("given_px", (100, 0, 200, 100)),
        ("rel1000", (250, 0, 500, 500)),
        ("rel1", (0.25, 0, 0.5, 0.5)),
    ],
)
def test_corners_on_a_crop_lie_in_the_given_picture(box_frame, corners):
    crop = FRAME.views[1]
    assert crop.to_given(corners, box_frame) == Box(500, 100, 600, 200)
    assert crop.to_corners(Box(500, 100, 600, 200), box_frame) == pytest.approx(corners)
    assert crop.to_given((0, 0, *crop.extent(box_frame)), box_frame) == crop.box


def test_a_crop_of_a_crop_lies_in_the_given_picture():
    inner = FRAME.views[1].to_given((500, 500, 1000, 1000), "rel1000")
    deeper = FRAME.showing(inner, Size(64, 32)).views[2]
    assert inner == Box(600, 200, 800, 300)
    assert deeper.to_given((0, 0, 500, 500), "rel1000") == Box(600, 200, 700, 250)


@pytest.mark.parametrize("box_frame", FRAMES)
def test_there_and_back(box_frame):
    rng = np.random.default_rng(1)
    for _ in range(200):
        x0, y0, x1, y1 = rng.uniform(-100, 3000, 4)
        view = View(Box(x0, y0, x0 + abs(x1) + 1, y0 + abs(y1) + 1), Size(*map(int, rng.integers(1, 2000, 2))))
        box = Box(*rng.uniform(-100, 3000, 4))
        back = view.to_given(view.to_corners(box, box_frame), box_frame)
        assert dataclasses.astuple(back) == pytest.approx(dataclasses.astuple(box))


def test_showing_leaves_the_frame_before_as_it_was():
    first = Frame(Size(10, 10), Size(10, 10))
    second = first.showing(Box(0, 0, 5, 5), Size(4, 4))
    assert first.crops == () and len(second.views) == 2 and second.views[0] == first.whole


@pytest.mark.parametrize(
    ("rules", "image", "action"),
    [
        (CropRules("any", image_base=0), 0, ImageSearch()),
        (CropRules("any", image_base=0), 1, GazeSearch(Box(400, 100, 800, 300))),
        (CropRules("any", image_base=1), 1, ImageSearch()),
        (CropRules("any", image_base=1), 2, GazeSearch(Box(400, 100, 800, 300))),
        (CropRules("given", image_base=0), 1, ImageSearch()),
    ],
)
def test_images_are_counted_from_the_dialect_s_base(rules, image, action):
    dialect = dataclasses.replace(load_dialect("qwen_agent"), crop=rules)
    text = f'<tool_call>{{"name": "image_search", "arguments": {{"img_idx": {image}}}}}</tool_call>'
    assert dialect.parse(text, FRAME) == action
    written = dialect.render_action(ImageSearch(), FRAME)
    assert f'"img_idx": {rules.image_base}' in written and dialect.parse(written, FRAME) == ImageSearch()


# --- a whole dialogue -------------------------------------------------------------------------


def test_only_crops_that_were_shown_can_be_named():
    crop = Observation(SearchResult((), 0.1), np.zeros((20, 40, 3), np.uint8), crop_box=Box(400, 100, 800, 300))
    first = Frame(Size(2000, 1000), Size(500, 250))
    dialect = load_dialect("qwen_agent")

    def half(size):
        return Size(size.width // 2, size.height // 2)

    shown = dialect.frame_after(first, crop, half)
    assert shown.crops == (View(Box(400, 100, 800, 300), Size(362, 181)),)  # enlarged to 725 x 363, then halved
    for silent in (Observation(notice="malformed"), dataclasses.replace(crop, crop=None)):
        assert dialect.frame_after(first, silent, half) is first
    assert load_dialect("sensenova_mars").frame_after(first, crop, half) is first  # it only ever cuts the picture


def test_a_crop_is_gazed_at_again_through_the_loop():
    zoom = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s], "img_idx": %d}}</tool_call>'
    texts = [zoom % ("100, 100, 400, 400", 0), zoom % ("0, 0, 500, 500", 1), "Lima"]
    policy = ScriptedPolicy(texts, load_dialect("qwen_agent"))
    gaze = GazeConfig(pad=0.0, framings=())
    episode = run_episode(Picture(np.zeros((300, 400, 3), np.uint8)), "Which?", policy=policy, retriever=Nothing(),
                          budget=Budget(), gaze=gaze)
    *_, end = episode
    first, second, _ = end.record.steps
    assert (first.box, second.box) == (Box(40, 30, 160, 120), Box(40, 30, 100, 75))
    assert end.record.answer == "Lima"


class Nothing:
    """A snapshot that holds nothing."""

    def search(self, queries):
        return tuple(SearchResult((), 0.1) for _ in queries)
