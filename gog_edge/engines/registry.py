"""What runs a bundle's graphs and searches its packs, as chosen on the command line; the built engines it leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gog_edge.engines.manifest import (
    BUILDER,
    CACHE,
    ENGINES,
    ORT,
    ORT_CUDA,
    BuiltEngines,
    build_command,
    own_folder,
    read_built,
)
from gog_edge.errors import ArtifactError, BackendError, InputError

if TYPE_CHECKING:
    from gog_edge.engines.base import DecoderEngine, GraphEngine
    from gog_edge.engines.tensorrt.decoder import DecoderShape

CPU_SEARCH, FAISS_GPU = "cpu", "faiss-gpu"

# Not by the extra `gpu`, whose ONNX Runtime would lie over the one that is there.
FAISS_GPU_INSTALL = "pip uninstall faiss-cpu && pip install 'faiss-gpu>=1.15,<1.16'"
SEARCHES = (CPU_SEARCH, FAISS_GPU)  # that packs can be searched with: their own indexes, or a GPU


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """One of `ENGINES`, where its engines lie, and one of `SEARCHES`. InputError for what there is not or cannot be."""

    engine: str = ORT
    folder: Path | None = None  # of built engines; None: the bundle's own for that runtime
    search: str = CPU_SEARCH

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"there is no engine '{self.engine}'; known are {', '.join(ENGINES)}")
        if self.folder is not None and not self.built:
            raise InputError(f"'{self.folder}' is a folder of built engines, and '{ORT}' runs the bundle's own graphs; "
                             "name the engine that they were built for, too")
        if self.search not in SEARCHES:
            raise InputError(f"there is no search '{self.search}'; known are {', '.join(SEARCHES)}")

    @property
    def built(self) -> bool:
        """Whether engines run that were built from the bundle's graphs, not these graphs themselves."""
        return self.engine != ORT

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is needed: what it is to run may be away now and there later."""
        return self.built or self.search != CPU_SEARCH

    def read(self, bundle: Path) -> EngineSet | None:
        """The bundle's engines, checked and not yet opened; None where its own graphs run. Raises BackendError."""
        if not self.built:
            return None
        folder = self.folder or own_folder(bundle, self.engine)
        with _mended_by(build_command(bundle, self.engine, folder=folder)):
            return EngineSet(folder, read_built(folder, bundle, self.engine))


@dataclass(frozen=True, slots=True)
class EngineSet:
    """The engines of a folder, as they are opened for the policy and the encoder. All errors are BackendErrors."""

    folder: Path
    built: BuiltEngines

    def open_graph(self, name: str) -> GraphEngine:
        """A graph without state: VISION, IMAGE or TEXT."""
        with _mended_by(self.built.rebuild()):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.onnx.device_decoder import open_cuda_graph

                return open_cuda_graph(self.folder, self.built, name)
            from gog_edge.engines.tensorrt import open_graph

            return open_graph(self.folder, self.built, name)

    def open_decoder(self, spec: DecoderShape, context: int) -> DecoderEngine:
        """The decoder; `spec` is the policy manifest's TextSpec, `context` the tokens that a cache has to hold.

        Its caches may hold fewer, as many as it was built for, or more, where that is part of the engine.
        """
        with _mended_by(self.built.rebuild()):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.onnx.device_decoder import open_cuda_decoder

                return open_cuda_decoder(self.folder, self.built)
            from gog_edge.engines.tensorrt import open_decoder

            return open_decoder(self.folder, self.built, spec)

    def bytes(self, names: Sequence[str]) -> int:
        """Size of some graphs' engines with their weights."""
        with _mended_by(self.built.rebuild()):
            stems = tuple(self.built.graph(name).file for name in names)
        return sum(entry.size for entry in self.built.files if entry.path.startswith(stems))

    def cache(self) -> Path:
        """Folder for what is worked out with these very engines; not there where it cannot be made."""
        from gog_edge.engines.onnx.prepacked import cache_key

        folder = self.folder / CACHE / f"{self.built.engine}-{cache_key(self.built.files)}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextmanager
def _mended_by(command: str) -> Iterator[None]:
    """Engines are rebuilt, a bundle is not: what is wrong with their files says nothing against its parts."""
    try:
        yield
    except ArtifactError as exc:
        said = str(exc)
        if BUILDER not in said:
            said = f"{said.partition('; build them again')[0]}; build them again: {command}"
        raise BackendError(said) from exc
