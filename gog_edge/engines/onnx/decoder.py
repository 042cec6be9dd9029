"""What a decoder's cache holds, on the host or on a device: read and written by tokens."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gog_edge.engines.base import Array, Floats, KvCache, Snapshot
from gog_edge.engines.onnx.native import KEYS, PAIR, TILE
from gog_edge.engines.onnx.session import (
    device_errors,
    open_session,
)
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


AHEAD = 32  # tokens from which the graph that only fills the cache is worth its run


class OrtCache(TokenCache):
    """A cache bound once as input and as output of its decoder."""

    def __init__(self, decoder: OrtDecoder) -> None:
        table = (decoder.capacity, decoder.rotary)
        cos, sin = (HostTensor(table, np.dtype(np.float32)) for _ in range(2))
        super().__init__(cos, sin, decoder.new_states(), decoder.capacity)
        self._numbers: dict[str, Array] = {
            "last": np.zeros(1, np.int32),  # index of the newest token
            "total": np.zeros((), np.int32),  # tokens in the cache after the step
            "keep": np.zeros(1, np.int64),  # rows of logits asked for
        }
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._numbers.items()}
        self._logits: Floats = np.empty((1, decoder.vocab), np.float32)
        self.session = decoder.session
        self._binding = self._bind(decoder.session, decoder)
        self.binding_ahead = self._bind(decoder.prefill, decoder) if decoder.prefill else None

    def bound(self, keep: int) -> tuple[Any, Floats]:
        """The binding of a step that gives `keep` rows of logits, and the buffer [keep, vocab] they come in."""
        if self._numbers["keep"][0] != keep:
            if len(self._logits) < keep:
                self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self._numbers["keep"][0] = keep
            self._rows = ort.OrtValue.ortvalue_from_numpy(self._logits[:keep])
            self._binding.bind_ortvalue_output("logits", self._rows)
        return self._binding, self._logits[:keep]

    def write_rotary(self, start: int, cos: Floats, sin: Floats) -> None:
        """Rows [n, head_dim / 2] of the tables for the tokens from `start` on."""
        self.cos.write(start, cos)
        self.sin.write(start, sin)

    def say_end(self, end: int) -> None:
        """How many tokens the cache holds after the step."""
        self._numbers["last"][0], self._numbers["total"][...] = end - 1, end

    def _bind(self, session: ort.InferenceSession, decoder: OrtDecoder) -> Any:
        binding = session.io_binding()
        taken = {item.name for item in session.get_inputs()}
        for name, value in self._values.items():
            if name in taken:  # a graph that only fills the cache keeps no rows
                binding.bind_ortvalue_input(name, value)
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            binding.bind_ortvalue_input(name, table.value)
        for name, state in zip(decoder.states, self.states, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", state.value)
            binding.bind_ortvalue_output(f"present_{name}", state.value)
        return binding


class OrtDecoder:
    """A decoder exported for ONNX Runtime, past and present in one buffer: by its own operators, or by ours."""

    def __init__(
        self, path: Path, *, capacity: int, threads: int | None = None, optimised: bool = False,
        prefill: Future[ort.InferenceSession] | None = None, operators: Path | None = None,
    ) -> None:
        """`capacity`: tokens of a cache, where the graph itself does not say. `prefill`: a graph over the same cache
        that only fills it, for many tokens at a time; it loads meanwhile. `operators`: `native.library()`, for the
        graph that needs it.
        """
        self.session = open_session(path, threads=threads, optimised=optimised, decoder=True, operators=operators)
        self.prefill = prefill.result() if prefill else None
        inputs = {item.name: item for item in self.session.get_inputs()}
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        if not self.states or not {"cos", "keep"} <= inputs.keys():
            raise BackendError(
                f"'{path}' is not a decoder that this version exported for ONNX Runtime; export with --engine ort"
            )
        self._tiled = inputs[f"past_{self.states[0]}"].type == "tensor(uint16)"
        self.hidden: int = inputs["inputs_embeds"].shape[2]
        self.rotary: int = inputs["cos"].shape[1]
        _, self.kv_heads, fixed, _ = inputs[f"past_{self.states[0]}"].shape
        self.capacity = fixed if isinstance(fixed, int) else capacity
        self.vocab: int = {item.name: item.shape for item in self.session.get_outputs()}["logits"][1]
        self.deepstack: int = inputs["deepstack"].shape[0] if "deepstack" in inputs else 0

    def new_cache(self) -> OrtCache:
        """An empty cache."""
        return OrtCache(self)

    def new_states(self) -> Sequence[TokenTensor]:
        """Keys and values of an empty cache, by layers."""
        if self._tiled:
            return new_states(self.states, self.kv_heads, self.capacity, 2 * self.rotary)
        shape = (1, self.kv_heads, self.capacity, 2 * self.rotary)
        return [HostTensor(shape, np.dtype(np.float32)) for _ in self.states]

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append embeds [T, hidden] with rotary cos, sin [T, head_dim / 2] after `past` tokens -> logits [keep, vocab].

        deepstack [layers, T, hidden] goes to the first layers' outputs; None adds nothing. The logits are overwritten
        by the cache's next step. BackendError when the cache is too small, or the memory.
        """
        count = len(embeds)
        if not isinstance(cache, OrtCache) or cache.session is not self.session:
            raise BackendError("this cache is of another engine; use the decoder's own new_cache()")
        if past + count > cache.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {cache.capacity}; open a larger one")
        cache.write_rotary(past, cos, sin)
        binding, logits = cache.bound(keep)
        ahead = count - keep if self.prefill is not None and count - keep >= AHEAD else 0
        with device_errors(f"{count} tokens cannot be computed"):
            if ahead:
                cache.say_end(past + ahead)
                self._run(self.prefill, cache.binding_ahead, embeds[:ahead], _part(deepstack, 0, ahead))
            cache.say_end(past + count)
            self._run(self.session, binding, embeds[ahead:], _part(deepstack, ahead, count))
        return logits

    def _run(self, session: Any, binding: Any, embeds: Floats, deepstack: Floats | None) -> None:
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None], np.float32))
        if self.deepstack:
            shape = (self.deepstack, *embeds.shape)
            added = np.zeros(shape, np.float32) if deepstack is None else np.ascontiguousarray(deepstack, np.float32)
            binding.bind_cpu_input("deepstack", added)
        session.run_with_iobinding(binding)


def _part(deepstack: Floats | None, start: int, stop: int) -> Floats | None:
    return None if deepstack is None else deepstack[:, start:stop]
