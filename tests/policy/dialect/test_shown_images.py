"""Boxes on the given picture and on crops of it, in every coordinate frame."""

import dataclasses

import numpy as np
import pytest
from scripted_policy import ScriptedPolicy

from gog_edge.agent.loop import run_episode
from gog_edge.config import Budget, GazeConfig
from gog_edge.picture import Picture
from gog_edge.policy.dialect.actions import BOX_FRAMES, ShownImage, ShownImages
from gog_edge.policy.dialect.dialect import CropRules
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Box, GazeSearch, ImageSearch, Observation, SearchResult, Size

IMAGES = ShownImages(Size(2000, 1000), Size(500, 250)).with_crop(Box(400, 100, 800, 300), Size(100, 50))


@pytest.mark.parametrize(
    ("box_frame", "corners"),
    [
        ("resized_px", (25, 0, 50, 25)),
        ("given_px", (100, 0, 200, 100)),
        ("rel1000", (250, 0, 500, 500)),
        ("rel1", (0.25, 0, 0.5, 0.5)),
    ],
)
def test_corners_on_a_crop_are_converted_to_the_given_picture(box_frame, corners):
    crop = IMAGES.all[1]
    assert crop.to_picture(corners, box_frame) == Box(500, 100, 600, 200)
    assert crop.from_picture(Box(500, 100, 600, 200), box_frame) == pytest.approx(corners)
    assert crop.to_picture((0, 0, *crop.extent(box_frame)), box_frame) == crop.box


def test_corners_on_a_crop_of_a_crop_are_converted_to_the_given_picture():
    inner = IMAGES.all[1].to_picture((500, 500, 1000, 1000), "rel1000")
    deeper = IMAGES.with_crop(inner, Size(64, 32)).all[2]
    assert inner == Box(600, 200, 800, 300)
    assert deeper.to_picture((0, 0, 500, 500), "rel1000") == Box(600, 200, 700, 250)


@pytest.mark.parametrize("box_frame", BOX_FRAMES)
def test_conversions_are_inverse(box_frame):
    rng = np.random.default_rng(1)
    for _ in range(200):
        x0, y0, x1, y1 = rng.uniform(-100, 3000, 4)
        image = ShownImage(Box(x0, y0, x0 + abs(x1) + 1, y0 + abs(y1) + 1), Size(*map(int, rng.integers(1, 2000, 2))))
        box = Box(*rng.uniform(-100, 3000, 4))
        back = image.to_picture(image.from_picture(box, box_frame), box_frame)
        assert dataclasses.astuple(back) == pytest.approx(dataclasses.astuple(box))


def test_adding_a_crop_returns_a_copy():
    first = ShownImages(Size(10, 10), Size(10, 10))
    second = first.with_crop(Box(0, 0, 5, 5), Size(4, 4))
    assert first.crops == () and len(second.all) == 2 and second.all[0] == first.picture


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
def test_image_indices_start_at_the_base_of_the_dialect(rules, image, action):
    dialect = dataclasses.replace(load_dialect("qwen_agent"), crop=rules)
    text = f'<tool_call>{{"name": "image_search", "arguments": {{"img_idx": {image}}}}}</tool_call>'
    assert dialect.parse(text, IMAGES) == action
    written = dialect.render_action(ImageSearch(), IMAGES)
    assert f'"img_idx": {rules.image_base}' in written and dialect.parse(written, IMAGES) == ImageSearch()


# --- conversations -------------------------------------------------------------------------


def test_only_crops_that_were_shown_get_an_index():
    crop = Observation(SearchResult((), 0.1), np.zeros((20, 40, 3), np.uint8), crop_box=Box(400, 100, 800, 300))
    first = ShownImages(Size(2000, 1000), Size(500, 250))
    dialect = load_dialect("qwen_agent")

    def half(size):
        return Size(size.width // 2, size.height // 2)

    shown = dialect.images_after(first, crop, half)
    assert shown.crops == (ShownImage(Box(400, 100, 800, 300), Size(362, 181)),)  # enlarged to 725 x 363, then halved
    for without_crop in (Observation(notice="malformed"), dataclasses.replace(crop, crop=None)):
        assert dialect.images_after(first, without_crop, half) is first
    # The boxes of this dialect always refer to the given picture.
    assert load_dialect("sensenova_mars").images_after(first, crop, half) is first


def test_the_loop_gazes_at_a_crop_of_a_crop():
    zoom = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s], "img_idx": %d}}</tool_call>'
    texts = [zoom % ("100, 100, 400, 400", 0), zoom % ("0, 0, 500, 500", 1), "Lima"]
    policy = ScriptedPolicy(texts, load_dialect("qwen_agent"))
    gaze = GazeConfig(pad=0.0, framings=())
    picture = Picture(np.zeros((300, 400, 3), np.uint8))
    record = run_episode(picture, "Which?", policy=policy, retriever=EmptyRetriever(),
                         budget=Budget(), on_event=lambda _: None, gaze=gaze)
    first, second, _ = record.steps
    assert (first.box, second.box) == (Box(40, 30, 160, 120), Box(40, 30, 100, 75))
    assert record.answer == "Lima"


class EmptyRetriever:
    """A retriever that finds nothing."""

    def search(self, queries):
        return tuple(SearchResult((), 0.1) for _ in queries)
