"""ONNX Runtime: stateless graphs, and decoders whose cache is written in place."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from gog_edge.engines.base import Array, Floats, KvCache, Snapshot
from gog_edge.errors import BackendError

LOAD_ERRORS = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoKernel, NoSuchFile)
CPU = ("CPUExecutionProvider",)
AHEAD = 32  # tokens from which the graph that only fills the cache is worth its run


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.is_file() else str(cpu))
    return max(1, len(siblings))


def session_options(threads: int | None = None, *, spinning: bool = True) -> ort.SessionOptions:
    """How every graph runs here; `threads`: one for each physical core when None."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin while a graph runs (small operators follow each other closely) and sleep between runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return options


def open_session(
    path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
    spinning: bool = True,
) -> ort.InferenceSession:
    """Load a graph on exactly the providers asked for; BackendError otherwise. `optimised` graphs are left as they are.

    Without `spinning`, threads sleep within a run, too, wherever they wait for others.
    """
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} here has no {', '.join(missing)} (it has "
            f"{', '.join(ort.get_available_providers())}); install the build that has it or ask for another provider"
        )
    options = session_options(threads, spinning=spinning)
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except LOAD_ERRORS as exc:
        mend = f"remove the folder '{path.parent}', it is made anew" if optimised else "export it again"
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load '{path}': {exc}; {mend}") from exc
    obtained = session.get_providers()
    if obtained[: len(providers)] != list(providers):
        raise BackendError(f"asked for {', '.join(providers)} for '{path}' and got {', '.join(obtained)}; see its log")
    return session


