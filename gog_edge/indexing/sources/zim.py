"""Reads Kiwix's ZIM files through python-libzim. Only this module imports it, because it is licensed under the GPL.

Format: https://wiki.openzim.org/wiki/ZIM_file_format, metadata: https://wiki.openzim.org/wiki/Metadata.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from gog_edge.errors import BackendError, SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    ImageRecord,
    Record,
    RedirectRecord,
    Skipped,
    wikipedia_text_licence,
)
from gog_edge.indexing.sources.files import PickleFieldsMixin, file_size, snapshot_date
from gog_edge.indexing.sources.html import Figure, Page, exceeds_max_depth, parse_page
from gog_edge.indexing.sources.images import (
    CACHED_THUMBNAILS,
    DEFAULT_THUMBNAILS,
    MAX_IMAGE_BYTES,
    ThumbnailOptions,
    decode_data_uri,
    make_thumbnail,
)
from gog_edge.indexing.sources.text import clean_line
from gog_edge.retrieval.manifest import Snapshot

if TYPE_CHECKING:
    from libzim.reader import Archive, Entry

CHUNK_ENTRIES = 256  # articles, redirects and files together
DOWNLOAD_ERROR = b"download_error_placeholder.css"  # in the page that mwoffliner writes for a failed download
MAX_HTML_BYTES = 8 * 2**20
_MAX_REDIRECTS = 8  # successive redirects that are followed
# libzim raises one of these for damaged data; all of its errors are C++ exceptions.
_DAMAGE = (RuntimeError, ValueError, KeyError, IndexError, MemoryError)


@dataclass(frozen=True, slots=True)
class _HtmlEntry:
    path: str
    title: str
    data: bytes


@dataclass(frozen=True)
class ZimSource(PickleFieldsMixin):
    """The articles, the redirects, and the images of the articles. `licence` is used if the metadata state none."""

    path: Path
    thumbnails: ThumbnailOptions = DEFAULT_THUMBNAILS
    licence: str | None = None

    def snapshot(self) -> Snapshot:
        """Describe the file by its metadata.

        The hash is the MD5 that the ZIM file contains, because hashing a large file takes minutes. `verify` checks it.

        Raises:
            SourceError: the file is not a ZIM file, or is truncated.
            BackendError: the extra `zim` is not installed.
        """
        archive = self._archive
        digest = f"md5:{archive.checksum}" if archive.has_checksum else sha256_of(self.path)
        name = self._metadata("Name") or self._metadata("Title") or self.path.stem
        return Snapshot(name, self._date, str(archive.uuid), digest, self._licence)

    def verify(self) -> None:
        """Read the whole file and compare its checksum; raise SourceError if it differs."""
        try:
            valid = self._archive.check()
        except _DAMAGE:
            valid = False
        if not valid:
            raise SourceError(f"'{self.path}' is corrupt: its checksum differs; download it again")

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
        return int(archive.entry_count if archive.has_new_namespace_scheme else archive.all_entry_count)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield ranges of entry ids."""
        for number in range(start, -(-self.size // CHUNK_ENTRIES)):
            first = number * CHUNK_ENTRIES
            last = min(first + CHUNK_ENTRIES, self.size)
            yield Chunk(number, last - first, (first, last))

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield articles with their images, and redirects, in the order of entries; damaged entries are `Skipped`."""
        for number in range(*chunk.content):
            found = self._read_entry(number)
            if isinstance(found, _HtmlEntry):
                yield from self._article(found)
            elif found is not None:
                yield found

    def _read_entry(self, number: int) -> _HtmlEntry | RedirectRecord | Skipped | None:
        """Return an entry; None for files other than articles."""
        try:
            entry = self._archive._get_entry_by_id(number)
            target = _follow_redirects(entry)
            if target is None:
                return Skipped("redirect does not end", entry.path)
            item = target.get_item()
            if not item.mimetype.startswith("text/html"):
                return None
            if entry.is_redirect:
                return RedirectRecord(clean_line(entry.title), target.path)
            if item.size > MAX_HTML_BYTES:
                return Skipped("article is too large", entry.path)
            return _HtmlEntry(entry.path, clean_line(entry.title) or entry.path, bytes(item.content))
        except _DAMAGE as exc:
            return Skipped("entry cannot be read", f"entry {number} ({exc})")

    def _article(self, html: _HtmlEntry) -> Iterator[Record]:
        if DOWNLOAD_ERROR in html.data:
            yield Skipped("article was not downloaded", html.path)
            return
        text = html.data.decode("utf-8", "replace")
        if exceeds_max_depth(text):
            yield Skipped("article is nested too deeply", html.path)
            return
        page = parse_page(text)
        if not page.paragraphs and not page.figures:
            yield Skipped("article has no text", html.path)
            return
        # A page of images without text is cited by its captions, and without captions by its title.
        captions = tuple(("", figure.caption) for figure in page.figures if figure.caption) or (("", html.title),)
        yield ArticleRecord(html.title, page.paragraphs or captions, self._licence, key=html.path)
        yield from page.skipped
        yield from self._images(html.path, page)

    def _images(self, article: str, page: Page) -> Iterator[Record]:
        for figure in page.figures:
            attribution, image = self._image(article, figure)
            if isinstance(image, Skipped):
                yield image
            else:
                yield ImageRecord(image, figure.caption, UNKNOWN_LICENCE, attribution, (article,), figure.lead)

    def _image(self, article: str, figure: Figure) -> tuple[str, bytes | Skipped]:
        """Return the attribution (creator and path) and the thumbnail of an image."""
        source = figure.source
        if source.startswith("data:"):
            return self._creator, _embedded_image(source, self.thumbnails)
        if source.startswith(("http:", "https:", "//")):
            return source, Skipped("image is not in the snapshot", source)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(article), unquote(source.split("?")[0])))
        path = path.lstrip("/")
        return ", ".join(filter(None, (self._creator, path))), self._thumbnail(path)

    @cached_property
    def _thumbnail(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(CACHED_THUMBNAILS)(self._load_thumbnail)

    def _load_thumbnail(self, path: str) -> bytes | Skipped:
        try:
            item = self._archive.get_entry_by_path(path).get_item()
            if item.size > MAX_IMAGE_BYTES:
                return Skipped("image is too large", path)
            return make_thumbnail(bytes(item.content), path, self.thumbnails)
        except KeyError:
            return Skipped("image is not in the snapshot", path)
        except _DAMAGE:
            return Skipped("image cannot be read", path)

    @cached_property
    def _archive(self) -> Archive:
        try:
            from libzim.reader import Archive
        except ImportError as exc:
            raise BackendError("reading ZIM files needs python-libzim; pip install 'gog_edge[zim]'") from exc
        file_size(self.path)
        try:
            return Archive(self.path)
        except _DAMAGE as exc:
            raise SourceError(f"'{self.path}' is not a ZIM file, or is truncated ({exc}); download it again") from exc

    def _metadata(self, key: str) -> str:
        try:
            return clean_line(self._archive.get_metadata(key).decode("utf-8", "replace"))
        except _DAMAGE:
            return ""

    @cached_property
    def _date(self) -> str:
        return self._metadata("Date") or snapshot_date(self.path)

    @cached_property
    def _creator(self) -> str:
        return self._metadata("Creator")

    @cached_property
    def _licence(self) -> str:
        if stated := self._metadata("License") or self.licence:
            return stated
        is_wikipedia = self._metadata("Name").startswith("wikipedia_") or self._creator == "Wikipedia"
        return wikipedia_text_licence(self._date) if is_wikipedia else UNKNOWN_LICENCE


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
