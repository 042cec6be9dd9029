import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import atlas
from atlas.policy.model import PIXEL_SPEC, PROCESSOR, atlas_config, build_model, encode_pictures, patchify
from atlas.policy.pool import GRIDS
from atlas.policy.tokenizer import SPECIAL
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.policy.manifest import read_manifest
from gog_edge.policy.vision import flatten, normalise, smart_resize
from gog_edge.types import Size

CHECKPOINT = Path(atlas.__file__).parent / "checkpoints" / "policy"


@pytest.fixture(scope="module")
def model():
    model = build_model(atlas_config(64, {name: n for n, name in enumerate(SPECIAL)}), seed=3)
    with torch.no_grad():  # larger weights, so that attention and windows matter
        for weight in model.model.visual.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


def pictures(rows, columns, count=2):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (count, 14 * rows, 14 * columns, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(14, 18), (6, 10), (16, 16)])
def test_the_batched_tower_equals_transformers(model, rows, columns):
    given = pictures(rows, columns)
    flat = patchify(given).reshape(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
    with torch.no_grad():
        batched = encode_pictures(model.model.visual, given)
        own = model.model.visual(flat, grid_thw=torch.tensor([[1, rows, columns]] * 2)).pooler_output
    assert batched.shape == (2, rows * columns // 4, 192) and batched.std() > 0.01
    assert (batched.flatten(0, 1) - own).abs().max() < 1e-4 * own.abs().max()


def test_patches_equal_those_of_the_runtime():
    given = pictures(4, 6, 1)
    flat, grid = flatten(normalise(given[0].numpy(), PIXEL_SPEC), PIXEL_SPEC)
    assert (grid.rows, grid.columns) == (4, 6)
    frames = torch.from_numpy(flat).reshape(24, 3, 2, 196)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert torch.allclose(patchify(given)[0].reshape(24, 3, 196), frames[:, :, 0], atol=1e-5)


def test_the_configuration_equals_that_of_the_shipped_policy():
    checkpoint = json.loads((CHECKPOINT / "config.json").read_text())
    processor = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    config = json.loads(atlas_config(tokenizer.get_vocab_size(), special).to_json_string(use_diff=False))
    del checkpoint["architectures"], checkpoint["dtype"]  # added by save_pretrained
    for part in ("text_config", "vision_config"):
        saved, built = checkpoint.pop(part), config[part]
        assert {key: built[key] for key in saved} == saved
    assert {key: config[key] for key in checkpoint} == checkpoint
    assert json.loads(json.dumps(PROCESSOR)) == processor
    assert read_manifest(DEFAULT_BUNDLE / "policy").vision == PIXEL_SPEC


def test_pictures_of_the_pool_have_the_size_to_which_the_runtime_resizes_a_photo():
    for size, aspect, _ in GRIDS:
        photo = Size(1200, round(1200 / aspect))
        assert smart_resize(photo, PIXEL_SPEC, PIXEL_SPEC.max_pixels) == size


def test_weights_depend_on_the_seed_alone():
    config = atlas_config(64, {name: n for n, name in enumerate(SPECIAL)})
    first, again = (build_model(config, seed=1).model.visual.merger.mlp[0].weight for _ in range(2))
    assert torch.equal(first, again)
