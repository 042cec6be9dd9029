"""Flags as pixels: real ones from the npm package flag-icons (MIT), and invented ones, which are in no pack."""

from __future__ import annotations

import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gog_edge.errors import ArtifactError
from gog_edge.types import Pixels

FLAG_LICENCE = "MIT"
FLAG_ATTRIBUTION = "flag-icons 7.5.0, Panayiotis Lipiridis and contributors"
FLAG_WIDTH, FLAG_HEIGHT = 320, 240
# Seeds of invented flags for training and for test sets; the ranges are disjoint.
TRAIN_INVENTED = range(0, 5000)
TEST_INVENTED = range(10_000, 12_000)
# Two flags count as the same if no block of their downscaled pixels (0..255) differs by this much. The blues of Chad
# and Romania differ by 56; an emblem differs by 100 or more.
TWIN_DIFFERENCE = 64.0


def _package_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name within the package, content) of country.json and the 4:3 SVG files, from a folder or npm tarball."""
    wanted = ("country.json", "flags/4x3/")
    if source.is_dir():
        for path in [source / "country.json", *sorted((source / "flags" / "4x3").glob("*.svg"))]:
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            stream = archive.extractfile(member)
            if name.startswith(wanted) and stream is not None:
                yield name, stream.read()


def load_flag_icons(source: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return PNG bytes (320x240 RGB) and country names, both by flag key, from the npm package flag-icons 7.5.0.

    Args:
        source: the package as a folder or as an npm tarball.

    Raises:
        ArtifactError: `source` does not exist or is another package.
    """
    import resvg_py

    if not source.exists():
        raise ArtifactError(
            f"flag-icons: '{source}' does not exist; run `npm pack flag-icons@7.5.0` and pass the file as --flags"
        )
    try:
        files = dict(_package_files(source))
        names = {row["code"]: row["name"] for row in json.loads(files["country.json"])}
        flags = {
            name.removeprefix("flags/4x3/").removesuffix(".svg"): resvg_py.svg_to_bytes(
                svg_string=content.decode(), width=FLAG_WIDTH, height=FLAG_HEIGHT, background="#ffffff"
            )
            for name, content in files.items()
            if name.endswith(".svg")
        }
    except (OSError, EOFError, tarfile.TarError, zlib.error, KeyError, TypeError, ValueError) as exc:
        raise ArtifactError(f"flag-icons: '{source}' must be the npm package flag-icons 7.5.0 ({exc})") from exc
    return flags, names


