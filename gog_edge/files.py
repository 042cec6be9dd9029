"""Files of artefacts: describe and verify them by hash, and replace them atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import sqlite3
import stat
import sys
import tomllib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeAlias, TypeVar

from annotated_types import Ge, MinLen

from gog_edge.errors import ArtifactError, GogEdgeError
from gog_edge.tables import build

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

# Files up to this size are hashed when an artefact is opened; larger ones are compared by size, and hashed by `verify`.
HASH_AT_OPEN_BYTES = 64 * 2**20
MODEL_MANIFEST = "manifest.json"  # of policies and encoders; packs and engines have their own
BLOCK_BYTES = 2**20
SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
OTHER_FILES = 512  # open files of a process other than vector shards: connections, stores, models
MAX_DOCUMENT_BYTES = 64 * 2**20  # of a JSON or TOML file
MAX_DEPTH = 64  # levels of lists and objects in a JSON or TOML file
MAX_DIGITS = 100  # of an integer in JSON
_KEY_PART = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')"""
_KEY_DOT = r"[ \t]*+\.[ \t]*+"
_LONG_KEY = re.compile(rf"(?m)(?:^|[\[{{,])[ \t]*+{_KEY_PART}(?:{_KEY_DOT}{_KEY_PART}){{{MAX_DEPTH},}}+[ \t]*+[=\]]")
OnBytes: TypeAlias = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artefact; `path` is relative to the artefact's folder, with forward slashes."""

    path: Annotated[str, MinLen(1)]
    size: Annotated[int, Ge(0)]  # bytes
    sha256: str  # hex

    @classmethod
    def from_json(cls, raw: Any, *, what: str, error: type[ArtifactError] = ArtifactError) -> FileEntry:
        """Read an entry of a manifest. Raises `error` if a field is missing or has another type."""
        return build(cls, raw, "files", error=error, where=f"{what}: invalid manifest")

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


def path_inside(root: Path, name: str) -> Path:
    """Return `root / name`. Raises ValueError, with the reason, if that is outside of `root` or no path at all."""
    if "\0" in name:
        raise ValueError("which contains a NUL character")
    try:
        path = root / name
        path.stat()  # resolve() follows a name that is too long without complaint
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as exc:
        raise ValueError(f"which is not a path ({exc.strerror})") from exc
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError("outside its own folder")
    return path


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
        entry = raw if isinstance(raw, FileEntry) else FileEntry.from_json(raw, what=what, error=error)
        try:
            path = path_inside(root, entry.path)
        except ValueError as exc:
            raise error(f"{what}: the manifest names '{entry.path[:100]}', {exc}; do not use this {what}") from exc
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


def map_array(path: Path, shape: tuple[int, ...], dtypes: Collection[str], *, what: str,
              error: type[ArtifactError] = ArtifactError) -> NDArray[Any]:
    """Map a .npy file read-only. Raises `error` if it is damaged, or has another shape, dtype or order."""
    import numpy as np  # imported here so that --help stays fast

    try:
        with path.open("rb") as stream:  # not np.load: it accepts archives, and leaves every error to its caller
            offset, found, columns_first, dtype = read_array_header(stream)
        if found != shape or dtype.name not in dtypes or columns_first:
            order = "Fortran" if columns_first else "C"
            raise error(f"{what}: '{path}' must hold {' or '.join(dtypes)} {list(shape)} in C order, got {dtype} "
                        f"{list(found)} in {order} order; copy or export it again")
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as exc:
        raise error(f"{what}: '{path}' cannot be read as a NumPy array ({exc}); copy or export it again") from exc


