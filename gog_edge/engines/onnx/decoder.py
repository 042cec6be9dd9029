"""Decoders on ONNX Runtime's CPU provider, and KV caches in host or device memory that are updated in place.

Keys and values of a cache are bound once, as inputs and as outputs of the decoder's graph, so that a step writes only
the new tokens. ONNX Runtime's Python API has no views of tensors; `tensor_view` makes them for device memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gog_edge.engines.base import FOREIGN_CACHE, Array, DecoderShape, Floats, KvCache, KvSnapshot, check_snapshot
from gog_edge.engines.onnx.native import CAPACITY_MULTIPLE, PAIR, TILE
from gog_edge.engines.onnx.session import device_errors, open_session
from gog_edge.errors import ArtifactError, BackendError

Shape: TypeAlias = tuple[int, ...]
Tensor = TypeVar("Tensor", "HostTensor", "DeviceTensor", "TiledTensor")

CUDA_NAME = "cuda"
_NOT_A_DECODER = "'{}' is not a decoder that this version exported for ONNX Runtime; export with --engine ort"
# A step with at least so many tokens that need no logits uses the prefill graph for them.
MIN_PREFILL_TOKENS = 32

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True, slots=True)
class Device:
    """A device by ONNX Runtime's name for it."""

    name: str  # CUDA_NAME or "cpu"
    index: int = 0


class TokenTensor(Protocol):
    """A tensor [..., tokens, width] that is bound to a decoder once and then read and written by token."""

    @property
    def value(self) -> Any:
        """Return the `OrtValue` to bind."""

    @property
    def shape(self) -> Shape:
        """Return [..., tokens, width]."""

    def write(self, start: int, rows: Array) -> None:
        """Write rows [..., n, width] of any floating-point type for the tokens from `start` on."""

    def read(self, length: int) -> Array:
        """Return the first `length` tokens."""

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """Copy the first `length` tokens of another tensor of the same class. Raises BackendError for others."""


def new_tensor(shape: Shape, dtype: np.dtype[Any], device: Device | None) -> TokenTensor:
    """Return zeros [..., tokens, width] on a device, or in host memory for None."""
    return HostTensor(shape, dtype) if device is None else DeviceTensor(shape, dtype, device)


class HostTensor:
    """A tensor in host memory, initially zero. Pages are allocated when they are first written."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.array = lazy_zeros(shape, dtype)
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(self.array)

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`."""
        self.array[..., start : start + rows.shape[-2], :] = rows

    def read(self, length: int) -> Array:
        """Return a view of the first `length` tokens."""
        return self.array[..., :length, :]

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`."""
        self.write(0, _same_class(self, other).read(length))


class DeviceTensor:
    """A tensor in device memory, accessed through a view for each row of the leading axes."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any], device: Device) -> None:
        # Zeros: attention multiplies masked values by zero, and uninitialized memory may hold NaN.
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device.name, device.index)
        self.shape, self._dtype = shape, dtype
        self._lead = math.prod(shape[:-2])

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`."""
        parts = np.ascontiguousarray(rows, self._dtype).reshape(self._lead, -1, self.shape[-1])
        for index, part in enumerate(parts):
            self._view(index, start, len(part)).update_inplace(np.ascontiguousarray(part))

    def read(self, length: int) -> Array:
        """Copy the first `length` tokens to the host."""
        read = np.empty((self._lead, length, self.shape[-1]), self._dtype)
        for index in range(self._lead if length else 0):
            read[index] = self._view(index, 0, length).numpy()
        return read.reshape(*self.shape[:-2], length, self.shape[-1])

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`. The copy stays on the device."""
        source = _same_class(self, other)
        for index in range(self._lead if length else 0):
            self._view(index, 0, length).update_inplace(source._view(index, 0, length))

    def _view(self, index: int, start: int, count: int) -> Any:
        tokens, width = self.shape[-2:]
        return tensor_view(self.value, (index * tokens + start) * width, (count, width))


