"""From pixels to the decoder's embeddings: resize, patches, window order, rotary angles.

All numpy and Pillow, and number for number what Qwen2.5-VL's own image processor gives.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gog_edge.engines.base import Floats, GraphEngine
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
class GridPlan:
    """What depends on the grid alone; M patches, M / merge² tokens."""

    patch_order: NDArray[np.int64]  # [M] raster-of-blocks patch index for each place in window order
    token_place: NDArray[np.int64]  # [tokens] place in window order of each token in reading order
    window_ids: NDArray[np.int32]  # [M] in window order
    segment_ids: NDArray[np.int32]  # [M] zeros: one picture
    cos: Floats  # [1, M, head_dim / 2] in window order
    sin: Floats


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """One picture as the decoder takes it."""

    embeds: Floats  # [rows * columns, hidden] float32, in reading order
    rows: int  # tokens
    columns: int
    resized: Size  # pixels the tower saw; boxes may be said in them


def smart_resize(size: Size, spec: VisionSpec, max_pixels: int | None = None) -> Size:
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


def window_order(grid: Grid, spec: VisionSpec) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(token index for each place in window order, window id of each place), both [tokens]."""
    rows, columns = grid.rows // spec.merge, grid.columns // spec.merge
    side = spec.window // spec.factor
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = (row // side) * math.ceil(columns / side) + column // side
    order = np.argsort(window, kind="stable")
    return order, window[order].astype(np.int32)


def rotary_angles(grid: Grid, spec: VisionSpec) -> Floats:
    """[M, head_dim / 2] radians, rows then columns, patches in the order of `flatten`."""
    merge, quarter = spec.merge, spec.head_dim // 4
    places = np.indices((grid.rows, grid.columns), np.float32)
    blocks = places.reshape(2, grid.rows // merge, merge, grid.columns // merge, merge).transpose(0, 1, 3, 2, 4)
    exponent = np.arange(0, 2 * quarter, 2, dtype=np.float32) / np.float32(2 * quarter)
    frequencies = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
    angles = blocks.reshape(2, -1, 1) * frequencies  # [2, M, head_dim / 4]
    return np.concatenate([angles[0], angles[1]], axis=-1)


@lru_cache(maxsize=64)
def plan_grid(grid: Grid, spec: VisionSpec) -> GridPlan:
    """All that the graph needs beside the patches; cached, since few grids come back often."""
    order, window = window_order(grid, spec)
    unit = spec.merge**2
    patch_order = (order[:, None] * unit + np.arange(unit)).reshape(-1)
    angles = rotary_angles(grid, spec)[patch_order]
    return GridPlan(
        patch_order=patch_order,
        token_place=np.argsort(order),
        window_ids=np.repeat(window, unit),
        segment_ids=np.zeros(len(patch_order), np.int32),
        cos=np.cos(angles)[None],
        sin=np.sin(angles)[None],
    )


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
        plan = plan_grid(grid, self.spec)
        feeds = {
            "patches": patches[plan.patch_order],
            "cos": plan.cos,
            "sin": plan.sin,
            "segment_ids": plan.segment_ids,
            "window_ids": plan.window_ids,
        }
        embeds = self._graph.run(feeds)["tokens"][plan.token_place]
        self.encoded += 1
        return ImageTokens(embeds, grid.rows // self.spec.merge, grid.columns // self.spec.merge, size)
