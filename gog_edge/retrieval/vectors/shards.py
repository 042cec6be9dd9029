"""The vectors of one space of a pack: append-only shards on disk, numbered by row over all of them.

A shard is two NumPy files (format 1.0 or 2.0, C order): vectors [n, dim] of float16 or float32, and ids [n] of int64.
Rows are read from the file when they are wanted, not through a mapping: the kernel maps a whole run of pages around
each page that is touched, so that a few hundred random rows of a mapped gigabyte make all of it resident.
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
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.files import allow_open_files
from gog_edge.types import Vectors

Ids = NDArray[np.int64]  # [n] int64, ids of images
Rows = NDArray[np.int64]  # [n] int64, numbers of rows
BLOCK_ROWS = 65_536
_READ_BYTES = 2**30  # Linux reads no more than 2 GiB at once
_MANY = 128  # ids that are more than one of so many rows are found quicker by a look at every row
_NO_ARRAY = (OSError, ValueError, EOFError, MemoryError, OverflowError)  # what NumPy raises at damaged or lying files


@dataclass(frozen=True, slots=True)
class _Part:
    """An open file of vectors."""

    path: Path
    handle: int
    offset: int  # bytes before the first row
    rows: int
    dtype: np.dtype[Any]


class VectorShards:
    """Row r is the r-th vector over the shards in their order; several rows may have one id. Reading is thread-safe."""

    def __init__(self, parts: Sequence[_Part], ids: Sequence[Ids], dim: int) -> None:
        """`parts` and their `ids`, in the order in which they were written; all of one type."""
        self._parts, self._dim = parts, dim
        self._dtype = parts[0].dtype if parts else np.dtype(np.float16)
        self._starts = np.cumsum([0] + [part.rows for part in parts])
        # Held, not mapped: eight bytes a row, and every hit of every search looks here.
        self._ids: Ids = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)

    @classmethod
    def open(cls, shards: Sequence[tuple[Path, Path]], dim: int) -> VectorShards:
        """Open (vectors, ids) files; ids are read, vectors are not.

        Raises:
            PackError: a file is missing, truncated, or of another shape or type; or the shards are of both types.
        """
        allow_open_files(len(shards))
        parts: list[_Part] = []
        try:
            for vectors, _ in shards:
                parts.append(_open_vectors(vectors, dim))
            for part in parts:
                if part.dtype != parts[0].dtype:
                    raise PackError(f"pack: '{part.path}' holds {part.dtype}, shards before it {parts[0].dtype}")
            opened = cls(parts, [_ids_of_part(path, part) for (_, path), part in zip(shards, parts, strict=True)], dim)
        except BaseException:
            _close([part.handle for part in parts])
            raise
        weakref.finalize(opened, _close, [part.handle for part in parts])
        return opened

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def ids(self) -> Ids:
        """The id of each row; not to be written to."""
        return self._ids

    @property
    def half(self) -> bool:
        """Whether vectors are stored as float16."""
        return bool(self._dtype == np.float16)

    @cached_property
    def distinct(self) -> int:
        """How many ids there are."""
        ids = self._sorted
        return int(np.count_nonzero(ids[1:] != ids[:-1])) + bool(len(ids))

    @property
    def repeats(self) -> bool:
        """Whether some id has several rows."""
        return self.distinct < len(self)

    def ids_of(self, rows: Rows) -> Ids:
        """Ids of rows, of any shape; -1 stays -1."""
        if not len(self._ids):
            return np.full(rows.shape, -1, dtype=np.int64)
        return np.where(rows < 0, -1, self._ids[rows])

    def first_rows(self, ids: ArrayLike) -> Rows:
        """The first row [n] of each id; -1 for ids that have none."""
        wanted = np.asarray(ids, dtype=np.int64)
        rows, places = self._spread(np.searchsorted(self._sorted, wanted, side="left"), wanted)
        found = np.full(len(wanted), -1, dtype=np.int64)
        found[places] = rows
        return found

    def rows_of(self, ids: ArrayLike) -> Rows:
        """All rows of some ids, in no order."""
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) * _MANY > len(self):
            return np.flatnonzero(np.isin(self._ids, wanted))
        wanted = np.unique(wanted)
        left, right = (np.searchsorted(self._sorted, wanted, side=side) for side in ("left", "right"))
        runs = [np.arange(*run) for run in zip(left[left < right], right[left < right], strict=True)]
        places = np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)
        return places if self._order is None else self._order[places]

    def take(self, rows: ArrayLike) -> Vectors:
        """Vectors [n, dim] float32 of rows that are there, in their order; quickest when they ascend.

        Raises:
            PackError: a file became shorter since it was opened.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        raw = np.empty((len(wanted), self._dim), dtype=self._dtype)
        buffer = raw.data.cast("B") if raw.size else memoryview(b"")
        width = self._dim * self._dtype.itemsize
        # Neighbours on disk are read in one piece.
        ends = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(part) != 0)) + 1
        starts = np.concatenate([[0], ends]) if len(wanted) else np.empty(0, dtype=np.int64)
        at = (wanted - self._starts[part])[starts].tolist()
        bounds = [*(starts * width).tolist(), len(buffer)]
        for index, (which, row) in enumerate(zip(part[starts].tolist(), at, strict=True)):
            _read_into(self._parts[which], row * width, buffer[bounds[index] : bounds[index + 1]])
        return _widened(raw)

    def blocks(self, start: int = 0, rows: int = BLOCK_ROWS) -> Iterator[Vectors]:
        """All vectors from row `start`, in order, `rows` at a time: float32 [at most rows, dim]."""
        for first in range(start, len(self), rows):
            yield self.take(np.arange(first, min(first + rows, len(self))))

    @cached_property
    def _order(self) -> Rows | None:
        """Rows sorted by id; None where they stand so, as they do unless packs were joined by hand."""
        if bool((self._ids[1:] >= self._ids[:-1]).all()):
            return None
        return np.argsort(self._ids, kind="stable")

    @cached_property
    def _sorted(self) -> Ids:
        return self._ids if self._order is None else self._ids[self._order]

    def _spread(self, places: Rows, wanted: Ids) -> tuple[Rows, Rows]:
        """Rows at sorted places that hold the wanted ids, and which of `wanted` these are."""
        held = np.flatnonzero(places < len(self._ids))
        held = held[self._sorted[places[held]] == wanted[held]]
        rows = places[held]
        return (rows if self._order is None else self._order[rows]), held


