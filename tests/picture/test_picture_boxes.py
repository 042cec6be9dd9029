"""A picture that is reduced while it is decoded gets the answer of the original, with boxes in pixels of its file."""

import io
from contextlib import closing
from dataclasses import replace

import pytest
from PIL import Image

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.runtime import open_runtime

QUESTION = "What is the capital of the country of the second flag from the left?"
SAMPLE = DEFAULT_BUNDLE / "samples" / "row.jpg"
TIMES = 4


@pytest.fixture(scope="module")
def runtime():
    with closing(open_runtime(DEFAULT_BUNDLE, threads=2)) as opened:
        yield replace(opened, limits=replace(opened.limits, decoded_pixels=1_000_000))


def ask(runtime, data):
    return runtime.answer(data, QUESTION, lambda event: None)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_boxes_are_of_the_file(runtime, form):
    small = ask(runtime, SAMPLE.read_bytes())
    image, stream = Image.open(SAMPLE), io.BytesIO()
    image.resize((image.width * TIMES, image.height * TIMES)).save(stream, form)
    assert runtime.decode(stream.getvalue()).resolution.width <= image.width * 2
    large = ask(runtime, stream.getvalue())
    assert large.answer == small.answer == "Helsinki"
    box, scaled = small.steps[0].box, large.steps[0].box
    expected = [TIMES * value for value in (box.x0, box.y0, box.x1, box.y1)]
    assert [scaled.x0, scaled.y0, scaled.x1, scaled.y1] == pytest.approx(expected, abs=TIMES * 4)
