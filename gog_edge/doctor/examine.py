"""The whole examination: facts about the machine, and what they mean for a bundle, its memory and its engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gog_edge.bundle import Bundle, open_bundle
from gog_edge.doctor.facts import ONNXRUNTIME, Machine, collect_facts
from gog_edge.doctor.finding import Finding, Report, State
from gog_edge.doctor.hardware import (
    REINSTALL_OPERATORS,
    USE_ORT_CUDA,
    USE_TENSORRT,
    check_gpus,
    check_libraries,
    check_machine,
    rtx_problem,
)
from gog_edge.doctor.probe import NATIVE_OPERATORS
from gog_edge.engines.manifest import (
    BUILT_ENGINES,
    ENGINES,
    ORT,
    TENSORRT,
    TENSORRT_ENGINES,
    TENSORRT_RTX,
    EngineManifest,
    build_command,
    default_engine_folder,
)
from gog_edge.engines.manifest import MANIFEST as ENGINE_MANIFEST
from gog_edge.engines.onnx import INSTALL_COMMAND, unsupported_reason
from gog_edge.engines.registry import CPU_SEARCH, EngineChoice, EngineSet
from gog_edge.engines.tensorrt.plan import MODULES, check_device, check_version
from gog_edge.errors import GogEdgeError
from gog_edge.files import read_json
from gog_edge.planner import format_size, plan_memory
from gog_edge.policy.manifest import MANIFEST, PolicyManifest
from gog_edge.retrieval.manifest import read_manifest as read_pack

OK, MISSING, WRONG = State.OK, State.MISSING, State.WRONG
COPY_AGAIN = "copy or build it again"


def examine(
    folder: Path, engine: str | None = None, engines: Path | None = None, *, search: str = CPU_SEARCH,
    machine: Machine | None = None,
) -> Report:
    """Check this machine and the bundle in `folder`. Problems become findings, whatever the machine's state.

    Args:
        folder: the bundle.
        engine: the engine to judge for; None for the best that works here.
        engines: a folder of built engines instead of the bundle's own.
        search: one of SEARCHES.
        machine: facts collected before; None to collect them.

    Raises:
        InputError: the options do not fit together; see `EngineChoice`.
    """
    choice = EngineChoice(engine or ORT, engines, search)
    machine = machine or collect_facts()
    findings = [*check_machine(machine), *check_gpus(machine, search), *check_libraries(machine, search),
                *check_bundle(folder, machine, choice)]  # fmt: skip
    return Report.of(str(folder), findings, engine, search)


def check_bundle(folder: Path, machine: Machine, choice: EngineChoice) -> Iterator[Finding]:
    """Check every part of the bundle, and for every engine its files and the memory it needs."""
    try:
        bundle = open_bundle(folder)
        bundle.verify(full=False)
    except GogEdgeError as exc:
        yield Finding("bundle", "bundle", WRONG, str(exc), COPY_AGAIN, ENGINES)
        return
    yield Finding("bundle", "bundle", OK, f"'{bundle.name}' in {bundle.root}", "", ENGINES)
    yield from _guarded("policy", _check_policy(bundle))
    yield from _guarded("encoder", _check_encoder(bundle))
    yield from _guarded("packs", _check_packs(bundle))
    yield from _guarded("ONNX Runtime", _check_opset(bundle, machine))
    yield from _guarded("native operators", _check_native_operators(bundle, machine), (ORT,))
    yield from _guarded("memory", _check_memory(bundle, None, machine, choice.search))
    for engine in BUILT_ENGINES:
        given = choice.folder if engine == choice.engine else None
        engine_folder = given or default_engine_folder(bundle.root, engine)
        yield from _guarded(engine, _check_engines(bundle, engine, engine_folder, machine, choice.search), (engine,))


def _guarded(name: str, findings: Iterator[Finding], needed_by: tuple[str, ...] = ENGINES) -> Iterator[Finding]:
    """Yield the findings; report an error while they are produced as a finding."""
    try:
        yield from findings
    except (GogEdgeError, OSError, ValueError, KeyError, TypeError) as exc:
        yield Finding("bundle", name, WRONG, str(exc) or repr(exc), COPY_AGAIN, needed_by)


def _check_policy(bundle: Bundle) -> Iterator[Finding]:
    if not isinstance(bundle.policy, Path):
        yield Finding("bundle", "policy", OK, f"{bundle.policy.model}, served by {bundle.policy.url}")
        return
    manifest = _policy_manifest(bundle.policy)
    size = format_size(sum(entry.size for entry in manifest.files))
    detail = f"{manifest.architecture}, {manifest.precision}, {size}, context {manifest.max_context:,}"
    yield Finding("bundle", "policy", OK, detail)


def _policy_manifest(policy: Path) -> PolicyManifest:
    """Parse the manifest without verifying the files, which `Bundle.verify` did."""
    return PolicyManifest.from_json(read_json(policy / MANIFEST, what="policy"))


def _check_opset(bundle: Bundle, machine: Machine) -> Iterator[Finding]:
    """Check that ONNX Runtime can load the policy's graphs. TensorRT does not need it for the policy."""
    version = machine.libraries[ONNXRUNTIME].version
    problem = unsupported_reason(version) if version and isinstance(bundle.policy, Path) else ""
    if problem:
        remedy = INSTALL_COMMAND if machine.jetson is None else USE_TENSORRT
        users = tuple(engine for engine in ENGINES if engine not in TENSORRT_ENGINES)
        yield Finding("bundle", "policy on ONNX Runtime", WRONG, problem, remedy, users)


