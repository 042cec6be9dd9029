"""The cache of a decoder on TensorRT: keys and values on the GPU, in half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gog_edge.engines.base import Floats, KvCache, Snapshot
from gog_edge.engines.cuda import Cuda, DeviceBuffer, Stream, pinned
from gog_edge.engines.trt_run import Run, Staged, Staging
from gog_edge.engines.trt_shapes import Shape
from gog_edge.errors import BackendError

HALF = np.dtype(np.float16)


class TrtCache:
    """One conversation's keys and values on the device, and its decode step. All is done when a method returns."""

    def __init__(self, cuda: Cuda, states: Sequence[str], *, kv_heads: int, head_dim: int, capacity: int) -> None:
        """`states`: names of keys and values, layer by layer. OutOfDeviceMemory when they do not fit."""
        cuda.use()
        self.capacity = capacity
        self.heads, self.width = kv_heads, head_dim * HALF.itemsize  # bytes of a token in one head
        self._cuda, self._stride = cuda, self.capacity * self.width  # bytes from one head to the next
        self.stream, self.staging = Stream(cuda), Staging(cuda)
        self.states = {name: DeviceBuffer(cuda, self.heads * self._stride) for name in states}
        for state in self.states.values():
            # Places not written yet weigh nothing in attention, but nothing times NaN is NaN.
            self.stream.clear(state.address, state.nbytes)
        self.stream.synchronize()
        self.decode: Run | None = None
        # Keys lie here as they were turned; the angles are for snapshots alone.
        self.cos: Floats = np.zeros((self.capacity, head_dim // 2), np.float32)
        self.sin: Floats = np.zeros_like(self.cos)

    def append(self, rows: Mapping[str, Staged], past: int, count: int) -> None:
        """Copy new rows [kv_heads, count, head_dim] of each state behind the first `past`."""
        width = count * self.width
        for name, staged in rows.items():
            target = self.states[name].at(past * self.width, width)
            self.stream.copy_rows(target, self._stride, staged.address, width, width, self.heads)

    def snapshot(self, length: int) -> Snapshot:
        """The first `length` tokens, to be kept in files."""
        self._cuda.use()
        through = pinned(self._cuda, self._shape(length), HALF)
        kept = np.empty((len(self.states), *through.shape), np.float32)
        width = length * self.width
        for state, values in zip(self.states.values(), kept, strict=True):
            self.stream.copy_rows(through.ctypes.data, width, state.address, self._stride, width, self.heads)
            self.stream.synchronize()
            values[...] = through
        return Snapshot(kept, self.cos[:length].copy(), self.sin[:length].copy())

    def restore(self, kept: Snapshot) -> None:
        """Begin with the tokens of a snapshot; BackendError when it is of another decoder or too long."""
        self._cuda.use()
        length = len(kept.cos)
        mine = (len(self.states), *self._shape(length))
        if kept.states.shape != mine or length > self.capacity:
            raise BackendError(
                f"a cache of {mine} cannot begin with kept tokens of {kept.states.shape}; remove those files"
            )
        through = pinned(self._cuda, self._shape(length), HALF)
        width = length * self.width
        for state, values in zip(self.states.values(), kept.states, strict=True):
            through[...] = values
            self.stream.copy_rows(state.address, self._stride, through.ctypes.data, width, width, self.heads)
            self.stream.synchronize()
        self.cos[:length], self.sin[:length] = kept.cos, kept.sin

    def copy_from(self, other: KvCache, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same engine."""
        if not isinstance(other, TrtCache) or other._facts != self._facts:
            raise BackendError("a cache can only be copied from one of the same decoder; open both on one engine")
        self._cuda.use()
        width = length * self.width
        for mine, theirs in zip(self.states.values(), other.states.values(), strict=True):
            self.stream.copy_rows(mine.address, self._stride, theirs.address, self._stride, width, self.heads)
        self.stream.synchronize()
        self.cos[:length], self.sin[:length] = other.cos[:length], other.sin[:length]

    @property
    def _facts(self) -> tuple[int, ...]:
        return len(self.states), self.heads, self.width, self.capacity

    def _shape(self, length: int) -> Shape:
        return self.heads, length, self.width // HALF.itemsize
