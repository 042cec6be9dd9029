"""Convert pixels to decoder embeddings: resize, patches, windows, rotary angles, learned positions.

The preprocessing is numpy and Pillow only, and gives the same patches as transformers' image processors of Qwen2.5-VL
and Qwen3-VL, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Annotated, Protocol

import numpy as np
from annotated_types import Ge, Gt, Le

from gog_edge.engines.base import Array, Floats, GraphEngine
from gog_edge.errors import PictureError
from gog_edge.picture import resize
from gog_edge.tables import Count, Dimension, Positive
from gog_edge.types import Pixels, Size

Side = Annotated[int, Ge(1), Le(1024)]  # pixels or patches
Spread = Annotated[float, Gt(0)]
MAX_ASPECT = 200  # longest side over shortest side, as in transformers' `smart_resize` of Qwen2-VL


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The shape of a vision tower and its preprocessing; the `vision` object of a policy manifest."""

    depth: Dimension  # transformer blocks
    hidden: Dimension
    heads: Dimension
    intermediate: Dimension
    out_hidden: Dimension  # equals the hidden size of the decoder
    patch: Side  # pixels per side of a patch
    merge: Side  # patches per side that are merged into one token
    temporal: Side  # a still picture is repeated this many times in each patch
    window: Count  # pixels per side of a local-attention window; 0: every block attends to the whole picture
    full_attention: tuple[Count, ...]  # blocks that attend to the whole picture if there are windows
    rope_theta: Annotated[float, Gt(0)]
    norm_eps: Annotated[float, Ge(0)]
    mean: tuple[float, float, float]  # of pixels scaled to 0..1
    std: tuple[Spread, Spread, Spread]
    min_pixels: Positive
    max_pixels: Positive
    crop_max_pixels: Positive  # limit for crops that are shown to the policy
    position_side: Count = 0  # the learned position table has position_side x position_side entries; 0: no table
    deepstack: tuple[Count, ...] = ()  # blocks whose features are added after the first layers of the decoder

    @property
    def factor(self) -> int:
        """Return the pixels per side of a token; the sides of resized pictures are multiples of it."""
        return self.patch * self.merge

    @property
    def head_dim(self) -> int:
        """Return the width of an attention head."""
        return self.hidden // self.heads

    @property
    def patch_dim(self) -> int:
        """Return the number of values of a flat patch."""
        return 3 * self.temporal * self.patch * self.patch


@dataclass(frozen=True, slots=True)
class Grid:
    """The patches of a resized picture."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The embeddings of one picture for the decoder."""

    embeds: Floats  # [rows * columns, hidden] float32, in reading order
    rows: int  # of tokens
    columns: int
    resized: Size  # the size in pixels that the vision tower received
    deepstack: Floats | None = None  # [layers, rows * columns, hidden], added after the first layers of the decoder


class PixelBudget(Protocol):
    """The limits that determine the size of a resized picture: a `VisionSpec`, or the config of a remote policy."""

    @property
    def factor(self) -> int:
        """Return the number that both sides must be a multiple of."""

    @property
    def min_pixels(self) -> int:
        """Return the area below which pictures are enlarged."""

    @property
    def max_pixels(self) -> int:
        """Return the area above which pictures are reduced."""


def smart_resize(size: Size, budget: PixelBudget, max_pixels: int | None = None) -> Size:
    """Return the size to resize a picture to, as transformers' `smart_resize` of Qwen2-VL computes it.

    Both sides are multiples of `budget.factor`, the area is within the budget, the aspect ratio is kept as far as
    possible. `max_pixels` overrides that of the budget.

    Raises:
        PictureError: one side is more than 200 times as long as the other.
    """
    long, short = max(size.width, size.height), min(size.width, size.height)
    if short < 1 or long / short > MAX_ASPECT:
        raise PictureError(
            f"the picture of {size.width} x {size.height} pixels is too narrow for the policy: one side may be at most "
            f"{MAX_ASPECT} times as long as the other; select a wider region"
        )
    factor, area, limit = budget.factor, size.width * size.height, max_pixels or budget.max_pixels
    height, width = (round(side / factor) * factor for side in (size.height, size.width))
    if height * width > limit:
        shrink = math.sqrt(area / limit)
        height, width = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (size.height, size.width)
        )
    elif height * width < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / area)
        height, width = (math.ceil(side * grow / factor) * factor for side in (size.height, size.width))
    return Size(width, height)


