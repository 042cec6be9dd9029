"""Reads the knowledge base of InfoSeek and OVEN, Wiki6M_ver_1_0.jsonl(.gz): one Wikipedia page with one image per line.

Fields: https://github.com/open-vision-language/oven: wikidata_id, wikipedia_title, wikipedia_content,
wikipedia_summary, wikipedia_image_url.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    wikipedia_text_licence,
)
from gog_edge.indexing.sources.files import CompressedFile, SingleFileSource, group_into_chunks, snapshot_of_file
from gog_edge.indexing.sources.images import ImageFolder
from gog_edge.indexing.sources.text import clean_line, split_paragraphs, text_value
from gog_edge.retrieval.manifest import Snapshot

LINE, IMAGE = "line", "image"  # kinds of items
WIKIPEDIA_DATE = "2022-10-01"  # of the Wikipedia dump that it was made from


@dataclass(frozen=True)
class Wiki6mSource(SingleFileSource):
    """The pages of the file, each with its image if the folder contains it."""

    path: Path
    images: ImageFolder
    licence: str = wikipedia_text_licence(WIKIPEDIA_DATE)

    def snapshot(self) -> Snapshot:
        """Describe the file.

        Raises:
            SourceError: it does not exist, or its first line is not a page.
        """
        self.images.check()
        with CompressedFile(self.path) as file:
            if not is_wiki6m(next(file.lines(), b"")):
                raise SourceError(f"the first line of '{self.path}' is not a page of Wiki6M (wikidata_id and "
                                  "wikipedia_title are missing); give the file Wiki6M_ver_1_0.jsonl.gz")
        return replace(snapshot_of_file(self.path, self.licence), date=WIKIPEDIA_DATE)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield lines.

        Raises:
            SourceError: the file is damaged.
        """
        with CompressedFile(self.path) as file:
            yield from group_into_chunks(file.lines(), file, start, len)

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article and its image for each line."""
        yield Present(LINE, len(chunk.content))
        for line in chunk.content:
            page = _json_object(line)
            title = clean_line(text_value(page.get("wikipedia_title")))
            if title:
                yield from self._records(title, page)
            else:
                yield Skipped("line is not a page", line[:80].decode("utf-8", "replace"), LINE)

    def _records(self, title: str, page: dict[str, Any]) -> Iterator[Record]:
        key = clean_line(text_value(page.get("wikidata_id"))) or title
        address = clean_line(text_value(page.get("wikipedia_image_url")))
        text = text_value(page.get("wikipedia_content")) or text_value(page.get("wikipedia_summary"))
        paragraphs = tuple(split_paragraphs("", text))
        if not paragraphs:
            yield Skipped("article has no text", title, LINE)
            return
        yield ArticleRecord(title, paragraphs, self.licence, key=key)
        if page.get("wikipedia_image_url"):
            yield Present(IMAGE)
        if address:
            image = self.images.thumbnail(address)
            if isinstance(image, Skipped):
                yield replace(image, kind=IMAGE)
            else:
                yield ImageRecord(image, title, UNKNOWN_LICENCE, address, (key,), True)
                yield Used(IMAGE, address, key)
        elif page.get("wikipedia_image_url"):
            yield Skipped("image address is not a text", title, IMAGE)
        yield Used(LINE, title, key)


def is_wiki6m(line: bytes) -> bool:
    """Return whether a line is a page of Wiki6M."""
    return {"wikidata_id", "wikipedia_title"} <= _json_object(line).keys()


def _json_object(line: bytes) -> dict[str, Any]:
    """Parse a line; return an empty object if it is not a JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
