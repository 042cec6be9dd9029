"""ONNX Runtime: sessions, stateless graphs, and a bundle's own decoder, which writes its cache in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf, NoSuchFile

from gog_edge.engines.base import Array, Floats, KvCache
from gog_edge.engines.native.tiled import new_states
from gog_edge.engines.ort_device import (
    DECODER_OPTIONS,
    INSTALL,
    PROVIDER_OPTIONS,
    RUN_ERRORS,
    device_errors,
    failure_of,
    load_libraries,
    of_device,
)
from gog_edge.engines.ort_release import NEWER, too_old
from gog_edge.engines.ort_tensors import HostTensor, TokenCache, TokenTensor
from gog_edge.errors import BackendError

LOAD_ERRORS = (*RUN_ERRORS, InvalidProtobuf, NoSuchFile)
START_ERRORS = (RuntimeError, ValueError)  # of a provider that cannot begin: no driver, no GPU
CPU = ("CPUExecutionProvider",)
AHEAD = 32  # tokens from which the graph that only fills the cache is worth its run
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32), "tensor(int64)": np.dtype(np.int64),
}  # fmt: skip
# What may be left to the processor by those who asked for a GPU: it reckons with shapes there. ONNX Runtime puts these
# operators there when they do; on other numbers the provider has kernels for them all. ArgMax finds where a text ends.
RECKONING = frozenset({
    "Add", "ArgMax", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Less", "LessOrEqual",
    "Mul", "Range", "ReduceMax", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
    "Where",
})  # fmt: skip

_NOT_OBTAINED = (
    "asked for {} for '{}', which would run on the processor: the provider's libraries or the driver cannot be loaded, "
    "or it lacks an operator (ONNX Runtime's log says which); see `gog-edge doctor`"
)


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
    # Where it joins a product and the widening of its weights, what they are multiplied with is not to be rounded.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(
    path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
    spinning: bool = True, decoder: bool = False, operators: Path | None = None,
) -> ort.InferenceSession:
    """Load a graph on exactly the providers asked for; BackendError otherwise. `optimised` graphs are left as they are.

    Without `spinning`, threads sleep within a run, too, wherever they wait for others. `decoder`: every operator must
    run on the provider; else it may leave those of RECKONING to the processor. `operators`: a library of operators
    that the graph needs besides ONNX Runtime's.
    """
    load_libraries(providers)
    _check_available(providers)
    options = session_options(threads, spinning=spinning)
    if operators is not None:
        _register(options, operators)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(decoder and tuple(providers) != CPU)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(tuple(providers) != CPU)))
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    known = DECODER_OPTIONS if decoder else PROVIDER_OPTIONS
    asked = [(name, dict(known.get(name, {}))) for name in providers]
    try:
        with device_errors(f"'{path}' cannot be loaded"):
            session = ort.InferenceSession(str(path), options, providers=asked, enable_fallback=False)
    except (*START_ERRORS, *LOAD_ERRORS) as exc:
        raise _load_error(exc, path, providers, optimised) from exc
    if session.get_providers()[: len(providers)] != list(providers):
        raise BackendError(_NOT_OBTAINED.format(", ".join(providers), path))
    if CPU[0] not in providers:
        _check_assigned(session, path, providers)
    return session


def _register(options: ort.SessionOptions, operators: Path) -> None:
    try:
        options.register_custom_ops_library(str(operators))
    except RUN_ERRORS as exc:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load '{operators}': {exc}; remove it and install gog_edge again"
        ) from exc


def _check_assigned(session: ort.InferenceSession, path: Path, providers: Sequence[str]) -> None:
    parts = session.get_provider_graph_assignment_info()
    left = {node.op_type for part in parts if part.ep_name not in providers for node in part.get_nodes()}
    if left - RECKONING:
        raise BackendError(
            f"asked for {', '.join(providers)} for '{path}', which leaves {', '.join(sorted(left - RECKONING))} to the "
            "processor; export the model again with this version, and report this if it stays so"
        )


def _check_available(providers: Sequence[str]) -> None:
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} here has no {', '.join(missing)} (it has "
            f"{', '.join(ort.get_available_providers())}); install the build that has it"
            f"{INSTALL.get(missing[0], '')} or ask for another provider"
        )


def _load_error(exc: Exception, path: Path, providers: Sequence[str], optimised: bool) -> BackendError:
    if isinstance(exc, START_ERRORS) or of_device(exc):
        return BackendError(f"{', '.join(providers)} cannot begin here: {failure_of(exc)}; see `gog-edge doctor`")
    if "fallback to CPU EP has been explicitly disabled" in str(exc):
        return BackendError(_NOT_OBTAINED.format(", ".join(providers), path))
    if (trouble := too_old(ort.__version__)) and "opset" in str(exc):
        return BackendError(f"'{path}' cannot be loaded: {trouble}; {NEWER}")
    mend = f"remove the folder '{path.parent}', it is made anew" if optimised else "export it again"
    return BackendError(f"ONNX Runtime {ort.__version__} cannot load '{path}': {exc}; {mend}")


class SessionGraph:
    """A graph without state, in a session that is open already."""

    def __init__(self, session: ort.InferenceSession, *, on_device: bool) -> None:
        self._session, self._on_device = session, on_device
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input by name, every output by name. Raises BackendError where a device fails."""
        with device_errors("a graph cannot be run", on_device=self._on_device):
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


class OrtGraph(SessionGraph):
    """A graph without state. Raises BackendError as `open_session` does."""

    def __init__(
        self, path: Path, *, threads: int | None = None, providers: Sequence[str] = CPU, optimised: bool = False,
        spinning: bool = True, operators: Path | None = None,
    ) -> None:
        session = open_session(
            path, threads=threads, providers=providers, optimised=optimised, spinning=spinning, operators=operators
        )
        super().__init__(session, on_device=tuple(providers) != CPU)


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
