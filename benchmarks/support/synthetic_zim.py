"""A synthetic ZIM file with the structure of those of Kiwix's scrapers: any number of articles with pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from libzim.writer import Creator, Hint, Item, StringProvider
from PIL import Image

WORDS = """
river mill bridge tower market harbour castle church garden valley island quarry forest village road railway painter
composer bishop merchant sailor engineer farmer weaver king queen council guild army fleet school library copper silver
wool timber granite salt amber glass iron wheat wine apple barley horse falcon heron otter salmon
""".split()  # noqa: SIM905
PARAGRAPHS, SENTENCES = 12, 4  # per article and per paragraph; about as many as in longer articles
WIDTH, HEIGHT = 320, 240  # pixels, as the scrapers store them


class _Entry(Item):  # type: ignore[misc]  # libzim has no types
    def __init__(self, path: str, title: str, mimetype: str, content: bytes, *, front: bool) -> None:
        super().__init__()
        self._path, self._title, self._mimetype, self._content, self._front = path, title, mimetype, content, front

    def get_path(self) -> str:
        return self._path

    def get_title(self) -> str:
        return self._title

    def get_mimetype(self) -> str:
        return self._mimetype

    def get_contentprovider(self) -> StringProvider:
        return StringProvider(self._content)

    def get_hints(self) -> dict[Hint, int]:
        return {Hint.FRONT_ARTICLE: int(self._front)}


def write_zim(path: Path, articles: int) -> Path:
    """Write a ZIM file of `articles` articles, each with one picture and one redirect; the same each time."""
    with Creator(path).config_indexing(False, "eng") as creator:
        creator.set_mainpath("A0")
        for key, value in (("Title", "Made world"), ("Name", f"made_{articles}"), ("Date", "2026-01-01"),
                           ("Language", "eng"), ("Creator", "nobody"), ("Publisher", "nobody"),
                           ("Description", "Made articles and pictures"), ("License", "CC0")):  # fmt: skip
            creator.add_metadata(key, value)
        for number in range(articles):
            rng = np.random.default_rng([7, number])
            title = title_of(number)
            creator.add_item(_Entry(f"A{number}", title, "text/html", page(title, number, rng), front=True))
            creator.add_item(_Entry(f"I/{number}.webp", "", "image/webp", picture(rng), front=False))
            creator.add_redirection(f"R{number}", f"{title} (other name)", f"A{number}", {Hint.FRONT_ARTICLE: 1})
    return path


def title_of(number: int) -> str:
    """Return the title of an article."""
    first, second = WORDS[number % len(WORDS)], WORDS[number // len(WORDS) % len(WORDS)]
    return f"{first.capitalize()} {second} {number}"


def page(title: str, number: int, rng: np.random.Generator) -> bytes:
    """Return the HTML of an article: lead, sections, and a figure with its caption."""
    figure = (f'<figure><img src="I/{number}.webp" width="{WIDTH}" height="{HEIGHT}">'
              f"<figcaption>The {title.lower()} seen from the south</figcaption></figure>")  # fmt: skip
    body = [f"<p><b>{title}</b> {' '.join(sentences(rng))}</p>", figure]
    for _ in range(PARAGRAPHS // 3):
        body.append(f"<h2>{WORDS[int(rng.integers(len(WORDS)))].capitalize()}</h2>")
        body += [f"<p>{' '.join(sentences(rng))}</p>" for _ in range(3)]
    return f"<html><head><title>{title}</title></head><body>{''.join(body)}</body></html>".encode()


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Yield the sentences of a paragraph."""
    for _ in range(SENTENCES):
        words = [WORDS[index] for index in rng.integers(len(WORDS), size=int(rng.integers(8, 18)))]
        yield f"{' '.join(words).capitalize()}."


def picture(rng: np.random.Generator) -> bytes:
    """Return a random WebP picture of smooth shapes."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 6, (HEIGHT, WIDTH, 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(soft) + fine, 0, 255).astype(np.uint8)).save(stream, "WEBP", quality=50)
    return stream.getvalue()
