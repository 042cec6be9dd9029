"""Engines built from a bundle's graphs: which there are, for what, from what. Read at run time, written by the builder.

One folder holds all engines of a bundle for one runtime. They are refused when they are of another release of the
runtime, for other GPUs, or of other graphs than those that lie in the bundle now.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gog_edge.errors import ArtifactError, BackendError
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files

SCHEMA, KIND = 1, "engines"
MANIFEST = "engines.json"
FOLDER = "engines"  # within a bundle; engines lie in a folder of the runtime's name in it
CACHE = "cache"  # within the folder of engines: what a runtime compiles for this box's GPU
ORT, ORT_CUDA, TENSORRT, TENSORRT_RTX = "ort", "ort-cuda", "tensorrt", "tensorrt-rtx"
TENSORRT_ENGINES = (TENSORRT, TENSORRT_RTX)
BUILT_ENGINES = (ORT_CUDA, *TENSORRT_ENGINES)
BUILDER = "python -m export.build_engines"  # the command
ENGINES = (ORT, *BUILT_ENGINES)  # that a bundle can be served with

# How a decoder keeps its keys and values.
IN_PLACE = "in-place"  # the outputs present_* are the inputs past_*, updated
NEW_ROWS = "new-rows"  # the outputs new_* are the new tokens' rows; the runtime copies them into past_*
DECODER, VISION, IMAGE, TEXT = "decoder", "vision", "image", "text"  # names of graphs
GRAPHS = (DECODER, VISION, IMAGE, TEXT)


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """One graph, ready to run."""

    name: str  # of GRAPHS
    file: str  # within the folder; its weights may lie beside
    sources: Mapping[str, str]  # the graph that it was made from, and its weights: paths in the bundle, to sha256
    cache: str = ""  # decoders: IN_PLACE or NEW_ROWS
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...] = ()  # TensorRT: input -> least, usual, most shape
    layers: Mapping[str, int] = field(default_factory=dict)  # TensorRT: of the built network, by what they do


@dataclass(frozen=True, slots=True)
class BuiltEngines:
    """All engines of a folder."""

    engine: str  # of BUILT_ENGINES
    version: str  # of the runtime they were built with; "" for ONNX Runtime, which loads graphs of any release
    sms: tuple[int, ...]  # compute capabilities they run on, 86 for 8.6; () for ONNX Runtime
    context: int  # tokens that a decoder's cache holds
    graphs: tuple[BuiltGraph, ...]
    parity: Mapping[str, Any]  # of the graphs they were built from, with the bundle's own, on ONNX Runtime
    files: tuple[FileEntry, ...]
    # Where they were read, which no manifest says.
    bundle: Path | None = field(default=None, compare=False)
    folder: Path | None = field(default=None, compare=False)

    def graph(self, name: str) -> BuiltGraph:
        """The graph of that name. ArtifactError where there is none."""
        found = next((graph for graph in self.graphs if graph.name == name), None)
        if found is None:
            raise ArtifactError(f"engines: there is none for '{name}'; build them again: {self.rebuild()}")
        return found

    def rebuild(self, sms: Sequence[int] = ()) -> str:
        """The command that builds them anew in their place, for these GPUs or the same."""
        wanted = (sms or self.sms) if self.engine == TENSORRT_RTX else ()
        return build_command(self.bundle or "BUNDLE", self.engine, wanted, context=self.context, folder=self.folder)

    def to_json(self) -> dict[str, Any]:
        """The object that `engines.json` holds."""
        fields = {key: item for key, item in asdict(self).items() if key not in ("bundle", "folder")}
        return {"schema": SCHEMA, "kind": KIND, **fields}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BuiltEngines:
        """Inverse of `to_json`; ArtifactError names what is missing."""
        if value.get("schema") != SCHEMA or value.get("kind") != KIND:
            raise ArtifactError(
                f"engines: the manifest has schema {value.get('schema')!r} and kind {value.get('kind')!r}, expected "
                f"{SCHEMA} and '{KIND}'; build them again with this version"
            )
        fields = {key: item for key, item in value.items() if key not in ("schema", "kind")}
        try:
            graphs = tuple(_graph(entry) for entry in fields.pop("graphs"))
            files = tuple(FileEntry(**entry) for entry in fields.pop("files"))
            return cls(graphs=graphs, files=files, sms=tuple(fields.pop("sms")), **fields)
        except (KeyError, TypeError, AttributeError) as exc:
            raise ArtifactError(f"engines: the manifest does not fit this version ({exc}); build them again") from exc


def build_command(
    bundle: Path | str, engine: str, sms: Sequence[int] = (), *, context: int = 0, folder: Path | None = None
) -> str:
    """What somebody has to run to get the engines of a bundle.

    `context`: tokens of a decoder's cache; 0: the builder's default. `folder`: where they are to lie; None: where the
    bundle has them.
    """
    words = [*BUILDER.split(), str(bundle), "--engine", engine]
    if sms:
        words += ["--sm", ",".join(map(str, sms))]
    if context:
        words += ["--context", str(context)]
    if folder is not None and folder.resolve() != own_folder(Path(bundle), engine).resolve():
        words += ["--out", str(folder)]
    return shlex.join(words)


def own_folder(bundle: Path, engine: str) -> Path:
    """Where a bundle has its engines for a runtime."""
    return bundle / FOLDER / engine


def read_built(folder: Path, bundle: Path, engine: str) -> BuiltEngines:
    """Read the engines of a folder, and check its files and that they are of this bundle's graphs.

    Raises:
        BackendError: there are none for that runtime, or some that this version no longer runs.
        ArtifactError: a file is missing or altered, or the bundle's graphs are others than those they were built from.
    """
    if not (folder / MANIFEST).is_file():
        raise BackendError(
            f"there are no engines in '{folder}'; build them: "
            f"{build_command(bundle, engine, folder=folder)}"
        )
    described = BuiltEngines.from_json(read_json(folder / MANIFEST, what="engines"))
    built = replace(described, bundle=bundle, folder=folder)
    if built.engine not in BUILT_ENGINES:
        raise BackendError(
            f"the engines in '{folder}' are for '{built.engine}', which this version does not run; build them: "
            f"{build_command(bundle, engine)}"
        )
    if built.engine != engine:
        raise BackendError(
            f"the engines in '{folder}' are for '{built.engine}', asked for is '{engine}'; build them: "
            f"{build_command(bundle, engine)}"
        )
    unknown = [graph.name for graph in built.graphs if graph.name not in GRAPHS]
    if unknown:
        raise BackendError(
            f"the engines in '{folder}' hold a graph '{unknown[0]}', which this version does not run; build them "
            f"again: {built.rebuild()}"
        )
    try:
        verify_files(folder, built.files, what="engines")
    except ArtifactError as exc:
        raise ArtifactError(f"{exc}; build them again: {built.rebuild()}") from exc
    for graph in built.graphs:
        check_sources(graph, bundle, built)
    return built


def check_sources(graph: BuiltGraph, bundle: Path, built: BuiltEngines) -> None:
    """ArtifactError where what an engine was built from is gone, or another graph now."""
    for path, sha256 in graph.sources.items():
        part, name = (bundle / path).parent, Path(path).name
        listed = read_json(part / MODEL_MANIFEST, what=part.name).get("files", ())
        if not any(entry.get("path") == name and entry.get("sha256") == sha256 for entry in listed):
            raise ArtifactError(
                f"engines: '{graph.file}' was built from another '{path}' than the bundle has now; build them again: "
                f"{built.rebuild()}"
            )


def _graph(entry: Mapping[str, Any]) -> BuiltGraph:
    profiles = tuple({name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
                     for profile in entry.get("profiles", ()))  # fmt: skip
    return BuiltGraph(**{**entry, "profiles": profiles})
