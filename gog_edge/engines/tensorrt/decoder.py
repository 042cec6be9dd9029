"""The cache of a decoder on TensorRT: keys and values on the GPU, in half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Protocol

import numpy as np

from gog_edge.engines.base import Array, Floats, KvCache, Snapshot
from gog_edge.engines.cuda import Cuda, DeviceBuffer, Stream, pinned
from gog_edge.engines.manifest import IN_PLACE, BuiltEngines, BuiltGraph
from gog_edge.engines.tensorrt.execution import Execution, Run, Staged, Staging
from gog_edge.engines.tensorrt.plan import Plan, Tensor
from gog_edge.engines.tensorrt.shapes import Shape, choose_profile
from gog_edge.errors import ArtifactError, BackendError

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


DECODE = -1  # beside the numbers of profiles
SINGLE, WHOLE = np.dtype(np.float32), np.dtype(np.int64)


class DecoderShape(Protocol):
    """What an engine must know of the decoder that it is to be."""

    @property
    def hidden(self) -> int:
        """Width of embeddings."""

    @property
    def layers(self) -> int:
        """Blocks, each with keys and values."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""

    @property
    def vocab(self) -> int:
        """Tokens that logits are of."""

    @property
    def deepstack(self) -> int:
        """Layers whose output gets a picture's features added."""


class TrtDecoder:
    """A decoder. Caches are stepped by turns: they share the memory that a step computes in."""

    def __init__(self, plan: Plan, graph: BuiltGraph, built: BuiltEngines, spec: DecoderShape) -> None:
        """ArtifactError when the engine is of another decoder than `spec`, or of another context than `built` says."""
        self.plan, self.capacity = plan, built.context
        self.kv_heads, self.head_dim, self.deepstack = spec.kv_heads, spec.head_dim, spec.deepstack
        self.hidden = spec.hidden
        self.in_place = graph.cache == IN_PLACE
        self.states = [f"{kind}_{layer}" for layer in range(spec.layers) for kind in ("key", "value")]
        check_decoder(plan, built, spec, self.states)
        if self.in_place:
            check_aliases(plan, self.states, built)
        self._staging = Staging(plan.cuda)
        stream = Stream(plan.cuda)
        self._executions = [Execution(plan, stream, number) for number in range(len(plan.profiles))]
        self._capturing = True
        # Kernels are compiled for the first run of a profile and for the first decode step; all later ones have theirs.
        self._compiled: set[int] = set()
        self._lock = Lock()
        plan.keep_kernels()

    def new_cache(self) -> TrtCache:
        """An empty cache. OutOfDeviceMemory when there is no room for it."""
        return TrtCache(
            self.plan.cuda, self.states, kv_heads=self.kv_heads, head_dim=self.head_dim, capacity=self.capacity
        )

    def warm(self) -> None:
        """Do a decode step, and do it again as a captured graph: kernels are compiled, and what fails, fails now."""
        cache, embeds = self.new_cache(), np.zeros((1, self.hidden), np.float32)
        for past in range(min(2, self.capacity)):
            self.step(cache, embeds, cache.cos[:1], cache.sin[:1], past)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append embeds [T, hidden] with rotary cos, sin [T, head_dim / 2] after `past` tokens -> logits [keep, vocab].

        deepstack [layers, T, hidden] goes to the first layers' outputs; None adds nothing. The logits are overwritten
        by the cache's next step.

        Raises:
            BackendError: the cache is too small or of another engine, or T or `keep` beyond what the engine was built
                for; or OutOfDeviceMemory, DeviceLost.
        """
        count = len(embeds)
        if not isinstance(cache, TrtCache):
            raise BackendError("this cache is of another engine; use the decoder's own new_cache()")
        if past + count > cache.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {cache.capacity}; build a larger one")
        feeds = self._feeds(embeds, cos, sin, past, deepstack, keep)
        with self._lock:
            self.plan.cuda.use()
            one = count == keep == 1
            logits = self._decode(cache, feeds, past) if one else self._append(cache, feeds, past)
        cache.cos[past : past + count], cache.sin[past : past + count] = cos, sin
        return logits

    def _feeds(
        self, embeds: Floats, cos: Floats, sin: Floats, past: int, deepstack: Floats | None, keep: int
    ) -> dict[str, Array]:
        count = len(embeds)
        feeds: dict[str, Array] = {
            "inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None], "past": np.array([past], WHOLE),
            "rows": np.arange(count - keep, count, dtype=WHOLE),
        }  # fmt: skip
        if self.deepstack:
            shape = (self.deepstack, count, self.hidden)
            feeds["deepstack"] = np.zeros(shape, np.float32) if deepstack is None else deepstack
        return feeds

    def _append(self, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> Floats:
        """Any number of tokens, through places that all caches share."""
        profile = choose_profile(self.plan.profiles, {name: feed.shape for name, feed in feeds.items()})
        run = self._prepare(cache, self._staging, self._executions[profile], feeds)
        self._go(run, cache, feeds, past)
        self._keep_kernels(profile)
        return run.output("logits").copy()

    def _decode(self, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> Floats:
        """One token, through places of the cache's own that never move: captured once it was done."""
        fresh = cache.decode is None
        if cache.decode is None:
            profile = choose_profile(self.plan.profiles, {name: feed.shape for name, feed in feeds.items()})
            execution = Execution(self.plan, cache.stream, profile, one_shape=True)
            cache.decode = self._prepare(cache, cache.staging, execution, feeds)
        self._go(cache.decode, cache, feeds, past)
        logits: Floats = cache.decode.output("logits")
        if fresh and self._capturing:
            self._capturing = cache.decode.capture(self.plan)
        self._keep_kernels(DECODE)
        return logits

    def _keep_kernels(self, first: int) -> None:
        """Once for each profile, and for DECODE."""
        if first not in self._compiled:
            self._compiled.add(first)
            self.plan.keep_kernels()

    def _prepare(self, cache: TrtCache, staging: Staging, execution: Execution, feeds: Mapping[str, Array]) -> Run:
        given = execution.reshape({name: feed.shape for name, feed in feeds.items()})
        inputs = {name: staging.place(name, feed.shape, self.plan.inputs[name].dtype) for name, feed in feeds.items()}
        outputs = {"logits": staging.place("logits", given["logits"], SINGLE)}
        addresses = {f"past_{name}": state.address for name, state in cache.states.items()}
        if self.in_place:
            addresses |= {f"present_{name}": state.address for name, state in cache.states.items()}
        else:
            rows = {f"new_{name}" for name in self.states}
            outputs |= {name: staging.place(name, given[name], HALF, host=False) for name in sorted(rows)}
        addresses |= {name: staged.address for name, staged in (inputs | outputs).items()}
        execution.bind(addresses)
        return Run(cache.stream, execution, inputs, outputs)

    def _go(self, run: Run, cache: TrtCache, feeds: Mapping[str, Array], past: int) -> None:
        run.fill(feeds)
        run.go()
        if not self.in_place:
            rows = {name: run.outputs[f"new_{name}"] for name in self.states}
            cache.append(rows, past, feeds["inputs_embeds"].shape[1])
        cache.stream.synchronize()


