"""MediaWiki's XML dumps (pages-articles, .xml, .xml.bz2, .xml.gz): texts and redirects, no pictures.

The format: https://www.mediawiki.org/wiki/Help:Export#Export_format. Pages are cut out by their tags, which no text
can hold unescaped, and parsed one by one, so that no declaration reaches the parser and memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from gog_edge.errors import SourceError
from gog_edge.indexing.drafts import ArticleDraft, Item, RedirectDraft, Skipped
from gog_edge.indexing.sources.base import Chunk
from gog_edge.indexing.sources.files import (
    MAX_PIECE_BYTES,
    OneFile,
    PackedFile,
    date_of,
    file_snapshot,
    group,
)
from gog_edge.indexing.sources.licences import UNKNOWN, wikipedia_text
from gog_edge.indexing.sources.paragraphs import one_line
from gog_edge.indexing.sources.wikitext import HIDDEN_LINKS, MAX_CHARACTERS, read_wikitext
from gog_edge.retrieval.manifest import Snapshot

_OPEN, _CLOSE = b"<page>", b"</page>"
_BLOCK = 2**20
_HEAD_BYTES = 2**18  # siteinfo ends long before
_SILENT_NAMESPACES = ("6", "14", "-2")  # files, categories, media: links to them show no text


@dataclass(frozen=True)
class MediaWikiSource(OneFile):
    """Articles and redirects of the main namespace. `licence` holds for wikis other than Wikipedia."""

    path: Path
    licence: str | None = None

    def snapshot(self) -> Snapshot:
        """Raises SourceError when it does not begin like a dump, or there is no such file."""
        plain = file_snapshot(self.path, self._licence)
        return replace(plain, name=self._site.findtext("dbname") or self._site.findtext("sitename") or plain.name)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Pages as XML; SourceError where the file is damaged."""
        with PackedFile(self.path) as file:
            yield from group(_pages(file), file, start, len)

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """An article or a redirect to a page."""
        for data in chunk.content:
            try:
                page = ElementTree.fromstring(data)
            except ElementTree.ParseError:
                yield Skipped("page is not XML", data[:80].decode("utf-8", "replace"))
                continue
            if page.findtext("ns", "0") == "0":
                yield self._page(page)

    def _page(self, page: ElementTree.Element) -> Item:
        title, redirect = one_line(page.findtext("title", "")), page.find("redirect")
        text = page.findtext("revision/text") or ""
        if not title:
            return Skipped("page has no title", page.findtext("id", ""))
        if redirect is not None:
            return RedirectDraft(title, one_line(redirect.get("title", "")))
        if len(text) > MAX_CHARACTERS:
            return Skipped("article is too large", title)
        paragraphs = tuple(read_wikitext(text, self._hidden))
        return ArticleDraft(title, paragraphs, self._licence) if paragraphs else Skipped("article has no text", title)

    @cached_property
    def _site(self) -> ElementTree.Element:
        """What the dump says of its wiki."""
        with PackedFile(self.path) as file:
            head = file.read(_HEAD_BYTES)
        begin, end = head.find(b"<siteinfo>"), head.find(b"</siteinfo>")
        try:
            if begin < 0 or end < 0:
                raise ValueError("there is no <siteinfo>")
            return ElementTree.fromstring(head[begin:end] + b"</siteinfo>")
        except (ValueError, ElementTree.ParseError) as exc:
            raise SourceError(f"'{self.path}' does not begin like a MediaWiki dump ({exc}); is it "
                              "...-pages-articles.xml.bz2?") from exc

    @cached_property
    def _hidden(self) -> frozenset[str]:
        spaces = self._site.iterfind("namespaces/namespace")
        return HIDDEN_LINKS | {(space.text or "").lower() for space in spaces if space.get("key") in _SILENT_NAMESPACES}

    @cached_property
    def _licence(self) -> str:
        if self.licence:
            return self.licence
        is_wikipedia = ".wikipedia.org/" in (self._site.findtext("base") or "")
        return wikipedia_text(date_of(self.path)) if is_wikipedia else UNKNOWN


def _pages(file: PackedFile) -> Iterator[bytes]:
    """From `<page>` to `</page>`; a page beyond MAX_PIECE_BYTES is cut, and then it does not parse.

    SourceError when the dump ends before its last tag.
    """
    kept = b""
    for block in iter(lambda: file.read(_BLOCK), b""):
        *pages, kept = (kept + block).split(_CLOSE)
        for page in pages:
            begin = page.find(_OPEN)
            if begin >= 0:
                yield page[begin:] + _CLOSE
        if len(kept) > MAX_PIECE_BYTES:
            if _OPEN in kept[:_BLOCK]:
                yield kept[:_BLOCK]
            kept = kept[-len(_CLOSE) :]
    if b"</mediawiki>" not in kept:
        raise SourceError(f"'{file.path}' ends before its last tag, </mediawiki>: it is truncated; fetch it again. "
                          "What was read before is kept")
