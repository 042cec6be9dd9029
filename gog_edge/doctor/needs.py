"""What a bundle needs: its parts, its memory, and the engines that were built for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gog_edge.bundle import Bundle, open_bundle
from gog_edge.doctor.box import ONNXRUNTIME, Box
from gog_edge.doctor.finding import Finding, State
from gog_edge.doctor.hardware import BROKEN_KERNELS, NOT_RTX, NOT_RTX_JETSON, rtx_trouble
from gog_edge.doctor.probe import KERNELS
from gog_edge.engines.manifest import (
    BUILT_ENGINES,
    ENGINES,
    ORT,
    TENSORRT,
    TENSORRT_ENGINES,
    TENSORRT_RTX,
    BuiltEngines,
    build_command,
    own_folder,
)
from gog_edge.engines.manifest import MANIFEST as BUILT_MANIFEST
from gog_edge.engines.onnx.session import NEWER, too_old
from gog_edge.engines.registry import CPU_SEARCH, EngineChoice, EngineSet
from gog_edge.engines.tensorrt.plan import MODULES, check_device, check_version
from gog_edge.errors import GogEdgeError
from gog_edge.files import read_json
from gog_edge.planner import as_size, plan_memory
from gog_edge.policy.manifest import MANIFEST, PolicyManifest
from gog_edge.retrieval.manifest import read_manifest as read_pack

OK, MISSING, WRONG = State.OK, State.MISSING, State.WRONG


@dataclass(frozen=True, slots=True)
class _Release:
    """Of a TensorRT that another process loaded."""

    __version__: str


def judge_bundle(folder: Path, box: Box, choice: EngineChoice, search: str = CPU_SEARCH) -> Iterator[Finding]:
    """Every part of the bundle, and for every engine whether its files and the memory are there.

    `choice`: where its engines lie, if not in the bundle. `search`: what its packs are to be searched with.
    """
    try:
        bundle = open_bundle(folder)
        bundle.verify(full=False)
    except GogEdgeError as exc:
        yield Finding("bundle", "bundle", WRONG, str(exc), "copy or build it again", ENGINES)
        return
    yield Finding("bundle", "bundle", OK, f"'{bundle.name}' in {bundle.root}", "", ENGINES)
    for look in (_policy, _encoder, _packs):
        yield from _told(look.__name__.strip("_"), look(bundle))
    yield from _told("ONNX Runtime", _opset(bundle, box))
    yield from _told("own kernels", _kernels(bundle, box), (ORT,))
    yield from _told("memory", _memory(bundle, None, box, search))
    for engine in BUILT_ENGINES:
        elsewhere = choice.folder if engine == choice.engine else None
        yield from _told(engine, _built(bundle, engine, elsewhere, box, search), (engine,))


def _told(what: str, findings: Iterator[Finding], needed_by: tuple[str, ...] = ENGINES) -> Iterator[Finding]:
    """The findings; where a part cannot be read, that."""
    try:
        yield from findings
    except (GogEdgeError, OSError, ValueError, KeyError, TypeError) as exc:
        yield Finding("bundle", what, WRONG, str(exc) or repr(exc), "copy or build it again", needed_by)


def _policy(bundle: Bundle) -> Iterator[Finding]:
    if not isinstance(bundle.policy, Path):
        yield Finding("bundle", "policy", OK, f"{bundle.policy.model}, run by {bundle.policy.url}")
        return
    manifest = _manifest(bundle.policy)
    size = sum(entry.size for entry in manifest.files)
    yield Finding("bundle", "policy", OK, f"{manifest.architecture}, {manifest.precision}, {as_size(size)}, context "
                  f"{manifest.max_context:,}")  # fmt: skip


def _manifest(policy: Path) -> PolicyManifest:
    return PolicyManifest.from_json(read_json(policy / MANIFEST, what="policy"))


def _opset(bundle: Bundle, box: Box) -> Iterator[Finding]:
    """Whether ONNX Runtime takes the policy's graphs; TensorRT's engines need it for none."""
    version = box.libraries[ONNXRUNTIME].version
    trouble = too_old(version) if version and isinstance(bundle.policy, Path) else ""
    if trouble:
        remedy = NEWER if box.jetson is None else NOT_RTX_JETSON
        users = tuple(engine for engine in ENGINES if engine not in TENSORRT_ENGINES)
        yield Finding("bundle", "policy on ONNX Runtime", WRONG, trouble, remedy, users)


def _kernels(bundle: Bundle, box: Box) -> Iterator[Finding]:
    """A policy whose graphs want our kernels does not open with kernels that do not load; without any it does."""
    library = box.libraries[KERNELS]
    if library.version and library.trouble and isinstance(bundle.policy, Path) and _manifest(bundle.policy).native:
        yield Finding("bundle", "policy on own kernels", WRONG, library.trouble, BROKEN_KERNELS, (ORT,))


def _encoder(bundle: Bundle) -> Iterator[Finding]:
    found = read_json(bundle.encoder / MANIFEST, what="encoder")
    size = sum(entry["size"] for entry in found["files"])
    yield Finding("bundle", "encoder", OK, f"{found['name']}, {found['dim']} dimensions, {as_size(size)}")


def _packs(bundle: Bundle) -> Iterator[Finding]:
    for path in bundle.packs:
        pack = read_pack(path)
        size = sum(entry.size for entry in pack.files)
        yield Finding("bundle", f"pack '{pack.name}'", OK, f"generation {pack.generation}, {pack.counts.articles:,} "
                      f"articles, {pack.counts.images:,} images, {as_size(size)}")  # fmt: skip


def _memory(bundle: Bundle, engines: EngineSet | None, box: Box, search: str) -> Iterator[Finding]:
    """What it takes, on the CPU or with engines or search on the first GPU, against what is free."""
    gpu = box.gpus.gpus[0] if box.gpus.gpus else None
    engine = ORT if engines is None else engines.built.engine
    part = "bundle" if engines is None else "engines"
    plan = plan_memory(bundle, engines, search=search, integrated=gpu is not None and gpu.integrated)
    try:
        plan.check(box.free, None if gpu is None else gpu.free)
    except GogEdgeError as exc:
        said, _, advice = str(exc).rpartition(": ")
        yield Finding(part, f"memory, {engine}", WRONG, said, advice, (engine,))
    else:
        yield Finding(part, f"memory, {engine}", OK, f"takes {plan}", "", (engine,))


def _built(bundle: Bundle, engine: str, elsewhere: Path | None, box: Box, search: str) -> Iterator[Finding]:
    """The bundle's engines, or those elsewhere: there, whole, of these graphs, of this TensorRT, for this GPU."""
    folder = elsewhere or own_folder(bundle.root, engine)
    trouble = rtx_trouble(box, int4=_int4(bundle)) if engine == TENSORRT_RTX and box.jetson is None else ""
    if trouble:
        yield Finding("engines", engine, WRONG, trouble, NOT_RTX, (engine,))
        return
    command = _command(bundle, engine, folder, box)
    if not folder.is_dir():
        yield Finding("engines", engine, MISSING, f"none in {folder}", command, (engine,))
        return
    try:
        engines = EngineChoice(engine, folder).read(bundle.root)
        _check_usable(engines.built if engines else None, box)
    except GogEdgeError as exc:
        yield Finding("engines", engine, WRONG, str(exc).partition("; build")[0], command, (engine,))
        return
    if engines is not None:
        yield Finding("engines", engine, OK, _about(engines.built), "", (engine,))
        yield from _memory(bundle, engines, box, search)


