"""InfoSeek's and OVEN's Wiki6M_ver_1_0.jsonl(.gz): a page of Wikipedia to a line, with one image's address.

Fields as in https://github.com/open-vision-language/oven: wikidata_id, wikipedia_title, wikipedia_content,
wikipedia_summary, wikipedia_image_url.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import UNKNOWN, ArticleDraft, Chunk, ImageDraft, Item, Skipped, wikipedia_text
from gog_edge.indexing.sources.files import ImageFolder, OneFile, PackedFile, file_snapshot, group
from gog_edge.indexing.sources.text import one_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

TAKEN = "2022-10-01"  # the date of Wikipedia in it


@dataclass(frozen=True)
class Wiki6mSource(OneFile):
    """Articles from lines of JSON, each with its image where the folder has it."""

    path: Path
    images: ImageFolder
    licence: str = wikipedia_text(TAKEN)

    def snapshot(self) -> Snapshot:
        """Raises SourceError when the first line is none of its kind, or there is no such file."""
        self.images.check()
        with PackedFile(self.path) as file:
            if not is_wiki6m(next(file.lines(), b"")):
                raise SourceError(f"'{self.path}' does not begin with a line of Wiki6M (no wikidata_id and "
                                  "wikipedia_title); is it the file Wiki6M_ver_1_0.jsonl.gz?")
        plain = file_snapshot(self.path, self.licence)
        return Snapshot(plain.name, TAKEN, plain.uuid, plain.sha256, plain.licence)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Lines; SourceError where the file is damaged."""
        with PackedFile(self.path) as file:
            yield from group(file.lines(), file, start, len)

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """An article and its image to a line."""
        for line in chunk.content:
            row = json_object(line)
            title = one_line(str(row.get("wikipedia_title") or ""))
            if title:
                yield from self._page(title, row)
            else:
                yield Skipped("line is no page", line[:80].decode("utf-8", "replace"))

    def _page(self, title: str, row: dict[str, Any]) -> Iterator[Item]:
        key = one_line(str(row.get("wikidata_id") or "")) or title
        text = row.get("wikipedia_content") or row.get("wikipedia_summary") or ""
        paragraphs = tuple(split_paragraphs("", str(text)))
        if not paragraphs:
            yield Skipped("article has no text", title)
            return
        yield ArticleDraft(title, paragraphs, self.licence, key=key)
        if address := one_line(str(row.get("wikipedia_image_url") or "")):
            image = self.images.thumbnail(address)
            yield image if isinstance(image, Skipped) else ImageDraft(image, title, UNKNOWN, address, (key,), True)


def json_object(line: bytes) -> dict[str, Any]:
    """A line of JSON; nothing where it is none, or no object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_wiki6m(line: bytes) -> bool:
    """Whether this is a line of such a file."""
    return {"wikidata_id", "wikipedia_title"} <= json_object(line).keys()
