"""Reads MediaWiki XML dumps: the articles of the main namespace as plain paragraphs, and redirects.

Templates, tables and files are left out. Format: https://www.mediawiki.org/wiki/Help:Export#Export_format.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mwparserfromhell

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    Record,
    RedirectRecord,
    Skipped,
    wikipedia_text_licence,
)
from gog_edge.indexing.sources.files import (
    MAX_PIECE_BYTES,
    CompressedFile,
    SingleFileSource,
    group_into_chunks,
    snapshot_date,
    snapshot_of_file,
)
from gog_edge.indexing.sources.text import MAX_TITLE, SKIPPED_SECTIONS, clean_line, clean_lines, split_text
from gog_edge.retrieval.manifest import Snapshot

MAX_CHARACTERS = 4 * 2**20  # of a page; MediaWiki stores at most half of this
HIDDEN_LINKS = frozenset(("file", "image", "category", "media"))  # canonical namespaces, in lower case
_SKIPPED_TAGS = frozenset(
    (
        "ref", "references", "gallery", "table", "math", "chem", "ce", "timeline", "syntaxhighlight", "source", "score",
        "imagemap", "graph", "templatestyles", "style", "mapframe", "maplink", "hiero", "indicator", "section",
        "inputbox", "categorytree",
    )
)  # fmt: skip
_BEHAVIOUR_SWITCHES = re.compile(r"__[A-Z]+__")
_BLANK_LINE = re.compile(r"\n\s*\n")
_LINE_MARKS = re.compile(r"^(?:[{|!].*|[:;*#]+|\s+)", re.MULTILINE)  # unclosed tables, list marks


# --- wikitext -----------------------------------------------------------------------------------


def parse_wikitext(text: str, hidden: Collection[str] = HIDDEN_LINKS) -> Iterator[tuple[str, str]]:
    """Yield (section, paragraph) in reading order.

    Args:
        text: wikitext of a page.
        hidden: namespaces, in lower case, whose links display no text.
    """
    path: list[tuple[int, str]] = []
    skipped_level = 0
    parts: list[str] = []
    for node in mwparserfromhell.parse(text, skip_style_tags=True).nodes:
        if not isinstance(node, mwparserfromhell.nodes.Heading):
            parts.append(_node_text(node, hidden))
            continue
        yield from () if skipped_level else _paragraphs(path, parts)
        parts = []
        if skipped_level and node.level > skipped_level:
            continue
        title = clean_line(_code_text(node.title, hidden))[:MAX_TITLE]
        path = [(level, name) for level, name in path if level < node.level] + [(node.level, title)]
        skipped_level = node.level if title.casefold() in SKIPPED_SECTIONS else 0
    yield from () if skipped_level else _paragraphs(path, parts)


def _paragraphs(path: list[tuple[int, str]], parts: list[str]) -> Iterator[tuple[str, str]]:
    section = " / ".join(title for _, title in path if title)
    for raw in _BLANK_LINE.split(_BEHAVIOUR_SWITCHES.sub("", "".join(parts))):
        text = clean_lines(_LINE_MARKS.sub("", raw))
        yield from ((section, piece) for piece in split_text(text))


def _code_text(code: Any, hidden: Collection[str]) -> str:
    return "" if code is None else "".join(_node_text(node, hidden) for node in code.nodes)


def _node_text(node: Any, hidden: Collection[str]) -> str:
    """Return the text that a reader of the rendered page sees."""
    kind = type(node).__name__
    if kind == "Text":
        return str(node.value).replace("'''", "").replace("''", "")
    if kind == "Wikilink":
        return _link_text(node, hidden)
    if kind == "Tag":
        return _tag_text(node, hidden)
    if kind == "ExternalLink":
        return _code_text(node.title, hidden) if node.brackets else str(node.url)
    if kind == "HTMLEntity":
        return str(node.normalize())
    return ""  # templates, arguments, comments


def _link_text(node: Any, hidden: Collection[str]) -> str:
    name = str(node.title).strip()
    if name.partition(":")[0].strip().lower() in hidden:
        return ""
    return _code_text(node.text, hidden) if node.text is not None else name.lstrip(":")


def _tag_text(node: Any, hidden: Collection[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _SKIPPED_TAGS:
        return ""
    if name in ("br", "hr"):
        return "\n"
    return _code_text(node.contents, hidden)


# --- dumps --------------------------------------------------------------------------------------

_OPEN, _CLOSE = b"<page>", b"</page>"
_BLOCK = 2**20
_HEAD_BYTES = 2**18  # <siteinfo> ends far before
_HIDDEN_NAMESPACES = ("6", "14", "-2")  # keys of files, categories and media


@dataclass(frozen=True)
class MediaWikiSource(SingleFileSource):
    """The articles and redirects of a dump. `licence` applies to wikis other than Wikipedia."""

    path: Path
    licence: str | None = None

    def snapshot(self) -> Snapshot:
        """Describe the dump.

        Raises:
            SourceError: the file does not exist, or does not begin with the header of a dump.
        """
        plain = snapshot_of_file(self.path, self._licence)
        return replace(plain, name=self._site.findtext("dbname") or self._site.findtext("sitename") or plain.name)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield pages as XML.

        Raises:
            SourceError: the file is damaged or truncated.
        """
        with CompressedFile(self.path) as file:
            yield from group_into_chunks(_pages(file), file, start, len)

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article or a redirect for each page of the main namespace."""
        for data in chunk.content:
            try:
                page = ElementTree.fromstring(data)
            except ElementTree.ParseError:
                yield Skipped("page is not XML", data[:80].decode("utf-8", "replace"))
                continue
            if page.findtext("ns", "0") == "0":
                yield self._page(page)

    def _page(self, page: ElementTree.Element) -> Record:
        title, redirect = clean_line(page.findtext("title", "")), page.find("redirect")
        text = page.findtext("revision/text") or ""
        if not title:
            return Skipped("page has no title", page.findtext("id", ""))
        if redirect is not None:
            return RedirectRecord(title, clean_line(redirect.get("title", "")))
        if len(text) > MAX_CHARACTERS:
            return Skipped("article is too large", title)
        paragraphs = tuple(parse_wikitext(text, self._hidden))
        return ArticleRecord(title, paragraphs, self._licence) if paragraphs else Skipped("article has no text", title)

    @cached_property
    def _site(self) -> ElementTree.Element:
        """Return the <siteinfo> element of the header. Raises SourceError."""
        with CompressedFile(self.path) as file:
            head = file.read(_HEAD_BYTES)
        begin, end = head.find(b"<siteinfo>"), head.find(b"</siteinfo>")
        try:
            if begin < 0 or end < 0:
                raise ValueError("<siteinfo> is missing")
            return ElementTree.fromstring(head[begin:end] + b"</siteinfo>")
        except (ValueError, ElementTree.ParseError) as exc:
            raise SourceError(f"'{self.path}' does not begin with the header of a MediaWiki dump ({exc}); give a file "
                              "...-pages-articles.xml.bz2") from exc

    @cached_property
    def _hidden(self) -> frozenset[str]:
        spaces = self._site.iterfind("namespaces/namespace")
        return HIDDEN_LINKS | {(space.text or "").lower() for space in spaces if space.get("key") in _HIDDEN_NAMESPACES}

    @cached_property
    def _licence(self) -> str:
        if self.licence:
            return self.licence
        is_wikipedia = ".wikipedia.org/" in (self._site.findtext("base") or "")
        return wikipedia_text_licence(snapshot_date(self.path)) if is_wikipedia else UNKNOWN_LICENCE


def _pages(file: CompressedFile) -> Iterator[bytes]:
    """Yield the bytes from each `<page>` to its `</page>`; longer pages are truncated to MAX_PIECE_BYTES.

    Raises:
        SourceError: the dump ends before its closing tag.
    """
    rest = b""
    for block in iter(lambda: file.read(_BLOCK), b""):
        *pages, rest = (rest + block).split(_CLOSE)
        for page in pages:
            begin = page.find(_OPEN)
            if begin >= 0:
                yield page[begin:] + _CLOSE
        if len(rest) > MAX_PIECE_BYTES:
            if _OPEN in rest[:_BLOCK]:
                yield rest[:_BLOCK]
            rest = rest[-len(_CLOSE) :]
    if b"</mediawiki>" not in rest:
        raise SourceError(f"'{file.path}' ends before its closing tag </mediawiki>: it is truncated; download it "
                          "again. What was read before this position is kept")