class OrtGraph:
    """A graph without state."""

    def __init__(
        self, path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
        spinning: bool = True,
    ) -> None:
        self._session = open_session(
            path, threads=threads, providers=providers, optimised=optimised, spinning=spinning
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input by name, every output by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def _sparse_zeros(shape: tuple[int, ...]) -> Floats:
    """Zeros that take memory only where something is written.

    Each head's tokens lie far from the next one's: with huge pages the first token would take half of the cache.
    """
    pages = mmap.mmap(-1, 4 * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32).reshape(shape)


class OrtCache:
    """One conversation's keys, values and rotary tables, bound once as input and as output."""

    def __init__(self, decoder: OrtDecoder) -> None:
        self.capacity = decoder.capacity
        # Rotary rows stand by token index: a picture's tokens share positions, so position would not do.
        self.cos: Floats = np.zeros((self.capacity, decoder.rotary), np.float32)
        self.sin: Floats = np.zeros((self.capacity, decoder.rotary), np.float32)
        shape = (1, decoder.kv_heads, self.capacity, 2 * decoder.rotary)
        self.states: list[Floats] = [_sparse_zeros(shape) for _ in decoder.states]
        self.last = np.zeros(1, np.int32)  # index of the newest token
        self.total = np.zeros((), np.int32)  # tokens in the cache after the step
        self.keep = np.zeros(1, np.int64)  # rows of logits asked for
        self._logits: Floats = np.empty((1, decoder.vocab), np.float32)
        self._held: list[Any] = []
        self._binding = self._bind(decoder.session, decoder)
        self.binding_ahead = self._bind(decoder.prefill, decoder) if decoder.prefill else None

    def bound(self, keep: int) -> tuple[Any, Floats]:
        """The binding of a step that gives `keep` rows of logits, and the buffer [keep, vocab] they come in."""
        if self.keep[0] != keep:
            if len(self._logits) < keep:
                self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self.keep[0] = keep
            self._rows = ort.OrtValue.ortvalue_from_numpy(self._logits[:keep])
            self._binding.bind_ortvalue_output("logits", self._rows)
        return self._binding, self._logits[:keep]

    def _value(self, array: Array) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held.append((array, value))
        return value

    def _bind(self, session: ort.InferenceSession, decoder: OrtDecoder) -> Any:
        binding = session.io_binding()
        named = {item.name for item in session.get_inputs()}
        for name in ("cos", "sin", "last", "total", "keep"):
            if name in named:
                binding.bind_ortvalue_input(name, self._value(getattr(self, name)))
        for name, state in zip(decoder.states, self.states, strict=True):
            value = self._value(state)
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        return binding

    def snapshot(self, length: int) -> Snapshot:
        """The first `length` tokens, to be kept in files."""
        states = np.stack([state[0, :, :length] for state in self.states])
        return Snapshot(states, self.cos[:length], self.sin[:length])

    def restore(self, kept: Snapshot) -> None:
        """Begin with the tokens of a snapshot; BackendError when it is of another decoder or too long."""
        states, length = kept.states, len(kept.cos)
        mine = (len(self.states), *self.states[0].shape[1:2], length, self.states[0].shape[3])
        if states.shape != mine or length > self.capacity:
            raise BackendError(f"a cache of {mine} cannot begin with kept tokens of {states.shape}; remove those files")
        self.cos[:length], self.sin[:length] = kept.cos, kept.sin
        for state, values in zip(self.states, states, strict=True):
            state[0, :, :length] = values

    def copy_from(self, other: KvCache, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same engine."""
        if not isinstance(other, OrtCache) or len(other.states) != len(self.states):
            raise BackendError("a cache can only be copied from one of the same decoder; open both on one engine")
        self.cos[:length], self.sin[:length] = other.cos[:length], other.sin[:length]
        for mine, theirs in zip(self.states, other.states, strict=True):
            mine[:, :, :length] = theirs[:, :, :length]


class OrtDecoder:
    """A decoder exported for ONNX Runtime (`GroupQueryAttention`, past and present in one buffer)."""

    def __init__(
        self, path: Path, *, capacity: int, threads: int | None = None, providers: Sequence[str] = CPU,
        optimised: bool = False, prefill: ort.InferenceSession | None = None,
    ) -> None:
        """`prefill`: a graph over the same cache that only fills it, for many tokens at a time."""
        self.session = open_session(path, threads=threads, providers=providers, optimised=optimised)
        self.prefill = prefill
        inputs = {item.name: item.shape for item in self.session.get_inputs()}
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        if not self.states or not {"cos", "keep"} <= inputs.keys():
            raise BackendError(
                f"'{path}' is not a decoder that this version exported for ONNX Runtime; export with --engine ort"
            )
        self.capacity = capacity
        self.hidden: int = inputs["inputs_embeds"][2]
        self.rotary: int = inputs["cos"][1]
        self.kv_heads: int = inputs[f"past_{self.states[0]}"][1]
        self.vocab: int = {item.name: item.shape for item in self.session.get_outputs()}["logits"][1]
        self.deepstack: int = inputs["deepstack"][0] if "deepstack" in inputs else 0

    def new_cache(self) -> OrtCache:
        """An empty cache."""
        return OrtCache(self)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append embeds [T, hidden] with rotary cos, sin [T, head_dim / 2] after `past` tokens -> logits [keep, vocab].

        deepstack [layers, T, hidden] goes to the first layers' outputs; None adds nothing. The logits are overwritten
        by the cache's next step. BackendError when the cache is too small.
        """
        count = len(embeds)
        if not isinstance(cache, OrtCache):
            raise BackendError("this cache is of another engine; use the decoder's own new_cache()")
        if past + count > cache.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {cache.capacity}; open a larger one")
        cache.cos[past : past + count], cache.sin[past : past + count] = cos, sin
        ahead = count - keep
        if self.prefill is None or ahead < AHEAD:
            ahead = 0
        else:
            self._run(self.prefill, cache.binding_ahead, cache, embeds[:ahead], past, _part(deepstack, 0, ahead))
        binding, logits = cache.bound(keep)
        self._run(self.session, binding, cache, embeds[ahead:], past + ahead, _part(deepstack, ahead, count))
        return logits

    def _run(
        self, session: ort.InferenceSession, binding: Any, cache: OrtCache, embeds: Floats, past: int,
        deepstack: Floats | None,
    ) -> None:
        end = past + len(embeds)
        cache.last[0], cache.total[...] = end - 1, end
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[None], np.float32))
        if self.deepstack:
            shape = (self.deepstack, *embeds.shape)
            added = np.zeros(shape, np.float32) if deepstack is None else np.ascontiguousarray(deepstack, np.float32)
            binding.bind_cpu_input("deepstack", added)
        session.run_with_iobinding(binding)


def _part(deepstack: Floats | None, start: int, stop: int) -> Floats | None:
    return None if deepstack is None else deepstack[:, start:stop]