def normalise(pixels: Pixels, spec: VisionSpec) -> Floats:
    """Scale pixels [height, width, 3] uint8 to 0..1, subtract the mean, divide by std -> [3, height, width] float32."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1), np.float32)


def flatten(image: Floats, spec: VisionSpec) -> tuple[Floats, Grid]:
    """Cut a normalised image [3, height, width] into flat patches [M, patch_dim]; return them with their grid.

    The patches of one token are consecutive, and tokens are in reading order.
    """
    _, height, width = image.shape
    grid = Grid(height // spec.patch, width // spec.patch)
    merge, side = spec.merge, spec.patch
    blocks = image.reshape(3, grid.rows // merge, merge, side, grid.columns // merge, merge, side)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # [rows, columns, merge, merge, 3, side, side]
    repeated = np.broadcast_to(ordered[:, :, :, :, :, None], (*ordered.shape[:5], spec.temporal, side, side))
    return np.ascontiguousarray(repeated).reshape(grid.rows * grid.columns, spec.patch_dim), grid


def window_feeds(grid: Grid, spec: VisionSpec) -> dict[str, Array]:
    """Return the graph inputs of window attention, for W windows of S slots each.

    `window_slots` [W, S] int64: the patch in each slot, 0 in unused slots. `patch_places` [M] int64: the slot of each
    patch, counted over all windows. `window_mask` [W, 1, S, S] bool: True for slots that hold a patch.
    """
    rows, columns = grid.rows // spec.merge, grid.columns // spec.merge
    side, unit = spec.window // spec.factor, spec.merge**2
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = (row // side) * math.ceil(columns / side) + column // side
    within = (row % side) * side + column % side
    token_places = window * side**2 + within
    patch_places = (token_places[:, None] * unit + np.arange(unit)).reshape(-1)
    count, slots = int(window.max()) + 1, side**2 * unit
    patches = np.full(count * slots, -1, np.int64)
    patches[patch_places] = np.arange(len(patch_places))
    used = (patches >= 0).reshape(count, 1, 1, slots)
    return {
        "window_slots": np.maximum(patches, 0).reshape(count, slots),
        "patch_places": patch_places,
        "window_mask": np.ascontiguousarray(np.broadcast_to(used, (count, 1, slots, slots))),
    }


def position_feeds(grid: Grid, spec: VisionSpec) -> dict[str, Array]:
    """Return the graph inputs that interpolate the learned position table bilinearly, with aligned corners.

    `position_places` [M, 4] int64: the four nearest table entries of each patch, in the order of `flatten`.
    `position_shares` [M, 4] float32: their weights.
    """
    side = spec.position_side
    axes = []
    for count in (grid.rows, grid.columns):
        at = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        low = np.floor(at).astype(np.int64)
        share = at - low.astype(np.float32)
        axes.append((np.stack([low, np.minimum(low + 1, side - 1)]), np.stack([1 - share, share])))
    (row, row_share), (column, column_share) = axes
    row_of, column_of = group_by_token(np.indices((grid.rows, grid.columns)), grid, spec.merge).astype(np.int64)
    places = row[:, None, row_of] * side + column[None, :, column_of]  # [2, 2, M]
    shares = row_share[:, None, row_of] * column_share[None, :, column_of]
    return {
        "position_places": np.ascontiguousarray(places.reshape(4, -1).T),
        "position_shares": np.ascontiguousarray(shares.reshape(4, -1).T, np.float32),
    }


def group_by_token(values: Array, grid: Grid, merge: int) -> Array:
    """Reorder values of patches [n, rows, columns] to [n, M], in the order of `flatten`."""
    blocks = values.reshape(len(values), grid.rows // merge, merge, grid.columns // merge, merge)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(len(values), -1)


def rotary_angles(grid: Grid, spec: VisionSpec) -> Floats:
    """Return the rotary angles of patches [M, head_dim / 2] in radians: rows, then columns. Order as in `flatten`."""
    quarter = spec.head_dim // 4
    places = group_by_token(np.indices((grid.rows, grid.columns), np.float32), grid, spec.merge)
    exponent = np.arange(0, 2 * quarter, 2, dtype=np.float32) / np.float32(2 * quarter)
    frequencies = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
    angles = places[:, :, None] * frequencies  # [2, M, head_dim / 4]
    return np.concatenate([angles[0], angles[1]], axis=-1)


@lru_cache(maxsize=64)
def grid_feeds(grid: Grid, spec: VisionSpec) -> Mapping[str, Array]:
    """Return all graph inputs but the patches. Cached: most pictures share a few grids."""
    angles = rotary_angles(grid, spec)[None]
    feeds: dict[str, Array] = {"cos": np.cos(angles), "sin": np.sin(angles)}
    if spec.window:
        feeds |= window_feeds(grid, spec)
    if spec.position_side:
        feeds |= position_feeds(grid, spec)
    return feeds


class VisionEncoder:
    """Encodes pictures with the vision tower and caches the most recent results. Safe for use by several threads."""

    def __init__(self, graph: GraphEngine, spec: VisionSpec, *, cache_size: int = 16) -> None:
        """`cache_size`: pictures whose embeddings are kept, least recently used first out."""
        self._graph = graph
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[bytes, Size], ImageTokens] = OrderedDict()
        self._lock = Lock()
        self.spec = spec
        self.encoded = 0  # pictures that were run through the tower

    def resized(self, size: Size) -> Size:
        """Return the size to which a whole picture of `size` is resized."""
        return smart_resize(size, self.spec)

    def resized_crop(self, size: Size) -> Size:
        """Return the size to which a crop of `size` is resized."""
        return smart_resize(size, self.spec, self.spec.crop_max_pixels)

    def encode(self, pixels: Pixels, max_pixels: int | None = None) -> ImageTokens:
        """Encode pixels [height, width, 3] uint8 RGB, or return the cached result.

        `max_pixels` overrides the limit of the spec.

        Raises:
            PictureError: one side is more than 200 times as long as the other.
        """
        size = smart_resize(Size(pixels.shape[1], pixels.shape[0]), self.spec, max_pixels)
        contiguous = np.ascontiguousarray(pixels)
        key = (hashlib.sha256(contiguous.data).digest() + repr(pixels.shape).encode(), size)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        tokens = self._encode(contiguous, size)
        with self._lock:
            self._cache[key] = tokens
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return tokens

    def _encode(self, pixels: Pixels, size: Size) -> ImageTokens:
        patches, grid = flatten(normalise(resize(pixels, size), self.spec), self.spec)
        outputs = self._graph.run({"patches": patches, **grid_feeds(grid, self.spec)})
        self.encoded += 1
        rows, columns = grid.rows // self.spec.merge, grid.columns // self.spec.merge
        return ImageTokens(outputs["tokens"], rows, columns, size, outputs.get("deepstack"))
