"""Read the vectors of a space: append-only shards on disk, with rows numbered over all of them.

A shard is two NumPy files (format 1.0 or 2.0, C order): vectors [n, dim] of float16 or float32, and ids [n] of int64.
Rows are read with preadv, not through a mapping: the kernel maps a run of pages around each page that is touched, so
that a few hundred random rows of a mapped file of a gigabyte make all of it resident.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.files import allow_open_files, read_array_header
from gog_edge.types import Vectors

Ids = NDArray[np.int64]  # [n] int64, image ids
Rows = NDArray[np.int64]  # [n] int64, row numbers
BLOCK_ROWS = 65_536
_READ_BYTES = 2**30  # per call; Linux reads at most 2 GiB at once
_SCAN_RATIO = 128  # for more ids than one in so many rows, a scan of all rows is faster than binary searches
_INVALID_ARRAY = (OSError, ValueError, MemoryError)  # raised for damaged files


@dataclass(frozen=True, slots=True)
class _VectorFile:
    """An open file of vectors."""

    path: Path
    descriptor: int
    offset: int  # of the first row, in bytes
    rows: int
    dtype: np.dtype[Any]


class VectorShards:
    """The vectors of some shards. Several rows may have the same id. May be read from several threads."""

    def __init__(self, files: Sequence[_VectorFile], ids: Sequence[Ids], dim: int) -> None:
        """Combine open files and their ids, in the order of their rows; all files have the same dtype."""
        self._files, self._dim = files, dim
        self._dtype = files[0].dtype if files else np.dtype(np.float16)
        self._starts = np.cumsum([0] + [file.rows for file in files])
        # In memory, not mapped: eight bytes per row, and every search reads them.
        self._ids: Ids = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)

    @classmethod
    def open(cls, shards: Sequence[tuple[Path, Path]], dim: int) -> VectorShards:
        """Open pairs of (vectors, ids) files. The ids are read into memory, the vectors are not.

        Raises:
            PackError: A file is missing or truncated, has another shape or dtype, or vectors have both dtypes.
        """
        allow_open_files(len(shards))
        files: list[_VectorFile] = []
        try:
            for vectors, _ in shards:
                files.append(_open_vectors(vectors, dim))
            for file in files:
                if file.dtype != files[0].dtype:
                    raise PackError(f"pack: '{file.path}' must have dtype {files[0].dtype} as the shards before it, "
                                    f"got {file.dtype}; build the pack again")
            ids = [_ids_of_file(path, file) for (_, path), file in zip(shards, files, strict=True)]
            opened = cls(files, ids, dim)
        except BaseException:
            _close([file.descriptor for file in files])
            raise
        weakref.finalize(opened, _close, [file.descriptor for file in files])
        return opened

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """Return the length of a vector."""
        return self._dim

    @property
    def ids(self) -> Ids:
        """Return the id of each row; the array must not be modified."""
        return self._ids

    @property
    def is_float16(self) -> bool:
        """Return whether vectors are stored as float16."""
        return bool(self._dtype == np.float16)

    @cached_property
    def id_count(self) -> int:
        """Return the number of distinct ids."""
        ids = self._sorted
        return int(np.count_nonzero(ids[1:] != ids[:-1])) + bool(len(ids))

    @property
    def has_repeated_ids(self) -> bool:
        """Return whether an id has several rows."""
        return self.id_count < len(self)

    def ids_of(self, rows: Rows) -> Ids:
        """Return the ids of rows, in an array of any shape; -1 for row -1."""
        if not len(self._ids):
            return np.full(rows.shape, -1, dtype=np.int64)
        return np.where(rows < 0, -1, self._ids[rows])

    def first_rows(self, ids: ArrayLike) -> Rows:
        """Return the first row of each id, [n]; -1 for an id without rows."""
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.searchsorted(self._sorted, wanted, side="left")
        present = np.flatnonzero(places < len(self._ids))
        present = present[self._sorted[places[present]] == wanted[present]]
        found = np.full(len(wanted), -1, dtype=np.int64)
        found[present] = places[present] if self._order is None else self._order[places[present]]
        return found

    def rows_of(self, ids: ArrayLike) -> Rows:
        """Return all rows of some ids, in no order."""
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) * _SCAN_RATIO > len(self):
            return np.flatnonzero(np.isin(self._ids, wanted))
        wanted = np.unique(wanted)
        left, right = (np.searchsorted(self._sorted, wanted, side=side) for side in ("left", "right"))
        runs = [np.arange(*run) for run in zip(left[left < right], right[left < right], strict=True)]
        places = np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
        return places if self._order is None else self._order[places]

    def take(self, rows: ArrayLike) -> Vectors:
        """Return the vectors [n, dim] float32 of existing rows, in the given order; fastest for ascending rows.

        Raises:
            PackError: A file was truncated after it was opened.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        file = np.searchsorted(self._starts, wanted, side="right") - 1
        raw = np.empty((len(wanted), self._dim), dtype=self._dtype)
        buffer = raw.data.cast("B") if raw.size else memoryview(b"")
        width = self._dim * self._dtype.itemsize
        # Consecutive rows of a file are read at once.
        ends = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(file) != 0)) + 1
        starts = np.concatenate([[0], ends]) if len(wanted) else np.empty(0, dtype=np.int64)
        first = (wanted - self._starts[file])[starts].tolist()
        bounds = [*(starts * width).tolist(), len(buffer)]
        for run, (number, row) in enumerate(zip(file[starts].tolist(), first, strict=True)):
            _read_into(self._files[number], row * width, buffer[bounds[run] : bounds[run + 1]])
        return _to_float32(raw)

    def blocks(self, start: int = 0, rows: int = BLOCK_ROWS) -> Iterator[Vectors]:
        """Yield all vectors from row `start` on, in order, in blocks of up to `rows`: [n, dim] float32."""
        for first in range(start, len(self), rows):
            yield self.take(np.arange(first, min(first + rows, len(self))))

    @cached_property
    def _order(self) -> Rows | None:
        """Return the rows sorted by id; None if they are stored that way, as they are in packs that we build."""
        if bool((self._ids[1:] >= self._ids[:-1]).all()):
            return None
        return np.argsort(self._ids, kind="stable")

    @cached_property
    def _sorted(self) -> Ids:
        return self._ids if self._order is None else self._ids[self._order]


