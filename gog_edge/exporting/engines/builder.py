"""Builds a plan in a process of its own: its memory comes back, and its end is an error, not ours."""

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
from typing import Any, TypeAlias

from gog_edge.bundle import Bundle
from gog_edge.engines.manifest import DECODER, KIND, MANIFEST, TENSORRT, TENSORRT_ENGINES, BuiltEngines, BuiltGraph
from gog_edge.errors import CheckpointError, GogEdgeError
from gog_edge.exporting.conversion.convert import lift_graph
from gog_edge.exporting.conversion.parity import check_comparable, check_lifted, measure_lifted
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
from gog_edge.exporting.engines.sources import BundleGraphs, GraphSource, Target, bundle_graphs, choose_target
from gog_edge.exporting.output_folder import replacing
from gog_edge.files import describe_files, write_json

GRACE = 5.0  # seconds that a process has to end once it said its last


def build_apart(request: PlanRequest, on_step: OnPlanStep) -> BuiltPlan:
    """`build_plan`, elsewhere. Raises what it raises, and CheckpointError where its process dies."""
    context = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(request, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said: BuiltPlan | BaseException | tuple[int, int] = ours.recv()
        while isinstance(said, tuple):
            on_step(*said)
            said = ours.recv()
    except EOFError:
        process.join()
        raise CheckpointError(_died(request, process.exitcode)) from None
    finally:
        ours.close()
        process.join(GRACE)
        process.kill()
    if isinstance(said, BaseException):
        raise said
    return said


def _work(request: PlanRequest, pipe: Connection) -> None:
    """The other process: steps as they come, then the plan or what went wrong."""
    said: BuiltPlan | BaseException
    try:
        said = build_plan(request, lambda done, of: pipe.send((done, of)))
    except (GogEdgeError, OSError, MemoryError) as exc:
        said = exc
    with suppress(BrokenPipeError):  # nobody listens any more
        pipe.send(said)


def _died(request: PlanRequest, code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            f"building '{request.graph.name}' was killed, as it is where memory runs out; close other programs or "
            "build on a larger machine"
        )
    return f"TensorRT's compiler ended while it built '{request.graph.name}' (exit code {code}); report its version"


TIMINGS = "timings.cache"  # TensorRT on the device: kernels' times on its GPU, so that the next build is quick
ROOM = 2.5  # times the bundle's graphs: all of them lifted, and all engines
OnStep: TypeAlias = Callable[[str, int, int], None]  # what is done, how far, of how much


@dataclass(frozen=True, slots=True)
class Cost:
    """What one graph took."""

    bytes: int  # of the engine
    weights: int  # bytes of the lifted graph
    seconds: float  # lifting included
    peak_mib: int  # of the process that built it; 0 where nothing is built


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The engines, and what it took to build them."""

    engines: BuiltEngines
    costs: Mapping[str, Cost]  # by graph

    def graphs(self) -> list[dict[str, Any]]:
        """One entry for each graph and GPU; GPUs that share a file share all of its figures."""
        return [
            {"name": graph.name, "sm": sm, "file": graph.file, **asdict(self.costs[graph.name]),
             **{kind: graph.layers.get(kind, 0) for kind in (KV_CACHE_UPDATE, ATTENTION)},
             "layers": sum(graph.layers.values())}
            for graph in self.engines.graphs for sm in self.engines.sms or (None,)
        ]  # fmt: skip


def silent(_: str, __: int, ___: int) -> None:
    """An `OnStep` that shows nothing."""


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
    """Build the engines of a bundle into the folder `out`, which is replaced only when all went well.

    Args:
        bundle: what `open_bundle` gives. Where another server runs its policy, only the encoder's towers are built.
        out: a new or empty folder, or one of engines.
        engine: of `engines.built.BUILT_ENGINES`.
        sms: compute capabilities, 86 for 8.6, that TensorRT for RTX builds for; by default all that it knows.
        context: tokens that a decoder's cache holds; by default as many as the policy's conversations have.
        parity: whether the lifted graphs are compared with the bundle's own first.
        on_step: is told what is done, and how far it is.

    Raises:
        BackendError: the engine, its module or a GPU's compute capability is not to be had, or ONNX Runtime here is too
            old for `parity`.
        CheckpointError: TensorRT refuses a graph or loses some of it, its weights would be doubled, the graphs miss the
            parity limits, `context` is out of range, `out` holds something else, or the disk or memory is too small.
        ArtifactError: the bundle's files are missing or altered.
    """
    found = bundle_graphs(bundle, context)
    target = choose_target(engine, sms, int4=found.int4)
    if any(graph.name == DECODER for graph in found.graphs):
        check_context(found.context, profiles=target.engine in TENSORRT_ENGINES)
    if parity:
        check_comparable(bundle, target.kind)
    with replacing(out, KIND, MANIFEST) as part:
        _check_room(found, part)
        lifting = {graph.name: _lift(graph, part, target, found, on_step) for graph in found.graphs}
        report = _parity(bundle, found, part, target, on_step) if parity else {}
        built, costs = [], {}
        for graph in found.graphs:
            described, cost = _build(graph, part, out, target, on_step)
            built.append(described)
            costs[graph.name] = replace(cost, seconds=round(cost.seconds + lifting[graph.name], 2))
        names = [path.name for path in part.iterdir() if path.name != TIMINGS]
        engines = BuiltEngines(
            engine=engine,
            version=target.version,
            sms=target.sms,
            context=found.context,
            graphs=tuple(built),
            parity=report,
            files=tuple(describe_files(part, names)),
        )
        write_json(part / MANIFEST, engines.to_json())
    return BuildReport(engines, costs)


def _lift(graph: GraphSource, part: Path, target: Target, found: BundleGraphs, on_step: OnStep) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    on_step(f"lift {graph.name}", 0, 1)
    lift_graph(graph.path, _lifted(graph, part), target.kind, context=found.context * (graph.name == DECODER))
    on_step(f"lift {graph.name}", 1, 1)
    return time.monotonic() - started


def _lifted(graph: GraphSource, part: Path) -> Path:
    return part / f"{graph.name}.onnx"


def _parity(bundle: Bundle, found: BundleGraphs, part: Path, target: Target, on_step: OnStep) -> dict[str, Any]:
    on_step("parity", 0, 1)
    lifted = {graph.name: _lifted(graph, part) for graph in found.graphs}
    report = measure_lifted(bundle, lifted, target.kind, context=found.context)
    check_lifted(report)
    on_step("parity", 1, 1)
    return report


def _build(graph: GraphSource, part: Path, out: Path, target: Target, on_step: OnStep) -> tuple[BuiltGraph, Cost]:
    """The lifted graph's engine in its place; where ONNX Runtime is the engine, the graph itself."""
    lifted, engine = _lifted(graph, part), part / f"{graph.name}.engine"
    sources = {entry.path: entry.sha256 for entry in graph.files}
    cache = target.cache if graph.name == DECODER else ""
    if target.engine not in TENSORRT_ENGINES:
        size = sum(path.stat().st_size for path in graph_files(lifted))
        return BuiltGraph(graph.name, lifted.name, sources, cache), Cost(size, size, 0.0, 0)
    timings = _timings(part, out) if target.engine == TENSORRT else None
    fused = graph.fused if target.kind == "standard" else {}
    request = PlanRequest(target.engine, lifted, engine, graph.profiles, target.ahead, fused, timings)
    plan = build_apart(request, lambda done, of: on_step(f"build {graph.name}", done, of))
    for path in graph_files(lifted):
        path.unlink()
    built = BuiltGraph(graph.name, engine.name, sources, cache, graph.profiles, plan.layers)
    return built, Cost(plan.size, plan.weights, plan.seconds, plan.peak_mib)


def _timings(part: Path, out: Path) -> Path:
    """The new folder's, which begins with the old one's."""
    if (out / TIMINGS).is_file() and not (part / TIMINGS).exists():
        shutil.copyfile(out / TIMINGS, part / TIMINGS)
    return part / TIMINGS


def _check_room(found: BundleGraphs, part: Path) -> None:
    needed, free = int(ROOM * found.size), shutil.disk_usage(part).free
    if needed > free:
        raise CheckpointError(
            f"'{part.parent}' has {free / 1e9:.1f} GB free, building takes about {needed / 1e9:.1f} GB; make room, or "
            "name a folder on another disk with --out"
        )
