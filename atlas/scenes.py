"""Scenes: pictures of several flags over a procedural background, described by a `SceneSpec` and drawn at any size.

A spec contains only numbers relative to the picture (0..1). A test set is therefore fixed by a seed and a hash of its
specs, whatever the version of the drawing library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from atlas.flags import invented_flag
from gog_edge.types import Box, Pixels, Size

Corner = tuple[float, float]
MAX_FLAGS = 6
GAP = 0.015  # minimum distance between two flags, in picture widths


@dataclass(frozen=True, slots=True)
class PlacedFlag:
    """One flag of a scene. Coordinates are fractions of the picture's width and height.

    The hash of a test set covers the field names of `PlacedFlag` and `SceneSpec`.
    """

    flag: str  # flag key
    corners: tuple[Corner, Corner, Corner, Corner]  # top left, top right, bottom right, bottom left
    light: float  # brightness factor at the left edge; at the right edge it is 2 - light
    occluder: tuple[float, float, float, float, int] | None = None  # x0, y0, x1, y1, colour seed

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Return x0, y0, x1, y1 of the bounding box, as fractions of the picture."""
        xs, ys = [c[0] for c in self.corners], [c[1] for c in self.corners]
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """The complete description of a picture."""

    seed: int  # of background and noise
    aspect: float  # width / height
    placed: tuple[PlacedFlag, ...]
    blur: float  # radius of the Gaussian blur, in thousandths of the width
    exposure: float  # factor on all pixels

    def box(self, index: int, size: Size) -> Box:
        """Return the bounding box of a flag in pixels of a picture of `size`."""
        x0, y0, x1, y1 = self.placed[index].bounds
        return Box(x0 * size.width, y0 * size.height, x1 * size.width, y1 * size.height)


# --- layout -----------------------------------------------------------------------------------


def _cells(rng: np.random.Generator, count: int) -> list[tuple[float, float, float, float]]:
    """Sample `count` cells (x0, y0, x1, y1): a row, a column, a grid, or a random subset of a grid."""
    if count == 1:
        return [(0.0, 0.0, 1.0, 1.0)]
    row = count <= 4 and rng.random() < 0.4
    if row:
        columns, rows = count, 1
    elif count <= 3 and rng.random() < 0.3:
        columns, rows = 1, count
    else:
        columns, rows = (2, 2) if count <= 4 else (3, 2)
        if count <= 4 and rng.random() < 0.4:
            columns = 3
    xs = _edges(rng, columns)
    ys = _edges(rng, rows)
    if rows == 1:  # a row may be lower than the picture
        depth = rng.uniform(0.4, 0.75)
        top = rng.uniform(0, 1 - depth)
        ys = [top, top + depth]
    if columns == 1:
        breadth = rng.uniform(0.35, 0.7)
        left = rng.uniform(0, 1 - breadth)
        xs = [left, left + breadth]
    cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]
    chosen = rng.permutation(len(cells))[:count]
    return [cells[k] for k in sorted(chosen)]


def _edges(rng: np.random.Generator, parts: int) -> list[float]:
    widths = rng.uniform(0.75, 1.3, parts)
    return [0.0, *(np.cumsum(widths) / widths.sum()).tolist()]


def sample_corners(
    rng: np.random.Generator, cell: tuple[float, float, float, float], aspect: float, *, fill: tuple[float, float]
) -> tuple[Corner, Corner, Corner, Corner]:
    """Sample the corners of a 4:3 flag inside a cell, rotated and in perspective.

    Args:
        rng: source of randomness.
        cell: x0, y0, x1, y1 as fractions of the picture.
        aspect: of the picture, width / height.
        fill: range of the flag's size relative to the largest that fits in the cell.
    """
    x0, y0, x1, y1 = cell
    w, h = (x1 - x0 - GAP) * aspect, y1 - y0 - GAP * aspect  # in picture heights
    scale = min(w / 4, h / 3) * rng.uniform(*fill)
    half_w, half_h = scale * 4 / 2 * rng.uniform(0.88, 1.08), scale * 3 / 2 * rng.uniform(0.88, 1.08)
    angle = rng.normal(0, 0.06)
    shape = np.array([(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)])
    shape *= 1 + rng.uniform(-0.09, 0.03, shape.shape)
    cos, sin = math.cos(angle), math.sin(angle)
    shape = shape @ np.array([[cos, sin], [-sin, cos]])
    extent = shape.max(0) - shape.min(0)
    shape *= min(1.0, w / extent[0], h / extent[1])
    low, high = shape.min(0), shape.max(0)
    cx = rng.uniform(-low[0], w - high[0]) if w > high[0] - low[0] else w / 2
    cy = rng.uniform(-low[1], h - high[1]) if h > high[1] - low[1] else h / 2
    corners = [(float(x0 + GAP / 2 + (cx + px) / aspect), float(y0 + GAP * aspect / 2 + cy + py)) for px, py in shape]
    return (corners[0], corners[1], corners[2], corners[3])


