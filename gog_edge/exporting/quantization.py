"""Weights as whole numbers: symmetric blocks, in the layout that ONNX Runtime's MatMulNBits reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gog_edge.engines.base import Floats
from gog_edge.policy.manifest import Blocks

Packed: TypeAlias = NDArray[np.uint8]  # [rows, blocks, size * bits / 8]; two numbers a byte at 4 bits, low half first

# Shares of a block's greatest value that scales are tried with: clipping a few large values often costs less than
# the coarser grid that would hold them.
CANDIDATES = {4: (1.0, 0.94, 0.88, 0.82, 0.76), 7: (1.0,), 8: (1.0,)}

# A scale for each row of both factors. Seven bits: without the instructions for it, processors add pairs of products in
# 16 bits, which 8 bits overflow.
ROWS = Blocks(7, None)
_NOTHING = 1e-35  # scales below it have no finite inverse: such weights are taken for zeros
_ROWS = 512  # quantised at a time: bounds the scratch memory


def quantise(weight: Floats, blocks: Blocks) -> tuple[Packed, Floats]:
    """(packed numbers, scales [rows, blocks]) of a weight [rows, columns]; a last short block is filled with zeros.

    Numbers are told by how far they are from the lowest, so never negative. Of the candidate scales each block takes
    the one with the least squared error. The greatest value by magnitude goes to the end of the grid that reaches one
    step further, -2^(bits-1), whatever its sign.
    """
    chunks = [weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS)]
    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(lambda rows: _quantise_rows(rows, blocks), chunks))
    return np.concatenate([packed for packed, _ in parts]), np.concatenate([scales for _, scales in parts])


def dequantise(packed: Packed, scales: Floats, blocks: Blocks, columns: int) -> Floats:
    """Inverse of `quantise` [rows, columns], less what rounding took."""
    numbers = packed.astype(np.int16)
    if blocks.bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    values = (numbers - 2 ** (blocks.bits - 1)) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(len(packed), -1)[:, :columns], np.float32)


def _quantise_rows(weight: Floats, blocks: Blocks) -> tuple[Packed, Floats]:
    rows, columns = weight.shape
    size = blocks.size or columns
    filled = np.zeros((rows, -(-columns // size) * size), np.float32)
    filled[:, :columns] = weight
    values = filled.reshape(rows, -1, size)
    low, high = -(2 ** (blocks.bits - 1)), 2 ** (blocks.bits - 1) - 1
    greatest = np.take_along_axis(values, np.abs(values).argmax(axis=-1, keepdims=True), axis=-1)
    best_error = np.full(values.shape[:2] + (1,), np.inf, np.float32)
    best_scale, best_numbers = np.zeros_like(greatest), np.zeros(values.shape, np.int8)
    for share in CANDIDATES[blocks.bits]:
        scale = greatest * np.float32(share / low)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > _NOTHING)
        numbers = np.clip(np.rint(values * inverse), low, high)
        error = np.square(numbers * scale - values).sum(axis=-1, keepdims=True)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_numbers, numbers.astype(np.int8), where=better)
    unsigned = (best_numbers.astype(np.int16) - low).astype(np.uint8)
    if blocks.bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return unsigned, best_scale[..., 0]