def _open_vectors(path: Path, dim: int) -> _VectorFile:
    try:
        with path.open("rb") as stream:
            offset, shape, columns_first, dtype = read_array_header(stream)
            size = os.fstat(stream.fileno()).st_size
    except _INVALID_ARRAY as exc:
        raise PackError(f"pack: '{path}' is not a NumPy array file ({exc}); copy or build the pack again") from exc
    if dtype not in (np.float16, np.float32) or columns_first or len(shape) != 2 or shape[1] != dim:
        order = "Fortran" if columns_first else "C"
        raise PackError(f"pack: '{path}' must contain float16 or float32 [n, {dim}] in C order, got {dtype} "
                        f"{list(shape)} in {order} order; build the pack again")
    expected = offset + shape[0] * dim * dtype.itemsize
    if size != expected:
        raise PackError(f"pack: '{path}' must have {expected} bytes by its header, got {size}; copy or build the pack "
                        "again")
    return _VectorFile(path, os.open(path, os.O_RDONLY), offset, shape[0], dtype)


def read_ids(path: Path) -> Ids:
    """Read a NumPy file of ids: [n] int64.

    Raises:
        PackError: The file is missing or truncated, is not an array file, or has another shape or dtype.
    """
    try:
        with path.open("rb") as stream:  # not np.load, which also accepts archives and pickles
            _, shape, _, dtype = read_array_header(stream)
            data = stream.read()
    except _INVALID_ARRAY as exc:
        raise PackError(f"pack: '{path}' is not a NumPy array file ({exc}); copy or build the pack again") from exc
    if dtype != np.int64 or len(shape) != 1 or len(data) != 8 * shape[0]:
        raise PackError(f"pack: '{path}' must contain int64 [n], got {dtype} {list(shape)} in {len(data)} bytes; copy "
                        "or build the pack again")
    return np.frombuffer(data, np.int64)


def _ids_of_file(path: Path, file: _VectorFile) -> Ids:
    ids = read_ids(path)
    if len(ids) != file.rows:
        raise PackError(f"pack: '{path}' must contain {file.rows} ids, got {len(ids)}; copy or build the pack again")
    return ids


def _read_into(file: _VectorFile, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `start` of a file's vectors on."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file.descriptor, [buffer[done : done + _READ_BYTES]], file.offset + start + done)
        if not count:
            raise PackError(f"pack: '{file.path}' was truncated while it was open; copy or build the pack again")
        done += count


def _to_float32(raw: NDArray[Any]) -> Vectors:
    """Convert float16 rows three times as fast as NumPy's cast: move the exponent's bits and multiply by 2^112.

    The result is exact for all finite values; components of unit vectors are finite.
    """
    if raw.dtype == np.float32:
        return raw
    bits = raw.view(np.int16).astype(np.int32)  # extends the sign to the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8fffe000: sign, exponent and fraction of the float16
    values: Vectors = bits.view(np.float32)
    np.multiply(values, np.float32(2.0**112), out=values)  # the difference of the exponent biases, 127 - 15
    return values


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
