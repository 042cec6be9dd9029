"""The engine manifest, `engines.json`: which engines were built from a bundle's graphs, for which runtime and GPUs.

One folder holds all engines of a bundle for one runtime. Reading refuses engines for another runtime and engines whose
source graphs have changed since. The builder (`gog_edge.exporting.engines`) writes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from gog_edge.errors import ArtifactError, BackendError
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files
from gog_edge.tables import build, shown

SCHEMA, KIND = 1, "engines"
MANIFEST = "engines.json"
ENGINES_FOLDER = "engines"  # in a bundle; holds one folder for each runtime
CACHE_FOLDER = "cache"  # in a policy's folder or a folder of engines: files generated for this machine
ORT, ORT_CUDA, TENSORRT, TENSORRT_RTX = "ort", "ort-cuda", "tensorrt", "tensorrt-rtx"
TENSORRT_ENGINES = (TENSORRT, TENSORRT_RTX)
BUILT_ENGINES = (ORT_CUDA, *TENSORRT_ENGINES)  # engines that must be built from a bundle's graphs first
ENGINES = (ORT, *BUILT_ENGINES)
BUILD_COMMAND = "gog-edge export engines"

# How a decoder engine updates its KV cache.
IN_PLACE = "in-place"  # the outputs present_* are the inputs past_*, updated
NEW_ROWS = "new-rows"  # the outputs new_* hold the new tokens' rows; the runtime copies them into past_*
DECODER, VISION, IMAGE, TEXT = "decoder", "vision", "image", "text"
GRAPHS = (DECODER, VISION, IMAGE, TEXT)


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """One engine of the manifest and the graph it was built from."""

    name: str  # one of GRAPHS
    file: str  # in the folder of engines; weights may be in a second file next to it
    sources: Mapping[str, str]  # path in the bundle -> sha256, of the source graph and its weights
    cache: str = ""  # decoders: IN_PLACE or NEW_ROWS
    # TensorRT: optimization profiles, each input name -> (min, opt, max) shape
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)  # TensorRT: number of layers of the network, by kind


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """All engines of one folder. Field names up to `files` are the keys of `engines.json`."""

    engine: str  # one of BUILT_ENGINES
    version: str  # of TensorRT; "" for ONNX Runtime, whose graphs are not tied to a release
    sms: tuple[int, ...]  # compute capabilities the engines run on, 86 for 8.6; () for ONNX Runtime
    context: Annotated[int, Ge(0)]  # capacity of the decoder's caches, in tokens; 0 without a decoder
    graphs: tuple[BuiltGraph, ...]
    parity: Mapping[str, Any]  # converted graphs against the bundle's own, both on ONNX Runtime
    files: tuple[FileEntry, ...]
    # Where the manifest was read; not stored.
    bundle: Path | None = field(default=None, compare=False)
    folder: Path | None = field(default=None, compare=False)

    def graph(self, name: str) -> BuiltGraph:
        """Return the engine of that name. Raises ArtifactError if the folder has none."""
        found = next((graph for graph in self.graphs if graph.name == name), None)
        if found is None:
            raise ArtifactError(
                f"engines: no engine was built for '{name}'; build them again: {self.rebuild_command()}"
            )
        return found

    def rebuild_command(self, sms: Sequence[int] = ()) -> str:
        """Return the command that builds these engines again in the same folder, for `sms` or the same GPUs."""
        targets = (sms or self.sms) if self.engine == TENSORRT_RTX else ()
        context = self.rebuild_context()
        return build_command(self.bundle or "BUNDLE", self.engine, targets, context=context, folder=self.folder)

    def rebuild_context(self) -> int:
        """Return the context, in tokens, to build these engines again with; 0 stands for the builder's default.

        The builder refuses a context above the policy's `max_context`, which may have shrunk since by a new export.
        """
        if self.bundle is None:
            return self.context
        sources = next((graph.sources for graph in self.graphs if graph.name == DECODER), {})
        for path in sources:
            try:
                limit = read_json((self.bundle / path).parent / MODEL_MANIFEST, what="policy")["max_context"]
                return self.context if self.context <= limit else 0
            except (ArtifactError, KeyError, TypeError):
                return 0
        return self.context

    def to_json(self) -> dict[str, Any]:
        """Return the content of `engines.json`."""
        fields = {key: item for key, item in asdict(self).items() if key not in ("bundle", "folder")}
        return {"schema": SCHEMA, "kind": KIND, **fields}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EngineManifest:
        """Parse the content of `engines.json`. Raises ArtifactError for another schema and missing or unknown keys."""
        if value.get("schema") != SCHEMA or value.get("kind") != KIND:
            raise ArtifactError(
                f"engines: the manifest has schema {shown(value.get('schema'))} and kind {shown(value.get('kind'))}, "
                f"expected {SCHEMA} and '{KIND}'; build them again with this version"
            )
        fields = {key: item for key, item in value.items() if key not in ("schema", "kind")}
        return build(cls, fields, "", error=ArtifactError, where="engines: invalid manifest; build them again")


def build_command(
    bundle: Path | str, engine: str, sms: Sequence[int] = (), *, context: int = 0, folder: Path | None = None
) -> str:
    """Return the shell command that builds the engines of a bundle.

    Args:
        bundle: the bundle's folder.
        engine: one of BUILT_ENGINES.
        sms: compute capabilities to build for; empty for the builder's default.
        context: capacity of the decoder's caches, in tokens; 0 for the builder's default.
        folder: output folder; None for the bundle's own.
    """
    words = [*BUILD_COMMAND.split(), str(bundle), "--engine", engine]
    if sms:
        words += ["--sm", ",".join(map(str, sms))]
    if context:
        words += ["--context", str(context)]
    if folder is not None and folder.resolve() != default_engine_folder(Path(bundle), engine).resolve():
        words += ["--out", str(folder)]
    return shlex.join(words)


def default_engine_folder(bundle: Path, engine: str) -> Path:
    """Return the folder in a bundle for the engines of one runtime."""
    return bundle / ENGINES_FOLDER / engine


def read_engine_manifest(folder: Path, bundle: Path, engine: str) -> EngineManifest:
    """Read a folder's manifest; verify its files and that they were built from the bundle's present graphs.

    Raises:
        BackendError: the folder has no engines, or engines for another runtime than `engine`, or this version cannot
            run them.
        ArtifactError: a file is missing or altered, or the bundle's graphs have changed since.
    """
    if not (folder / MANIFEST).is_file():
        raise BackendError(f"no engines in '{folder}'; build them: {build_command(bundle, engine, folder=folder)}")
    parsed = EngineManifest.from_json(read_json(folder / MANIFEST, what="engines"))
    built = replace(parsed, bundle=bundle, folder=folder)
    if built.engine not in BUILT_ENGINES:
        raise BackendError(
            f"the engines in '{folder}' are for '{built.engine}', which this version does not run; build them: "
            f"{build_command(bundle, engine)}"
        )
    if built.engine != engine:
        raise BackendError(
            f"the engines in '{folder}' are for '{built.engine}', but '{engine}' was requested; build them: "
            f"{build_command(bundle, engine)}"
        )
    unknown = [graph.name for graph in built.graphs if graph.name not in GRAPHS]
    if unknown:
        raise BackendError(
            f"the engines in '{folder}' include the graph '{unknown[0]}', which this version does not run; build them "
            f"again: {built.rebuild_command()}"
        )
    try:
        verify_files(folder, built.files, what="engines")
    except ArtifactError as exc:
        raise ArtifactError(f"{exc}; build them again: {built.rebuild_command()}") from exc
    for graph in built.graphs:
        check_sources(graph, bundle, built)
    return built


def check_sources(graph: BuiltGraph, bundle: Path, built: EngineManifest) -> None:
    """Raise ArtifactError if a graph that an engine was built from was removed from the bundle or replaced."""
    for path, sha256 in graph.sources.items():
        part, name = (bundle / path).parent, Path(path).name
        listed = read_json(part / MODEL_MANIFEST, what=part.name).get("files")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        if not any(entry.get("path") == name and entry.get("sha256") == sha256 for entry in entries):
            raise ArtifactError(
                f"engines: '{graph.file}' was built from a version of '{path}' that the bundle no longer contains; "
                f"build them again: {built.rebuild_command()}"
            )
