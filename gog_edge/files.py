"""Files that are named by hash: describe, verify, and commit by rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import ArtifactError

# Whole-file hashing at open is worth its time up to here; larger files are checked by size, and by `verify`.
HASH_AT_OPEN_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artefact; `path` is relative to the artefact's folder, with forward slashes."""

    path: str
    size: int  # bytes
    sha256: str  # hex

    def to_json(self) -> dict[str, Any]:
        """Plain fields, as manifests hold them."""
        return asdict(self)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(root: Path, names: Iterable[str]) -> list[FileEntry]:
    """Size and hash of each named file below `root`, sorted by name."""
    return [FileEntry(name, (root / name).stat().st_size, sha256_of(root / name)) for name in sorted(names)]


def verify_files(
    root: Path,
    entries: Iterable[Mapping[str, Any] | FileEntry],
    *,
    what: str,
    error: type[ArtifactError] = ArtifactError,
    full: bool = False,
) -> None:
    """Raise `error` naming the first file that is missing or altered.

    Files above `HASH_AT_OPEN_BYTES` are compared by size only, unless `full`.
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
        if (full or size <= HASH_AT_OPEN_BYTES) and sha256_of(path) != entry.sha256:
            raise error(f"{what}: '{path}' is altered (its sha256 is not the manifest's); copy or build it again")


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented UTF-8 JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *, what: str, error: type[ArtifactError] = ArtifactError) -> dict[str, Any]:
    """Read a JSON object; `error` when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{what}: there is no '{path}'; is this the right folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise error(f"{what}: '{path}' is not JSON ({exc}); copy or build it again") from exc
    if not isinstance(value, dict):
        raise error(f"{what}: '{path}' holds a {type(value).__name__}, not an object")
    return value