def sample_occluder(
    rng: np.random.Generator, bounds: tuple[float, float, float, float]
) -> tuple[float, float, float, float, int]:
    """Sample a pole or an ellipse that covers a tenth to a quarter of the flag: x0, y0, x1, y1, colour seed."""
    x0, y0, x1, y1 = bounds
    w, h = x1 - x0, y1 - y0
    if rng.random() < 0.5:  # a pole of full height
        at = rng.uniform(x0 + 0.1 * w, x1 - 0.25 * w)
        return float(at), float(y0 - 0.02), float(at + w * rng.uniform(0.08, 0.16)), float(y1 + 0.02), 0
    bw, bh = w * rng.uniform(0.25, 0.45), h * rng.uniform(0.3, 0.5)
    left, top = rng.choice([x0 - 0.2 * bw, x1 - 0.8 * bw]), rng.uniform(y0, y1 - bh)
    return float(left), float(top), float(left + bw), float(top + bh), int(rng.integers(1, 1000))


def make_spec(
    seed: int,
    flags: Sequence[str],
    *,
    aspect: float = 4 / 3,
    occluded: int | None = None,
    occlusion_rate: float = 0.12,
) -> SceneSpec:
    """Sample a layout of the given flags.

    Args:
        seed: the same arguments and seed give the same spec.
        flags: flag keys, one to MAX_FLAGS.
        aspect: of the picture, width / height.
        occluded: index of a flag that always gets an occluder.
        occlusion_rate: probability of an occluder for every other flag.
    """
    rng = np.random.default_rng([seed, 1])
    cells = _cells(rng, len(flags))
    order = rng.permutation(len(flags))
    fill = (0.72, 1.0) if len(flags) == 1 else (0.6, 1.0)
    placed = []
    for index, flag in enumerate(flags):
        corners = sample_corners(rng, cells[order[index]], aspect, fill=fill)
        item = PlacedFlag(flag, corners, float(rng.uniform(0.8, 1.2)))
        hide = rng.random() < occlusion_rate or index == occluded
        if hide:
            item = PlacedFlag(flag, corners, item.light, sample_occluder(rng, item.bounds))
        placed.append(item)
    return SceneSpec(seed, aspect, tuple(placed), float(rng.choice([0, 0, 0.8, 1.6])), float(rng.uniform(0.75, 1.12)))


