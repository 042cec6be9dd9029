"""Reads the knowledge base of Encyclopedic VQA: one JSON object of two million pages, keyed by address (.json or .zip).

Fields: https://github.com/google-research/google-research/tree/master/encyclopedic_vqa: title, section_titles,
section_texts, image_urls, image_reference_descriptions, image_section_indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ijson

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import UNKNOWN_LICENCE, ArticleRecord, Chunk, ImageRecord, Record, Skipped
from gog_edge.indexing.sources.files import (
    CompressedFile,
    SingleFileSource,
    damage_message,
    group_into_chunks,
    snapshot_of_file,
)
from gog_edge.indexing.sources.images import ImageFolder
from gog_edge.indexing.sources.text import MAX_TITLE, clean_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

LICENCE = "CC BY-SA 3.0"  # of Wikipedia's texts when the data set was created
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
        for address, page in chunk.content:
            if _is_page(page):
                yield from self._records(clean_line(address), page)
            else:
                yield Skipped("entry is not a page", clean_line(address))

    def _records(self, address: str, page: dict[str, Any]) -> Iterator[Record]:
        title = clean_line(str(page["title"])) or address
        sections = zip_longest(page["section_titles"], page["section_texts"], fillvalue="")
        paragraphs = tuple(
            paragraph
            for name, text in sections
            for paragraph in split_paragraphs(_section(name, page["title"]), str(text))
        )
        if not paragraphs:
            yield Skipped("article has no text", address)
            return
        yield ArticleRecord(title, paragraphs, self.licence, key=address)
        yield from self._images(address, page)

    def _images(self, article: str, page: dict[str, Any]) -> Iterator[Record]:
        captions, sections = (_list(page.get(name)) for name in
                              ("image_reference_descriptions", "image_section_indices"))
        lead = sections.index(0) if 0 in sections else None  # the first image of the lead section
        for number, raw in enumerate(_list(page.get("image_urls"))):
            address = clean_line(str(raw))
            image = self.images.thumbnail(address)
            if isinstance(image, Skipped):
                yield image
                continue
            caption = clean_line(str(captions[number] or "")) if number < len(captions) else ""
            yield ImageRecord(image, caption, UNKNOWN_LICENCE, address, (article,), number == lead)


def _is_page(value: Any) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("title"), str)
            and all(isinstance(value.get(name), list) for name in ("section_titles", "section_texts")))


def _section(name: Any, title: str) -> str:
    """Return the title of a section; empty for the lead section, which has the title of the page."""
    return "" if name == title else clean_line(str(name))[:MAX_TITLE]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pages(file: CompressedFile) -> Iterator[tuple[str, Any]]:
    try:
        yield from ijson.kvitems(file, "", use_float=True, buf_size=_BLOCK)
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as exc:
        raise SourceError(damage_message(file, exc)) from exc


def _length(piece: tuple[str, Any]) -> int:
    """Return the approximate size of a page in bytes."""
    texts = piece[1].get("section_texts") if isinstance(piece[1], dict) else None
    return sum(len(text) for text in _list(texts) if isinstance(text, str))
