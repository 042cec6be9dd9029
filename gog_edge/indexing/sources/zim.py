"""Reads Kiwix's ZIM files through python-libzim. Only this module imports it, because it is licensed under the GPL.

Format: https://wiki.openzim.org/wiki/ZIM_file_format, metadata: https://wiki.openzim.org/wiki/Metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gog_edge.errors import BackendError, SourceError
from gog_edge.indexing import OnProgress
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    ImageRecord,
    Notice,
    Present,
    Record,
    RedirectRecord,
    SharedFile,
    Skipped,
    Used,
    wikipedia_text_licence,
)
from gog_edge.indexing.sources.files import PickleFieldsMixin, snapshot_date
from gog_edge.indexing.sources.html import Page, parse_page
from gog_edge.indexing.sources.images import (
    CACHED_THUMBNAILS,
    DEFAULT_THUMBNAILS,
    TOO_LARGE,
    ThumbnailOptions,
    make_thumbnail,
)
from gog_edge.indexing.sources.kiwix.addresses import candidate_paths, is_data_uri
from gog_edge.indexing.sources.kiwix.entries import (
    ENTRY,
    HTML_HEAD,
    UNTYPED,
    VIEWER_SCRIPTS,
    WEB_SCRAPERS,
    is_html,
    is_of_viewer,
    is_xhtml,
    looks_like_html,
    main_type,
    reason_internal,
    reason_unused,
    title_of_path,
)
from gog_edge.indexing.sources.kiwix.parts import ZimFile, whole_name
from gog_edge.indexing.sources.markup.decoding import decode_page, exceeds_max_depth, html_of_xhtml
from gog_edge.indexing.sources.markup.figures import Figure
from gog_edge.indexing.sources.svg import decode_data_uri
from gog_edge.indexing.sources.text import clean_line
from gog_edge.picture import MAX_BYTES
from gog_edge.retrieval.manifest import Snapshot
from gog_edge.retrieval.text.tokens import name_key

if TYPE_CHECKING:
    from libzim.reader import Archive, Entry, Item

CHECKING = "comparing the checksum"  # a stage
CHUNK_ENTRIES = 256  # articles, redirects and files together
DOWNLOAD_ERROR = b"download_error_placeholder.css"  # in the page that mwoffliner writes for a failed download
MAX_HTML_BYTES = 8 * 2**20
IMAGE_MISSING, OTHER_SIZE = "image is not in the snapshot", "another size of the image is in the pack"
_MAX_REDIRECTS = 8  # successive redirects that are followed
_CACHED_ADDRESSES, _MAX_ADDRESS = 8192, 4096  # characters
_WIKIPEDIA_NAMES = ("wikipedia_", "kiwix.wikipedia_")
# libzim raises one of these for damaged data; all of its errors are C++ exceptions.
_DAMAGE = (RuntimeError, ValueError, LookupError, MemoryError, OSError, ArithmeticError, TypeError)
_DATE = re.compile(r"\s*((?:19|20)\d\d)[-/.]?(0[1-9]|1[0-2])(?:[-/.]?(0[1-9]|[12]\d|3[01]))?(?!\d)")


@dataclass(frozen=True, slots=True)
class _HtmlEntry:
    path: str
    title: str  # empty if the entry has none
    data: bytes
    media_type: str


@dataclass(frozen=True)
class ZimSource(PickleFieldsMixin):
    """The articles, the redirects, and the images of the articles. `licence` is used if the metadata state none.

    `path` is that of the file, or of any part of a split file; the file itself need not exist if its parts do.
    """

    path: Path
    thumbnails: ThumbnailOptions = DEFAULT_THUMBNAILS
    licence: str | None = None

    def snapshot(self) -> Snapshot:
        """Describe the file by its metadata.

        The hash is the MD5 that the ZIM file contains, because hashing a large file takes minutes. `verify` checks it.

        Raises:
            SourceError: the file is not a ZIM file, or is truncated, or a part of it is missing.
            BackendError: the extra `zim` is not installed.
        """
        archive, file = self._archive, self._file
        digest = f"md5:{file.checksum}" if file.checksum else file.digest("sha256", file.size)
        name = self._metadata("Name") or self._metadata("Title") or whole_name(self.path).stem
        return Snapshot(name, self._date, str(archive.uuid), digest, self._licence)

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Read the whole file and compare its checksum; a file that contains none passes.

        Raises:
            SourceError: the checksum differs, or the file is not a whole ZIM file.
        """
        file, done = self._file, 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if on_progress is not None:
                on_progress(CHECKING, done, file.size)

        file.verify(advance)

    def metadata(self) -> dict[str, str]:
        """Return all textual metadata: Title, Creator, Language, Flavour, Counter and so on."""
        keys = self._archive.metadata_keys
        return {key: self._metadata(key) for key in keys if not key.startswith("Illustration")}

    def prepare(self, work: Path) -> None:
        """Do nothing: a ZIM file has random access."""

    @property
    def size(self) -> int:
        """Return the number of entries of all kinds."""
        archive = self._archive
        # In files written since 2021 the user entries come first. Before, they are mixed with the internal ones.
        return int(archive.all_entry_count if self._has_namespaces else archive.entry_count)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield ranges of entry ids."""
        for number in range(start, -(-self.size // CHUNK_ENTRIES)):
            first = number * CHUNK_ENTRIES
            last = min(first + CHUNK_ENTRIES, self.size)
            yield Chunk(number, last - first, (first, last))

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield articles with their images, and redirects, in the order of entries; damaged entries are `Skipped`.

        Every entry is counted: used, or skipped by reason. Images are counted when all articles are known.
        """
        if chunk.number == 0 and self._file.checksum is None:
            yield Notice(f"'{self._file.path.name}' contains no checksum, so that damage in it cannot be detected")
        yield Present(ENTRY, chunk.size)
        for number in range(*chunk.content):
            found = self._read_entry(number)
            if isinstance(found, _HtmlEntry):
                yield from self._article(found)
            else:
                yield found

    # --- entries ------------------------------------------------------------------------------

    def _read_entry(self, number: int) -> _HtmlEntry | RedirectRecord | SharedFile | Skipped:
        """Return a page, a redirect to one, or any other file with the reason that it is not used as an article."""
        try:
            entry = self._archive._get_entry_by_id(number)
            path = entry.path
            if reason := reason_internal(path, has_namespaces=self._has_namespaces):
                return Skipped(reason, path, ENTRY)
            return self._redirect(entry, path) if entry.is_redirect else self._file_or_page(entry, path)
        except _DAMAGE as exc:
            return Skipped("entry cannot be read", f"entry {number} ({exc})", ENTRY)

    def _redirect(self, entry: Entry, path: str) -> RedirectRecord | Skipped:
        target = _follow_redirects(entry)
        if target is None:
            return Skipped("redirect does not end", path, ENTRY)
        if not _is_page(target.get_item()):
            return Skipped("redirect to a file that is not an article", path, ENTRY)
        name = self._title(entry, path) or title_of_path(path, has_namespaces=self._has_namespaces)
        if not name_key(name):
            return Skipped("name of a redirect has no word", name, ENTRY)
        return RedirectRecord(name, target.path, ENTRY)

    def _file_or_page(self, entry: Entry, path: str) -> _HtmlEntry | SharedFile | Skipped:
        item = entry.get_item()
        media_type = item.mimetype
        if not _is_page(item):
            return SharedFile(path, ENTRY, reason_unused(media_type))
        if self._is_web_archive and is_of_viewer(path):
            return Skipped("page belongs to the viewer of the archive", path, ENTRY)
        if item.size > MAX_HTML_BYTES:
            return Skipped("article is too large", path, ENTRY)
        return _HtmlEntry(path, self._title(entry, path), bytes(item.content), media_type)

    def _title(self, entry: Entry, path: str) -> str:
        """Return the title of an entry; empty if it has none, in which case libzim returns its path."""
        title = entry.title
        is_path = title == path or (self._has_namespaces and title == path[2:])
        return "" if is_path else clean_line(title)

    # --- articles -----------------------------------------------------------------------------

    def _article(self, html: _HtmlEntry) -> Iterator[Record]:
        if DOWNLOAD_ERROR in html.data:
            yield Skipped("article was not downloaded", html.path, ENTRY)
            return
        text = decode_page(html.data, html.media_type)
        if is_xhtml(html.media_type):
            text = html_of_xhtml(text)
        if exceeds_max_depth(text):
            yield Skipped("article is nested too deeply", html.path, ENTRY)
            return
        page = parse_page(text)
        if not page.paragraphs and not page.figures:
            yield Skipped("article has no text", html.path, ENTRY)
            return
        title = html.title or page.title or title_of_path(html.path, has_namespaces=self._has_namespaces)
        # A page of images without text is cited by its captions, and without captions by its title.
        captions = tuple(("", figure.caption) for figure in page.figures if figure.caption) or (("", title),)
        yield ArticleRecord(title, page.paragraphs or captions, self._licence, key=html.path)
        for skipped in page.skipped:
            yield Skipped(skipped.reason, skipped.item[:200])
            if target := self._resolve(html.path, page.base, skipped.item):
                yield SharedFile(target, ENTRY, skipped.reason, html.path)
        for figure in page.figures:
            yield from self._image(html.path, page, figure)
        yield Used(ENTRY, html.path, article=html.path)

    def _image(self, article: str, page: Page, figure: Figure) -> Iterator[Record]:
        """Yield the image of the best address that leads to one, or why there is none; count the files."""
        failures: list[Skipped] = []
        chosen = False
        for address in (figure.source, *figure.others):
            path = "" if is_data_uri(address) else self._resolve(article, page.base, address)
            if path is None:
                failures.append(Skipped(IMAGE_MISSING, address[:200]))
                continue
            if chosen:
                yield from _count(path, article, OTHER_SIZE)
                continue
            image = self._thumbnail(path) if path else _embedded_image(address, self.thumbnails)
            if isinstance(image, Skipped):
                failures.append(image)
                yield from _count(path, article, image.reason)
                continue
            chosen = True
            attribution = ", ".join(filter(None, (self._creator, path)))
            yield ImageRecord(image, figure.caption, UNKNOWN_LICENCE, attribution, (article,), figure.lead)
            yield from _count(path, article)
        if not chosen:
            yield failures[0]

    def _resolve(self, page: str, base: str, address: str) -> str | None:
        """Return the path of the file that an address in a page leads to; None if the ZIM file does not contain it."""
        return self._target(page.rpartition("/")[0], base, address) if len(address) <= _MAX_ADDRESS else None

    @cached_property
    def _target(self) -> Callable[[str, str, str], str | None]:
        return lru_cache(_CACHED_ADDRESSES)(self._find_target)

    def _find_target(self, folder: str, base: str, address: str) -> str | None:
        paths = candidate_paths(folder, base, address)
        return next((found for path in paths if (found := self._find_file(path))), None)

    def _find_file(self, path: str) -> str | None:
        try:
            target = _follow_redirects(self._archive.get_entry_by_path(path))
            return None if target is None or _is_page(target.get_item()) else target.path
        except _DAMAGE:
            return None

    @cached_property
    def _thumbnail(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(CACHED_THUMBNAILS)(self._load_thumbnail)

    def _load_thumbnail(self, path: str) -> bytes | Skipped:
        try:
            item = self._archive.get_entry_by_path(path).get_item()
            if item.size > MAX_BYTES:
                return Skipped(TOO_LARGE, path)
            return make_thumbnail(bytes(item.content), path, self.thumbnails)
        except _DAMAGE:
            return Skipped("image cannot be read", path)

    # --- the file and its metadata ------------------------------------------------------------

    @cached_property
    def _file(self) -> ZimFile:
        return ZimFile.open(self.path)

    @cached_property
    def _archive(self) -> Archive:
        try:
            from libzim.reader import Archive
        except ImportError as exc:
            raise BackendError("reading ZIM files needs python-libzim; pip install 'gog_edge[zim]'") from exc
        path = self._file.path
        try:
            return Archive(path)
        except _DAMAGE as exc:
            what = clean_line(str(exc))
            raise SourceError(f"'{path}' is damaged: libzim cannot open it ({what}); download it again") from exc

    @cached_property
    def _has_namespaces(self) -> bool:
        return not self._archive.has_new_namespace_scheme

    @cached_property
    def _is_web_archive(self) -> bool:
        scraper = self._metadata("Scraper").lower()
        return any(name in scraper for name in WEB_SCRAPERS) or all(map(self._find_file, VIEWER_SCRIPTS))

    def _metadata(self, key: str) -> str:
        try:
            return clean_line(self._archive.get_metadata(key).decode("utf-8", "ignore"))
        except _DAMAGE:
            return ""

    @cached_property
    def _date(self) -> str:
        """Return the date of the metadata, or of the file's name or last modification, ISO 8601."""
        found = _DATE.match(self._metadata("Date"))
        return "-".join(filter(None, found.groups())) if found else snapshot_date(self._file.parts[0])

    @cached_property
    def _creator(self) -> str:
        return self._metadata("Creator")

    @cached_property
    def _licence(self) -> str:
        if stated := self._metadata("License") or self.licence:
            return stated
        is_wikipedia = self._metadata("Name").startswith(_WIKIPEDIA_NAMES) or self._creator == "Wikipedia"
        return wikipedia_text_licence(self._date) if is_wikipedia else UNKNOWN_LICENCE


def _count(path: str, article: str, reason: str = "") -> Iterator[SharedFile]:
    """Yield what becomes of the file of an image; an embedded image has none."""
    if path:
        yield SharedFile(path, ENTRY, reason, article)


def _is_page(item: Item) -> bool:
    """Return whether a file is an article, by its media type, or without one by its beginning."""
    if is_html(item.mimetype):
        return True
    untyped = main_type(item.mimetype) in UNTYPED and item.size <= MAX_HTML_BYTES
    return untyped and looks_like_html(bytes(item.content[:HTML_HEAD]))


def _follow_redirects(entry: Entry) -> Entry | None:
    """Return the entry at the end of a chain of redirects; None for a loop or a very long chain."""
    for _ in range(_MAX_REDIRECTS):
        if not entry.is_redirect:
            return entry
        entry = entry.get_redirect_entry()
    return None


def _embedded_image(uri: str, options: ThumbnailOptions) -> bytes | Skipped:
    """Return the thumbnail of a `data:` URI."""
    try:
        data = decode_data_uri(uri)
    except ValueError:
        data = b""  # does not decode as an image
    return make_thumbnail(data, uri[:80], options)