# --- drawing ----------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, size: Size, cells: int) -> NDArray[np.float32]:
    """Sample smooth noise in [-1, 1]: [height, width] float32."""
    coarse = rng.uniform(-1, 1, (max(2, cells * size.height // size.width), cells)).astype(np.float32)
    image = Image.fromarray(coarse, mode=None).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def draw_background(rng: np.random.Generator, size: Size) -> Image.Image:
    """Draw a wall, sky and ground, boards, bricks or plain shapes in uneven light."""
    base = rng.uniform(60, 210, 3)
    ys = np.linspace(0, 1, size.height, dtype=np.float32)[:, None, None]
    other = np.clip(base + rng.normal(0, 35, 3), 20, 235)
    canvas = np.broadcast_to(base * (1 - ys) + other * ys, (size.height, size.width, 3)).astype(np.float32)
    if rng.random() < 0.35:  # a horizon
        line = int(size.height * rng.uniform(0.55, 0.9))
        canvas[line:] = rng.uniform(50, 170, 3)
    shade = _noise(rng, size, int(rng.integers(3, 7))) * rng.uniform(5, 30)
    if rng.random() < 0.5:
        shade = shade + _noise(rng, size, int(rng.integers(30, 90))) * rng.uniform(3, 14)
    image = Image.fromarray(np.clip(canvas + shade[..., None], 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    kind = rng.random()
    colour = tuple(int(v) for v in np.clip(base + rng.normal(0, 25, 3), 0, 255))
    if kind < 0.2:  # boards
        step = int(size.width * rng.uniform(0.05, 0.15)) + 4
        for x in range(0, size.width, step):
            draw.line((x, 0, x, size.height), fill=colour, width=max(1, size.width // 300))
    elif kind < 0.35:  # bricks
        step = int(size.height * rng.uniform(0.05, 0.1)) + 4
        for row, y in enumerate(range(0, size.height, step)):
            draw.line((0, y, size.width, y), fill=colour, width=max(1, size.width // 400))
            for x in range(-(row % 2) * step, size.width, 2 * step):
                draw.line((x, y, x, y + step), fill=colour, width=max(1, size.width // 400))
    elif kind < 0.7:  # distractors: discs and posts
        for _ in range(int(rng.integers(1, 5))):
            cx, cy = rng.uniform(0, size.width), rng.uniform(0, size.height)
            r = size.width * rng.uniform(0.02, 0.1)
            plain = tuple(int(v) for v in rng.uniform(40, 220, 3))
            if rng.random() < 0.6:
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=plain)
            else:
                draw.rectangle((cx - r / 4, 0, cx + r / 4, size.height), fill=plain)
    return image


def _perspective(source: Sequence[Corner], target: Sequence[Corner]) -> tuple[float, ...]:
    """Return the eight coefficients for `Image.transform` that map target to source coordinates."""
    rows, values = [], []
    for (sx, sy), (tx, ty) in zip(source, target, strict=True):
        rows.append([tx, ty, 1, 0, 0, 0, -sx * tx, -sx * ty])
        rows.append([0, 0, 0, tx, ty, 1, -sy * tx, -sy * ty])
        values += [sx, sy]
    return tuple(np.linalg.solve(np.array(rows), np.array(values)).tolist())


def paste_flag(canvas: Image.Image, flag: Pixels, item: PlacedFlag) -> None:
    """Warp a flag into the canvas, in place."""
    size = Size(*canvas.size)
    x0, y0, x1, y1 = item.bounds
    left, top = math.floor(x0 * size.width) - 1, math.floor(y0 * size.height) - 1
    width, height = math.ceil(x1 * size.width) - left + 2, math.ceil(y1 * size.height) - top + 2
    # Downscale the source to about the size of the target first, because a transform alone would alias.
    reduce = min(1.0, max(width / flag.shape[1], height / flag.shape[0]) * 1.1)
    source = Image.fromarray(flag)
    if reduce < 1:
        source = source.resize((max(4, round(flag.shape[1] * reduce)), max(4, round(flag.shape[0] * reduce))))
    gradient = np.linspace(item.light, 2 - item.light, source.width, dtype=np.float32)[None, :, None]
    lit = np.clip(np.asarray(source, dtype=np.float32) * gradient, 0, 255).astype(np.uint8)
    target = [(x * size.width - left, y * size.height - top) for x, y in item.corners]
    w, h = source.size
    coefficients = _perspective([(0, 0), (w, 0), (w, h), (0, h)], target)
    box = (width, height)
    cloth = Image.fromarray(lit).transform(box, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    mask = Image.new("L", (width * 2, height * 2))
    ImageDraw.Draw(mask).polygon([(x * 2, y * 2) for x, y in target], fill=255)
    canvas.paste(cloth, (left, top), mask.resize(box, Image.Resampling.BOX))


def draw_occluder(canvas: Image.Image, occluder: tuple[float, float, float, float, int]) -> None:
    """Draw an occluder (x0, y0, x1, y1, colour seed) on the canvas: a pole for seed 0, else an ellipse."""
    x0, y0, x1, y1, seed = occluder
    bounds = (x0 * canvas.width, y0 * canvas.height, x1 * canvas.width, y1 * canvas.height)
    rng = np.random.default_rng([seed, 3])
    colour = tuple(int(v) for v in rng.uniform(30, 200, 3))
    draw = ImageDraw.Draw(canvas)
    if seed == 0:
        draw.rectangle(bounds, fill=(84, 80, 78))
    else:
        draw.ellipse(bounds, fill=colour)


def draw_scene(spec: SceneSpec, flags: Mapping[str, Pixels], width: int) -> Pixels:
    """Draw a scene: [height, width, 3] uint8 RGB with height = width / aspect.

    Args:
        spec: what to draw.
        flags: pixels by flag key, 4:3 in any resolution.
        width: in pixels.
    """
    size = Size(width, round(width / spec.aspect))
    rng = np.random.default_rng([spec.seed, 2])
    canvas = draw_background(rng, size)
    for item in spec.placed:
        paste_flag(canvas, flags[item.flag], item)
    for item in spec.placed:
        if item.occluder is not None:
            draw_occluder(canvas, item.occluder)
    if spec.blur:
        canvas = canvas.filter(ImageFilter.GaussianBlur(spec.blur * width / 1000))
    pixels = np.asarray(canvas, dtype=np.float32) * spec.exposure
    pixels += rng.normal(0, 1, (*pixels.shape[:2], 1)).astype(np.float32) * rng.uniform(0, 5)
    drawn: Pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return drawn


def flags_of_scene(spec: SceneSpec, flags: Mapping[str, Pixels]) -> dict[str, Pixels]:
    """Return the pixels of the flags in a scene by flag key: from `flags`, or drawn if they are invented."""
    return {
        item.flag: invented_flag(int(item.flag.split()[1])) if item.flag.startswith("invented ") else flags[item.flag]
        for item in spec.placed
    }


# --- which flag a place word refers to ----------------------------------------------------------

# A place word is used only if it is unambiguous: "second from the left" requires clearly separated positions.
MIN_DISTANCE = 0.06  # of the picture's width or height
MIN_AREA_RATIO = 1.25


def _ranked(values: Sequence[float], apart: float) -> list[int] | None:
    """Return the indices in ascending order of their values, or None if two values differ by less than `apart`."""
    order = sorted(range(len(values)), key=values.__getitem__)
    if any(values[b] - values[a] < apart for a, b in zip(order, order[1:], strict=False)):
        return None
    return order


def _extreme(values: Sequence[float], apart: float) -> int | None:
    """Return the index of the smallest value, or None if the next one differs by less than `apart`."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return order[0] if len(order) < 2 or values[order[1]] - values[order[0]] >= apart else None


RELATIONS = (
    "left1", "left2", "left3", "right1", "right2", "top1", "bottom1", "middle",
    "top left", "top right", "bottom left", "bottom right", "largest", "smallest",
)  # fmt: skip


def relations(spec: SceneSpec) -> dict[str, int]:
    """Return the index of the flag that each of RELATIONS refers to, without ambiguous ones.

    Empty for a scene of one flag.
    """
    bounds = [item.bounds for item in spec.placed]
    if len(bounds) < 2:
        return {}
    xs = [(b[0] + b[2]) / 2 for b in bounds]
    ys = [(b[1] + b[3]) / 2 for b in bounds]
    areas = [math.log((b[2] - b[0]) * (b[3] - b[1])) for b in bounds]
    meant: dict[str, int | None] = {}
    row = _ranked(xs, MIN_DISTANCE)
    if row is not None:
        meant |= {"left1": row[0], "right1": row[-1]}
        if len(row) >= 3:
            meant |= {"left2": row[1], "right2": row[-2]}
        if len(row) == 3:
            meant["middle"] = row[1]
        if len(row) >= 4:
            meant["left3"] = row[2]
    else:
        meant |= {"left1": _extreme(xs, MIN_DISTANCE), "right1": _extreme([-x for x in xs], MIN_DISTANCE)}
    meant |= {"top1": _extreme(ys, MIN_DISTANCE), "bottom1": _extreme([-y for y in ys], MIN_DISTANCE)}
    larger = math.log(MIN_AREA_RATIO)
    meant |= {"largest": _extreme([-a for a in areas], larger), "smallest": _extreme(areas, larger)}
    if max(ys) - min(ys) > 0.2 and max(xs) - min(xs) > 0.2:
        for name, sx, sy in (
            ("top left", 1, 1), ("top right", -1, 1), ("bottom left", 1, -1), ("bottom right", -1, -1),
        ):  # fmt: skip
            corner = _extreme([sx * x + sy * y for x, y in zip(xs, ys, strict=True)], 0.15)
            if corner is not None and (sx * (xs[corner] - 0.5) < 0 and sy * (ys[corner] - 0.5) < 0):
                meant[name] = corner
    return {name: index for name, index in meant.items() if index is not None}
