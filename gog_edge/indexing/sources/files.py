"""Files that snapshots come in: plain, gzip, bzip2 or zip, read in order, with the place where one is damaged."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import Chunk, Skipped
from gog_edge.indexing.sources.images import RULES, ThumbnailRules, make_thumbnail
from gog_edge.retrieval.manifest import Snapshot

CHUNK_PIECES = 256
CHUNK_BYTES = 4 * 2**20
MAX_PIECE_BYTES = 32 * 2**20  # a longer line or page is cut there, and then it does not parse
_DATE = re.compile(r"(?<!\d)(20\d\d)-?(0[1-9]|1[0-2])(?:-?(0[1-9]|[12]\d|3[01]))?(?!\d)")
_DAMAGED = (EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile)  # RuntimeError: a zip with a password
_Piece = TypeVar("_Piece")


class Reopened:
    """A dataclass that is pickled by its fields alone: what it had opened is opened anew where it arrives."""

    def __reduce__(self) -> tuple[type[Any], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, field.name) for field in fields(cast(Any, self)))


class OneFile(Reopened):
    """What sources share that are one file, read from its beginning: nothing is to be sorted, bytes are counted."""

    path: Path

    def prepare(self, work: Path) -> None:
        """Nothing is to be sorted."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return file_size(self.path)


class PackedFile:
    """The bytes of a file, unpacked while they are read. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """SourceError when there is no such file, or when it begins like an archive and is none."""
        self.path, self.size = path, file_size(path)
        self._raw = path.open("rb")
        try:
            self._stream = _unpacked(self._raw)
        except _DAMAGED as exc:
            error = self._damaged(exc)
            self._raw.close()
            raise error from exc

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes read from the disk so far."""
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        """`size` unpacked bytes, fewer at the end and before damage, which the next call raises as SourceError."""
        parts = list[bytes]()
        while size > 0:
            try:
                part = self._stream.read1(size)
            except _DAMAGED as exc:
                if parts:
                    break
                raise self._damaged(exc) from exc
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def lines(self) -> Iterator[bytes]:
        """Line by line; of a line beyond MAX_PIECE_BYTES the rest is left out."""
        cut = False
        while line := self._line():
            if not cut:
                yield line
            cut = not line.endswith(b"\n")

    def _line(self) -> bytes:
        try:
            return bytes(self._stream.readline(MAX_PIECE_BYTES))
        except _DAMAGED as exc:
            raise self._damaged(exc) from exc

    def _damaged(self, exc: BaseException) -> SourceError:
        return SourceError(f"'{self.path}' is truncated or damaged before byte {self.position} of {self.size} ({exc}); "
                           "fetch it again, and compare its checksum. What was read before is kept")


def _unpacked(raw: BinaryIO) -> Any:
    head = raw.read(4)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if head == b"PK\x03\x04":
        archive = zipfile.ZipFile(raw)
        return archive.open(max(archive.infolist(), key=lambda member: member.file_size))
    return raw


def file_size(path: Path) -> int:
    """Bytes of a file; SourceError when there is none."""
    if not path.is_file():
        raise SourceError(f"there is no file '{path}'; is this the right path?")
    return path.stat().st_size


def group(
    pieces: Iterable[_Piece], file: PackedFile, start: int, length: Callable[[_Piece], int]
) -> Iterator[Chunk]:
    """Chunks of up to CHUNK_PIECES pieces or about CHUNK_BYTES, each a tuple of pieces; sizes in bytes of the disk."""
    number, begun, weight, content = 0, 0, 0, list[_Piece]()
    for piece in pieces:
        content.append(piece)
        weight += length(piece)
        if len(content) == CHUNK_PIECES or weight >= CHUNK_BYTES:
            if number >= start:
                yield Chunk(number, file.position - begun, tuple(content))
            number, begun, weight, content = number + 1, file.position, 0, []
    if content and number >= start:
        yield Chunk(number, file.size - begun, tuple(content))


def file_snapshot(path: Path, licence: str, *, name: str = "", uuid: str = "") -> Snapshot:
    """What a file says of itself: its date is the one in its name, else that of its last change."""
    file_size(path)
    return Snapshot(name or path.name, date_of(path), uuid, sha256_of(path), licence)


def date_of(path: Path) -> str:
    """The date in a file's name (20240901, 2024-09-01, 2024-09), else of its last change; ISO 8601."""
    found = _DATE.search(path.name)
    if found:
        return "-".join(part for part in found.groups() if part)
    return changed_on(path)


def changed_on(path: Path) -> str:
    """The day of a file's last change, ISO 8601."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".svg", ".tif", ".tiff", "")
MAX_BYTES = 32 * 2**20
REMEMBERED = 1024
NOT_GIVEN, MISSING = "no folder of images was given", "image is not in the folder"


@dataclass(frozen=True)
class ImageFolder(Reopened):
    """Thumbnails by address. Without a folder there is none, and each is Skipped."""

    folder: Path | None
    rules: ThumbnailRules = RULES

    def check(self) -> None:
        """SourceError when the folder is not there."""
        if self.folder is not None and not self.folder.is_dir():
            raise SourceError(f"there is no folder of images '{self.folder}'; name the one that they were fetched into")

    def thumbnail(self, address: str) -> bytes | Skipped:
        """The file to serve, or why there is none."""
        return self._remembered(address)

    @cached_property
    def _remembered(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(REMEMBERED)(self._load)

    def _load(self, address: str) -> bytes | Skipped:
        if self.folder is None:
            return Skipped(NOT_GIVEN, address)
        return next((load_thumbnail(path, address, self.rules) for name in names_of(address)
                     if _is_file(path := self.folder / name)), Skipped(MISSING, address))


def load_thumbnail(path: Path, what: str, rules: ThumbnailRules) -> bytes | Skipped:
    """The thumbnail of a file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return Skipped("image is too large", what)
        return make_thumbnail(path.read_bytes(), what, rules)
    except OSError:
        return Skipped("image cannot be read", what)


def names_of(address: str) -> Iterator[str]:
    """The names, relative to the folder, that the image of an address may have there; likely ones first."""
    last = address.partition("#")[0].partition("?")[0].rpartition("/")[2]
    for name in dict.fromkeys((PurePosixPath(unquote(last)).name, last)):
        if name and name != "..":
            yield name
            digits = hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
            yield f"{digits[0]}/{digits[:2]}/{name}"
    for algorithm in ("md5", "sha1", "sha256"):
        digest = hashlib.new(algorithm, address.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
        yield from (digest + suffix for suffix in SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name too long, or with bytes that no file has