def png_pixels(png: bytes) -> Pixels:
    """Decode a PNG that the atlas tools wrote: [height, width, 3] uint8 RGB. Not for untrusted files."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# --- invented flags ---------------------------------------------------------------------------

_COLOURS = (
    (206, 17, 38), (0, 56, 147), (0, 122, 61), (252, 209, 22), (255, 255, 255), (20, 20, 20), (0, 158, 219),
    (239, 125, 0), (110, 30, 110), (122, 60, 20), (0, 140, 140), (180, 200, 60), (240, 130, 170), (90, 90, 100),
)  # fmt: skip
_Colour = tuple[int, int, int]


def _star(cx: float, cy: float, radius: float, points: int, turn: float) -> list[tuple[float, float]]:
    corners = []
    for k in range(2 * points):
        r = radius if k % 2 == 0 else radius * 0.42
        angle = turn + math.pi * k / points
        corners.append((cx + r * math.sin(angle), cy - r * math.cos(angle)))
    return corners


def _field(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colours: Sequence[_Colour], w: int, h: int) -> None:
    kind = rng.integers(6)
    parts = int(rng.integers(2, 6))
    edges = np.concatenate([[0], np.cumsum(rng.uniform(0.6, 1.4, parts))])
    edges = edges / edges[-1]
    draw.rectangle((0, 0, w, h), fill=colours[0])
    for k in range(parts):
        colour = colours[k % len(colours)]
        a, b = edges[k], edges[k + 1]
        if kind in (0, 1):
            draw.rectangle((0, a * h, w, b * h), fill=colour)
        elif kind in (2, 3):
            draw.rectangle((a * w, 0, b * w, h), fill=colour)
    if kind == 4:
        corner = [(0, 0), (w, 0), (0, h)] if rng.random() < 0.5 else [(0, 0), (w, h), (0, h)]
        draw.polygon(corner, fill=colours[1])
    elif kind == 5:
        draw.rectangle((0, 0, w / 2, h / 2), fill=colours[1])
        draw.rectangle((w / 2, h / 2, w, h), fill=colours[1 if rng.random() < 0.5 else 2])


def _charge(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colours: Sequence[_Colour], w: int, h: int) -> None:
    kind = rng.integers(9)
    cx, cy = w * rng.choice([0.22, 0.5, 0.5, 0.75]), h * rng.choice([0.3, 0.5, 0.5, 0.7])
    r = h * rng.uniform(0.13, 0.3)
    a, b = colours[-1], colours[-2]
    if kind == 0:
        draw.polygon(_star(cx, cy, r, int(rng.integers(4, 9)), rng.uniform(0, 0.6)), fill=a)
    elif kind == 1:
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=a)
    elif kind == 2:
        shift = r * rng.uniform(0.3, 0.5)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=a)
        draw.ellipse((cx - r + shift, cy - r * 0.8, cx + r * 0.8 + shift, cy + r * 0.8), fill=b)
    elif kind == 3:
        t = h * rng.uniform(0.06, 0.14)
        draw.rectangle((0, cy - t, w, cy + t), fill=a)
        draw.rectangle((cx - t, 0, cx + t, h), fill=a)
    elif kind == 4:
        draw.polygon([(0, 0), (w * rng.uniform(0.3, 0.6), h / 2), (0, h)], fill=a)
    elif kind == 5:
        draw.polygon([(cx, cy - r), (cx + 1.3 * r, cy), (cx, cy + r), (cx - 1.3 * r, cy)], fill=a)
    elif kind == 6:
        t = int(h * rng.uniform(0.08, 0.16))
        draw.line((0, 0, w, h), fill=a, width=t)
        if rng.random() < 0.5:
            draw.line((0, h, w, 0), fill=a, width=t)
    elif kind == 7:
        draw.rectangle((0, 0, w * 0.42, h * 0.5), fill=b)
        draw.polygon(_star(w * 0.21, h * 0.25, h * 0.18, int(rng.integers(5, 9)), 0), fill=a)
    else:
        count = int(rng.integers(3, 8))
        for k in range(count):
            angle = 2 * math.pi * k / count
            x, y = w / 2 + h * 0.28 * math.sin(angle), h / 2 - h * 0.28 * math.cos(angle)
            draw.polygon(_star(x, y, h * 0.08, 5, 0), fill=a)


def invented_flag(seed: int) -> Pixels:
    """Draw a flag that belongs to no country: [240, 320, 3] uint8 RGB. The same seed gives the same flag."""
    rng = np.random.default_rng([seed, 77])
    scale = 2  # drawn at twice the size and downscaled, for smooth edges
    w, h = FLAG_WIDTH * scale, FLAG_HEIGHT * scale
    picked = rng.choice(len(_COLOURS), size=5, replace=False)
    colours = [_COLOURS[k] for k in picked]
    image = Image.new("RGB", (w, h))
    draw = ImageDraw.Draw(image)
    _field(draw, rng, colours[:3], w, h)
    for _ in range(int(rng.integers(1, 3))):
        _charge(draw, rng, colours[3:], w, h)
    return np.asarray(image.resize((FLAG_WIDTH, FLAG_HEIGHT), Image.Resampling.LANCZOS))


def invented_key(seed: int) -> str:
    """Return the flag key of an invented flag."""
    return f"invented {seed}"


def _block_means(pixels: Pixels) -> NDArray[np.float64]:
    """Return the block means of a flag: [24, 32, 3] float64."""
    height, width = pixels.shape[0] // 24, pixels.shape[1] // 32
    blocks: NDArray[np.float64] = pixels[: height * 24, : width * 32].reshape(24, height, 32, width, 3).mean((1, 3))
    return blocks


def distinguishable_flags(flags: Mapping[str, Pixels]) -> dict[str, list[str]]:
    """Return for each flag the keys of the flags that can be told apart from it, most similar first."""
    keys = sorted(flags)
    small = np.stack([_block_means(flags[key]) for key in keys])
    found = {}
    for index, key in enumerate(keys):
        difference = np.abs(small - small[index])
        order, largest = np.argsort(difference.mean((1, 2, 3)), kind="stable"), difference.max((1, 2, 3))
        found[key] = [keys[k] for k in order if largest[k] >= TWIN_DIFFERENCE]
    return found