def _int4(bundle: Bundle) -> bool:
    if not isinstance(bundle.policy, Path):
        return False
    weights = _manifest(bundle.policy).weights.decoder
    return weights is not None and weights.bits == 4


def _command(bundle: Bundle, engine: str, folder: Path, box: Box) -> str:
    if box.jetson is not None and engine != TENSORRT:
        return NOT_RTX_JETSON
    sms = [gpu.sm for gpu in box.gpus.gpus[:1]] if engine == TENSORRT_RTX else []
    return build_command(bundle.root, engine, sms, context=_context(bundle, folder), folder=folder)


def _context(bundle: Bundle, folder: Path) -> int:
    """That of the engines in a folder, so that they are built again with it; 0 where none is known that can be had.

    The builder takes no more than the policy's own, which may be fewer since it was exported again, and without any
    takes that.
    """
    try:
        context = BuiltEngines.from_json(read_json(folder / BUILT_MANIFEST, what="engines")).context
    except GogEdgeError:
        return 0
    return context if isinstance(bundle.policy, Path) and context <= _manifest(bundle.policy).max_context else 0


def _check_usable(built: BuiltEngines | None, box: Box) -> None:
    """BackendError where TensorRT here is of another release, or the first GPU is none that they were built for."""
    if built is None or built.engine not in TENSORRT_ENGINES:
        return
    version = box.libraries[MODULES[built.engine]].version
    if version:
        check_version(_Release(version), built)
    if box.gpus.gpus:
        gpu = box.gpus.gpus[0]
        check_device(gpu, built)


def _about(built: BuiltEngines) -> str:
    names = ", ".join(graph.name for graph in built.graphs)
    size = as_size(sum(entry.size for entry in built.files))
    sms = f" for SM {', '.join(map(str, built.sms))}" * bool(built.sms)
    return f"{built.version} {names}{sms}, context {built.context:,}, {size}".strip()
