"""The runtime's preprocessing of pictures, compared with open_clip's evaluation transform."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gog_edge.exporting.clip.checkpoint import preprocessing_of
from gog_edge.exporting.clip.parity import SAMPLES
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.picture import decode_picture
from gog_edge.retrieval import encoder
from gog_edge.retrieval.encoder import parse_image_spec, preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRAMES = (32, 37, (48, 48), (24, 40), (40, 24))  # an int or (height, width), as in configurations
KERNELS = ("bicubic", "bilinear", "random")
MODES = ("squash", "shortest", "longest")


def settings_of(mode, interpolation="bicubic", fill=0):
    return {"mean": MEAN, "std": STD, "resize_mode": mode, "interpolation": interpolation, "fill_color": fill}


def theirs(pixels, frame, given):
    import_torchvision()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=frame, **given), is_train=False)(Image.fromarray(pixels)).numpy()


def ours(pixels, frame, given):
    return preprocess(pixels, parse_image_spec(asdict(preprocessing_of({"image_size": frame}, given))))


def noise(width, height, seed=0):
    """Random black and white pixels, in which a shift by a fraction of a pixel is visible everywhere."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


sides = st.one_of(st.integers(1, 12), st.integers(13, 400))


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.sampled_from(FRAMES), st.sampled_from(MODES), st.sampled_from(KERNELS))
@example(1, 1, 32, "shortest", "bicubic")
@example(1, 300, 37, "shortest", "bicubic")
@example(333, 1, 37, "squash", "bilinear")
@example(399, 398, (24, 40), "longest", "bilinear")
@example(51, 50, (40, 24), "shortest", "bilinear")
def test_every_value_equals_open_clips(width, height, frame, mode, interpolation):
    pixels, given = noise(width, height), settings_of(mode, interpolation, fill=77)
    try:
        expected = theirs(pixels, frame, given)
    except ValueError:  # PIL refuses a side of 0 pixels
        assume(False)
    np.testing.assert_array_equal(ours(pixels, frame, given), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 300), (900, 3), (1600, 1200), (1201, 1603), (224, 224)])
def test_a_real_frame_size_and_pictures_of_every_shape(size, mode):
    pixels = noise(*size)
    try:
        expected = theirs(pixels, 224, settings_of(mode))
    except ValueError:
        assert mode == "longest" and 224 * min(size) / max(size) <= 0.5  # of a pixel
        assert ours(pixels, 224, settings_of(mode)).shape == (3, 224, 224)
    else:
        np.testing.assert_array_equal(ours(pixels, 224, settings_of(mode)), expected)


@pytest.mark.parametrize("name", ["one.jpg", "row.jpg", "wall.jpg"])
def test_photographs(name):
    pixels = decode_picture((SAMPLES / name).read_bytes()).pixels
    for mode in MODES:
        np.testing.assert_array_equal(ours(pixels, 224, settings_of(mode)), theirs(pixels, 224, settings_of(mode)))


def test_a_thin_picture_does_not_fill_the_memory():
    thin = np.linspace(0, 255, 600_000).astype(np.uint8)[:, None, None].repeat(3, axis=2)
    for pixels in (thin, thin.transpose(1, 0, 2)):
        middle = ours(pixels, 224, settings_of("shortest"))[0] * STD[0] + MEAN[0]
        np.testing.assert_allclose(middle, 0.5, atol=0.01)  # scaled as a whole, it would be 120 GB


@pytest.mark.parametrize("size", [(1, 2000), (2000, 3), (700, 300), (300, 700), (41, 43)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_the_middle_of_a_thin_picture_equals_open_clips(monkeypatch, size, kernel):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    given = settings_of("shortest", kernel)
    expected = theirs(pixels, 48, given)
    monkeypatch.setattr(encoder, "MAX_SCALED_PIXELS", 0)
    values = np.abs(ours(pixels, 48, given) - expected) * np.array(STD)[:, None, None] * 255
    assert values.max() < 1.01
