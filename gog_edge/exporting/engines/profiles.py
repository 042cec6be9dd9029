"""What shapes an engine must take: for each graph its profiles, each with the bounds of every free shape by input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from gog_edge.engines.tensorrt.shapes import Bounds, Profile, Shape
from gog_edge.errors import CheckpointError
from gog_edge.policy.manifest import TextSpec, VisionSpec
from gog_edge.policy.session import CHUNK
from gog_edge.policy.vision import MAX_ASPECT
from gog_edge.retrieval.encoder import AT_ONCE

Sizes: TypeAlias = tuple[int, int, int]  # the least, the usual and the most

# Tokens of a step: decode and verified drafts, append, prefill. A profile of exactly one token keeps a second copy of
# half-precision weights in another layout; one of at most 2 to 64 crashes the compiler of TensorRT for RTX 1.7.1.
DRAFTS = 128
STEPS: tuple[Sizes, ...] = ((1, 1, DRAFTS), (1, 64, CHUNK), (1, CHUNK, CHUNK))
BUCKETS = (64, 256, 1024)  # merged tokens of a picture, besides the most that there can be


def decoder_profiles(spec: TextSpec, context: int) -> tuple[Profile, ...]:
    """Decode, append, prefill, for caches of `context` tokens."""
    return tuple(_step(spec, (least, min(usual, context), min(most, context))) for least, usual, most in STEPS)


def check_context(context: int, *, profiles: bool) -> None:
    """CheckpointError for a cache of too few tokens; `profiles`: the engine has those of a decoder."""
    least = DRAFTS if profiles else 1
    if context < least:
        raise CheckpointError(f"a cache of {context} tokens is too small; give --context at least {least}")


def _step(spec: TextSpec, tokens: Sizes) -> Profile:
    angles = _bounds(tokens, lambda t: (1, t, spec.head_dim // 2))
    profile = {
        "inputs_embeds": _bounds(tokens, lambda t: (1, t, spec.hidden)), "cos": angles, "sin": angles,
        "rows": _bounds((1, 1, DRAFTS), lambda rows: (rows,)),
    }  # fmt: skip
    if spec.deepstack:
        profile["deepstack"] = _bounds(tokens, lambda t: (spec.deepstack, t, spec.hidden))
    return profile


def _bounds(sizes: Sizes, shape: Callable[[int], Shape]) -> Bounds:
    least, usual, most = map(shape, sizes)
    return least, usual, most


def vision_profiles(spec: VisionSpec) -> tuple[Profile, ...]:
    """One for each bucket of merged tokens, up to the most that a resized picture has."""
    most = most_tokens(spec)
    ends = [*(end for end in BUCKETS if end < most), most]
    return tuple(_bucket(spec, first + 1, end) for first, end in zip([0, *ends], ends, strict=False))


def most_tokens(spec: VisionSpec) -> int:
    """Merged tokens of the picture that `smart_resize` leaves the most of; thin ones may pass the pixel budget."""
    return max(_most(spec, spec.max_pixels), _most(spec, spec.crop_max_pixels))


def _most(spec: VisionSpec, budget: int) -> int:
    side, least = math.sqrt(budget) / spec.factor, math.sqrt(spec.min_pixels) / spec.factor
    stretch = math.sqrt(MAX_ASPECT)
    shrunk = side * stretch  # one row, kept at a token's height
    grown = (least * stretch + 1) * (least / stretch + 1)  # both sides are rounded up
    return math.floor(max(side * side, shrunk, grown))


def _bucket(spec: VisionSpec, least: int, most: int) -> Profile:
    unit = spec.merge**2
    patches = (least * unit, most * unit, most * unit)
    angles = _bounds(patches, lambda m: (1, m, spec.head_dim // 2))
    profile = {"patches": _bounds(patches, lambda m: (m, spec.patch_dim)), "cos": angles, "sin": angles}
    if spec.position_side:
        for name in ("position_places", "position_shares"):
            profile[name] = _bounds(patches, lambda m: (m, 4))
    if spec.window:
        windows, slots = _windows(spec, least, most), (spec.window // spec.patch) ** 2
        profile["window_slots"] = _bounds(windows, lambda count: (count, slots))
        profile["patch_places"] = _bounds(patches, lambda m: (m,))
        profile["window_mask"] = _bounds(windows, lambda count: (count, 1, slots, slots))
    return profile


def _windows(spec: VisionSpec, least: int, most: int) -> Sizes:
    """Windows of pictures of `least` to `most` tokens: few where they fill them, many where they are thin."""
    side = spec.window // spec.factor
    counts = []
    for rows in range(1, math.isqrt(most) + 1):
        fewest = max(rows, math.ceil(least / rows))
        widest = min(most // rows, MAX_ASPECT * (rows + 1) + 1)  # both sides were rounded to whole tokens
        counts += [math.ceil(rows / side) * math.ceil(columns / side) for columns in (fewest, widest)
                   if fewest <= widest]  # fmt: skip
    square = math.ceil(math.isqrt(most) / side) ** 2
    return min(counts), min(max(square, min(counts)), max(counts)), max(counts)


def image_profiles(width: int, height: int) -> tuple[Profile, ...]:
    """As many pictures as an encoder runs at once."""
    return ({"pixels": _bounds((1, 1, AT_ONCE), lambda n: (n, 3, height, width))},)


def text_profiles(length: int) -> tuple[Profile, ...]:
    """As many texts of `length` tokens as an encoder runs at once."""
    return ({"tokens": _bounds((1, 1, AT_ONCE), lambda n: (n, length))},)
