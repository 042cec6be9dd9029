"""Decoders that `exporting.lift` rewrote for other runtimes, run by ONNX Runtime on whatever provider.

Caches stay where they lie, on a device or on the host. Graphs for ONNX Runtime's own attention take the rotary tables
of all tokens, those of the standard's operators the rows of the new ones. They update a cache in place (outputs
`present_*`) or give the new tokens' rows (outputs `new_*`), which are copied into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from gog_edge.engines.base import Array, Floats, KvCache
from gog_edge.engines.manifest import DECODER, BuiltEngines
from gog_edge.engines.onnx.decoder import CUDA_NAME, Device, TokenCache, new_tensor
from gog_edge.engines.onnx.session import CUDA, DTYPES, OrtGraph, device_errors, open_session
from gog_edge.errors import ArtifactError, BackendError

STEP = {"inputs_embeds", "cos", "sin", "rows"}  # inputs of all such graphs, beside where the new tokens stand
ENDS, PAST = {"last", "total"}, {"past"}  # where they stand: one or the other


class LiftedCache(TokenCache):
    """A cache bound once as input of its decoder, and as output where that updates it."""

    def __init__(self, decoder: LiftedDecoder) -> None:
        table, state = (decoder.capacity, decoder.rotary), decoder.state
        # Tables that are no inputs are for snapshots alone: they stay on the host.
        place = decoder.device if decoder.tables else None
        kind = decoder.dtypes["cos"]
        cos, sin = (new_tensor(table, kind, place) for _ in range(2))
        states = [new_tensor(state, decoder.dtypes[f"past_{name}"], decoder.device) for name in decoder.states]
        super().__init__(cos, sin, states, decoder.capacity)
        self.binding = self._bind(decoder)
        self.logits: Floats = np.empty((0, decoder.vocab), np.float32)

    def keep(self, rows: int) -> None:
        """Have room for so many rows of logits."""
        if len(self.logits) != rows:
            self.logits = np.empty((rows, self.logits.shape[1]), np.float32)
            self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))

    def _bind(self, decoder: LiftedDecoder) -> Any:
        binding = decoder.session.io_binding()
        if decoder.tables:
            binding.bind_ortvalue_input("cos", self.cos.value)
            binding.bind_ortvalue_input("sin", self.sin.value)
        for name, state in zip(decoder.states, self.states, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", state.value)
            if decoder.in_place:
                binding.bind_ortvalue_output(f"present_{name}", state.value)
        return binding


class LiftedDecoder:
    """A rewritten decoder. Caches are stepped by turns: a device does one step at a time."""

    def __init__(self, session: ort.InferenceSession, path: Path, *, device: Device | None = None) -> None:
        """`path`: of the graph, for messages. `device`: where caches lie; None: arrays of the host.

        ArtifactError when the graph is no rewritten decoder.
        """
        self.session, self.device = session, device
        inputs = {item.name: item for item in session.get_inputs()}
        outputs = {item.name: item for item in session.get_outputs()}
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        self.tables = inputs.keys() >= ENDS
        self.in_place = {f"present_{name}" for name in self.states} <= outputs.keys()
        _check(path, self.states, inputs.keys(), outputs.keys())
        self.dtypes = {name: DTYPES[item.type] for name, item in inputs.items()}
        self.state: tuple[int, ...] = tuple(inputs[f"past_{self.states[0]}"].shape)
        self.capacity: int = self.state[2]
        self.rotary: int = inputs["cos"].shape[-1]
        self.vocab: int = outputs["logits"].shape[-1]
        self.deepstack: int = inputs["deepstack"].shape[0] if "deepstack" in inputs else 0
        bound = {f"past_{name}" for name in self.states} | ({"cos", "sin"} if self.tables else set())
        self._fed = [name for name in inputs if name not in bound]
        self._lock = Lock()

    def new_cache(self) -> LiftedCache:
        """An empty cache. OutOfDeviceMemory where the device has no room for it."""
        with device_errors(f"a cache of {self.capacity} tokens cannot be made", on_device=self.device is not None):
            return LiftedCache(self)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """See `DecoderEngine`. BackendError when the cache is too small, or the device fails."""
        count = len(embeds)
        if not isinstance(cache, LiftedCache):
            raise BackendError("this cache is of another engine; use the decoder's own new_cache()")
        if past + count > cache.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {cache.capacity}; build a larger one")
        feeds = self._feeds(embeds, cos, sin, past, deepstack, keep)
        with self._lock, device_errors(f"{count} tokens cannot be computed", on_device=self.device is not None):
            cache.cos.write(past, cos)
            cache.sin.write(past, sin)
            cache.keep(keep)
            self._run(cache, feeds, past)
        return cache.logits

    def _feeds(
        self, embeds: Floats, cos: Floats, sin: Floats, past: int, deepstack: Floats | None, keep: int
    ) -> dict[str, Array]:
        count = len(embeds)
        if self.deepstack and deepstack is None:
            deepstack = np.zeros((self.deepstack, *embeds.shape), np.float32)
        known: dict[str, Any] = {
            "inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None], "deepstack": deepstack,
            "rows": np.arange(count - keep, count), "past": [past], "last": [past + count - 1], "total": past + count,
        }  # fmt: skip
        return {name: np.array(known[name], self.dtypes[name]) for name in self._fed}

    def _run(self, cache: LiftedCache, feeds: Mapping[str, Array], past: int) -> None:
        for name, feed in feeds.items():
            cache.binding.bind_cpu_input(name, feed)
        if self.in_place:
            self.session.run_with_iobinding(cache.binding)
            return
        for name in self.states:  # anew each time: their shapes are the step's
            cache.binding.bind_output(f"new_{name}")
        self.session.run_with_iobinding(cache.binding)
        _, *new = cache.binding.get_outputs()  # logits were bound first
        for state, rows in zip(cache.states, new, strict=True):
            state.write(past, rows.numpy())


def _check(path: Path, states: list[str], inputs: Set[str], outputs: Set[str]) -> None:
    written = ({f"present_{name}" for name in states}, {f"new_{name}" for name in states})
    takes = any(inputs >= STEP | places for places in (ENDS, PAST))
    if not states or not takes or not any(outputs >= names for names in written):
        raise ArtifactError(
            f"engines: '{path}' is no decoder as this version rewrites them: its inputs are {', '.join(inputs)}; build "
            "them again"
        )


CUDA_DEVICE = Device(CUDA_NAME)


def open_cuda_decoder(folder: Path, built: BuiltEngines) -> LiftedDecoder:
    """The decoder. Raises BackendError; ArtifactError when its graph is of another version."""
    path = folder / built.graph(DECODER).file
    return LiftedDecoder(open_session(path, providers=CUDA, decoder=True), path, device=CUDA_DEVICE)


def open_cuda_graph(folder: Path, built: BuiltEngines, name: str) -> OrtGraph:
    """A graph without state. Raises BackendError."""
    return OrtGraph(folder / built.graph(name).file, providers=CUDA)