def _open_vectors(path: Path, dim: int) -> _Part:
    try:
        with path.open("rb") as stream:
            read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
            shape, columns_first, dtype = read(stream)
            offset, size = stream.tell(), path.stat().st_size
    except _NO_ARRAY as exc:
        raise PackError(f"pack: '{path}' is no array ({exc}); copy or build it again") from exc
    if dtype not in (np.float16, np.float32) or columns_first or len(shape) != 2 or shape[1] != dim:
        raise PackError(f"pack: '{path}' holds {dtype} {shape}, wanted float16 or float32 [n, {dim}] in rows")
    wanted = offset + shape[0] * dim * dtype.itemsize
    if size != wanted:
        raise PackError(f"pack: '{path}' has {size} bytes, its header says {wanted}; copy or build it again")
    return _Part(path, os.open(path, os.O_RDONLY), offset, shape[0], dtype)


def read_ids(path: Path) -> Ids:
    """Read a NumPy file of ids: [n] int64.

    Raises:
        PackError: it is missing, truncated, no such file, or of another shape or type.
    """
    try:
        with path.open("rb") as stream:  # not np.load, which takes archives and pickles for arrays too
            ids = npy.read_array(stream, allow_pickle=False)
    except _NO_ARRAY as exc:
        raise PackError(f"pack: '{path}' is no array ({exc}); copy or build it again") from exc
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise PackError(f"pack: '{path}' holds {ids.dtype} {ids.shape}, wanted int64 [n]; copy or build it again")
    return np.asarray(ids)


def _ids_of_part(path: Path, part: _Part) -> Ids:
    ids = read_ids(path)
    if len(ids) != part.rows:
        raise PackError(f"pack: '{path}' holds {len(ids)} ids, wanted {part.rows}; copy or build it again")
    return ids


def _read_into(part: _Part, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from the bytes `start` of a part's vectors."""
    done = 0
    while done < len(buffer):
        count = os.preadv(part.handle, [buffer[done : done + _READ_BYTES]], part.offset + start + done)
        if not count:
            raise PackError(f"pack: '{part.path}' became shorter while it was open; copy or build it again")
        done += count


def _widened(raw: NDArray[Any]) -> Vectors:
    """Float32 of float16 rows, three times as fast as NumPy's cast: exponents are moved, then corrected by 2^112.

    Exact for all finite values; components of unit vectors are.
    """
    if raw.dtype == np.float32:
        return raw
    bits = raw.view(np.int16).astype(np.int32)  # the sign goes to the top
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8fffe000: the sign, exponent and fraction of a half
    wide: Vectors = bits.view(np.float32)
    np.multiply(wide, np.float32(2.0**112), out=wide)
    return wide


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)
