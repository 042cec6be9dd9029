"""Reads the knowledge base of Encyclopedic VQA: one JSON object of two million pages, keyed by address (.json or .zip).

Fields: https://github.com/google-research/google-research/tree/master/encyclopedic_vqa: title, section_titles,
section_texts, image_urls, image_reference_descriptions, image_section_indices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    ImageRecord,
    Present,
    Record,
    Skipped,
    Used,
)
from gog_edge.indexing.sources.files import (
    MAX_PIECE_BYTES,
    CompressedFile,
    SingleFileSource,
    damage_message,
    group_into_chunks,
    snapshot_of_file,
)
from gog_edge.indexing.sources.images import ImageFolder
from gog_edge.indexing.sources.text import MAX_TITLE, clean_line, split_paragraphs, text_value
from gog_edge.retrieval.manifest import Snapshot

LICENCE = "CC BY-SA 3.0"  # of Wikipedia's texts when the data set was created
ENTRY, IMAGE = "entry", "image"  # kinds of items
MAX_DEPTH = 64  # levels; the data set has four
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)
_BLOCK = 2**18  # bytes


@dataclass(frozen=True)
class EncyclopedicVqaSource(SingleFileSource):
    """The pages of the file, with the images of their sections if the folder contains them."""

    path: Path
    images: ImageFolder
    licence: str = LICENCE

    def snapshot(self) -> Snapshot:
        """Describe the file.

        Raises:
            SourceError: it does not exist, or its first entry is not a page.
        """
        self.images.check()
        with CompressedFile(self.path) as file:
            first = next(_pages(file), None)
        if first is None or not _is_page(first[1]):
            raise SourceError(f"the first entry of '{self.path}' is not a page (title, section_titles, section_texts); "
                              "give the file encyclopedic_kb_wiki.json")
        return snapshot_of_file(self.path, self.licence)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield pages as (address, object).

        Raises:
            SourceError: the file is damaged.
        """
        with CompressedFile(self.path) as file:
            yield from group_into_chunks(_pages(file), file, start, _length)

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article and its images for each page."""
        yield Present(ENTRY, len(chunk.content))
        for address, page in chunk.content:
            if _is_page(page):
                yield from self._records(clean_line(address), page)
            else:
                yield Skipped("entry is not a page", clean_line(address), ENTRY)

    def _records(self, address: str, page: dict[str, Any]) -> Iterator[Record]:
        title = clean_line(page["title"]) or address
        sections = zip_longest(page["section_titles"], page["section_texts"], fillvalue="")
        paragraphs = tuple(
            paragraph
            for name, text in sections
            for paragraph in split_paragraphs(_section(name, page["title"]), text_value(text))
        )
        if not paragraphs:
            yield Skipped("article has no text", address, ENTRY)
            return
        yield ArticleRecord(title, paragraphs, self.licence, key=address)
        yield from self._images(address, page)
        yield Used(ENTRY, address, address)

    def _images(self, article: str, page: dict[str, Any]) -> Iterator[Record]:
        captions, sections = (_list(page.get(name)) for name in
                              ("image_reference_descriptions", "image_section_indices"))
        lead = sections.index(0) if 0 in sections else None  # the first image of the lead section
        addresses = _list(page.get("image_urls"))
        yield Present(IMAGE, len(addresses))
        for number, raw in enumerate(addresses):
            address = clean_line(text_value(raw))
            image = self.images.thumbnail(address) if address else Skipped("image address is not a text", article)
            if isinstance(image, Skipped):
                yield replace(image, kind=IMAGE)
                continue
            caption = clean_line(text_value(captions[number])) if number < len(captions) else ""
            yield ImageRecord(image, caption, UNKNOWN_LICENCE, address, (article,), number == lead)
            yield Used(IMAGE, address, article)


def _is_page(value: Any) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("title"), str)
            and all(isinstance(value.get(name), list) for name in ("section_titles", "section_texts")))


def _section(name: Any, title: str) -> str:
    """Return the title of a section; empty for the lead section, which has the title of the page."""
    return "" if name == title else clean_line(text_value(name))[:MAX_TITLE]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pages(file: CompressedFile) -> Iterator[tuple[str, Any]]:
    try:
        yield from ijson.kvitems(_ShallowFile(file), "", use_float=True, buf_size=_BLOCK)
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as exc:
        raise SourceError(damage_message(file, exc)) from exc


class _ShallowFile:
    """A JSON file that is read up to a limit of nesting, beyond which the parser would need gigabytes."""

    def __init__(self, file: CompressedFile) -> None:
        self._file, self._depth, self._string = file, 0, b""  # the beginning of a string that is not complete

    def read(self, size: int) -> bytes:
        """Return the next bytes. Raises ValueError if they are nested too deeply."""
        data = self._file.read(size)
        text = _STRING.sub(b"", self._string + data)
        start = text.find(b'"')
        self._string = text[start:] if start >= 0 else b""
        if len(self._string) > MAX_PIECE_BYTES:
            raise ValueError(f"a text has more than {MAX_PIECE_BYTES} bytes")
        brackets = np.frombuffer(text[:start] if start >= 0 else text, np.uint8)
        steps = np.isin(brackets, _OPENING).astype(np.int64) - np.isin(brackets, _CLOSING)
        depths = self._depth + np.cumsum(steps)
        if len(depths):
            self._depth = int(depths[-1])
            if depths.max() > MAX_DEPTH:
                raise ValueError(f"the JSON nests more than {MAX_DEPTH} levels")
        return data


def _length(piece: tuple[str, Any]) -> int:
    """Return the approximate size of a page in bytes."""
    texts = piece[1].get("section_texts") if isinstance(piece[1], dict) else None
    return sum(len(text) for text in _list(texts) if isinstance(text, str))