def check_decoder(plan: Plan, built: BuiltEngines, spec: DecoderShape, states: list[str]) -> None:
    """ArtifactError where the engine's inputs or logits are not those of this decoder."""
    state = (1, spec.kv_heads, built.context, spec.head_dim)
    angles = (1, -1, spec.head_dim // 2)
    wanted = [
        Tensor("inputs_embeds", SINGLE, (1, -1, spec.hidden)), Tensor("cos", SINGLE, angles),
        Tensor("sin", SINGLE, angles), Tensor("past", WHOLE, (1,)), Tensor("rows", WHOLE, (-1,)),
        Tensor("logits", SINGLE, (-1, spec.vocab)), *(Tensor(f"past_{name}", HALF, state) for name in states),
    ]  # fmt: skip
    if spec.deepstack:
        wanted.append(Tensor("deepstack", SINGLE, (spec.deepstack, -1, spec.hidden)))
    has = {*plan.inputs.values(), *(tensor for name, tensor in plan.outputs.items() if name == "logits")}
    other = sorted({tensor.name for tensor in has ^ set(wanted)})
    if other:
        raise ArtifactError(
            f"engines: '{plan.path}' is not of this policy's decoder with {built.context} tokens "
            f"({', '.join(other)} differ); build them again: {built.rebuild()}"
        )


def check_aliases(plan: Plan, states: list[str], built: BuiltEngines) -> None:
    """ArtifactError where the engine does not write keys and values where they lie."""
    asked: Any = getattr(plan.engine, "get_aliased_input_tensor", None)  # TensorRT from 10.15 on
    for name in states:
        if asked is None or asked(f"present_{name}") != f"past_{name}":
            raise ArtifactError(
                f"engines: '{plan.path}' does not update '{name}' in its place; build them again: {built.rebuild()}"
            )
