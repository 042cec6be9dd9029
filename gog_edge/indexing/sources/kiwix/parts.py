"""The bytes of a ZIM file, whole or split into parts: its header is checked, and its checksum compared.

Format: https://wiki.openzim.org/wiki/ZIM_file_format. Parts are named `x.zimaa`, `x.zimab` and so on.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from gog_edge.errors import SourceError

MAGIC = b"ZIM\x04"
VERSIONS = (5, 6)  # of the format that are read
_PART = re.compile(r"(.+\.zim)[a-z]{2}", re.IGNORECASE)
_HEADER = struct.Struct("<4sHH16sIIQQQQIIQ")  # 80 bytes
_CHECKSUM_BYTES = hashlib.md5(usedforsecurity=False).digest_size
_MIN_WITH_CHECKSUM = _HEADER.size  # position of the list of media types; in older files it is 72
_BLOCK_BYTES = 4 * 2**20
_ADVICE = "download it again, or copy it again from where it is whole"


def whole_name(path: Path) -> Path:
    """Return the path of the whole file that a part belongs to, and every other path unchanged."""
    found = _PART.fullmatch(path.name)
    return path if found is None else path.with_name(found[1])


def find_parts(path: Path) -> tuple[Path, ...]:
    """Return the parts of a split file in order, given the path of the whole or of a part; () if there are none.

    Raises:
        SourceError: a part is missing.
    """
    whole = whole_name(path)
    if whole.suffix.lower() != ".zim" or not whole.parent.is_dir() or (whole == path and path.exists()):
        return ()
    pattern = re.compile(re.escape(whole.name) + "[a-z]{2}")
    found = {entry.name[-2:]: entry for entry in whole.parent.iterdir() if pattern.fullmatch(entry.name)}
    names = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]
    missing = [name for name in names[: names.index(max(found)) + 1] if name not in found] if found else []
    if missing:
        raise SourceError(f"the part '{whole.name}{missing[0]}' of '{whole}' is missing beside '{max(found.values())}'"
                          "; copy all parts into one folder")
    return tuple(found[name] for name in names if name in found)


@dataclass(frozen=True)
class ZimFile:
    """The parts of a ZIM file, in order; a file that is not split is its only part."""

    parts: tuple[Path, ...]

    @staticmethod
    def open(path: Path) -> ZimFile:
        """Find the file or its parts, and check the header against their size.

        Raises:
            SourceError: nothing is there, a part is missing, or it is not a whole ZIM file of a known version.
        """
        parts = find_parts(path) or ((path,) if path.is_file() else ())
        if not parts:
            raise SourceError(f"the file '{path}' does not exist or is not a file, nor are there parts of it such as "
                              f"'{whole_name(path).name}aa'; check the path of the snapshot")
        file = ZimFile(parts)
        file._check_header()
        return file

    @property
    def path(self) -> Path:
        """Return the path that libzim opens: the first part."""
        return self.parts[0]

    @cached_property
    def size(self) -> int:
        """Return the size of all parts in bytes."""
        return sum(part.stat().st_size for part in self.parts)

    @cached_property
    def checksum_position(self) -> int | None:
        """Return where the checksum is stored, which is over all bytes before it; None if the file has none."""
        header = _HEADER.unpack(self._head)
        return int(header[-1]) if header[9] >= _MIN_WITH_CHECKSUM else None

    @cached_property
    def checksum(self) -> str | None:
        """Return the MD5 that the file contains, in hex; None if it has none."""
        position = self.checksum_position
        return None if position is None else self._read(position, _CHECKSUM_BYTES).hex()

    def digest(self, algorithm: str, size: int, on_bytes: Callable[[int], None] | None = None) -> str:
        """Return the hex digest of the first `size` bytes; `on_bytes` is called with the size of each block."""
        found = hashlib.new(algorithm, usedforsecurity=False)
        for block in self._blocks(size):
            found.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
        return found.hexdigest()

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Compare the checksum with the content; a file without one passes.

        Raises:
            SourceError: it differs.
        """
        if self.checksum_position is None:
            return
        found = self.digest("md5", self.checksum_position, on_bytes)
        if found != self.checksum:
            raise SourceError(f"'{self.path}' is corrupt: its checksum differs (MD5 {found}, the file says "
                              f"{self.checksum}); {_ADVICE}. To build from what can be read of it, skip the check "
                              "with --no-checksum")

    # --- header -------------------------------------------------------------------------------

    @cached_property
    def _head(self) -> bytes:
        return self._read(0, _HEADER.size)

    def _check_header(self) -> None:
        name = self.path
        if self._head[: len(MAGIC)] != MAGIC[: len(self._head)]:
            raise SourceError(f"'{name}' is not a ZIM file: it begins with {self._head[:4]!r}, not {MAGIC!r}; give a "
                              ".zim file")
        if len(self._head) < _HEADER.size:
            raise SourceError(f"'{name}' is truncated: it has {self.size} bytes, which is less than the header of a "
                              f"ZIM file; {_ADVICE}")
        version = _HEADER.unpack(self._head)[1]
        if version not in VERSIONS:
            raise SourceError(f"'{name}' has version {version} of the ZIM format; {VERSIONS[0]} and {VERSIONS[1]} are "
                              f"supported; {'get a newer edition' if version < VERSIONS[0] else 'update gog_edge'}")
        if self.checksum_position is None:
            return
        expected = self.checksum_position + _CHECKSUM_BYTES
        if self.size < expected:
            last = f" A part after '{self.parts[-1].name}' may be missing." if len(self.parts) > 1 else ""
            raise SourceError(f"'{name}' is truncated: it has {self.size} bytes, its header says {expected}; "
                              f"{_ADVICE}.{last}")
        if self.size > expected:
            raise SourceError(f"'{name}' is corrupt: it has {self.size} bytes, its header says {expected}; {_ADVICE}")

    def _read(self, start: int, size: int) -> bytes:
        found = b""
        for part in self.parts:
            length = part.stat().st_size
            if start < length and len(found) < size:
                with part.open("rb") as stream:
                    stream.seek(start)
                    found += stream.read(size - len(found))
            start = max(0, start - length)
        return found

    def _blocks(self, size: int) -> Iterator[bytes]:
        for part in self.parts:
            with part.open("rb") as stream:
                while size > 0 and (block := stream.read(min(size, _BLOCK_BYTES))):
                    size -= len(block)
                    yield block
