"""Encyclopedic VQA's knowledge base: one JSON object of two million pages, keyed by address (as .json or its .zip).

Fields as in https://github.com/google-research/google-research/tree/master/encyclopedic_vqa: title, section_titles,
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
from gog_edge.indexing.sources.base import UNKNOWN, ArticleDraft, Chunk, ImageDraft, Item, Skipped
from gog_edge.indexing.sources.files import ImageFolder, OneFile, PackedFile, file_snapshot, group
from gog_edge.indexing.sources.text import MAX_TITLE, one_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

LICENCE = "CC BY-SA 3.0"  # of Wikipedia's texts when it was made
_BLOCK = 2**18  # bytes


@dataclass(frozen=True)
class EncyclopedicVqaSource(OneFile):
    """Articles with the images of their sections, where the folder has them."""

    path: Path
    images: ImageFolder
    licence: str = LICENCE

    def snapshot(self) -> Snapshot:
        """Raises SourceError when it does not begin with a page, or there is no such file."""
        self.images.check()
        with PackedFile(self.path) as file:
            first = next(_pages(file), None)
        if first is None or not is_page(first[1]):
            raise SourceError(f"'{self.path}' does not begin with a page (title, section_titles, section_texts); is it "
                              "the file encyclopedic_kb_wiki.json?")
        return file_snapshot(self.path, self.licence)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Pages as (address, object); SourceError where the file is damaged."""
        with PackedFile(self.path) as file:
            yield from group(_pages(file), file, start, _length)

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """An article and its images to a page."""
        for address, page in chunk.content:
            if is_page(page):
                yield from self._page(one_line(address), page)
            else:
                yield Skipped("entry is no page", one_line(address))

    def _page(self, address: str, page: dict[str, Any]) -> Iterator[Item]:
        title = one_line(str(page["title"])) or address
        sections = zip_longest(page["section_titles"], page["section_texts"], fillvalue="")
        paragraphs = tuple(
            paragraph
            for name, text in sections
            for paragraph in split_paragraphs(_section(name, page["title"]), str(text))
        )
        if not paragraphs:
            yield Skipped("article has no text", address)
            return
        yield ArticleDraft(title, paragraphs, self.licence, key=address)
        yield from self._images(address, page)

    def _images(self, article: str, page: dict[str, Any]) -> Iterator[Item]:
        captions, places = (_list(page.get(name)) for name in ("image_reference_descriptions", "image_section_indices"))
        lead = 0 in places and places.index(0)  # the first image of the first section shows what the page is about
        for number, raw in enumerate(_list(page.get("image_urls"))):
            address = one_line(str(raw))
            image = self.images.thumbnail(address)
            if isinstance(image, Skipped):
                yield image
                continue
            caption = one_line(str(captions[number] or "")) if number < len(captions) else ""
            yield ImageDraft(image, caption, UNKNOWN, address, (article,), lead is not False and number == lead)


def is_page(value: Any) -> bool:
    """Whether this is an entry of such a file."""
    return (isinstance(value, dict) and isinstance(value.get("title"), str)
            and all(isinstance(value.get(name), list) for name in ("section_titles", "section_texts")))


def _section(name: Any, title: str) -> str:
    """The lead's section bears the page's title, and has none here."""
    return "" if name == title else one_line(str(name))[:MAX_TITLE]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pages(file: PackedFile) -> Iterator[tuple[str, Any]]:
    try:
        yield from ijson.kvitems(file, "", use_float=True, buf_size=_BLOCK)
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as exc:
        raise SourceError(f"'{file.path}' is truncated or damaged before byte {file.position} of {file.size} ({exc}); "
                          "fetch it again, and compare its checksum. What was read before is kept") from exc


def _length(piece: tuple[str, Any]) -> int:
    """About how many bytes a page takes."""
    texts = piece[1].get("section_texts") if isinstance(piece[1], dict) else None
    return sum(len(text) for text in _list(texts) if isinstance(text, str))
