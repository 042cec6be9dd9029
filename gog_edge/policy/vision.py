"""From pixels to the decoder's embeddings: resize, patches, windows, rotary angles, positions.

All numpy and Pillow, and number for number what the image processor of Qwen2.5-VL and Qwen3-VL gives.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol

import numpy as np
from PIL import Image

from gog_edge.engines.base import Array, Floats, GraphEngine
from gog_edge.errors import PictureError
from gog_edge.policy.manifest import VisionSpec
from gog_edge.types import Pixels, Size

MAX_ASPECT = 200  # longer strips cannot be told apart by the tower


@dataclass(frozen=True, slots=True)
class Grid:
    """A resized picture in patches."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """One picture as the decoder takes it."""

    embeds: Floats  # [rows * columns, hidden] float32, in reading order
    rows: int  # tokens
    columns: int
    resized: Size  # pixels the tower saw; boxes may be said in them
    deepstack: Floats | None = None  # [layers, rows * columns, hidden]: what the decoder's first layers add


class PixelBudget(Protocol):
    """What decides the size of a resized picture."""

    @property
    def factor(self) -> int:
        """Sides are multiples of it."""

    @property
    def min_pixels(self) -> int:
        """Smaller pictures are enlarged."""

    @property
    def max_pixels(self) -> int:
        """Larger pictures are made smaller."""


def smart_resize(size: Size, spec: PixelBudget, max_pixels: int | None = None) -> Size:
    """The size to resize to: sides multiples of `spec.factor`, area within the pixel budget, aspect nearly kept.

    `max_pixels` replaces the spec's. Raises PictureError for strips more than 200 times as long as wide.
    """
    long, short = max(size.width, size.height), min(size.width, size.height)
    if short < 1 or long / short > MAX_ASPECT:
        raise PictureError(
            f"a picture of {size.width} x {size.height} pixels is too thin to look at "
            f"(one side may be at most {MAX_ASPECT} times the other); give a wider cut-out"
        )
    factor, area, most = spec.factor, size.width * size.height, max_pixels or spec.max_pixels
    height, width = (round(side / factor) * factor for side in (size.height, size.width))
    if height * width > most:
        shrink = math.sqrt(area / most)
        height, width = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (size.height, size.width)
        )
    elif height * width < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / area)
        height, width = (math.ceil(side * grow / factor) * factor for side in (size.height, size.width))
    return Size(width, height)


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Bicubic, as Pillow does it; pixels [height, width, 3] uint8."""
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    image = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def normalise(pixels: Pixels, spec: VisionSpec) -> Floats:
    """[height, width, 3] uint8 0..255 -> [3, height, width] float32, scaled to 0..1, less mean, over std."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1), np.float32)


def flatten(image: Floats, spec: VisionSpec) -> tuple[Floats, Grid]:
    """Normalised [3, height, width] -> flat patches [M, patch_dim], merged blocks together, and their grid."""
    _, height, width = image.shape
    grid = Grid(height // spec.patch, width // spec.patch)
    merge, side = spec.merge, spec.patch
    blocks = image.reshape(3, grid.rows // merge, merge, side, grid.columns // merge, merge, side)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # [rows, columns, merge, merge, 3, side, side]
    repeated = np.broadcast_to(ordered[:, :, :, :, :, None], (*ordered.shape[:5], spec.temporal, side, side))
    return np.ascontiguousarray(repeated).reshape(grid.rows * grid.columns, spec.patch_dim), grid


def window_feeds(grid: Grid, spec: VisionSpec) -> dict[str, Array]:
    """Windows as slots: the patch in each of W * S places, the place of each patch, who is there to be seen.

    `window_slots` [W, S] int64 (0 where a place is empty), `patch_places` [M] int64, `window_mask` [W, 1, S, S] bool.
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
    held = (patches >= 0).reshape(count, 1, 1, slots)
    return {
        "window_slots": np.maximum(patches, 0).reshape(count, slots),
        "patch_places": patch_places,
        "window_mask": np.ascontiguousarray(np.broadcast_to(held, (count, 1, slots, slots))),
    }


