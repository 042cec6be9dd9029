"""Reads the files of snapshots in order, plain or compressed, and reports where one is damaged."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import Chunk
from gog_edge.retrieval.manifest import Snapshot

CHUNK_PIECES = 256  # lines or pages of a chunk, at most
CHUNK_BYTES = 4 * 2**20
MAX_PIECE_BYTES = 32 * 2**20  # longer lines and pages are truncated, after which they fail to parse
_DATE = re.compile(r"(?<!\d)(20\d\d)-?(0[1-9]|1[0-2])(?:-?(0[1-9]|[12]\d|3[01]))?(?!\d)")
# RuntimeError: an encrypted zip file
_DAMAGE = (EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile, lzma.LZMAError)
_OTHER_ARCHIVES = {b"7z\xbc\xaf": "7z", b"\x28\xb5\x2f\xfd": "Zstandard", b"Rar!": "RAR"}  # by first bytes
_Piece = TypeVar("_Piece")


class PickleFieldsMixin:
    """A dataclass that is pickled by its fields only, so that open files are reopened in the other process."""

    def __reduce__(self) -> tuple[type[Any], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, field.name) for field in fields(cast(Any, self)))


class SingleFileSource(PickleFieldsMixin):
    """The common part of sources that read one file sequentially: there is no preparation, and the unit is bytes."""

    path: Path

    def prepare(self, work: Path) -> None:
        """Do nothing: the file is read in its own order."""

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return file_size(self.path)


class CompressedFile:
    """A file that is decompressed while it is read: plain, gzip, bzip2, or the largest member of a zip archive.

    Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            SourceError: it does not exist, or its archive header is damaged.
        """
        self.path, self.size = path, file_size(path)
        self._raw = path.open("rb")
        try:
            self._stream = _decompressed(self._raw)
        except _DAMAGE as exc:
            error = self._damage_error(exc)
            self._raw.close()
            raise error from exc

    def __enter__(self) -> CompressedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """Return the number of (compressed) bytes read so far."""
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        """Return `size` decompressed bytes, or fewer at the end of the file and before damage.

        Raises:
            SourceError: the file is damaged at this position.
        """
        parts = list[bytes]()
        while size > 0:
            try:
                part = self._stream.read1(size)
            except _DAMAGE as exc:
                if parts:
                    break
                raise self._damage_error(exc) from exc
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def lines(self) -> Iterator[bytes]:
        """Yield line by line; lines are truncated to MAX_PIECE_BYTES.

        Raises:
            SourceError: the file is damaged.
        """
        truncated = False
        while line := self._readline():
            if not truncated:
                yield line
            truncated = not line.endswith(b"\n")

    def _readline(self) -> bytes:
        try:
            return bytes(self._stream.readline(MAX_PIECE_BYTES))
        except _DAMAGE as exc:
            raise self._damage_error(exc) from exc

    def _damage_error(self, exc: BaseException) -> SourceError:
        return SourceError(damage_message(self, exc))


def damage_message(file: CompressedFile, exc: BaseException) -> str:
    """Return the message for a file that is damaged at its current position."""
    return (f"'{file.path}' is truncated or damaged before byte {file.position} of {file.size} ({exc}); download it "
            "again and compare its checksum. What was read before this position is kept")


def _decompressed(raw: BinaryIO) -> Any:
    head = raw.read(4)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if head == b"\xfd7zX":
        return lzma.LZMAFile(raw)
    if head in _OTHER_ARCHIVES:
        raw.close()
        raise SourceError(f"'{raw.name}': it is a {_OTHER_ARCHIVES[head]} file, which is not read: unpack it, or get a "
                          ".bz2 or .gz file")
    if head == b"PK\x03\x04":
        archive = zipfile.ZipFile(raw)
        return archive.open(max(archive.infolist(), key=lambda member: member.file_size))
    return raw


def file_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        SourceError: the file does not exist.
    """
    if not path.is_file():
        raise SourceError(f"the file '{path}' does not exist, or is not a file; check the path of the snapshot")
    return path.stat().st_size


def group_into_chunks(
    pieces: Iterable[_Piece], file: CompressedFile, start: int, length: Callable[[_Piece], int]
) -> Iterator[Chunk]:
    """Yield chunks of up to CHUNK_PIECES pieces or about CHUNK_BYTES; the content of each is a tuple of pieces.

    Args:
        pieces: lines or pages read from `file`.
        file: gives the size of each chunk in compressed bytes.
        start: number of the first chunk to yield.
        length: returns the size of a piece in bytes.
    """
    number, begin, weight, content = 0, 0, 0, list[_Piece]()
    for piece in pieces:
        content.append(piece)
        weight += length(piece)
        if len(content) == CHUNK_PIECES or weight >= CHUNK_BYTES:
            if number >= start:
                yield Chunk(number, file.position - begin, tuple(content))
            number, begin, weight, content = number + 1, file.position, 0, []
    if content and number >= start:
        yield Chunk(number, file.size - begin, tuple(content))


def snapshot_of_file(path: Path, licence: str) -> Snapshot:
    """Describe a snapshot by its file: name, date, sha256.

    Raises:
        SourceError: the file does not exist.
    """
    file_size(path)
    return Snapshot(path.name, snapshot_date(path), "", sha256_of(path), licence)


def snapshot_date(path: Path) -> str:
    """Return the ISO 8601 date in a file name (20240901, 2024-09-01, 2024-09), or of the last modification."""
    found = _DATE.search(path.name)
    if found:
        return "-".join(part for part in found.groups() if part)
    return modified_date(path)


def modified_date(path: Path) -> str:
    """Return the date of a file's last modification, ISO 8601."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
