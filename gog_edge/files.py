"""Files of artefacts: describe and verify them by hash, and replace them atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gog_edge.errors import ArtifactError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Files up to this size are hashed when an artefact is opened; larger ones are compared by size, and hashed by `verify`.
HASH_AT_OPEN_BYTES = 64 * 2**20
MODEL_MANIFEST = "manifest.json"  # of policies and encoders; packs and engines have their own
BLOCK_BYTES = 2**20
SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
OTHER_FILES = 512  # open files of a process other than vector shards: connections, stores, models
OnBytes: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artefact; `path` is relative to the artefact's folder, with forward slashes."""

    path: str
    size: int  # bytes
    sha256: str  # hex

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a manifest stores them."""
        return asdict(self)


def sha256_of(path: Path, on_bytes: OnBytes | None = None) -> str:
    """Return the hex sha256 of a file, read in blocks; `on_bytes` is called with the size of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_files(root: Path, names: Iterable[str]) -> list[FileEntry]:
    """Return size and hash of each named file below `root`, sorted by name."""
    return [FileEntry(name, (root / name).stat().st_size, sha256_of(root / name)) for name in sorted(names)]


def verify_files(
    root: Path,
    entries: Iterable[Mapping[str, Any] | FileEntry],
    *,
    what: str,
    error: type[ArtifactError] = ArtifactError,
    full: bool = False,
    by_size: Container[str] = (),
    on_bytes: OnBytes | None = None,
) -> None:
    """Raise `error` naming the first file that is missing or altered.

    Files above `HASH_AT_OPEN_BYTES`, and those whose path is in `by_size`, are compared by size only unless `full`.
    `on_bytes` is called with the number of bytes hashed.
    """
    for raw in entries:
        entry = raw if isinstance(raw, FileEntry) else FileEntry(**raw)
        path = root / entry.path
        if not path.resolve().is_relative_to(root.resolve()):
            raise error(f"{what}: the manifest names '{entry.path}', outside its own folder; do not use this {what}")
        if not path.is_file():
            raise error(f"{what}: '{entry.path}' is missing from {root}; copy or build the {what} again")
        size = path.stat().st_size
        if size != entry.size:
            raise error(f"{what}: '{path}' has {size} bytes, its manifest says {entry.size}; copy or build it again")
        hashed = full or (size <= HASH_AT_OPEN_BYTES and entry.path not in by_size)
        if hashed and sha256_of(path, on_bytes) != entry.sha256:
            raise error(f"{what}: '{path}' is altered (its sha256 is not the manifest's); copy or build it again")


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary file, fsync and rename: a reader sees the old file or the new one, never a partial one."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array atomically in NumPy's .npy format, which can be memory-mapped."""
    import numpy as np  # imported here so that --help stays fast

    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as stream:
        # not np.save: it bypasses Python's file object, and does not report a full disk as such
        rows = np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(rows))
        stream.write(rows.data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def is_disk_full(exc: BaseException) -> bool:
    """Return whether an error means that the disk is full or a file may not grow (beyond 4 GiB on FAT32)."""
    if isinstance(exc, sqlite3.Error):
        return getattr(exc, "sqlite_errorcode", None) in SQLITE_FULL or "disk is full" in str(exc)
    return isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_as(where: Path, error: type[ArtifactError] = ArtifactError) -> Iterator[None]:
    """Raise `error` with a clear message if the disk is full; other errors pass unchanged."""
    try:
        yield
    except (sqlite3.Error, OSError) as exc:
        if is_disk_full(exc):
            raise error(f"the disk of '{where}' is full ({exc}); free some space and run the same command again: it "
                        "continues where it stopped") from exc
        raise


def allow_open_files(more: int) -> None:
    """Raise the soft limit of open files so that `more` files fit, as far as the system allows."""
    if sys.platform == "win32":
        return  # has no RLIMIT_NOFILE
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, sum(1 for _ in Path("/dev/fd").iterdir()) + more + OTHER_FILES)
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def sync_files(paths: Iterable[Path]) -> None:
    """Flush files to disk before anything refers to them."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *, what: str, error: type[ArtifactError] = ArtifactError) -> dict[str, Any]:
    """Read a JSON object. Raises `error` when the file is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{what}: '{path}' does not exist; is this the right folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise error(f"{what}: '{path}' is not JSON ({exc}); copy or build it again") from exc
    if not isinstance(value, dict):
        raise error(f"{what}: '{path}' must contain a JSON object, got a {type(value).__name__}")
    return value