def position_feeds(grid: Grid, spec: VisionSpec) -> dict[str, Array]:
    """Each patch's four nearest places in the learned table and their shares, patches in the order of `flatten`.

    The picture's corners fall on the table's corners; between its places it is mixed bilinearly.
    """
    side = spec.position_side
    axes = []
    for count in (grid.rows, grid.columns):
        at = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        low = np.floor(at).astype(np.int64)
        share = at - low.astype(np.float32)
        axes.append((np.stack([low, np.minimum(low + 1, side - 1)]), np.stack([1 - share, share])))
    (row, row_share), (column, column_share) = axes
    row_of, column_of = blockwise(np.indices((grid.rows, grid.columns)), grid, spec.merge).astype(np.int64)
    places = row[:, None, row_of] * side + column[None, :, column_of]  # [2, 2, M]
    shares = row_share[:, None, row_of] * column_share[None, :, column_of]
    return {
        "position_places": np.ascontiguousarray(places.reshape(4, -1).T),
        "position_shares": np.ascontiguousarray(shares.reshape(4, -1).T, np.float32),
    }


def blockwise(places: Array, grid: Grid, merge: int) -> Array:
    """[n, rows, columns] -> [n, M] with the patches of one token side by side, tokens in reading order."""
    blocks = places.reshape(len(places), grid.rows // merge, merge, grid.columns // merge, merge)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(len(places), -1)


def rotary_angles(grid: Grid, spec: VisionSpec) -> Floats:
    """[M, head_dim / 2] radians, rows then columns, patches in the order of `flatten`."""
    quarter = spec.head_dim // 4
    places = blockwise(np.indices((grid.rows, grid.columns), np.float32), grid, spec.merge)
    exponent = np.arange(0, 2 * quarter, 2, dtype=np.float32) / np.float32(2 * quarter)
    frequencies = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
    angles = places[:, :, None] * frequencies  # [2, M, head_dim / 4]
    return np.concatenate([angles[0], angles[1]], axis=-1)


@lru_cache(maxsize=64)
def grid_feeds(grid: Grid, spec: VisionSpec) -> Mapping[str, Array]:
    """All that the graph needs beside the patches; cached, since few grids come back often."""
    angles = rotary_angles(grid, spec)[None]
    feeds: dict[str, Array] = {"cos": np.cos(angles), "sin": np.sin(angles)}
    if spec.window:
        feeds |= window_feeds(grid, spec)
    if spec.position_side:
        feeds |= position_feeds(grid, spec)
    return feeds


class VisionEncoder:
    """Encodes pictures and remembers the last ones."""

    def __init__(self, graph: GraphEngine, spec: VisionSpec, *, remember: int = 16) -> None:
        self._graph = graph
        self._remember = remember
        self._seen: OrderedDict[tuple[bytes, Size], ImageTokens] = OrderedDict()
        self._lock = Lock()
        self.spec = spec
        self.encoded = 0  # pictures that went through the tower

    def resized(self, size: Size) -> Size:
        """The size in which the tower sees a picture of `size`."""
        return smart_resize(size, self.spec)

    def resized_crop(self, size: Size) -> Size:
        """The size in which the tower sees a crop of `size`."""
        return smart_resize(size, self.spec, self.spec.crop_max_pixels)

    def encode(self, pixels: Pixels, max_pixels: int | None = None) -> ImageTokens:
        """Pixels [height, width, 3] uint8 RGB -> embeddings; pictures seen lately come from memory.

        `max_pixels` replaces the spec's budget. Raises PictureError for pictures too thin to look at.
        """
        size = smart_resize(Size(pixels.shape[1], pixels.shape[0]), self.spec, max_pixels)
        contiguous = np.ascontiguousarray(pixels)
        key = (hashlib.sha256(contiguous.data).digest() + repr(pixels.shape).encode(), size)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        tokens = self._encode(contiguous, size)
        with self._lock:
            self._seen[key] = tokens
            while len(self._seen) > self._remember:
                self._seen.popitem(last=False)
        return tokens

    def _encode(self, pixels: Pixels, size: Size) -> ImageTokens:
        patches, grid = flatten(normalise(resize(pixels, size), self.spec), self.spec)
        said = self._graph.run({"patches": patches, **grid_feeds(grid, self.spec)})
        self.encoded += 1
        rows, columns = grid.rows // self.spec.merge, grid.columns // self.spec.merge
        return ImageTokens(said["tokens"], rows, columns, size, said.get("deepstack"))
