"""Symmetric integer quantization of weights, in the layout that ONNX Runtime's MatMulNBits reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gog_edge.engines.base import Floats
from gog_edge.policy.manifest import WeightQuantization

# uint8 [rows, blocks, size * bits / 8]. Of 4-bit values, two share a byte, the first in the low four bits.
Packed: TypeAlias = NDArray[np.uint8]

# Fractions of a block's maximum that are tried as the end of its grid, by bits. Clipping a few large values often
# gives a smaller error than the coarser grid that would contain them.
CANDIDATES = {4: (1.0, 0.94, 0.88, 0.82, 0.76), 7: (1.0,), 8: (1.0,)}

# One scale per row of both factors, for integer matmuls. 7 bits, because processors without VNNI instructions add
# pairs of products in 16 bits, which 8-bit weights overflow.
INT7_BY_ROW = WeightQuantization(7, None)
_MIN_SCALE = 1e-35  # smaller scales have no finite inverse; such weights are stored as zeros
_CHUNK_ROWS = 512  # rows quantized at a time, which bounds the temporary memory


def quantize(weight: Floats, scheme: WeightQuantization) -> tuple[Packed, Floats]:
    """Quantize a weight [rows, columns]; a last block that is too short is padded with zeros.

    Values are stored with an offset of 2^(bits-1), as unsigned integers. The value of largest magnitude is mapped to
    -2^(bits-1), the end of the grid with one more step, so scales may be negative. Of the candidate scales, each block
    uses the one with the smallest squared error.

    Returns:
        The packed values, and float32 scales [rows, blocks].
    """
    chunks = [weight[start : start + _CHUNK_ROWS] for start in range(0, len(weight), _CHUNK_ROWS)]
    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(lambda rows: _quantize_chunk(rows, scheme), chunks))
    return np.concatenate([packed for packed, _ in parts]), np.concatenate([scales for _, scales in parts])


def dequantize(packed: Packed, scales: Floats, scheme: WeightQuantization, columns: int) -> Floats:
    """Return the float32 values [rows, columns] of what `quantize` gave."""
    values = packed.astype(np.int16)
    if scheme.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    scaled = (values - 2 ** (scheme.bits - 1)) * scales[:, :, None]
    return np.ascontiguousarray(scaled.reshape(len(packed), -1)[:, :columns], np.float32)


def _quantize_chunk(weight: Floats, scheme: WeightQuantization) -> tuple[Packed, Floats]:
    rows, columns = weight.shape
    size = scheme.size or columns
    padded = np.zeros((rows, -(-columns // size) * size), np.float32)
    padded[:, :columns] = weight
    values = padded.reshape(rows, -1, size)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=-1, keepdims=True), axis=-1)
    best_error = np.full(values.shape[:2] + (1,), np.inf, np.float32)
    best_scale, best_values = np.zeros_like(extreme), np.zeros(values.shape, np.int8)
    for fraction in CANDIDATES[scheme.bits]:
        scale = extreme * np.float32(fraction / low)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > _MIN_SCALE)
        quantized = np.clip(np.rint(values * inverse), low, high)
        error = np.square(quantized * scale - values).sum(axis=-1, keepdims=True)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_values, quantized.astype(np.int8), where=better)
    unsigned = (best_values.astype(np.int16) - low).astype(np.uint8)
    if scheme.bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return unsigned, best_scale[..., 0]
