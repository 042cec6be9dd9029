"""Bars, drawn with Pillow: one group for each measure, one bar for each engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 1000, 26, 34, 250, 130, 70  # pixels
INK, PALE, OURS, OTHER = "#1d2733", "#66717d", "#1f9d61", "#9db2c9"


def draw_bars(path: Path, title: str, note: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Write a picture of `groups`: measure -> engine -> figure in `unit`; ours, by name, in another colour."""
    rows = sum(len(group) for group in groups.values())
    image = Image.new("RGB", (WIDTH, TOP + rows * BAR + len(groups) * (GAP + BAR) + GAP), "white")
    draw = ImageDraw.Draw(image)
    draw.text((24, 16), title, INK, ImageFont.load_default(22))
    draw.text((24, 46), note, PALE, ImageFont.load_default(13))
    y = TOP
    for measure, figures in groups.items():
        y += GAP
        draw.text((24, y - 6), measure, INK, ImageFont.load_default(17))
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