def read_array_header(stream: BinaryIO) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a .npy file; return the offset of its data, shape, whether columns come first, and dtype.

    Raises:
        ValueError: it is damaged, or not of an array of numbers.
    """
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} is not supported")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except Exception as exc:  # NumPy evaluates the header as Python; what is wrong with it may be of any class
        raise ValueError(str(exc) or type(exc).__name__) from exc
    if dtype.kind not in "fiub" or any(type(side) is not int or not 0 <= side < 2**48 for side in shape):
        raise ValueError(f"{dtype} {shape} is no array of numbers")
    return stream.tell(), shape, columns_first, dtype


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
    """Write indented UTF-8 JSON atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def open_tokenizer(path: Path, *, what: str, error: type[GogEdgeError] = ArtifactError) -> Tokenizer:
    """Read a tokenizer.json. Raises `error` if the tokenizers library cannot read it, or encode a text with it."""
    from tokenizers import Tokenizer  # imported here so that --help stays fast

    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # the library raises Exception itself; a panic in it is no Exception
        raise error(f"{what}: cannot read '{path}' as a tokenizer ({exc}); copy or export it again") from exc
    return tokenizer


# --- documents: JSON, TOML ----------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 defines it: bytes are UTF-8, numbers are finite, strings are text, keys are unique.

    Raises:
        ValueError: it is not JSON, or contains NaN, Infinity, a number out of range, an unpaired surrogate, an object
            with a repeated key, or more than MAX_DEPTH levels.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_integer,
                           object_pairs_hook=_unique_keys)
        _check_depth(value)
        if "\\u" in text:  # only an escape can spell half of a character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it has more than {MAX_DEPTH} levels") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ValueError if it is not TOML, or has more than MAX_DEPTH levels."""
    if _LONG_KEY.search(text):  # takes the parser minutes
        raise ValueError(f"it has a key of more than {MAX_DEPTH} levels")
    try:
        value = tomllib.loads(text.removeprefix("\ufeff"))
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"it has more than {MAX_DEPTH} levels") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:  # cannot become a float, and more than 4,300 digits not even an int
        raise ValueError(f"{text[:40]}... has {len(text)} digits, the limit is {MAX_DIGITS}")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in value if keys.count(key) > 1)!r} occurs twice in an object")
    return value


def _check_depth(value: Any) -> None:
    """Raise RecursionError for more than MAX_DEPTH levels, long before recursive functions would."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for one in level if isinstance(one, dict | list)
                 for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    if any(isinstance(one, dict | list) for one in level):
        raise RecursionError


def read_bounded(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes; a pipe or a device would be read for ever.

    Raises:
        FileNotFoundError, NotADirectoryError: it does not exist.
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # to open a pipe would wait for a writer
    except ValueError as exc:  # a NUL character in the path
        raise OSError(errno.EINVAL, str(exc), str(path)) from exc
    with open(descriptor, "rb") as stream:  # noqa: PTH123  # Path.open takes no descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def read_document(path: Path, parse: Callable[[str], T], *, what: str, error: type[GogEdgeError], syntax: str) -> T:
    """Read a UTF-8 file, with or without a byte order mark, and parse it; `syntax` names the format in messages.

    Raises `error` when the file is missing, not a regular file, larger than MAX_DOCUMENT_BYTES, or refused by `parse`
    with a ValueError.
    """
    try:
        return parse(read_bounded(path).decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{what}: '{path}' does not exist; is this the right folder?") from None
    except OSError as exc:
        raise error(f"{what}: cannot read '{path}' ({exc.strerror or exc}); check that it is a readable file") from exc
    except ValueError as exc:  # UnicodeDecodeError, JSONDecodeError and TOMLDecodeError too
        raise error(f"{what}: '{path}' is not {syntax} ({exc}); copy or build it again") from exc


def read_json(path: Path, *, what: str, error: type[GogEdgeError] = ArtifactError) -> dict[str, Any]:
    """Read a JSON object. Raises `error` when the file is missing, not JSON (see `parse_json`), or not an object."""
    value = read_document(path, parse_json, what=what, error=error, syntax="JSON")
    if not isinstance(value, dict):
        raise error(f"{what}: '{path}' must contain a JSON object, got a {type(value).__name__}")
    return value


def read_json_list(path: Path, *, what: str, error: type[GogEdgeError] = ArtifactError) -> list[Any]:
    """Read a JSON array. Raises as `read_json` does."""
    value = read_document(path, parse_json, what=what, error=error, syntax="JSON")
    if not isinstance(value, list):
        raise error(f"{what}: '{path}' must contain a JSON list, got a {type(value).__name__}")
    return value
