"""Compilation of one ONNX graph to a TensorRT plan, with checks that nothing of the graph was lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from gog_edge.engines.tensorrt.plan import ErrorLog, Profile, import_tensorrt, supported_sms
from gog_edge.errors import CheckpointError

KV_CACHE_UPDATE, ATTENTION = "kv_cache_update", "attention"  # kinds of network layers
WORKSPACE_BYTES = 1 << 30  # that TensorRT on the device may use to time kernels
LONG_PHASE = "Computing profile costs"  # TensorRT's name for the phase that compiles kernels; others take no time

# A plan contains the graph's weights once, plus kernels. A second copy of the weights in another layout would double
# the memory of the model, so a plan above weights * MAX_GROWTH + KERNEL_BYTES is refused.
MAX_GROWTH, KERNEL_BYTES = 1.25, 32 << 20
OnPlanStep: TypeAlias = Callable[[int, int], None]  # (units done, units in total)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A plan to build."""

    engine: str  # one of TENSORRT_ENGINES
    graph: Path  # .onnx
    plan: Path  # the file to write
    profiles: tuple[Profile, ...]
    sms: tuple[int, ...]  # compute capabilities, 86 for 8.6; () for the GPU of this machine
    layers: Mapping[str, int]  # number of layers that the network must have, by kind
    timing_cache: Path | None = None  # kernel timings on this machine's GPU: read if the file exists, then written


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan that was built."""

    size: int  # bytes
    weights: int  # bytes of the graph
    seconds: float
    peak_mib: int  # of this process
    layers: Mapping[str, int]  # number of layers of the network, by kind


def build_plan(request: PlanRequest, on_step: OnPlanStep) -> BuiltPlan:
    """Build a plan and write it to a file.

    Raises:
        CheckpointError: TensorRT refuses the graph, ignores an input, does not fuse the required layers, or writes the
            weights twice.
        OSError: the plan cannot be written.
    """
    started = time.monotonic()
    trt = import_tensorrt(request.engine)
    errors = ErrorLog(trt)
    builder = trt.Builder(errors.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, errors.logger)  # owns the weights, so it must outlive the build
    if not parser.parse_from_file(str(request.graph)):
        raise CheckpointError(f"TensorRT cannot read '{request.graph.name}': {_parser_errors(parser)}")
    layers = _check_network(network, request)
    config = _config(trt, builder, network, request, on_step)
    _write(trt, builder, network, config, request, errors)
    size, weights = request.plan.stat().st_size, graph_weights_bytes(request.graph)
    _check_size(request.graph, size, weights)
    return BuiltPlan(size, weights, round(time.monotonic() - started, 2), peak_mib(), layers)


# --- files and memory ----------------------------------------------------------------------------


def peak_mib() -> int:
    """Return the peak resident memory of this process in MiB (`getrusage` would include the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def graph_files(graph: Path) -> list[Path]:
    """Return a graph's file and its external data file, if it has one."""
    return [path for path in (graph, graph.with_name(f"{graph.name}.data")) if path.exists()]


def graph_weights_bytes(graph: Path) -> int:
    """Return the size of a graph and of the external tensors it refers to; the data file may contain others."""
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    infos = [ExternalDataInfo(tensor) for tensor in tensors if uses_external_data(tensor)]
    external = {(info.location, info.offset): info.length or 0 for info in infos}
    return graph.stat().st_size + sum(external.values())


def _check_size(graph: Path, size: int, weights: int) -> None:
    limit = int(weights * MAX_GROWTH) + KERNEL_BYTES
    if size > limit:
        raise CheckpointError(
            f"the engine of '{graph.name}' has {size:,} bytes, its graph {weights:,}: more than the limit of {limit:,} "
            "for an engine that contains the weights once, because its profiles make TensorRT store them in a second "
            "layout; please report this with TensorRT's version"
        )


# --- checks of the network -----------------------------------------------------------------------


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} '{error.node_name()}': {error.desc()}" for error in errors)


def _check_network(network: Any, request: PlanRequest) -> dict[str, int]:
    """Return the number of layers by kind. Raises CheckpointError if required layers or inputs are missing."""
    unused = sorted(unused_inputs(network))
    if unused:
        raise CheckpointError(
            f"TensorRT's network of '{request.graph.name}' does not use the inputs {', '.join(unused)}"
        )
    layers = _count_layers(network)
    for kind, count in request.layers.items():
        if layers.get(kind, 0) != count:
            raise CheckpointError(
                f"TensorRT's network of '{request.graph.name}' has {layers.get(kind, 0)} layers of kind {kind}, "
                f"expected {count}: the parser did not recognize them, and the engine would be slow"
            )
    return layers