def _check_native_operators(bundle: Bundle, machine: Machine) -> Iterator[Finding]:
    """Report a library that cannot be loaded if the policy's graphs use it. Without any library the policy opens."""
    library = machine.libraries[NATIVE_OPERATORS]
    if not (library.version and library.problem and isinstance(bundle.policy, Path)):
        return
    if _policy_manifest(bundle.policy).has_native:
        yield Finding("bundle", "policy on native operators", WRONG, library.problem, REINSTALL_OPERATORS, (ORT,))


def _check_encoder(bundle: Bundle) -> Iterator[Finding]:
    found = read_json(bundle.encoder / MANIFEST, what="encoder")
    size = sum(entry["size"] for entry in found["files"])
    yield Finding("bundle", "encoder", OK, f"{found['name']}, {found['dim']} dimensions, {format_size(size)}")


def _check_packs(bundle: Bundle) -> Iterator[Finding]:
    for path in bundle.packs:
        pack = read_pack(path)
        size = format_size(sum(entry.size for entry in pack.files))
        detail = (f"generation {pack.generation}, {pack.counts.articles:,} articles, {pack.counts.images:,} images, "
                  f"{size}")  # fmt: skip
        yield Finding("bundle", f"pack '{pack.name}'", OK, detail)


def _check_memory(bundle: Bundle, engines: EngineSet | None, machine: Machine, search: str) -> Iterator[Finding]:
    """Compare the memory plan, for the CPU or for engines or search on the first GPU, with the free memory."""
    gpu = machine.gpus.gpus[0] if machine.gpus.gpus else None
    engine = ORT if engines is None else engines.built.engine
    part = "bundle" if engines is None else "engines"
    plan = plan_memory(bundle, engines, search=search, integrated=gpu is not None and gpu.integrated)
    try:
        plan.check(machine.free, None if gpu is None else gpu.free)
    except GogEdgeError as exc:
        detail, _, advice = str(exc).rpartition(": ")
        yield Finding(part, f"memory, {engine}", WRONG, detail, advice, (engine,))
    else:
        yield Finding(part, f"memory, {engine}", OK, f"needs up to {plan}", "", (engine,))


def _check_engines(bundle: Bundle, engine: str, folder: Path, machine: Machine, search: str) -> Iterator[Finding]:
    """Check that a folder's engines are complete and were built from these graphs, for this release and this GPU."""
    problem = rtx_problem(machine, int4=_has_int4(bundle)) if engine == TENSORRT_RTX and machine.jetson is None else ""
    if problem:
        yield Finding("engines", engine, WRONG, problem, USE_ORT_CUDA, (engine,))
        return
    command = _build_command(bundle, engine, folder, machine)
    if not folder.is_dir():
        yield Finding("engines", engine, MISSING, f"none in {folder}", command, (engine,))
        return
    try:
        engines = EngineChoice(engine, folder).read_engines(bundle.root)
        _check_compatible(engines.built if engines else None, machine)
    except GogEdgeError as exc:
        yield Finding("engines", engine, WRONG, str(exc).partition("; build")[0], command, (engine,))
        return
    if engines is not None:
        yield Finding("engines", engine, OK, _describe(engines.built), "", (engine,))
        yield from _check_memory(bundle, engines, machine, search)


def _has_int4(bundle: Bundle) -> bool:
    if not isinstance(bundle.policy, Path):
        return False
    weights = _policy_manifest(bundle.policy).weights.decoder
    return weights is not None and weights.bits == 4


def _build_command(bundle: Bundle, engine: str, folder: Path, machine: Machine) -> str:
    """Return the command that builds the engines, with the context of those in the folder, if the policy allows it."""
    if machine.jetson is not None and engine != TENSORRT:
        return USE_TENSORRT
    sms = [gpu.sm for gpu in machine.gpus.gpus[:1]] if engine == TENSORRT_RTX else []
    try:
        found = EngineManifest.from_json(read_json(folder / ENGINE_MANIFEST, what="engines"))
        context = replace(found, bundle=bundle.root).rebuild_context()
    except GogEdgeError:
        context = 0
    return build_command(bundle.root, engine, sms, context=context, folder=folder)


def _check_compatible(built: EngineManifest | None, machine: Machine) -> None:
    """Raise BackendError if engines are for another TensorRT release than the installed one or another GPU."""
    if built is None or built.engine not in TENSORRT_ENGINES:
        return
    version = machine.libraries[MODULES[built.engine]].version
    if version:
        check_version(version, built)
    if machine.gpus.gpus:
        check_device(machine.gpus.gpus[0], built)


def _describe(built: EngineManifest) -> str:
    names = ", ".join(graph.name for graph in built.graphs)
    size = format_size(sum(entry.size for entry in built.files))
    sms = f" for SM {', '.join(map(str, built.sms))}" * bool(built.sms)
    return f"{built.version} {names}{sms}, context {built.context:,}, {size}".strip()
