"""How benchmarks present results: machine card, tables, bar charts, and JSON in the last line."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, RenderableType

from gog_edge.files import write_json

RESULTS = Path("benchmarks/results")  # in the checkout, the working directory of the commands
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13-bindings", "faiss-cpu", "faiss-gpu", "numpy")
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 1000, 26, 34, 250, 130, 70  # of a bar chart, pixels
INK, PALE, OURS, OTHER = "#1d2733", "#66717d", "#1f9d61", "#9db2c9"


def machine_card() -> dict[str, str]:
    """Return processor, memory and the versions of the installed packages that matter, as text."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    card = {
        "processor": f"{names[0] if names else platform.processor()} x {psutil.cpu_count()}",
        "memory": f"{memory:.0f} GiB",
        "python": sys.version.split()[0],
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            card[package] = version(package)
    return card


def load_average() -> float:
    """Return the machine's load in the last minute."""
    return float(round(psutil.getloadavg()[0], 2))


def print_results(
    card: Mapping[str, str], tables: Sequence[RenderableType], line: Mapping[str, object], out: Path | None,
    *, width: int | None = None,
) -> None:  # fmt: skip
    """Print the machine card, the tables and the results as a last line of JSON; write the JSON to `out` as well."""
    console = Console(width=width)
    console.print(*(f"{key}: {value}" for key, value in card.items()), sep="\n", highlight=False)
    console.print(*tables, sep="\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, line)
    print(json.dumps(line))


def draw_bars(path: Path, title: str, note: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Draw a bar chart as a PNG file: a group per metric, with a bar per engine.

    Args:
        path: of the file.
        title: first line.
        note: second line, smaller.
        groups: figures by metric and engine. Bars of engines whose name begins with "ours" have another colour.
        unit: of the figures.
    """
    rows = sum(len(group) for group in groups.values())
    image = Image.new("RGB", (WIDTH, TOP + rows * BAR + len(groups) * (GAP + BAR) + GAP), "white")
    draw = ImageDraw.Draw(image)
    draw.text((24, 16), title, INK, ImageFont.load_default(22))
    draw.text((24, 46), note, PALE, ImageFont.load_default(13))
    y = TOP
    for metric, figures in groups.items():
        y += GAP
        draw.text((24, y - 6), metric, INK, ImageFont.load_default(17))
        y += BAR
        longest = max(figures.values(), default=0) or 1
        for engine, figure in figures.items():
            end = LEFT + (WIDTH - LEFT - RIGHT) * figure / longest
            draw.rectangle((LEFT, y + 3, end, y + BAR - 4), OURS if engine.startswith("ours") else OTHER)
            draw.text((LEFT - 10, y + BAR / 2), engine, INK, ImageFont.load_default(15), anchor="rm")
            text = f"{figure:.{1 if figure >= 10 else 2}f} {unit}"
            draw.text((end + 8, y + BAR / 2), text, INK, ImageFont.load_default(15), anchor="lm")
            y += BAR
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
