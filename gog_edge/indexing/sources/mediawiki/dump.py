"""Reads the pages of MediaWiki XML dumps: https://www.mediawiki.org/wiki/Help:Export#Export_format."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    Present,
    Record,
    RedirectRecord,
    Skipped,
    Used,
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
from gog_edge.indexing.sources.mediawiki.site import Site, clean_title, read_site, redirect_target
from gog_edge.indexing.sources.mediawiki.wikitext import parse_wikitext
from gog_edge.indexing.sources.text import clean_line
from gog_edge.retrieval.manifest import Snapshot

MAX_CHARACTERS = 4 * 2**20  # of a page; MediaWiki stores at most half of this
_OPEN, _CLOSE = b"<page>", b"</page>"
_REVISION = b"<revision>"
_BLOCK = 2**20
_COMPACT_BYTES = 8 * 2**20  # of a page with its history, from which older revisions are dropped while it is read
_HEAD_BYTES = 2**18  # <siteinfo> ends far before
_TIMESTAMP, _ID = re.compile(rb"<timestamp>\s*([^<]*?)\s*</timestamp>"), re.compile(rb"<id>\s*(\d+)\s*</id>")
_DELETED = re.compile(rb"<text\b[^<>]*\bdeleted=")
_LANGUAGE = re.compile(rb"<mediawiki\b[^<>]*\bxml:lang=[\"']([\w-]+)")
_SPACE = "{http://www.w3.org/XML/1998/namespace}space"  # attribute of texts, xml:space
_WIKITEXT = frozenset(("", "wikitext"))  # content models that are read
_ARTICLES = "0"  # key of the main namespace
PAGE = "page"  # the items that are counted


@dataclass(frozen=True)
class MediaWikiSource(SingleFileSource):
    """The articles and redirects of a dump. Every page of it is an article, a redirect or skipped with a reason.

    `licence` applies to wikis other than Wikipedia. `language` may name the variant to choose in wikis that are written
    in several, such as zh-hant; it is ignored for other languages than the wiki's.
    """

    path: Path
    licence: str | None = None
    language: str = ""

    def snapshot(self) -> Snapshot:
        """Describe the dump.

        Raises:
            SourceError: the file does not exist, or does not begin with the header of a dump.
        """
        plain = snapshot_of_file(self.path, self._licence)
        return replace(plain,
            name=self._siteinfo.findtext("dbname") or self._siteinfo.findtext("sitename") or plain.name)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield pages as XML.

        Raises:
            SourceError: the file is damaged or truncated.
        """
        with CompressedFile(self.path) as file:
            yield from group_into_chunks(_pages(file), file, start, len)

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article, a redirect, or the reason why it is skipped, for each page."""
        yield Present(PAGE, len(chunk.content))
        for data in chunk.content:
            try:
                record = self._record(ElementTree.fromstring(data))
            except (ElementTree.ParseError, ValueError):  # ValueError: an undefined encoding
                record = _skipped("page is not XML", data[:80].decode("utf-8", "replace"))
            yield record
            if isinstance(record, ArticleRecord):
                yield Used(PAGE, record.title, article=record.identity)

    def _record(self, page: ElementTree.Element) -> Record:
        title = clean_line(page.findtext("title", ""))
        space = (page.findtext("ns") or self._site.namespace_key(title)).strip()  # <ns> is missing before 2012
        if not title:
            return _skipped("page has no title", page.findtext("id", ""))
        if space != _ARTICLES:
            return _skipped(f"page is in the namespace {self._site.namespaces.get(space) or space}", title)
        revision = page.find("revision")
        redirect = page.find("redirect")
        if redirect is not None and redirect.get("title"):
            return self._redirect(title, redirect.get("title", ""))
        if revision is None:
            return _skipped("page has no revision", title)
        model = (revision.findtext("model") or "").strip()
        if model not in _WIKITEXT:
            return _skipped(f"content model is {model}", title)
        text = revision.find("text")
        if text is None or not (text.text or "").strip():
            return _skipped(_why_empty(text), title)
        return self._page(title, text.text or "")

    def _page(self, title: str, text: str) -> Record:
        if (target := redirect_target(text)) is not None:
            return self._redirect(title, target)
        if len(text) > MAX_CHARACTERS:
            return _skipped("article is too large", title)
        paragraphs = tuple(parse_wikitext(text, self._site, title))
        return ArticleRecord(title, paragraphs, self._licence) if paragraphs else _skipped("article has no text", title)

    def _redirect(self, title: str, target: str) -> Record:
        if prefix := self._site.namespace_of(target):
            known = prefix.replace("_", " ") in {name.lower() for name in self._site.namespaces.values()}
            place = "namespace" if known or prefix in self._site.hidden else "wiki"
            return _skipped(f"redirect to another {place}", title)
        article = clean_line(clean_title(target, self._site))
        if not article:
            return _skipped("redirect has no target", title)
        return RedirectRecord(title, article, PAGE) if article != title else _skipped("redirect to itself", title)

    @cached_property
    def _head(self) -> bytes:
        with CompressedFile(self.path) as file:
            return _as_utf8(file.read(_HEAD_BYTES))

    @cached_property
    def _siteinfo(self) -> ElementTree.Element:
        """Return the <siteinfo> element of the header. Raises SourceError."""
        begin, end = self._head.find(b"<siteinfo>"), self._head.find(b"</siteinfo>")
        try:
            if begin < 0 or end < 0:
                raise ValueError("<siteinfo> is missing")
            return ElementTree.fromstring(self._head[begin:end] + b"</siteinfo>")
        except (ValueError, ElementTree.ParseError) as exc:
            raise SourceError(f"'{self.path}' does not begin with the header of a MediaWiki dump ({exc}); give a file "
                              "...-pages-articles.xml.bz2") from exc

    @cached_property
    def _site(self) -> Site:
        found = _LANGUAGE.search(self._head)
        language = found[1].decode() if found else ""
        return read_site(self._siteinfo, language, snapshot_date(self.path), self.language)

    @cached_property
    def _licence(self) -> str:
        if self.licence:
            return self.licence
        is_wikipedia = ".wikipedia.org/" in (self._siteinfo.findtext("base") or "")
        return wikipedia_text_licence(snapshot_date(self.path)) if is_wikipedia else UNKNOWN_LICENCE


def _skipped(reason: str, item: str) -> Skipped:
    return Skipped(reason, item, PAGE)


def _why_empty(text: ElementTree.Element | None) -> str:
    if text is None:
        return "page has no text"
    if text.get("deleted"):
        return "text is deleted"
    is_stub = text.get("bytes", "0") != "0" and text.get(_SPACE) is None  # in dumps named "stub"
    return "text is not in the dump" if is_stub else "article has no text"


def _pages(file: CompressedFile) -> Iterator[bytes]:
    """Yield the bytes from each `<page>` to its `</page>`, with the newest revision only.

    Pages that are longer even so are truncated to MAX_PIECE_BYTES, after which they fail to parse.

    Raises:
        SourceError: the dump ends before its closing tag.
    """
    rest = b""
    for block in _utf8_blocks(file):
        *pages, rest = (rest + block).split(_CLOSE)
        for page in pages:
            yield from _pages_in(page)
        if len(rest) > _COMPACT_BYTES:
            rest = _keep_newest(rest)
        if len(rest) > MAX_PIECE_BYTES:
            if _OPEN in rest[:_BLOCK]:
                yield rest[:_BLOCK]
            rest = rest[-len(_CLOSE) :]
    if b"</mediawiki>" not in rest:
        raise SourceError(f"'{file.path}' ends before its closing tag </mediawiki>: it is truncated; download it "
                          "again. What was read before this position is kept")


def _pages_in(data: bytes) -> Iterator[bytes]:
    """Yield the page that ends here. Others that begin before it have no end, and are yielded as they are."""
    before, *begun = data.split(_OPEN)
    if not begun:
        if b"<title>" in before or _REVISION in before:
            yield before[-_BLOCK:] + _CLOSE
        return
    *broken, page = begun
    yield from (_OPEN + part[:_BLOCK] for part in broken)
    yield _keep_newest(_OPEN + page) + _CLOSE


def _keep_newest(page: bytes) -> bytes:
    """Return a page with its newest complete revision whose text is not deleted, and what follows the last revision."""
    if page.count(_REVISION) < 2:
        return page
    head, *revisions = page.split(_REVISION)
    rest = b"" if b"</revision>" in revisions[-1] else _REVISION + revisions.pop()
    return head + _REVISION + max(enumerate(revisions), key=_age)[1] + rest


def _age(numbered: tuple[int, bytes]) -> tuple[bool, bytes, int, int]:
    number, revision = numbered
    timestamp, ident = _TIMESTAMP.search(revision), _ID.search(revision)
    return not _DELETED.search(revision), timestamp[1] if timestamp else b"", int(ident[1]) if ident else 0, number


def _utf8_blocks(file: CompressedFile) -> Iterator[bytes]:
    """Yield the file in blocks of UTF-8; UTF-16 is recognised by its byte order mark."""
    first = file.read(_BLOCK)
    if not first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        while first:
            yield first
            first = file.read(_BLOCK)
        return
    decoder = codecs.getincrementaldecoder("utf-16")("replace")
    while first:
        yield decoder.decode(first).encode("utf-8", "replace")
        first = file.read(_BLOCK)
    yield decoder.decode(b"", final=True).encode("utf-8", "replace")


def _as_utf8(head: bytes) -> bytes:
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return head.decode("utf-16", "replace").encode() if utf16 else head
