"""Decoders on TensorRT: keys and values stay on the GPU, in half precision, a decode step is one captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Protocol

import numpy as np

from gog_edge.engines.base import Array, Floats, KvCache
from gog_edge.engines.built import IN_PLACE, BuiltEngines, BuiltGraph
from gog_edge.engines.cuda import Stream
from gog_edge.engines.trt_cache import HALF, TrtCache
from gog_edge.engines.trt_plan import Plan, Tensor
from gog_edge.engines.trt_run import Execution, Run, Staging
from gog_edge.engines.trt_shapes import choose_profile
from gog_edge.errors import ArtifactError, BackendError

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
