"""What a decoder's cache holds, on the host or on a device: read and written by tokens."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort

from gog_edge.engines.base import Array, KvCache, Snapshot
from gog_edge.errors import BackendError

Shape: TypeAlias = tuple[int, ...]  # [..., tokens, width]
Tensor = TypeVar("Tensor", "HostTensor", "DeviceTensor")
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
CUDA_NAME = "cuda"


@dataclass(frozen=True, slots=True)
class Device:
    """Memory as ONNX Runtime knows it."""

    name: str  # CUDA_NAME, "cpu"
    index: int = 0


class TokenTensor(Protocol):
    """An input of a decoder [..., tokens, width] that stays bound where it is."""

    @property
    def value(self) -> Any:
        """The `OrtValue` to bind."""

    @property
    def shape(self) -> Shape:
        """[..., tokens, width]."""

    def write(self, start: int, rows: Array) -> None:
        """Rows [..., n, width] of any floating type for the tokens from `start` on."""

    def read(self, length: int) -> Array:
        """The first `length` tokens, in the tensor's own type."""

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """Take over the first `length` tokens of another one of the same kind and shape."""


def new_tensor(shape: Shape, dtype: np.dtype[Any], device: Device | None) -> TokenTensor:
    """Zeros [..., tokens, width] on a device; None: an array of the host."""
    return HostTensor(shape, dtype) if device is None else DeviceTensor(shape, dtype, device)


class HostTensor:
    """Zeros that take memory only where something is written."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.array = zero_pages(shape, dtype)
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(self.array)

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`."""
        self.array[..., start : start + rows.shape[-2], :] = rows

    def read(self, length: int) -> Array:
        """See `TokenTensor`; a view."""
        return self.array[..., :length, :]

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`; BackendError when the other is of another kind."""
        self.write(0, _same_kind(self, other).read(length))


def zero_pages(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Zeros that take memory only where something is written."""
    pages = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    # Each head's tokens lie far from the next one's: with huge pages the first token would take half of the cache.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


class DeviceTensor:
    """Memory of a device, written and read through windows: one for each row of the leading axes."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any], device: Device) -> None:
        # Kernels multiply what is hidden by zero: memory as it comes may hold what is no number, and stays none.
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device.name, device.index)
        self.shape, self._dtype = shape, dtype
        self._lead = math.prod(shape[:-2])

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`."""
        parts = np.ascontiguousarray(rows, self._dtype).reshape(self._lead, -1, self.shape[-1])
        for index, part in enumerate(parts):
            self._window(index, start, len(part)).update_inplace(np.ascontiguousarray(part))

    def read(self, length: int) -> Array:
        """See `TokenTensor`; a copy on the host."""
        read = np.empty((self._lead, length, self.shape[-1]), self._dtype)
        for index in range(self._lead if length else 0):
            read[index] = self._window(index, 0, length).numpy()
        return read.reshape(*self.shape[:-2], length, self.shape[-1])

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`; within the device. BackendError when the other is of another kind."""
        theirs = _same_kind(self, other)
        for index in range(self._lead if length else 0):
            self._window(index, 0, length).update_inplace(theirs._window(index, 0, length))

    def _window(self, index: int, start: int, count: int) -> Any:
        tokens, width = self.shape[-2:]
        return window(self.value, (index * tokens + start) * width, (count, width))


class _DLTensor(ctypes.Structure):
    """The head of a `DLManagedTensor`: https://dmlc.github.io/dlpack/latest/c_api.html."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def window(value: Any, offset: int, shape: Shape) -> Any:
    """A contiguous part of an `OrtValue` as one of its own, in the same memory, which it keeps alive.

    `shape` from the element `offset` on. ONNX Runtime has no such views; but what it hands out by DLPack names address
    and shape, and it takes the same back with others.
    """
    capsule = value.__dlpack__()
    tensor = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    lengths = (ctypes.c_int64 * len(shape))(*shape)
    tensor.data += offset * tensor.bits // 8
    tensor.ndim, tensor.shape = len(shape), ctypes.addressof(lengths)  # read, and copied, by the next line
    return ort.OrtValue.from_dlpack(capsule)


class TokenCache:
    """One conversation's rotary tables, keys and values."""

    def __init__(self, cos: TokenTensor, sin: TokenTensor, states: Sequence[TokenTensor], capacity: int) -> None:
        """Tables [capacity, head_dim / 2]; states [1, kv_heads, capacity, head_dim] in the decoder's own order."""
        self.capacity = capacity
        # Rotary rows stand by token index: a picture's tokens share positions, so position would not do.
        self.cos, self.sin, self.states = cos, sin, tuple(states)

    def snapshot(self, length: int) -> Snapshot:
        """The first `length` tokens, to be kept in files."""
        states = np.stack([state.read(length)[0] for state in self.states])
        parts = (states, self.cos.read(length), self.sin.read(length))
        return Snapshot(*(part.astype(np.float32, copy=False) for part in parts))

    def restore(self, kept: Snapshot) -> None:
        """Begin with the tokens of a snapshot; BackendError when it is of another decoder or too long."""
        length = len(kept.cos)
        kv_heads, _, width = self.states[0].shape[1:]
        mine = (len(self.states), kv_heads, length, width)
        if kept.states.shape != mine or length > self.capacity:
            raise BackendError(
                f"a cache of {mine} cannot begin with kept tokens of {kept.states.shape}; remove those files"
            )
        for tensor, values in zip(self._tensors(), (kept.cos, kept.sin, *kept.states), strict=True):
            tensor.write(0, values)

    def copy_from(self, other: KvCache, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same engine."""
        if not isinstance(other, TokenCache) or len(other.states) != len(self.states):
            raise BackendError("a cache can only be copied from one of the same decoder; open both on one engine")
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_from(theirs, length)

    def _tensors(self) -> tuple[TokenTensor, ...]:
        return self.cos, self.sin, *self.states


def _same_kind(mine: Tensor, other: TokenTensor) -> Tensor:
    if not isinstance(other, type(mine)):
        raise BackendError("a cache can only be copied from one on the same device; open both on one engine")
    return other
