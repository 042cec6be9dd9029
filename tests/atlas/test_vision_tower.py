import pytest
import torch

from atlas.policy.model import (
    IMAGE_MEAN,
    IMAGE_STD,
    MERGE,
    PIXEL_SPEC,
    atlas_config,
    build_model,
    encode_pictures,
    patchify,
)
from atlas.policy.pool import GRIDS
from atlas.policy.tokens import SPECIAL
from gog_edge.policy.vision import flatten, normalise


@pytest.fixture(scope="module")
def model():
    model = build_model(atlas_config(64, {name: n for n, name in enumerate(SPECIAL)}), seed=3)
    with torch.no_grad():  # wide enough that attention and windows matter
        for weight in model.model.visual.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


def pictures(rows, columns, count=2):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (count, 14 * rows, 14 * columns, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(14, 18), (6, 10), (16, 16)])
def test_the_batched_tower_is_transformers_own(model, rows, columns):
    given = pictures(rows, columns)
    flat = patchify(given).reshape(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
    with torch.no_grad():
        batched = encode_pictures(model.model.visual, given)
        own = model.model.visual(flat, grid_thw=torch.tensor([[1, rows, columns]] * 2)).pooler_output
    assert batched.shape == (2, rows * columns // 4, 192) and batched.std() > 0.01
    assert (batched.flatten(0, 1) - own).abs().max() < 1e-4 * own.abs().max()


def test_patches_are_those_of_the_runtime():
    given = pictures(4, 6, 1)
    flat, grid = flatten(normalise(given[0].numpy(), PIXEL_SPEC), PIXEL_SPEC)
    assert (grid.rows, grid.columns) == (4, 6)
    frames = torch.from_numpy(flat).reshape(24, 3, 2, 196)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert torch.allclose(patchify(given)[0].reshape(24, 3, 196), frames[:, :, 0], atol=1e-5)


def test_the_configuration_is_the_runtime_s():
    config = atlas_config(64, {name: n for n, name in enumerate(SPECIAL)})
    vision = config.vision_config
    assert (vision.window_size, vision.spatial_merge_size, vision.patch_size) == (PIXEL_SPEC.window, MERGE, 14)
    assert sum(config.text_config.rope_parameters["mrope_section"]) * 2 == 192 // 6
    assert (PIXEL_SPEC.mean, PIXEL_SPEC.std) == (IMAGE_MEAN, IMAGE_STD)
    for size, aspect, _ in GRIDS:  # the pool's pictures are as the runtime would resize them
        assert size.width % 28 == size.height % 28 == 0 and size.width * size.height <= PIXEL_SPEC.max_pixels
        assert abs(size.width / size.height / aspect - 1) < 0.07


def test_a_seed_gives_the_same_weights():
    config = atlas_config(64, {name: n for n, name in enumerate(SPECIAL)})
    first, again = (build_model(config, seed=1).model.visual.merger.mlp[0].weight for _ in range(2))
    assert torch.equal(first, again)
