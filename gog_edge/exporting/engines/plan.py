"""What TensorRT builds for, and the objects that it calls back while it builds."""

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

from gog_edge.engines.tensorrt.plan import Messages, known_sms, trt_module
from gog_edge.engines.tensorrt.shapes import Profile
from gog_edge.errors import CheckpointError

LONG_PHASE = "Computing profile costs"  # of a build, as TensorRT calls it: kernels are made; others take no time
OnPlanStep: TypeAlias = Callable[[int, int], None]  # done, of


def step_monitor(trt: Any, on_step: OnPlanStep) -> Any:
    """Tells `on_step` how far a build is."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Listens to the phase that takes the time."""

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
            except OSError:  # who asked for the engine is gone: the build ends
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def file_stream(trt: Any, file: BinaryIO) -> Any:
    """A stream of TensorRT into an open file. `failed` is the error of a write that did not go well."""

    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        """Keeps errors: they must not pass through the frames of TensorRT."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failed: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as exc:
                self.failed = exc
                return 0

    return Stream()


KV_CACHE_UPDATE, ATTENTION = "kv_cache_update", "attention"  # layers by what they do
WORKSPACE_BYTES = 1 << 30  # that TensorRT on the device may use to time kernels

# A plan holds the graph's weights once, and kernels; a second copy in another layout would be a second model.
GROWTH, KERNEL_BYTES = 1.25, 32 << 20


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to build, from what, for what."""

    engine: str  # of TENSORRT_ENGINES
    graph: Path  # .onnx
    plan: Path  # the file to write
    profiles: tuple[Profile, ...]
    sms: tuple[int, ...]  # compute capabilities, 86 for 8.6; () for the GPU of this box
    layers: Mapping[str, int]  # that the network must have, so many by what they do
    timings: Path | None = None  # of kernels on this box's GPU: read where there are any, then written


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """What came out."""

    size: int  # bytes
    weights: int  # bytes of the graph
    seconds: float
    peak_mib: int  # that this process had at the most
    layers: Mapping[str, int]  # of the network, by what they do


def build_plan(request: PlanRequest, on_step: OnPlanStep) -> BuiltPlan:
    """Build it. CheckpointError where TensorRT refuses the graph, loses some of it, or writes its weights twice."""
    started = time.monotonic()
    trt = trt_module(request.engine)
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)  # must outlive the build: it owns the weights
    if not parser.parse_from_file(str(request.graph)):
        raise CheckpointError(f"TensorRT cannot read '{request.graph.name}': {_refusals(parser)}")
    layers = _checked(network, request)
    config = _config(trt, builder, network, request, on_step)
    _write(trt, builder, network, config, request, messages)
    size, weights = request.plan.stat().st_size, weights_of(request.graph)
    _check_size(request.graph, size, weights)
    return BuiltPlan(size, weights, round(time.monotonic() - started, 2), peak_mib(), layers)


def peak_mib() -> int:
    """The most memory that this process had; what `getrusage` says begins with what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def graph_files(graph: Path) -> list[Path]:
    """A graph, and its weights where they lie beside."""
    return [path for path in (graph, graph.with_name(f"{graph.name}.data")) if path.exists()]


def weights_of(graph: Path) -> int:
    """Bytes of a graph and of the weights that it names: the file beside it may hold others, which it has no more."""
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    infos = [ExternalDataInfo(tensor) for tensor in tensors if uses_external_data(tensor)]
    beside = {(info.location, info.offset): info.length or 0 for info in infos}
    return graph.stat().st_size + sum(beside.values())


def _check_size(graph: Path, size: int, weights: int) -> None:
    """CheckpointError where a plan is too large to hold the graph's weights only once."""
    most = int(weights * GROWTH) + KERNEL_BYTES
    if size > most:
        raise CheckpointError(
            f"the engine of '{graph.name}' has {size:,} bytes, its graph {weights:,}: more than the {most:,} that "
            "hold the weights once; its profiles ask for another layout of them: report this TensorRT's version"
        )


