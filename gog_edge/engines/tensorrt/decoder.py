"""Decoders on TensorRT, with a float16 KV cache in device memory.

A decode step (one token, one row of logits) is captured as a CUDA graph and launched as a whole from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from gog_edge.engines.base import Array, DecoderShape, Floats, KvCache, KvSnapshot, check_snapshot, check_step
from gog_edge.engines.cuda import Cuda, DeviceBuffer, Stream, pinned_array
from gog_edge.engines.manifest import DECODER, IN_PLACE, BuiltGraph, EngineManifest
from gog_edge.engines.tensorrt.execution import Buffer, BufferPool, Execution, Run
from gog_edge.engines.tensorrt.plan import Plan, Shape, Tensor, choose_profile, open_plan
from gog_edge.errors import ArtifactError, BackendError

FP16, FP32, INT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int64)
DECODE_STEP = -1  # in the set of compiled profiles: the specialized kernels of decode steps


def open_decoder(folder: Path, built: EngineManifest, shape: DecoderShape, *, device: int = 0) -> TrtDecoder:
    """Open the decoder and run two steps, so that its kernels are compiled. See `open_plan` for the errors raised."""
    plan = open_plan(folder, built, DECODER, device=device)
    decoder = TrtDecoder(plan, built.graph(DECODER), built, shape)
    decoder.warm_up()
    return decoder


class TrtCache:
    """Keys and values of one conversation in device memory, and its captured decode step. Methods are synchronous."""

    def __init__(self, cuda: Cuda, states: Sequence[str], *, kv_heads: int, head_dim: int, capacity: int) -> None:
        """Allocate the cache. `states`: names of keys and values, layer by layer. Raises OutOfDeviceMemory."""
        cuda.use()
        self.capacity = capacity
        self.heads, self.width = kv_heads, head_dim * FP16.itemsize  # bytes of one token in one head
        self._cuda, self._stride = cuda, self.capacity * self.width  # bytes from one head to the next
        self.stream, self.buffers = Stream(cuda), BufferPool(cuda)
        self.states = {name: DeviceBuffer(cuda, self.heads * self._stride) for name in states}
        for state in self.states.values():
            # Attention weighs unwritten tokens with zero, but zero times NaN is NaN.
            self.stream.zero(state.address, state.nbytes)
        self.stream.synchronize()
        self.decode: Run | None = None
        # Keys are stored with their rotation applied; the rotary tables only serve snapshots.
        self.cos: Floats = np.zeros((self.capacity, head_dim // 2), np.float32)
        self.sin: Floats = np.zeros_like(self.cos)

    def append(self, rows: Mapping[str, Buffer], past: int, count: int) -> None:
        """Enqueue copying new rows [kv_heads, count, head_dim] of each state behind the first `past` tokens."""
        width = count * self.width
        for name, buffer in rows.items():
            target = self.states[name].at(past * self.width, width)
            self.stream.copy_2d(target, self._stride, buffer.address, width, width, self.heads)

    def snapshot(self, length: int) -> KvSnapshot:
        """See `KvCache`."""
        self._cuda.use()
        staging = pinned_array(self._cuda, self._shape(length), FP16)
        states = np.empty((len(self.states), *staging.shape), np.float32)
        width = length * self.width
        for state, values in zip(self.states.values(), states, strict=True):
            self.stream.copy_2d(staging.ctypes.data, width, state.address, self._stride, width, self.heads)
            self.stream.synchronize()
            values[...] = staging
        return KvSnapshot(states, self.cos[:length].copy(), self.sin[:length].copy())

    def restore(self, snapshot: KvSnapshot) -> None:
        """See `KvCache`. Raises BackendError if the snapshot is of another decoder or too long."""
        check_snapshot(snapshot, len(self.states), self.heads, self.width // FP16.itemsize, self.capacity)
        self._cuda.use()
        length = len(snapshot.cos)
        staging = pinned_array(self._cuda, self._shape(length), FP16)
        width = length * self.width
        for state, values in zip(self.states.values(), snapshot.states, strict=True):
            staging[...] = values
            self.stream.copy_2d(state.address, self._stride, staging.ctypes.data, width, width, self.heads)
            self.stream.synchronize()
        self.cos[:length], self.sin[:length] = snapshot.cos, snapshot.sin

    def copy_from(self, other: KvCache, length: int) -> None:
        """See `KvCache`. Raises BackendError for a cache of another decoder or engine."""
        if not isinstance(other, TrtCache) or other._layout != self._layout:
            raise BackendError("a cache can only be copied from a cache of the same decoder; open both on one engine")
        self._cuda.use()
        width = length * self.width
        for target, source in zip(self.states.values(), other.states.values(), strict=True):
            self.stream.copy_2d(target.address, self._stride, source.address, self._stride, width, self.heads)
        self.stream.synchronize()
        self.cos[:length], self.sin[:length] = other.cos[:length], other.sin[:length]

    @property
    def _layout(self) -> tuple[int, ...]:
        return len(self.states), self.heads, self.width, self.capacity

    def _shape(self, length: int) -> Shape:
        return self.heads, length, self.width // FP16.itemsize


class TrtDecoder:
    """A decoder. Its caches are stepped one at a time, because steps share the engine's workspace."""

    def __init__(self, plan: Plan, graph: BuiltGraph, built: EngineManifest, shape: DecoderShape) -> None:
        """Check the engine. Raises ArtifactError if its dimensions are not `shape` or its context is not `built`'s."""
        self.plan, self.capacity = plan, built.context
        self.kv_heads, self.head_dim, self.deepstack = shape.kv_heads, shape.head_dim, shape.deepstack
        self.hidden = shape.hidden
        self.in_place = graph.cache == IN_PLACE
        self.states = [f"{kind}_{layer}" for layer in range(shape.layers) for kind in ("key", "value")]
        _check_tensors(plan, built, shape, self.states)
        if self.in_place:
            _check_aliases(plan, self.states, built)
        self._buffers = BufferPool(plan.cuda)
        stream = Stream(plan.cuda)
        self._executions = [Execution(plan, stream, index) for index in range(len(plan.profiles))]
        self._capturing = True
        # Kernels are compiled by the first run of each profile and by the first decode step; later runs reuse them.
        self._compiled: set[int] = set()
        self._lock = Lock()
        plan.save_kernels()

    def new_cache(self) -> TrtCache:
        """Return an empty cache. Raises OutOfDeviceMemory."""
        return TrtCache(
            self.plan.cuda, self.states, kv_heads=self.kv_heads, head_dim=self.head_dim, capacity=self.capacity
        )

    def warm_up(self) -> None:
        """Run a decode step, then run it as a captured graph: kernels are compiled, and errors occur now."""
        cache, embeds = self.new_cache(), np.zeros((1, self.hidden), np.float32)
        for past in range(min(2, self.capacity)):
            self.step(cache, embeds, cache.cos[:1], cache.sin[:1], past)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append tokens and return logits; see `DecoderEngine.step`.

        Raises BackendError also if no profile accepts this number of tokens or of rows of logits.
        """
        count = len(embeds)
        own = check_step(cache, TrtCache, past, count)
        feeds = self._feeds(embeds, cos, sin, past, deepstack, keep)
        with self._lock:
            self.plan.cuda.use()
            decode = count == keep == 1
            logits = self._decode(own, feeds, past) if decode else self._append(own, feeds, past)
        own.cos[past : past + count], own.sin[past : past + count] = cos, sin
        return logits

    def _feeds(
        self, embeds: Floats, cos: Floats, sin: Floats, past: int, deepstack: Floats | None, keep: int
    ) -> dict[str, Array]:
        count = len(embeds)
        feeds: dict[str, Array] = {
            "inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None], "past": np.array([past], INT64),
            "rows": np.arange(count - keep, count, dtype=INT64),
        }  # fmt: skip
        if self.deepstack:
            shape = (self.deepstack, count, self.hidden)
            feeds["deepstack"] = np.zeros(shape, np.float32) if deepstack is None else deepstack
        return feeds

    def _append(self, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> Floats:
        """Append any number of tokens, with buffers that all caches share."""
        profile = choose_profile(self.plan.profiles, {name: feed.shape for name, feed in feeds.items()})
        run = self._prepare(cache, self._buffers, self._executions[profile], feeds)
        self._launch(run, cache, feeds, past)
        self._save_kernels(profile)
        return run.output("logits").copy()

    def _decode(self, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> Floats:
        """Append one token, with buffers of the cache's own that never move: captured after the first time."""
        first = cache.decode is None
        if cache.decode is None:
            profile = choose_profile(self.plan.profiles, {name: feed.shape for name, feed in feeds.items()})
            execution = Execution(self.plan, cache.stream, profile, one_shape=True)
            cache.decode = self._prepare(cache, cache.buffers, execution, feeds)
        self._launch(cache.decode, cache, feeds, past)
        logits: Floats = cache.decode.output("logits")
        if first and self._capturing:
            self._capturing = cache.decode.capture(self.plan)
        self._save_kernels(DECODE_STEP)
        return logits

    def _save_kernels(self, profile: int) -> None:
        """Save the kernels that the first run with a profile, or DECODE_STEP, compiled."""
        if profile not in self._compiled:
            self._compiled.add(profile)
            self.plan.save_kernels()

    def _prepare(self, cache: TrtCache, buffers: BufferPool, execution: Execution, feeds: Mapping[str, Array]) -> Run:
        shapes = execution.set_shapes({name: feed.shape for name, feed in feeds.items()})
        inputs = {name: buffers.get(name, feed.shape, self.plan.inputs[name].dtype) for name, feed in feeds.items()}
        outputs = {"logits": buffers.get("logits", shapes["logits"], FP32)}
        addresses = {f"past_{name}": state.address for name, state in cache.states.items()}
        if self.in_place:
            addresses |= {f"present_{name}": state.address for name, state in cache.states.items()}
        else:
            rows = {f"new_{name}" for name in self.states}
            outputs |= {name: buffers.get(name, shapes[name], FP16, host=False) for name in sorted(rows)}
        addresses |= {name: buffer.address for name, buffer in (inputs | outputs).items()}
        execution.bind(addresses)
        return Run(cache.stream, execution, inputs, outputs)

    def _launch(self, run: Run, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> None:
        run.set_inputs(feeds)
        run.launch()
        if not self.in_place:
            rows = {name: run.outputs[f"new_{name}"] for name in self.states}
            cache.append(rows, past, feeds["inputs_embeds"].shape[1])
        cache.stream.synchronize()


def _check_tensors(plan: Plan, built: EngineManifest, shape: DecoderShape, states: list[str]) -> None:
    """Raise ArtifactError if the engine's inputs or logits are not those of a decoder of this shape."""
    state = (1, shape.kv_heads, built.context, shape.head_dim)
    table = (1, -1, shape.head_dim // 2)
    expected = [
        Tensor("inputs_embeds", FP32, (1, -1, shape.hidden)), Tensor("cos", FP32, table), Tensor("sin", FP32, table),
        Tensor("past", INT64, (1,)), Tensor("rows", INT64, (-1,)), Tensor("logits", FP32, (-1, shape.vocab)),
        *(Tensor(f"past_{name}", FP16, state) for name in states),
    ]  # fmt: skip
    if shape.deepstack:
        expected.append(Tensor("deepstack", FP32, (shape.deepstack, -1, shape.hidden)))
    found = {*plan.inputs.values(), *(tensor for name, tensor in plan.outputs.items() if name == "logits")}
    different = sorted({tensor.name for tensor in found ^ set(expected)})
    if different:
        raise ArtifactError(
            f"engines: '{plan.path}' was not built from this policy's decoder with a context of {built.context} tokens "
            f"({', '.join(different)} differ); build them again: {built.rebuild_command()}"
        )


def _check_aliases(plan: Plan, states: list[str], built: EngineManifest) -> None:
    """Raise ArtifactError if the engine writes keys and values to other memory than it reads them from."""
    alias_of: Any = getattr(plan.engine, "get_aliased_input_tensor", None)  # TensorRT 10.15 and later
    for name in states:
        if alias_of is None or alias_of(f"present_{name}") != f"past_{name}":
            raise ArtifactError(
                f"engines: '{plan.path}' does not update '{name}' in place; build them again: {built.rebuild_command()}"
            )
