"""A pack of a few countries whose flags are plain bars, small enough for expected results by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from gog_edge.indexing.generation import PackOptions, PackWriter
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Manifest, Snapshot
from gog_edge.types import Pixels

SNAPSHOT = Snapshot("little world", "2026-01-01", "00000000-0000-0000-0000-000000000001", "ab" * 32, "CC0")
RED, GREEN, BLUE, WHITE, YELLOW, BLACK = (200, 0, 0), (0, 130, 0), (0, 0, 160), (255, 255, 255), (250, 210, 0), (0,) * 3
FLAGS = {
    "France": (BLUE, WHITE, RED),
    "Italy": (GREEN, WHITE, RED),
    "Norway": (RED, BLUE, RED),
    "Spain": (RED, YELLOW, RED),
    "Portugal": (GREEN, RED, RED),
    "Chad": ((0, 0, 160), YELLOW, RED),
    "Romania": ((0, 1, 162), YELLOW, RED),
    "Guinea": (RED, YELLOW, GREEN),
    "Papua New Guinea": (BLACK, BLACK, RED),
    "Germany": (BLACK, RED, YELLOW),
}
FACTS = {
    "France": ("Paris", "Euro"),
    "Italy": ("Rome", "Euro"),
    "Norway": ("Oslo", "Krone"),
    "Svalbard": ("Longyearbyen", "Krone"),
    "Spain": ("Madrid", "Euro"),
    "Portugal": ("Lisbon", "Euro"),
    "Chad": ("N'Djamena", "Franc"),
    "Romania": ("Bucharest", "Leu"),
    "Guinea": ("Conakry", "Franc"),
    "Papua New Guinea": ("Port Moresby", "Kina"),
    "Germany": ("Berlin", "Euro"),
}
CONTINENTS = {"Chad": "Africa", "Guinea": "Africa", "Papua New Guinea": "Oceania"}
REDIRECTS = {"Portugal": ("PT", "Portuguese Republic"), "Italy": ("IT",), "Chad": ("Tchad",)}


def bars(*colours: tuple[int, ...], width: int = 60, height: int = 40) -> Pixels:
    """Return upright bars of equal width."""
    each = width // len(colours)
    row = np.concatenate([np.tile(np.array(colour, dtype=np.uint8), (each, 1)) for colour in colours])
    return np.tile(row, (height, 1, 1))


def png(pixels: Pixels) -> bytes:
    """Return pixels as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def flag(name: str) -> Pixels:
    """Return the flag of a country."""
    return bars(*FLAGS[name])


def articles() -> list[ArticleRecord]:
    """Return an article with four facts for each country."""
    records = []
    for name, (capital, currency) in FACTS.items():
        facts = (
            ("Continent", f"{name} lies in {CONTINENTS.get(name, 'Europe')}."),
            ("Capital city", f"The capital of {name} is {capital}."),
            ("Currency, money", f"The currency of {name} is the {currency}."),
            ("Neighbours, borders", f"{name} borders {'Spain' if name in ('France', 'Portugal') else 'nobody'}."),
        )
        records.append(ArticleRecord(name, facts, "CC0", REDIRECTS.get(name, ())))
    return records


def images() -> list[ImageRecord]:
    """Return an image of each flag; Svalbard has the flag of Norway."""
    articles = {name: (name,) for name in FLAGS} | {"Norway": ("Norway", "Svalbard")}
    return [ImageRecord(png(flag(name)), f"Flag of {name}", "MIT", "us", articles[name]) for name in FLAGS]


def write_little_pack(folder: Path, encoder: Encoder, *, name: str = "little", **settings) -> Manifest:
    """Write the pack and return its manifest."""
    with PackWriter(folder, name=name, snapshot=SNAPSHOT, encoder=encoder, options=PackOptions(**settings)) as writer:
        writer.add(articles(), images())
        return writer.commit()
