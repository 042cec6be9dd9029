"""Wikitext -> paragraphs in sections: what is drawn by templates, tables and files is left out."""

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
from gog_edge.indexing.sources.base import UNKNOWN, ArticleDraft, Chunk, Item, RedirectDraft, Skipped, wikipedia_text
from gog_edge.indexing.sources.files import (
    MAX_PIECE_BYTES,
    OneFile,
    PackedFile,
    date_of,
    file_snapshot,
    group,
)
from gog_edge.indexing.sources.html_rules import DROPPED_SECTIONS
from gog_edge.indexing.sources.text import MAX_TITLE, clean_lines, one_line, split_text
from gog_edge.retrieval.manifest import Snapshot

MAX_CHARACTERS = 4 * 2**20  # twice what MediaWiki stores of a page
HIDDEN_LINKS = frozenset(("file", "image", "category", "media"))  # namespaces, in lower case; every wiki knows these
_DROPPED_TAGS = frozenset(
    (
        "ref", "references", "gallery", "table", "math", "chem", "ce", "timeline", "syntaxhighlight", "source", "score",
        "imagemap", "graph", "templatestyles", "style", "mapframe", "maplink", "hiero", "indicator", "section",
        "inputbox", "categorytree",
    )
)  # fmt: skip
_SWITCHES = re.compile(r"__[A-Z]+__")
_BREAK = re.compile(r"\n\s*\n")
_REMAINS = re.compile(r"^(?:[{|!].*|[:;*#]+|\s+)", re.MULTILINE)  # of tables not closed; the marks of lists


def read_wikitext(text: str, hidden: Collection[str] = HIDDEN_LINKS) -> Iterator[tuple[str, str]]:
    """(section, paragraph) in reading order. `hidden` are the namespaces, in lower case, whose links show no text."""
    path: list[tuple[int, str]] = []
    dropped = 0
    loose: list[str] = []
    for node in mwparserfromhell.parse(text, skip_style_tags=True).nodes:
        if not isinstance(node, mwparserfromhell.nodes.Heading):
            loose.append(_shown(node, hidden))
            continue
        yield from () if dropped else _paragraphs(path, loose)
        loose = []
        if dropped and node.level > dropped:
            continue
        title = one_line(_text(node.title, hidden))[:MAX_TITLE]
        path = [(level, name) for level, name in path if level < node.level] + [(node.level, title)]
        dropped = node.level if title.casefold() in DROPPED_SECTIONS else 0
    yield from () if dropped else _paragraphs(path, loose)


def _paragraphs(path: list[tuple[int, str]], parts: list[str]) -> Iterator[tuple[str, str]]:
    section = " / ".join(title for _, title in path if title)
    for raw in _BREAK.split(_SWITCHES.sub("", "".join(parts))):
        text = clean_lines(_REMAINS.sub("", raw))
        yield from ((section, piece) for piece in split_text(text))


def _text(code: Any, hidden: Collection[str]) -> str:
    return "" if code is None else "".join(_shown(node, hidden) for node in code.nodes)


def _shown(node: Any, hidden: Collection[str]) -> str:
    """What a reader sees of a node."""
    kind = type(node).__name__
    if kind == "Text":
        return str(node.value).replace("'''", "").replace("''", "")
    if kind == "Wikilink":
        return _link(node, hidden)
    if kind == "Tag":
        return _tag(node, hidden)
    if kind == "ExternalLink":
        return _text(node.title, hidden) if node.brackets else str(node.url)
    if kind == "HTMLEntity":
        return str(node.normalize())
    return ""  # templates, arguments, comments


def _link(node: Any, hidden: Collection[str]) -> str:
    name = str(node.title).strip()
    if name.partition(":")[0].strip().lower() in hidden:
        return ""
    return _text(node.text, hidden) if node.text is not None else name.lstrip(":")


def _tag(node: Any, hidden: Collection[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name in ("br", "hr"):
        return "\n"
    return _text(node.contents, hidden)


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
