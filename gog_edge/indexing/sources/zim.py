"""Kiwix's ZIM files, through python-libzim: the one module that imports it, for it is GPL and an extra of its own.

What is in a ZIM: https://wiki.openzim.org/wiki/ZIM_file_format and, for metadata, https://wiki.openzim.org/wiki/Metadata.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from gog_edge.errors import BackendError, SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import (
    UNKNOWN,
    ArticleDraft,
    Chunk,
    ImageDraft,
    Item,
    RedirectDraft,
    Skipped,
    wikipedia_text,
)
from gog_edge.indexing.sources.figures import Figure
from gog_edge.indexing.sources.files import Reopened, date_of, file_size
from gog_edge.indexing.sources.html import Page, is_too_deep, read_page
from gog_edge.indexing.sources.images import RULES, ThumbnailRules, make_thumbnail
from gog_edge.indexing.sources.text import one_line
from gog_edge.retrieval.manifest import Snapshot

if TYPE_CHECKING:
    from libzim.reader import Archive, Entry

ENTRIES = 256  # to a chunk: articles, redirects and files alike
NOT_FETCHED = b"download_error_placeholder.css"  # mwoffliner's page in the place of one that it could not get
MAX_HTML_BYTES = 8 * 2**20
MAX_IMAGE_BYTES = 32 * 2**20
REMEMBERED = 1024  # thumbnails: a flag or a map stands in many articles
_HOPS = 8  # redirects to redirects that are followed
# What libzim raises at damaged bytes; all of it comes from C++ as one of these.
_DAMAGED = (RuntimeError, ValueError, KeyError, IndexError, MemoryError)


@dataclass(frozen=True, slots=True)
class _Html:
    path: str
    title: str
    data: bytes


@dataclass(frozen=True)
class ZimSource(Reopened):
    """Articles, redirects and the images that articles show. `licence` holds where the metadata name none."""

    path: Path
    rules: ThumbnailRules = RULES
    licence: str | None = None

    def snapshot(self) -> Snapshot:
        """Raises SourceError when this is no ZIM, or a truncated one, BackendError without the extra `zim`.

        Its hash is the MD5 that every ZIM carries of itself: another one would take minutes of a large file. Whether
        the bytes still have it, `verify` tells.
        """
        archive = self._archive
        digest = f"md5:{archive.checksum}" if archive.has_checksum else sha256_of(self.path)
        name = self._metadata("Name") or self._metadata("Title") or self.path.stem
        return Snapshot(name, self._date, str(archive.uuid), digest, self._licence)

    def verify(self) -> None:
        """Read the whole file and compare its checksum; SourceError when it is altered."""
        try:
            whole = self._archive.check()
        except _DAMAGED:
            whole = False
        if not whole:
            raise SourceError(f"'{self.path}' is corrupt: its checksum is another; download it again")

    def metadata(self) -> dict[str, str]:
        """All that the ZIM says of itself in words: Title, Creator, Language, Flavour, Counter and so on."""
        keys = self._archive.metadata_keys
        return {key: self._metadata(key) for key in keys if not key.startswith("Illustration")}

    def prepare(self, work: Path) -> None:
        """Nothing is to be sorted."""

    @property
    def size(self) -> int:
        """Entries of all kinds."""
        archive = self._archive
        # Since 2021 users' entries come first, all others after them; before, they stood between others.
        return int(archive.entry_count if archive.has_new_namespace_scheme else archive.all_entry_count)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Ranges of entry ids."""
        for number in range(start, -(-self.size // ENTRIES)):
            first = number * ENTRIES
            last = min(first + ENTRIES, self.size)
            yield Chunk(number, last - first, (first, last))

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """Articles with their images, and redirects, in the order of entries; what is damaged is Skipped."""
        for number in range(*chunk.content):
            found = self._read(number)
            if isinstance(found, _Html):
                yield from self._article(found)
            elif found is not None:
                yield found

    def _read(self, number: int) -> _Html | RedirectDraft | Skipped | None:
        """What an entry is; nothing for those that only articles show."""
        try:
            entry = self._archive._get_entry_by_id(number)
            target = _followed(entry)
            if target is None:
                return Skipped("redirect leads nowhere", entry.path)
            item = target.get_item()
            if not item.mimetype.startswith("text/html"):
                return None
            if entry.is_redirect:
                return RedirectDraft(one_line(entry.title), target.path)
            if item.size > MAX_HTML_BYTES:
                return Skipped("article is too large", entry.path)
            return _Html(entry.path, one_line(entry.title) or entry.path, bytes(item.content))
        except _DAMAGED as exc:
            return Skipped("entry cannot be read", f"entry {number} ({exc})")

    def _article(self, html: _Html) -> Iterator[Item]:
        if NOT_FETCHED in html.data:
            yield Skipped("article was not fetched", html.path)
            return
        text = html.data.decode("utf-8", "replace")
        if is_too_deep(text):
            yield Skipped("article is nested too deep", html.path)
            return
        page = read_page(text)
        if not page.paragraphs and not page.figures:
            yield Skipped("article has no text", html.path)
            return
        # Of a page of pictures alone their captions can be cited, of one without captions its name.
        shown = tuple(("", figure.caption) for figure in page.figures if figure.caption) or (("", html.title),)
        yield ArticleDraft(html.title, page.paragraphs or shown, self._licence, key=html.path)
        yield from page.skipped
        yield from self._images(html.path, page)

    def _images(self, article: str, page: Page) -> Iterator[Item]:
        for figure in page.figures:
            attribution, image = self._picture(article, figure)
            if isinstance(image, Skipped):
                yield image
            else:
                yield ImageDraft(image, figure.caption, UNKNOWN, attribution, (article,), figure.lead)

    def _picture(self, article: str, figure: Figure) -> tuple[str, bytes | Skipped]:
        """Whom and where an image comes from, and its thumbnail."""
        source = figure.source
        if source.startswith("data:"):
            return self._creator, _inline_image(source, self.rules)
        if source.startswith(("http:", "https:", "//")):
            return source, Skipped("image is not in the snapshot", source)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(article), unquote(source.split("?")[0])))
        path = path.lstrip("/")
        return ", ".join(filter(None, (self._creator, path))), self._thumbnail(path)

    @cached_property
    def _thumbnail(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(REMEMBERED)(self._load)

    def _load(self, path: str) -> bytes | Skipped:
        try:
            item = self._archive.get_entry_by_path(path).get_item()
            if item.size > MAX_IMAGE_BYTES:
                return Skipped("image is too large", path)
            return make_thumbnail(bytes(item.content), path, self.rules)
        except KeyError:
            return Skipped("image is not in the snapshot", path)
        except _DAMAGED:
            return Skipped("image cannot be read", path)

    @cached_property
    def _archive(self) -> Archive:
        try:
            from libzim.reader import Archive
        except ImportError as exc:
            raise BackendError("ZIM files are read by python-libzim, which is not here: "
                               "pip install 'gog_edge[zim]'") from exc
        file_size(self.path)
        try:
            return Archive(self.path)
        except _DAMAGED as exc:
            raise SourceError(f"'{self.path}' is no ZIM file, or a truncated one ({exc}); download it again") from exc

    def _metadata(self, key: str) -> str:
        try:
            return one_line(self._archive.get_metadata(key).decode("utf-8", "replace"))
        except _DAMAGED:
            return ""

    @cached_property
    def _date(self) -> str:
        return self._metadata("Date") or date_of(self.path)

    @cached_property
    def _creator(self) -> str:
        return self._metadata("Creator")

    @cached_property
    def _licence(self) -> str:
        if named := self._metadata("License") or self.licence:
            return named
        is_wikipedia = self._metadata("Name").startswith("wikipedia_") or self._creator == "Wikipedia"
        return wikipedia_text(self._date) if is_wikipedia else UNKNOWN


def _followed(entry: Entry) -> Entry | None:
    """What a redirect leads to in the end; None where it runs in a circle."""
    for _ in range(_HOPS):
        if not entry.is_redirect:
            return entry
        entry = entry.get_redirect_entry()
    return None


def _inline_image(source: str, rules: ThumbnailRules) -> bytes | Skipped:
    """The thumbnail of a `data:` URI (RFC 2397)."""
    kind, _, text = source.partition(",")
    try:
        data = base64.b64decode(unquote(text), validate=False) if kind.endswith(";base64") else unquote_to_bytes(text)
    except (ValueError, binascii.Error):
        data = b""
    return make_thumbnail(data, source[:80], rules)
