"""Decoders that were rewritten for other runtimes, run by ONNX Runtime on the processor: to be checked, not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.engines.base import DecoderEngine, Floats, KvCache
from gog_edge.engines.ort import DTYPES, OrtDecoder, open_session
from gog_edge.engines.ort_tensors import HostTensor, TokenCache
from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.lift import Kind


def open_lifted(path: Path, kind: Kind, *, context: int) -> DecoderEngine:
    """A rewritten decoder. BackendError where it cannot be loaded.

    It takes no more memory than the decoder that it was made from: in four bits ONNX Runtime multiplies with the
    weights as they are stored. Left to run operator by operator, it would widen all of a large model's first.
    """
    return OrtDecoder(path, capacity=context) if kind == "half" else LiftedDecoder(path)


class LiftedDecoder:
    """A decoder whose cache is updated in place (outputs `present_*`) or gets new rows (outputs `new_*`)."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)
        inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.states = [name.removeprefix("past_") for name in inputs if name.startswith("past_")]
        self.in_place = f"present_{self.states[0]}" in self.outputs if self.states else False
        written = {f"{'present' if self.in_place else 'new'}_{name}" for name in self.states}
        if not self.states or not {"cos", "sin", "past", "rows"} <= inputs.keys() or not written <= set(self.outputs):
            raise CheckpointError(f"'{path}' is no decoder rewritten for TensorRT: its inputs are {', '.join(inputs)}")
        self.shape: tuple[int, ...] = tuple(inputs[f"past_{self.states[0]}"].shape)
        self.dtype = DTYPES[inputs[f"past_{self.states[0]}"].type]
        self.capacity: int = self.shape[2]
        self.rotary: int = inputs["cos"].shape[2]
        self.deepstack: int = inputs["deepstack"].shape[0] if "deepstack" in inputs else 0

    def new_cache(self) -> TokenCache:
        """An empty cache."""
        table = (self.capacity, self.rotary)
        cos, sin = (HostTensor(table, np.dtype(np.float32)) for _ in range(2))
        return TokenCache(cos, sin, [HostTensor(self.shape, self.dtype) for _ in self.states], self.capacity)

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """See `DecoderEngine`."""
        count = len(embeds)
        if not isinstance(cache, TokenCache):
            raise BackendError("this cache is of another engine; use the decoder's own new_cache()")
        if past + count > self.capacity:
            raise BackendError(f"{past} + {count} tokens do not fit a cache of {self.capacity}; lift a larger one")
        cache.cos.write(past, cos)
        cache.sin.write(past, sin)
        feeds = {"inputs_embeds": embeds[None], "cos": cos[None], "sin": sin[None],
                 "past": np.array([past], np.int64), "rows": np.arange(count - keep, count)}  # fmt: skip
        if self.deepstack:
            feeds["deepstack"] = np.zeros((self.deepstack, *embeds.shape)) if deepstack is None else deepstack
        return self._run(cache, feeds, past)

    def _run(self, cache: TokenCache, feeds: dict[str, Any], past: int) -> Floats:
        binding = self.session.io_binding()
        for name, values in feeds.items():
            kind = np.int64 if values.dtype.kind == "i" else np.float32
            binding.bind_cpu_input(name, np.ascontiguousarray(values, kind))
        for name, state in zip(self.states, cache.states, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", state.value)
            if self.in_place:
                binding.bind_ortvalue_output(f"present_{name}", state.value)
            else:
                binding.bind_output(f"new_{name}")
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        *updates, logits = binding.get_outputs()
        if not self.in_place:
            for state, update in zip(cache.states, updates, strict=True):
                state.write(past, update.numpy())
        return np.array(logits.numpy(), np.float32)