def unused_inputs(network: Any) -> set[str]:
    """Return the names of the network's inputs that no output depends on."""
    producers = {
        layer.get_output(index).name: layer for layer in _layers(network) for index in range(layer.num_outputs)
    }
    pending = [network.get_output(index).name for index in range(network.num_outputs)]
    visited: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in visited:
            visited.add(name)
            inputs = _layer_inputs(producers[name]) if name in producers else ()
            pending += [tensor.name for tensor in inputs]
    return {network.get_input(index).name for index in range(network.num_inputs)} - visited


def _count_layers(network: Any) -> dict[str, int]:
    names = Counter(layer.type.name.lower() for layer in _layers(network))
    names[ATTENTION] = names.pop("attention_input", 0)  # TensorRT has two layers for one attention
    del names["attention_output"]
    return dict(sorted((+names).items()))


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _layer_inputs(layer: Any) -> list[Any]:
    return [tensor for index in range(layer.num_inputs) if (tensor := layer.get_input(index)) is not None]


# --- build configuration -------------------------------------------------------------------------


def _config(trt: Any, builder: Any, network: Any, request: PlanRequest, on_step: OnPlanStep) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = _progress_monitor(trt, on_step)
    if request.sms:
        supported = supported_sms(trt)
        config.num_compute_capabilities = len(request.sms)
        for index, sm in enumerate(request.sms):
            config.set_compute_capability(supported[sm], index)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # needed for the capture of CUDA graphs
    else:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if request.timing_cache is not None:
        load_timing_cache(config, request.timing_cache)
    for profile in request.profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, profile, request.graph.name))
    return config


def _optimization_profile(builder: Any, network: Any, shapes: Profile, graph: str) -> Any:
    """Create an optimization profile. Raises CheckpointError if its inputs are not the network's dynamic ones."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}
    if dynamic != shapes.keys():
        raise CheckpointError(
            f"'{graph}' has the dynamic inputs {', '.join(sorted(dynamic)) or 'none'}, but the profile has bounds for "
            f"{', '.join(sorted(shapes)) or 'none'}"
        )
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.items():
        profile.set_shape(name, *bounds)
    return profile


def load_timing_cache(config: Any, path: Path) -> None:
    """Use the kernel timings of a file; start with none if it is missing, damaged, or of another release or GPU."""
    stored = path.read_bytes() if path.is_file() else b""
    for data in (stored, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def save_timing_cache(config: Any, path: Path) -> None:
    """Write the kernel timings, if there are any; the plan does not fail if they cannot be written."""
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    if data is not None:
        with suppress(OSError):
            path.write_bytes(bytes(data))


# --- callbacks and output ------------------------------------------------------------------------


def _progress_monitor(trt: Any, on_step: OnPlanStep) -> Any:
    """Return a progress monitor of TensorRT that reports the long phase to `on_step`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if phase == LONG_PHASE:
                self.steps = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase == LONG_PHASE:
                    on_step(step + 1, self.steps)
            except OSError:  # the process that asked for the plan has ended: cancel the build
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _file_stream(trt: Any, file: BinaryIO) -> Any:
    """Return a stream writer of TensorRT for an open file; its attribute `error` holds the OSError of a write."""

    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as exc:  # must not propagate through TensorRT's own frames
                self.error = exc
                return 0

    return Stream()


def _write(trt: Any, builder: Any, network: Any, config: Any, request: PlanRequest, errors: ErrorLog) -> None:
    """Build the plan and write it, as a stream if this TensorRT supports it."""
    with request.plan.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            stream = _file_stream(trt, file)
            done = builder.build_serialized_network_to_stream(network, config, stream)
            if stream.error is not None:
                raise stream.error
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            file.write(plan or b"")
    if not done:
        raise CheckpointError(
            f"TensorRT {trt.__version__} could not build an engine of '{request.graph.name}': {errors.drain()}"
        )
    if request.timing_cache is not None:
        save_timing_cache(config, request.timing_cache)
