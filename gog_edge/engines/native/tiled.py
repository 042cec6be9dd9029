"""A cache as the native operators read it: bfloat16, tokens in tiles, factors of one product side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gog_edge.engines.base import Array, Floats
from gog_edge.engines.native import KEYS, PAIR, TILE
from gog_edge.engines.ort_tensors import Shape, TokenTensor, zero_pages
from gog_edge.errors import BackendError


class TiledTensor:
    """Keys or values [1, kv_heads, tokens, width] in the layout of attention.h: a `TokenTensor` of float32 outside."""

    def __init__(self, shape: Shape, *, tile: int, pair: int) -> None:
        """`tile` tokens stand together, by `pair` numbers of each."""
        _, heads, tokens, width = shape
        self.shape, self._tile = shape, tile
        # [kv_heads, tokens / tile, width / pair, tile, pair] bfloat16
        self._array: NDArray[np.uint16] = zero_pages(
            (heads, tokens // tile, width // pair, tile, pair), np.dtype(np.uint16)
        )
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(self._array.reshape(shape))

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`; numbers are rounded to the nearest."""
        heads, _, groups, _, pair = self._array.shape
        parts = bfloat16(rows).reshape(heads, -1, groups, pair)
        tiles, places = np.divmod(np.arange(start, start + parts.shape[1]), self._tile)
        self._array[:, tiles, :, places] = parts.transpose(1, 0, 2, 3)

    def read(self, length: int) -> Floats:
        """See `TokenTensor`; float32, a copy."""
        tiles, places = np.divmod(np.arange(length), self._tile)
        rows = self._array[:, tiles, :, places]  # [length, kv_heads, width / pair, pair]
        _, heads, _, width = self.shape
        return widened(rows.transpose(1, 0, 2, 3).reshape(1, heads, length, width))

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`; whole tiles. BackendError when the other is of another kind."""
        if not isinstance(other, TiledTensor):
            raise BackendError("a cache can only be copied from one of the same kind; open both on one engine")
        tiles = -(-length // self._tile)
        self._array[:, :tiles] = other._array[:, :tiles]


def new_states(names: list[str], kv_heads: int, tokens: int, width: int) -> list[TiledTensor]:
    """Zeros for `key_*` and `value_*`, with room for so many tokens at least."""
    shape = (1, kv_heads, -(-tokens // KEYS) * KEYS, width)
    return [
        TiledTensor(shape, tile=TILE, pair=PAIR) if name.startswith("key") else TiledTensor(shape, tile=PAIR, pair=1)
        for name in names
    ]


def bfloat16(values: Array) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to the nearest, of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(halves: NDArray[np.uint16]) -> Floats:
    """Inverse of `bfloat16`, less what rounding took."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
