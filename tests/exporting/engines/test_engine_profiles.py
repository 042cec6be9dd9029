from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.engines.base import PREFILL_CHUNK
from gog_edge.engines.tensorrt.plan import choose_profile
from gog_edge.errors import CheckpointError, PictureError
from gog_edge.exporting.engines.profiles import (
    check_context,
    decoder_profiles,
    image_profiles,
    max_image_tokens,
    vision_profiles,
)
from gog_edge.policy.manifest import TextSpec
from gog_edge.policy.vision import Grid, VisionSpec, grid_feeds, smart_resize
from gog_edge.types import Size

QWEN25 = VisionSpec(
    depth=2, hidden=64, heads=4, intermediate=96, out_hidden=64, patch=14, merge=2, temporal=2, window=112,
    full_attention=(1,), rope_theta=1e4, norm_eps=1e-6, mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=3136,
    max_pixels=1_003_520, crop_max_pixels=50_176,
)  # fmt: skip
QWEN3 = replace(QWEN25, patch=16, window=0, full_attention=(), min_pixels=65_536, max_pixels=786_432, position_side=48,
                deepstack=(0,))
TEXT = TextSpec(
    hidden=64, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=80, vocab=300, norm_eps=1e-6, rope_theta=1e4,
    mrope_section=(6, 5, 5), mrope_interleaved=True, qkv_bias=False, qk_norm=True, deepstack=2, tied=True,
)  # fmt: skip


def shapes_of(size, spec):
    grid = Grid(size.height // spec.patch, size.width // spec.patch)
    count = grid.rows * grid.columns
    return {"patches": (count, spec.patch_dim)} | {name: feed.shape for name, feed in grid_feeds(grid, spec).items()}


def fits(shapes, profile):
    assert shapes.keys() == profile.keys()
    return all(low <= at <= high for name, shape in shapes.items()
               for low, at, high in zip(profile[name][0], shape, profile[name][2], strict=True))


@pytest.mark.parametrize("spec", [QWEN25, QWEN3], ids=["windows", "positions"])
@settings(max_examples=150, deadline=None)
@given(width=st.integers(1, 6000), height=st.integers(1, 6000), crop=st.booleans(), budget=st.integers(3136, 10**6))
def test_every_picture_fits_exactly_one_profile(spec, width, height, crop, budget):
    spec = replace(spec, max_pixels=max(spec.min_pixels, budget))
    try:
        size = smart_resize(Size(width, height), spec, min(budget, spec.crop_max_pixels) if crop else None)
    except PictureError:
        return
    shapes, profiles = shapes_of(size, spec), vision_profiles(spec)
    assert [fits(shapes, profile) for profile in profiles].index(True) == choose_profile(profiles, shapes)
    assert sum(fits(shapes, profile) for profile in profiles) == 1


@pytest.mark.parametrize("long", [1, 8, 27, 64, 200])
@pytest.mark.parametrize("short", [1, 13, 28, 300])
def test_thin_pictures_that_exceed_the_pixel_budget_fit_too(long, short):
    """Their short side cannot become shorter than a token."""
    spec = replace(QWEN25, max_pixels=51_744, crop_max_pixels=12_544)
    size = smart_resize(Size(short * long, short), spec)
    assert sum(fits(shapes_of(size, spec), profile) for profile in vision_profiles(spec)) == 1
    assert smart_resize(Size(60_000, 300), spec).width // 28 > 51_744 // 28**2  # such a picture does exceed the budget


def test_windows_of_a_bucket_are_counted_exactly():
    """Compare with all grids that pictures of aspect 200 or less can have after rounding."""
    maximum = max_image_tokens(QWEN25)
    profiles = vision_profiles(QWEN25)
    assert [profile["patch_places"][2][0] // 4 for profile in profiles] == [64, 256, 1024, maximum]
    for first, profile in zip((1, 65, 257), profiles, strict=False):
        last = profile["patch_places"][2][0] // 4
        counts = [-(-rows // 4) * -(-columns // 4) for rows, columns in product(range(1, last + 1), repeat=2)
                  if first <= rows * columns <= last
                  and max(rows, columns) <= 200 * (min(rows, columns) + 1) + 1]  # fmt: skip
        assert [shape[0] for shape in profile["window_slots"]][::2] == [min(counts), max(counts)]


def test_optimal_shapes_are_within_the_bounds():
    for spec in (QWEN25, QWEN3, replace(QWEN25, max_pixels=257 * 784, crop_max_pixels=3136)):
        for profile in vision_profiles(spec):
            assert fits({name: shapes[1] for name, shapes in profile.items()}, profile)


def decoder_shapes(tokens):
    return {"inputs_embeds": (1, tokens, 64), "rows": (1,), "deepstack": (2, tokens, 64),
            "cos": (1, tokens, 16), "sin": (1, tokens, 16)}  # fmt: skip


def test_a_decoder_has_profiles_for_decode_append_and_prefill():
    decode, append, prefill = decoder_profiles(TEXT, 4096)
    assert [profile["inputs_embeds"] for profile in (decode, append, prefill)] == [
        ((1, 1, 64), (1, 1, 64), (1, 128, 64)), ((1, 1, 64), (1, 64, 64), (1, PREFILL_CHUNK, 64)),
        ((1, 1, 64), (1, PREFILL_CHUNK, 64), (1, PREFILL_CHUNK, 64)),
    ]  # fmt: skip
    assert decode["rows"] == ((1,), (1,), (128,)) and decode["deepstack"][2] == (2, 128, 64)
    assert append["cos"] == append["sin"] == ((1, 1, 16), (1, 64, 16), (1, PREFILL_CHUNK, 16))
    chosen = [choose_profile((decode, append, prefill), decoder_shapes(tokens)) for tokens in (1, 5, 64, 300, 512)]
    assert chosen == [0, 0, 1, 2, 2]
    assert "deepstack" not in decoder_profiles(replace(TEXT, deepstack=0), 4096)[0]


def test_no_step_is_longer_than_the_cache():
    assert [profile["inputs_embeds"][2][1] for profile in decoder_profiles(TEXT, 200)] == [128, 200, 200]
    with pytest.raises(CheckpointError, match="context of 127 tokens is too small; give --context at least 128"):
        check_context(127, profiles=True)
    check_context(127, profiles=False)
    with pytest.raises(CheckpointError, match="context of 0 tokens is too small; give --context at least 1"):
        check_context(0, profiles=False)


def test_image_profiles_take_a_whole_batch():
    assert image_profiles(96, 64) == ({"pixels": ((1, 3, 64, 96), (1, 3, 64, 96), (16, 3, 64, 96))},)
