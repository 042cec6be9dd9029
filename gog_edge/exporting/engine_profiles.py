"""What shapes an engine must take: for each graph its profiles, each a range of shapes by input.

Inputs that are not named have one shape only.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from gog_edge.errors import CheckpointError
from gog_edge.policy.manifest import TextSpec, VisionSpec
from gog_edge.policy.session import CHUNK
from gog_edge.policy.vision import MAX_ASPECT
from gog_edge.retrieval.encoder import AT_ONCE

Shape: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[Shape, ...]  # least, usual, most
Profile: TypeAlias = dict[str, Range]

# Tokens of a step: decode and verified drafts, append, prefill. A profile of exactly one token keeps a second copy of
# half-precision weights in another layout; one of at most 2 to 64 crashes the compiler of TensorRT for RTX 1.7.1.
DRAFTS = 128
STEPS = ((1, 1, DRAFTS), (1, 64, CHUNK), (1, CHUNK, CHUNK))
BUCKETS = (64, 256, 1024)  # merged tokens of a picture, besides the most that there can be


def decoder_profiles(spec: TextSpec, context: int) -> tuple[Profile, ...]:
    """Decode, append, prefill, for caches of `context` tokens. CheckpointError for too few of them."""
    if context < DRAFTS:
        raise CheckpointError(f"a cache of {context} tokens is too small; give --context at least {DRAFTS}")
    return tuple(_step(spec, tuple(min(tokens, context) for tokens in step)) for step in STEPS)


def _step(spec: TextSpec, tokens: Shape) -> Profile:
    profile = {"inputs_embeds": tuple((1, t, spec.hidden) for t in tokens), "rows": ((1,), (1,), (DRAFTS,))}
    for name in ("cos", "sin"):
        profile[name] = tuple((1, t, spec.head_dim // 2) for t in tokens)
    if spec.deepstack:
        profile["deepstack"] = tuple((spec.deepstack, t, spec.hidden) for t in tokens)
    return profile


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
    patches = [tokens * unit for tokens in (least, most, most)]
    profile: Profile = {"patches": tuple((m, spec.patch_dim) for m in patches)}
    for name in ("cos", "sin"):
        profile[name] = tuple((1, m, spec.head_dim // 2) for m in patches)
    if spec.position_side:
        for name in ("position_places", "position_shares"):
            profile[name] = tuple((m, 4) for m in patches)
    return profile | (_windows(spec, least, most) if spec.window else {})


def _windows(spec: VisionSpec, least: int, most: int) -> Profile:
    """Of the windows of pictures of `least` to `most` tokens: few where they fill them, many where they are thin."""
    side = spec.window // spec.factor
    slots = side**2 * spec.merge**2
    counts = []
    for rows in range(1, math.isqrt(most) + 1):
        fewest = max(rows, math.ceil(least / rows))
        widest = min(most // rows, MAX_ASPECT * (rows + 1) + 1)  # both sides were rounded to whole tokens
        counts += [math.ceil(rows / side) * math.ceil(columns / side) for columns in (fewest, widest)
                   if fewest <= widest]  # fmt: skip
    square = math.ceil(math.isqrt(most) / side) ** 2
    windows = sorted((min(counts), square, max(counts)))
    return {
        "window_slots": tuple((count, slots) for count in windows),
        "patch_places": tuple((tokens * spec.merge**2,) for tokens in (least, most, most)),
        "window_mask": tuple((count, 1, slots, slots) for count in windows),
    }


def image_profiles(width: int, height: int) -> tuple[Profile, ...]:
    """As many pictures as an encoder runs at once."""
    return ({"pixels": tuple((n, 3, height, width) for n in (1, 1, AT_ONCE))},)


def text_profiles(length: int) -> tuple[Profile, ...]:
    """As many texts of `length` tokens as an encoder runs at once."""
    return ({"tokens": tuple((n, length) for n in (1, 1, AT_ONCE))},)
