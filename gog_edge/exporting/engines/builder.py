"""Build the engines of a bundle: convert its graphs, compare them with the originals, compile them with TensorRT.

Each plan is compiled in a process of its own. Its memory is released afterwards, and a crash of TensorRT's compiler
becomes an error.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, TypeAlias

from gog_edge.bundle import Bundle
from gog_edge.engines.manifest import DECODER, KIND, MANIFEST, TENSORRT, TENSORRT_ENGINES, BuiltGraph, EngineManifest
from gog_edge.errors import CheckpointError, GogEdgeError
from gog_edge.exporting.conversion.convert import Kind, convert_graph
from gog_edge.exporting.conversion.parity import check_comparable, check_converted, measure_converted
from gog_edge.exporting.engines.plan import (
    ATTENTION,
    KV_CACHE_UPDATE,
    BuiltPlan,
    OnPlanStep,
    PlanRequest,
    build_plan,
    graph_files,
)
from gog_edge.exporting.engines.profiles import check_context
from gog_edge.exporting.engines.sources import BuildTarget, BundleGraphs, GraphSource, bundle_graphs, choose_target
from gog_edge.exporting.output_folder import atomic_output_folder, check_disk_space
from gog_edge.files import describe_files, write_json

EXIT_SECONDS = 5.0  # that a build process has to exit after its last message
TIMING_CACHE = "timings.cache"  # TensorRT on the device: kernel timings on its GPU, which speed up the next build
DISK_FACTOR = 2.5  # disk space needed, relative to the bundle's graphs: all converted graphs and all engines
OnStep: TypeAlias = Callable[[str, int, int], None]  # (name of the step, units done, units in total)


def silent(_: str, __: int, ___: int) -> None:
    """Ignore progress (an `OnStep`)."""


@dataclass(frozen=True, slots=True)
class BuildCost:
    """What building one graph's engine took."""

    bytes: int  # of the engine
    weights: int  # bytes of the converted graph
    seconds: float  # including the conversion
    peak_mib: int  # of the build process; 0 if none was needed


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The engines, and what building them took."""

    engines: EngineManifest
    costs: Mapping[str, BuildCost]  # by graph

    def graphs(self) -> list[dict[str, Any]]:
        """Return one JSON object per graph and GPU; GPUs that share an engine share all of its figures."""
        return [
            {"name": graph.name, "sm": sm, "file": graph.file, **asdict(self.costs[graph.name]),
             **{kind: graph.layers.get(kind, 0) for kind in (KV_CACHE_UPDATE, ATTENTION)},
             "layers": sum(graph.layers.values())}
            for graph in self.engines.graphs for sm in self.engines.sms or (None,)
        ]  # fmt: skip


def build_engines(
    bundle: Bundle,
    out: Path,
    *,
    engine: str,
    sms: Sequence[int] = (),
    context: int | None = None,
    parity: bool = True,
    on_step: OnStep = silent,
) -> BuildReport:
    """Build the engines of a bundle into the folder `out`, which is replaced only when everything succeeded.

    Args:
        bundle: from `open_bundle`. If another server runs its policy, only the encoder's engines are built.
        out: a new or empty folder, or one of engines.
        engine: one of `gog_edge.engines.manifest.BUILT_ENGINES`.
        sms: compute capabilities, 86 for 8.6, that TensorRT for RTX builds for; empty for all that it supports.
        context: tokens that the decoder's KV cache has room for; None for the policy's own limit.
        parity: whether to compare the converted graphs with the bundle's own first.
        on_step: called with the progress of each step.

    Raises:
        BackendError: the engine, its Python module or a compute capability is not available, or the installed ONNX
            Runtime is too old for `parity`.
        CheckpointError: TensorRT refuses a graph, ignores a part of it or duplicates its weights, the graphs miss a
            parity limit, `context` is out of range, `out` contains something else, or disk or memory do not suffice.
        ArtifactError: a file of the bundle is missing or altered.
    """
    sources = bundle_graphs(bundle, context)
    target = choose_target(engine, sms, int4=sources.int4)
    if any(graph.name == DECODER for graph in sources.graphs):
        check_context(sources.context, profiles=target.engine in TENSORRT_ENGINES)
    if parity:
        check_comparable(bundle, target.kind)
    with atomic_output_folder(out, KIND, MANIFEST) as part:
        remedy = "free some space, or choose a folder on another disk with --out"
        check_disk_space(part, int(DISK_FACTOR * sources.size), "the build", remedy)
        seconds = {graph.name: _convert(graph, part, target, sources, on_step) for graph in sources.graphs}
        report = _check_parity(bundle, sources, part, target, on_step) if parity else {}
        built, costs = [], {}
        for graph in sources.graphs:
            described, cost = _build(graph, part, out, target, on_step)
            built.append(described)
            costs[graph.name] = replace(cost, seconds=round(cost.seconds + seconds[graph.name], 2))
        names = [path.name for path in part.iterdir() if path.name != TIMING_CACHE]
        engines = EngineManifest(
            engine=engine,
            version=target.version,
            sms=target.sms,
            context=sources.context,
            graphs=tuple(built),
            parity=report,
            files=tuple(describe_files(part, names)),
        )
        write_json(part / MANIFEST, engines.to_json())
    return BuildReport(engines, costs)


def measure_conversion(bundle: Bundle, kind: Kind, context: int | None = None) -> dict[str, Any]:
    """Convert a bundle's graphs in a temporary folder and compare them with the originals; see `measure_converted`.

    Raises CheckpointError also if the temporary folder does not have enough space.
    """
    sources = bundle_graphs(bundle, context)
    try:
        with TemporaryDirectory() as folder:
            converted = {graph.name: _converted(graph, Path(folder)) for graph in sources.graphs}
            for graph in sources.graphs:
                convert_graph(graph.path, converted[graph.name], kind, context=_graph_context(graph, sources))
            return measure_converted(bundle, converted, kind, context=sources.context)
    except OSError as exc:
        raise CheckpointError(
            f"cannot write the converted graphs to '{gettempdir()}' ({exc}); choose a folder with enough space: "
            "TMPDIR=FOLDER"
        ) from exc


def _graph_context(graph: GraphSource, sources: BundleGraphs) -> int:
    return sources.context if graph.name == DECODER else 0


def _convert(graph: GraphSource, part: Path, target: BuildTarget, sources: BundleGraphs, on_step: OnStep) -> float:
    """Convert a graph; return the seconds it took."""
    started = time.monotonic()
    on_step(f"convert {graph.name}", 0, 1)
    convert_graph(graph.path, _converted(graph, part), target.kind, context=_graph_context(graph, sources))
    on_step(f"convert {graph.name}", 1, 1)
    return time.monotonic() - started


def _converted(graph: GraphSource, part: Path) -> Path:
    return part / f"{graph.name}.onnx"


def _check_parity(
    bundle: Bundle, sources: BundleGraphs, part: Path, target: BuildTarget, on_step: OnStep
) -> dict[str, Any]:
    on_step("parity", 0, 1)
    converted = {graph.name: _converted(graph, part) for graph in sources.graphs}
    report = measure_converted(bundle, converted, target.kind, context=sources.context)
    check_converted(report)
    on_step("parity", 1, 1)
    return report


def _build(
    graph: GraphSource, part: Path, out: Path, target: BuildTarget, on_step: OnStep
) -> tuple[BuiltGraph, BuildCost]:
    """Replace a converted graph by its TensorRT plan; for ONNX Runtime the graph itself is the engine."""
    converted, engine = _converted(graph, part), part / f"{graph.name}.engine"
    hashes = {entry.path: entry.sha256 for entry in graph.files}
    cache = target.cache if graph.name == DECODER else ""
    if target.engine not in TENSORRT_ENGINES:
        size = sum(path.stat().st_size for path in graph_files(converted))
        return BuiltGraph(graph.name, converted.name, hashes, cache), BuildCost(size, size, 0.0, 0)
    timing_cache = _timing_cache(part, out) if target.engine == TENSORRT else None
    layers = graph.fused_layers if target.kind == "standard" else {}
    request = PlanRequest(target.engine, converted, engine, graph.profiles, target.build_sms, layers, timing_cache)
    plan = build_in_subprocess(request, lambda done, total: on_step(f"build {graph.name}", done, total))
    for path in graph_files(converted):
        path.unlink()
    built = BuiltGraph(graph.name, engine.name, hashes, cache, graph.profiles, plan.layers)
    return built, BuildCost(plan.size, plan.weights, plan.seconds, plan.peak_mib)


def _timing_cache(part: Path, out: Path) -> Path:
    """Return the timing cache in the new folder, which starts as a copy of the one in the old folder."""
    if (out / TIMING_CACHE).is_file() and not (part / TIMING_CACHE).exists():
        shutil.copyfile(out / TIMING_CACHE, part / TIMING_CACHE)
    return part / TIMING_CACHE


# --- the build process ---------------------------------------------------------------------------


def build_in_subprocess(request: PlanRequest, on_step: OnPlanStep) -> BuiltPlan:
    """Run `build_plan` in another process.

    Raises what `build_plan` raises, and CheckpointError if the process dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of our threads
    receiver, sender = context.Pipe()
    process = context.Process(target=_run_build, args=(request, sender), daemon=True)
    process.start()
    sender.close()
    try:
        message: BuiltPlan | BaseException | tuple[int, int] = receiver.recv()
        while isinstance(message, tuple):
            on_step(*message)
            message = receiver.recv()
    except EOFError:
        process.join()
        raise CheckpointError(_describe_death(request, process.exitcode)) from None
    finally:
        receiver.close()
        process.join(EXIT_SECONDS)
        process.kill()
    if isinstance(message, BaseException):
        raise message
    return message


def _run_build(request: PlanRequest, pipe: Connection) -> None:
    """Send the progress of a build, then the plan or the error (the body of the other process)."""
    result: BuiltPlan | BaseException
    try:
        result = build_plan(request, lambda done, total: pipe.send((done, total)))
    except (GogEdgeError, OSError, MemoryError) as exc:
        result = exc
    with suppress(BrokenPipeError):  # the parent process has ended
        pipe.send(result)


def _describe_death(request: PlanRequest, code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            f"building '{request.graph.name}' was killed, probably because memory ran out; close other programs or "
            "build on a larger machine"
        )
    return (
        f"TensorRT's compiler ended while building '{request.graph.name}' (exit code {code}); please report this with "
        "TensorRT's version"
    )
