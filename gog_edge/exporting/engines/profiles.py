"""TensorRT optimization profiles of each graph: the (min, opt, max) shape of every dynamic input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from gog_edge.engines.base import PREFILL_CHUNK
from gog_edge.engines.tensorrt.plan import Bounds, Profile, Shape
from gog_edge.errors import CheckpointError
from gog_edge.policy.manifest import TextSpec
from gog_edge.policy.vision import MAX_ASPECT, VisionSpec
from gog_edge.retrieval.encoder import MAX_BATCH

Sizes: TypeAlias = tuple[int, int, int]  # (min, opt, max)

# Tokens of a step for decoding with draft tokens, appending, and prefill. A profile of exactly one token makes TensorRT
# store fp16 weights in a second layout; one of at most 2 to 64 crashes the compiler of TensorRT for RTX 1.7.1.
MAX_DRAFT_ROWS = 128
STEPS: tuple[Sizes, ...] = ((1, 1, MAX_DRAFT_ROWS), (1, 64, PREFILL_CHUNK), (1, PREFILL_CHUNK, PREFILL_CHUNK))
BUCKETS = (64, 256, 1024)  # largest number of image tokens of each vision profile; the last one ends at the maximum


def decoder_profiles(spec: TextSpec, context: int) -> tuple[Profile, ...]:
    """Return the profiles for decode, append and prefill steps with a KV cache of `context` tokens."""
    return tuple(_step(spec, (low, min(opt, context), min(high, context))) for low, opt, high in STEPS)


def check_context(context: int, *, profiles: bool) -> None:
    """Raise CheckpointError if a KV cache is too small; `profiles`: whether the engine has the decoder's profiles."""
    minimum = MAX_DRAFT_ROWS if profiles else 1
    if context < minimum:
        raise CheckpointError(f"a context of {context} tokens is too small; give --context at least {minimum}")


def _step(spec: TextSpec, tokens: Sizes) -> Profile:
    angles = _bounds(tokens, lambda t: (1, t, spec.head_dim // 2))
    profile = {
        "inputs_embeds": _bounds(tokens, lambda t: (1, t, spec.hidden)), "cos": angles, "sin": angles,
        "rows": _bounds((1, 1, MAX_DRAFT_ROWS), lambda rows: (rows,)),
    }  # fmt: skip
    if spec.deepstack:
        profile["deepstack"] = _bounds(tokens, lambda t: (spec.deepstack, t, spec.hidden))
    return profile


def _bounds(sizes: Sizes, shape: Callable[[int], Shape]) -> Bounds:
    low, opt, high = map(shape, sizes)
    return low, opt, high


def vision_profiles(spec: VisionSpec) -> tuple[Profile, ...]:
    """Return one profile per bucket of image tokens, up to the largest number that a resized picture can have."""
    maximum = max_image_tokens(spec)
    ends = [*(end for end in BUCKETS if end < maximum), maximum]
    return tuple(_bucket(spec, first + 1, end) for first, end in zip([0, *ends], ends, strict=False))


def max_image_tokens(spec: VisionSpec) -> int:
    """Return an upper bound of the tokens of a picture after `smart_resize`; thin ones may exceed the pixel budget."""
    return max(_max_tokens(spec, spec.max_pixels), _max_tokens(spec, spec.crop_max_pixels))


def _max_tokens(spec: VisionSpec, budget: int) -> int:
    max_side, min_side = math.sqrt(budget) / spec.factor, math.sqrt(spec.min_pixels) / spec.factor
    stretch = math.sqrt(MAX_ASPECT)
    shrunk = max_side * stretch  # a single row of tokens, which cannot become thinner
    grown = (min_side * stretch + 1) * (min_side / stretch + 1)  # both sides are rounded up
    return math.floor(max(max_side * max_side, shrunk, grown))


def _bucket(spec: VisionSpec, min_tokens: int, max_tokens: int) -> Profile:
    patches_per_token = spec.merge**2
    patches = (min_tokens * patches_per_token, max_tokens * patches_per_token, max_tokens * patches_per_token)
    angles = _bounds(patches, lambda m: (1, m, spec.head_dim // 2))
    profile = {"patches": _bounds(patches, lambda m: (m, spec.patch_dim)), "cos": angles, "sin": angles}
    if spec.position_side:
        for name in ("position_places", "position_shares"):
            profile[name] = _bounds(patches, lambda m: (m, 4))
    if spec.window:
        windows, slots = _windows(spec, min_tokens, max_tokens), (spec.window // spec.patch) ** 2
        profile["window_slots"] = _bounds(windows, lambda count: (count, slots))
        profile["patch_places"] = _bounds(patches, lambda m: (m,))
        profile["window_mask"] = _bounds(windows, lambda count: (count, 1, slots, slots))
    return profile


def _windows(spec: VisionSpec, min_tokens: int, max_tokens: int) -> Sizes:
    """Return the number of windows of pictures of min_tokens to max_tokens: few if square, many if thin."""
    side = spec.window // spec.factor
    counts = []
    for rows in range(1, math.isqrt(max_tokens) + 1):
        narrowest = max(rows, math.ceil(min_tokens / rows))
        widest = min(max_tokens // rows, MAX_ASPECT * (rows + 1) + 1)  # both sides were rounded to multiples of tokens
        counts += [math.ceil(rows / side) * math.ceil(columns / side) for columns in (narrowest, widest)
                   if narrowest <= widest]  # fmt: skip
    square = math.ceil(math.isqrt(max_tokens) / side) ** 2
    return min(counts), min(max(square, min(counts)), max(counts)), max(counts)


def image_profiles(width: int, height: int) -> tuple[Profile, ...]:
    """Return the profile of an encoder's image graph, for batches of up to MAX_BATCH pictures."""
    return ({"pixels": _bounds((1, 1, MAX_BATCH), lambda n: (n, 3, height, width))},)


def text_profiles(length: int) -> tuple[Profile, ...]:
    """Return the profile of an encoder's text graph, for batches of up to MAX_BATCH texts of `length` tokens."""
    return ({"tokens": _bounds((1, 1, MAX_BATCH), lambda n: (n, length))},)
