"""Decoders that `exporting.conversion` converted for other runtimes, on any execution provider of ONNX Runtime.

This runs engines of "ort-cuda", and on the CPU it checks converted graphs without the runtime they were converted for.
Caches stay in device or host memory. A graph with ONNX Runtime's attention takes the rotary tables of all tokens, one
with standard operators the rows of the new tokens. A graph updates a cache in place (outputs `present_*`) or returns
the new tokens' rows (outputs `new_*`), which are then copied into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from gog_edge.engines.base import Array, Floats, KvCache, check_step
from gog_edge.engines.manifest import DECODER, EngineManifest
from gog_edge.engines.onnx.decoder import CUDA_NAME, Device, TokenCache, new_tensor
from gog_edge.engines.onnx.session import CUDA_PROVIDERS, DTYPES, OrtGraph, device_errors, open_session
from gog_edge.errors import ArtifactError

CUDA_DEVICE = Device(CUDA_NAME)
STEP_INPUTS = {"inputs_embeds", "cos", "sin", "rows"}  # of all converted decoders
# The position of the new tokens is given by one of these sets of inputs.
END_INPUTS, PAST_INPUTS = {"last", "total"}, {"past"}


def open_cuda_decoder(folder: Path, built: EngineManifest) -> ConvertedDecoder:
    """Open the decoder on the CUDA provider.

    Raises:
        BackendError: the provider is unavailable or the graph cannot be loaded; OutOfDeviceMemory, DeviceLost.
        ArtifactError: the graph was converted by another version.
    """
    path = folder / built.graph(DECODER).file
    return ConvertedDecoder(open_session(path, providers=CUDA_PROVIDERS, decoder=True), path, device=CUDA_DEVICE)


def open_cuda_graph(folder: Path, built: EngineManifest, name: str) -> OrtGraph:
    """Open a graph without state on the CUDA provider. Raises BackendError."""
    return OrtGraph(folder / built.graph(name).file, providers=CUDA_PROVIDERS)


class ConvertedCache(TokenCache):
    """A cache that is bound once as input of its decoder, and as output if the graph updates it in place."""

    def __init__(self, decoder: ConvertedDecoder) -> None:
        table, state = (decoder.capacity, decoder.rotary), decoder.state
        # Without table inputs the rotary tables only serve snapshots and stay on the host.
        device = decoder.device if decoder.takes_tables else None
        dtype = decoder.dtypes["cos"]
        cos, sin = (new_tensor(table, dtype, device) for _ in range(2))
        states = [new_tensor(state, decoder.dtypes[f"past_{name}"], decoder.device) for name in decoder.states]
        super().__init__(cos, sin, states, decoder.capacity)
        self.binding = self._bind(decoder)
        self.logits: Floats = np.empty((0, decoder.vocab), np.float32)

    def bind_logits(self, rows: int) -> None:
        """Bind a buffer of `rows` rows for the logits."""
        if len(self.logits) != rows:
            self.logits = np.empty((rows, self.logits.shape[1]), np.float32)
            self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))

    def _bind(self, decoder: ConvertedDecoder) -> Any:
        binding = decoder.session.io_binding()
        if decoder.takes_tables:
            binding.bind_ortvalue_input("cos", self.cos.value)
            binding.bind_ortvalue_input("sin", self.sin.value)
        for name, state in zip(decoder.states, self.states, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", state.value)
            if decoder.in_place:
                binding.bind_ortvalue_output(f"present_{name}", state.value)
        return binding


class ConvertedDecoder:
    """A converted decoder. Its caches are stepped one at a time: a device executes one step at a time anyway."""

    def __init__(self, session: ort.InferenceSession, path: Path, *, device: Device | None = None) -> None:
        """Wrap a session whose graph was read from `path`; caches are on `device`, or in host memory for None.

        Raises ArtifactError if the graph does not have a converted decoder's inputs and outputs.
        """
        self.session, self.device = session, device
        inputs = {item.name: item for item in session.get_inputs()}
        outputs = {item.name: item for item in session.get_outputs()}
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        self.takes_tables = inputs.keys() >= END_INPUTS
        self.in_place = {f"present_{name}" for name in self.states} <= outputs.keys()
        _check_graph(path, self.states, inputs.keys(), outputs.keys())
        self.dtypes = {name: DTYPES[item.type] for name, item in inputs.items()}
        self.state: tuple[int, ...] = tuple(inputs[f"past_{self.states[0]}"].shape)
        self.capacity: int = self.state[2]
        self.rotary: int = inputs["cos"].shape[-1]
        self.vocab: int = outputs["logits"].shape[-1]
        self.deepstack: int = inputs["deepstack"].shape[0] if "deepstack" in inputs else 0
        bound = {f"past_{name}" for name in self.states} | ({"cos", "sin"} if self.takes_tables else set())
        self._fed = [name for name in inputs if name not in bound]
        self._lock = Lock()

    def new_cache(self) -> ConvertedCache:
        """Return an empty cache. Raises OutOfDeviceMemory."""
        action = f"a cache of {self.capacity} tokens cannot be allocated"
        with device_errors(action, on_device=self.device is not None):
            return ConvertedCache(self)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append tokens and return logits; see `DecoderEngine.step`."""
        count = len(embeds)
        own = check_step(cache, ConvertedCache, past, count)
        feeds = self._feeds(embeds, cos, sin, past, deepstack, keep)
        with self._lock, device_errors(f"{count} tokens cannot be computed", on_device=self.device is not None):
            own.cos.write(past, cos)
            own.sin.write(past, sin)
            own.bind_logits(keep)
            self._run(own, feeds, past)
        return own.logits

    def _feeds(
        self, embeds: Floats, cos: Floats, sin: Floats, past: int, deepstack: Floats | None, keep: int
    ) -> dict[str, Array]:
        count = len(embeds)
        if self.deepstack and deepstack is None:
            deepstack = np.zeros((self.deepstack, *embeds.shape), np.float32)
        values: dict[str, Any] = {
            "inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None], "deepstack": deepstack,
            "rows": np.arange(count - keep, count), "past": [past], "last": [past + count - 1], "total": past + count,
        }  # fmt: skip
        return {name: np.array(values[name], self.dtypes[name]) for name in self._fed}

    def _run(self, cache: ConvertedCache, feeds: Mapping[str, Array], past: int) -> None:
        for name, feed in feeds.items():
            cache.binding.bind_cpu_input(name, feed)
        if self.in_place:
            self.session.run_with_iobinding(cache.binding)
            return
        for name in self.states:  # bound for each step: their shape is the step's
            cache.binding.bind_output(f"new_{name}")
        self.session.run_with_iobinding(cache.binding)
        _, *new = cache.binding.get_outputs()  # the logits were bound first
        for state, rows in zip(cache.states, new, strict=True):
            state.write(past, rows.numpy())


def _check_graph(path: Path, states: list[str], inputs: Set[str], outputs: Set[str]) -> None:
    updates = ({f"present_{name}" for name in states}, {f"new_{name}" for name in states})
    takes = any(inputs >= STEP_INPUTS | positions for positions in (END_INPUTS, PAST_INPUTS))
    if not states or not takes or not any(outputs >= names for names in updates):
        raise ArtifactError(
            f"engines: '{path}' is not a decoder converted by this version: its inputs are {', '.join(inputs)}; build "
            "them again"
        )