def _refusals(parser: Any) -> str:
    errors = [parser.get_error(at) for at in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} '{error.node_name()}': {error.desc()}" for error in errors)


def _checked(network: Any, request: PlanRequest) -> dict[str, int]:
    """The network's layers by what they do. CheckpointError where some or an input got lost."""
    lost = sorted(unreached_inputs(network))
    if lost:
        raise CheckpointError(f"TensorRT's network of '{request.graph.name}' does not use the inputs {', '.join(lost)}")
    layers = _count(network)
    for kind, count in request.layers.items():
        if layers.get(kind, 0) != count:
            raise CheckpointError(
                f"TensorRT's network of '{request.graph.name}' has {layers.get(kind, 0)} layers of {kind}, expected "
                f"{count}: its graph was not recognised, and would run slowly"
            )
    return layers


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(at) for at in range(network.num_layers))


def _count(network: Any) -> dict[str, int]:
    """TensorRT has two layers for one attention."""
    names = Counter(layer.type.name.lower() for layer in _layers(network))
    names[ATTENTION] = names.pop("attention_input", 0)
    del names["attention_output"]
    return dict(sorted((+names).items()))


def unreached_inputs(network: Any) -> set[str]:
    """Names of the network's inputs that none of its outputs depends on."""
    makers = {layer.get_output(at).name: layer for layer in _layers(network) for at in range(layer.num_outputs)}
    todo = [network.get_output(at).name for at in range(network.num_outputs)]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            inputs = _inputs(makers[name]) if name in makers else ()
            todo += [tensor.name for tensor in inputs]
    return {network.get_input(at).name for at in range(network.num_inputs)} - seen


def _inputs(layer: Any) -> list[Any]:
    return [tensor for at in range(layer.num_inputs) if (tensor := layer.get_input(at)) is not None]


def _config(trt: Any, builder: Any, network: Any, request: PlanRequest, on_step: OnPlanStep) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = step_monitor(trt, on_step)
    if request.sms:
        known = known_sms(trt)
        config.num_compute_capabilities = len(request.sms)
        for at, sm in enumerate(request.sms):
            config.set_compute_capability(known[sm], at)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or its runs may not be captured as CUDA graphs
    else:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if request.timings is not None:
        use_timings(config, request.timings)
    for profile in request.profiles:
        config.add_optimization_profile(_profile(builder, network, profile, request.graph.name))
    return config


def use_timings(config: Any, path: Path) -> None:
    """Begin with the kernels' times of a file; with none where there is none, or it is of another release or GPU."""
    kept = path.read_bytes() if path.is_file() else b""
    for times in (kept, b""):
        cache = config.create_timing_cache(times)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def keep_timings(config: Any, path: Path) -> None:
    """Write the kernels' times, if there are any. The plan is there: it is not lost because they cannot be written."""
    cache = config.get_timing_cache()
    times = None if cache is None else cache.serialize()
    if times is not None:
        with suppress(OSError):
            path.write_bytes(bytes(times))


def _profile(builder: Any, network: Any, shapes: Profile, graph: str) -> Any:
    """CheckpointError where the shapes are not those of the network's free inputs."""
    inputs = [network.get_input(at) for at in range(network.num_inputs)]
    free = {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}
    if free != shapes.keys():
        raise CheckpointError(
            f"'{graph}' has the inputs {', '.join(sorted(free)) or 'none'} of free shape, bounds are there for "
            f"{', '.join(sorted(shapes)) or 'none'}"
        )
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.items():
        profile.set_shape(name, *bounds)
    return profile


def _write(trt: Any, builder: Any, network: Any, config: Any, request: PlanRequest, messages: Messages) -> None:
    """Build and write the plan; in pieces where this TensorRT can."""
    with request.plan.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            stream = file_stream(trt, file)
            done = builder.build_serialized_network_to_stream(network, config, stream)
            if stream.failed is not None:
                raise stream.failed
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            file.write(plan or b"")
    if not done:
        raise CheckpointError(
            f"TensorRT {trt.__version__} built no engine of '{request.graph.name}': {messages.take()}"
        )
    if request.timings is not None:
        keep_timings(config, request.timings)
