"""Preprocessing against transformers, bit for bit, and the cache of encoded pictures."""

import numpy as np
import pytest

from gog_edge.errors import PictureError
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.manifest import read_manifest
from gog_edge.policy.vision import (
    Grid,
    VisionEncoder,
    flatten,
    normalise,
    position_feeds,
    resize,
    rotary_angles,
    smart_resize,
    window_feeds,
)
from gog_edge.types import Size

SIZES = [(196, 252), (100, 333), (31, 45), (700, 900), (57, 3000), (28, 28)]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def reference(tiny_model):
    import_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    spec = tiny_model.manifest.vision
    return Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels})


@pytest.mark.parametrize("height, width", SIZES)
def test_patches_equal_those_of_transformers_bit_for_bit(tiny_model, reference, height, width):
    spec, pixels = tiny_model.manifest.vision, noise(height, width)
    expected = reference([pixels], return_tensors="np")
    size = smart_resize(Size(width, height), spec)
    patches, grid = flatten(normalise(resize(pixels, size), spec), spec)
    assert expected["image_grid_thw"].tolist() == [[1, grid.rows, grid.columns]]
    assert np.array_equal(patches, expected["pixel_values"])


@pytest.mark.parametrize("rows, columns", [(14, 18), (8, 8), (4, 2), (20, 34)])
def test_windows_and_rotary_angles_equal_those_of_transformers(tiny_model, rows, columns):
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    spec, grid = tiny_model.manifest.vision, Grid(rows, columns)
    thw = torch.tensor([[1, rows, columns]])
    index, bounds = get_vision_window_index(thw, spec.merge, spec.window, spec.patch)
    feeds = window_feeds(grid, spec)
    used = feeds["window_mask"][:, 0, 0]
    assert np.array_equal(feeds["window_mask"], np.broadcast_to(used[:, None, None], feeds["window_mask"].shape))
    assert (feeds["window_slots"][used][:: spec.merge**2] // spec.merge**2).tolist() == index.tolist()
    assert used.sum(axis=1).tolist() == np.diff(bounds.numpy()).tolist()
    assert np.array_equal(feeds["window_slots"].reshape(-1)[feeds["patch_places"]], np.arange(rows * columns))
    positions = get_vision_position_ids(thw, spec.merge).numpy()
    quarter = spec.head_dim // 4
    frequencies = spec.rope_theta ** (-np.arange(quarter) / quarter)
    expected = np.concatenate([np.outer(positions[:, axis], frequencies) for axis in (0, 1)], axis=1)
    assert np.allclose(rotary_angles(grid, spec), expected, atol=1e-6)


@pytest.mark.parametrize("rows, columns", [(14, 18), (6, 6), (4, 2), (20, 34)])
def test_learned_positions_are_interpolated_as_in_transformers(qwen3_policy, rows, columns):
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    spec = read_manifest(qwen3_policy).vision
    places, shares = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, rows, columns]]), spec.position_side, align_corners=True, spatial_merge_size=spec.merge
    )
    feeds = position_feeds(Grid(rows, columns), spec)
    table = np.random.default_rng(0).normal(size=(spec.position_side**2, 3))
    expected = (table[places.numpy()] * shares.numpy()[:, :, None]).sum(axis=1)
    interpolated = (table[feeds["position_places"]] * feeds["position_shares"][:, :, None]).sum(axis=1)
    assert np.allclose(interpolated, expected, atol=1e-5)


def test_crops_have_a_pixel_limit_of_their_own(tiny_model):
    spec = tiny_model.manifest.vision
    size = smart_resize(Size(600, 400), spec, spec.crop_max_pixels)
    assert size.width * size.height <= spec.crop_max_pixels
    assert size.width % spec.factor == size.height % spec.factor == 0


def test_a_picture_that_is_too_narrow_is_rejected(tiny_model):
    with pytest.raises(PictureError, match="2000 x 9"):
        smart_resize(Size(2000, 9), tiny_model.manifest.vision)


class CountingTower:
    """A vision tower that counts its runs."""

    def __init__(self, width):
        self.runs, self.width = 0, width

    def run(self, feeds):
        self.runs += 1
        return {"tokens": np.zeros((len(feeds["patches"]) // 4, self.width), np.float32)}


def test_recent_pictures_are_not_encoded_again(tiny_model):
    tower = CountingTower(tiny_model.manifest.vision.out_hidden)
    encoder = VisionEncoder(tower, tiny_model.manifest.vision, cache_size=2)
    first, second, third = (noise(60, 90, seed) for seed in range(3))
    assert encoder.encode(first) is encoder.encode(first[:].copy())
    assert encoder.encode(first, 3136) is not encoder.encode(first)
    assert tower.runs == 2
    for pixels in (second, third, first):
        encoder.encode(pixels)
    assert tower.runs == encoder.encoded == 5