class TiledTensor:
    """Keys or values [1, kv_heads, tokens, width] in the tiled bfloat16 layout of native/attention.h.

    Reads and writes use float32.
    """

    def __init__(self, shape: Shape, *, tile: int, pair: int) -> None:
        """`tile`: tokens that are interleaved, `pair` consecutive elements of each at a time."""
        _, heads, tokens, width = shape
        self.shape, self._tile = shape, tile
        # bfloat16 [kv_heads, tokens / tile, width / pair, tile, pair]
        self._array: NDArray[np.uint16] = lazy_zeros(
            (heads, tokens // tile, width // pair, tile, pair), np.dtype(np.uint16)
        )
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(self._array.reshape(shape))

    def write(self, start: int, rows: Array) -> None:
        """See `TokenTensor`. Values are rounded to the nearest bfloat16."""
        heads, _, groups, _, pair = self._array.shape
        parts = to_bfloat16(rows).reshape(heads, -1, groups, pair)
        tiles, places = np.divmod(np.arange(start, start + parts.shape[1]), self._tile)
        self._array[:, tiles, :, places] = parts.transpose(1, 0, 2, 3)

    def read(self, length: int) -> Floats:
        """Copy the first `length` tokens, as float32."""
        tiles, places = np.divmod(np.arange(length), self._tile)
        rows = self._array[:, tiles, :, places]  # [length, kv_heads, width / pair, pair]
        _, heads, _, width = self.shape
        return from_bfloat16(rows.transpose(1, 0, 2, 3).reshape(1, heads, length, width))

    def copy_from(self, other: TokenTensor, length: int) -> None:
        """See `TokenTensor`. Copies whole tiles, so it may write tokens beyond `length`."""
        source = _same_class(self, other)
        tiles = -(-length // self._tile)
        self._array[:, :tiles] = source._array[:, :tiles]


def new_tiled_tensors(names: list[str], kv_heads: int, tokens: int, width: int) -> list[TiledTensor]:
    """Return zeros for the states `key_*` and `value_*`, with room for at least `tokens` tokens each."""
    shape = (1, kv_heads, -(-tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, width)
    return [
        TiledTensor(shape, tile=TILE, pair=PAIR) if name.startswith("key") else TiledTensor(shape, tile=PAIR, pair=1)
        for name in names
    ]


def to_bfloat16(values: Array) -> NDArray[np.uint16]:
    """Round to bfloat16, to nearest with ties to even, and return the bits in an array of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """Convert the bits of bfloat16 values to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def lazy_zeros(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Return zeros whose pages are allocated when they are first written."""
    pages = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    # The tokens of different heads are far apart: with huge pages the first token would allocate half of a cache.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


class _DLTensor(ctypes.Structure):
    """The start of a `DLManagedTensor`: https://dmlc.github.io/dlpack/latest/c_api.html."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def tensor_view(value: Any, offset: int, shape: Shape) -> Any:
    """Return a contiguous part of an `OrtValue`, of `shape` from element `offset` on, that shares and keeps its memory.

    ONNX Runtime has no such views, but it exports tensors by DLPack and imports them again with another address and
    shape.
    """
    capsule = value.__dlpack__()
    tensor = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    lengths = (ctypes.c_int64 * len(shape))(*shape)
    tensor.data += offset * tensor.bits // 8
    tensor.ndim, tensor.shape = len(shape), ctypes.addressof(lengths)  # the next line reads and copies them
    return ort.OrtValue.from_dlpack(capsule)


def _same_class(target: Tensor, source: TokenTensor) -> Tensor:
    if not isinstance(source, type(target)):
        raise BackendError(
            "a cache can only be copied from a cache of the same kind on the same device; open both on one engine"
        )
    return source


class TokenCache:
    """Keys, values and rotary tables of one conversation, as tensors that ONNX Runtime reads and writes."""

    def __init__(self, cos: TokenTensor, sin: TokenTensor, states: Sequence[TokenTensor], capacity: int) -> None:
        """cos, sin: [capacity, head_dim / 2]; states: [1, kv_heads, capacity, head_dim] in the decoder's order."""
        self.capacity = capacity
        # Rotary tables are indexed by token, not by position, because the tokens of a picture share positions.
        self.cos, self.sin, self.states = cos, sin, tuple(states)

    def snapshot(self, length: int) -> KvSnapshot:
        """See `KvCache`."""
        states = np.stack([state.read(length)[0] for state in self.states])
        parts = (states, self.cos.read(length), self.sin.read(length))
        return KvSnapshot(*(part.astype(np.float32, copy=False) for part in parts))

    def restore(self, snapshot: KvSnapshot) -> None:
        """See `KvCache`. Raises BackendError if the snapshot is of another decoder or too long."""
        kv_heads, _, width = self.states[0].shape[1:]
        check_snapshot(snapshot, len(self.states), kv_heads, width, self.capacity)
        for tensor, values in zip(self._tensors(), (snapshot.cos, snapshot.sin, *snapshot.states), strict=True):
            tensor.write(0, values)

    def copy_from(self, other: KvCache, length: int) -> None:
        """See `KvCache`. Raises BackendError for a cache of another decoder or device."""
        if not isinstance(other, TokenCache) or len(other.states) != len(self.states):
            raise BackendError("a cache can only be copied from a cache of the same decoder; open both on one engine")
        for target, source in zip(self._tensors(), other._tensors(), strict=True):
            target.copy_from(source, length)

    def _tensors(self) -> tuple[TokenTensor, ...]:
        return self.cos, self.sin, *self.states


class OrtCache(TokenCache):
    """A cache that is bound once, as input and as output of its decoder's graphs."""

    def __init__(self, decoder: OrtDecoder) -> None:
        table = (decoder.capacity, decoder.rotary)
        cos, sin = (HostTensor(table, np.dtype(np.float32)) for _ in range(2))
        super().__init__(cos, sin, decoder.new_states(), decoder.capacity)
        self._scalars: dict[str, Array] = {
            "last": np.zeros(1, np.int32),  # index of the newest token
            "total": np.zeros((), np.int32),  # tokens in the cache after the step
            "keep": np.zeros(1, np.int64),  # rows of logits
        }
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._scalars.items()}
        self._logits: Floats = np.empty((1, decoder.vocab), np.float32)
        self.session = decoder.session
        self._binding = self._bind(decoder.session, decoder)
        self.prefill_binding = self._bind(decoder.prefill, decoder) if decoder.prefill else None

    def bind_logits(self, keep: int) -> tuple[Any, Floats]:
        """Return the binding of a step with `keep` rows of logits, and the buffer [keep, vocab] it writes them to."""
        if self._scalars["keep"][0] != keep:
            if len(self._logits) < keep:
                self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self._scalars["keep"][0] = keep
            self._rows = ort.OrtValue.ortvalue_from_numpy(self._logits[:keep])
            self._binding.bind_ortvalue_output("logits", self._rows)
        return self._binding, self._logits[:keep]

    def write_rotary(self, start: int, cos: Floats, sin: Floats) -> None:
        """Write rows [n, head_dim / 2] of the rotary tables for the tokens from `start` on."""
        self.cos.write(start, cos)
        self.sin.write(start, sin)

    def set_length(self, length: int) -> None:
        """Set how many tokens the cache holds after the next run."""
        self._scalars["last"][0], self._scalars["total"][...] = length - 1, length

    def _bind(self, session: ort.InferenceSession, decoder: OrtDecoder) -> Any:
        binding = session.io_binding()
        inputs = {item.name for item in session.get_inputs()}
        for name, value in self._values.items():
            if name in inputs:  # the prefill graph has no logits, hence no `keep`
                binding.bind_ortvalue_input(name, value)
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            binding.bind_ortvalue_input(name, table.value)
        for name, state in zip(decoder.states, self.states, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", state.value)
            binding.bind_ortvalue_output(f"present_{name}", state.value)
        return binding


class OrtDecoder:
    """A decoder exported for ONNX Runtime, with ONNX Runtime's operators or with this package's native ones."""

    def __init__(
        self, path: Path, *, capacity: int, threads: int | None = None, optimized: bool = False,
        prefill: Future[ort.InferenceSession] | None = None, operators: Path | None = None,
    ) -> None:
        """Open the graph.

        Args:
            path: the graph.
            capacity: tokens that fit a cache, if the graph itself does not fix it.
            threads, optimized: see `open_session`.
            prefill: a second graph over the same cache that computes no logits and is faster for many tokens. It may
                still be loading.
            operators: the native operator library, if the graph needs it.

        Raises:
            BackendError: the graph cannot be loaded or is not such a decoder.
        """
        self.session = open_session(path, threads=threads, optimized=optimized, decoder=True, operators=operators)
        self.prefill = prefill.result() if prefill else None
        inputs = {item.name: item for item in self.session.get_inputs()}
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        if not self.states or not {"cos", "keep"} <= inputs.keys():
            raise BackendError(_NOT_A_DECODER.format(path))
        try:
            self._tiled = inputs[f"past_{self.states[0]}"].type == "tensor(uint16)"
            self.hidden: int = inputs["inputs_embeds"].shape[2]
            self.rotary: int = inputs["cos"].shape[1]
            _, self.kv_heads, fixed, _ = inputs[f"past_{self.states[0]}"].shape
            self.capacity = fixed if isinstance(fixed, int) else capacity
            self.vocab: int = {item.name: item.shape for item in self.session.get_outputs()}["logits"][1]
            self.deepstack: int = inputs["deepstack"].shape[0] if "deepstack" in inputs else 0
        except (IndexError, KeyError, ValueError) as exc:
            raise BackendError(_NOT_A_DECODER.format(path)) from exc

    def check_shape(self, shape: DecoderShape) -> None:
        """Raise ArtifactError unless the graph has the dimensions that its manifest promises."""
        layers, width = len(self.states) // 2, 2 * self.rotary
        own = DecoderShape(self.hidden, layers, self.kv_heads, width, self.vocab, self.deepstack)
        for name in (field.name for field in fields(DecoderShape)):
            found, promised = getattr(own, name), getattr(shape, name)
            if found != promised:
                raise ArtifactError(f"policy: the decoder has '{name}' {found}, its manifest says {promised}; export "
                                    "the policy again")

    def new_cache(self) -> OrtCache:
        """Return an empty cache."""
        return OrtCache(self)

    def new_states(self) -> Sequence[TokenTensor]:
        """Return the keys and values of an empty cache, layer by layer."""
        if self._tiled:
            return new_tiled_tensors(self.states, self.kv_heads, self.capacity, 2 * self.rotary)
        shape = (1, self.kv_heads, self.capacity, 2 * self.rotary)
        return [HostTensor(shape, np.dtype(np.float32)) for _ in self.states]

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append tokens and return logits; see `DecoderEngine.step`."""
        count = len(embeds)
        if not isinstance(cache, OrtCache) or cache.session is not self.session:
            raise BackendError(FOREIGN_CACHE)
        if past + count > cache.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {cache.capacity}; open a larger one")
        cache.write_rotary(past, cos, sin)
        binding, logits = cache.bind_logits(keep)
        split = count - keep if self.prefill is not None and count - keep >= MIN_PREFILL_TOKENS else 0
        with device_errors(f"{count} tokens cannot be computed", on_cpu=ArtifactError):
            if split:
                cache.set_length(past + split)
                self._run(self.prefill, cache.prefill_binding, embeds[:split], _slice(deepstack, 0, split))
            cache.set_length(past + count)
            self._run(self.session, binding, embeds[split:], _slice(deepstack, split, count))
        return logits

    def _run(self, session: Any, binding: Any, embeds: Floats, deepstack: Floats | None) -> None:
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None], np.float32))
        if self.deepstack:
            shape = (self.deepstack, *embeds.shape)
            added = np.zeros(shape, np.float32) if deepstack is None else np.ascontiguousarray(deepstack, np.float32)
            binding.bind_cpu_input("deepstack", added)
        session.run_with_iobinding(binding)


def _slice(deepstack: Floats | None, start: int, stop: int) -> Floats | None:
    return None if deepstack is None else deepstack[:, start:stop]
