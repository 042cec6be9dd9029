"""The engine and search backend chosen on the command line, and the built engines that the choice leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gog_edge.engines.manifest import (
    BUILD_COMMAND,
    CACHE_FOLDER,
    ENGINES,
    ORT,
    ORT_CUDA,
    EngineManifest,
    build_command,
    default_engine_folder,
    read_engine_manifest,
)
from gog_edge.errors import ArtifactError, BackendError, InputError

if TYPE_CHECKING:  # imports numpy, which --help does not need
    from gog_edge.engines.base import DecoderEngine, DecoderShape, GraphEngine

CPU_SEARCH, FAISS_GPU = "cpu", "faiss-gpu"
SEARCHES = (CPU_SEARCH, FAISS_GPU)  # what searches the packs: their own indexes, or copies on a GPU

# Not the extra `gpu`: its ONNX Runtime would overwrite the files of the installed one.
FAISS_GPU_INSTALL = "pip uninstall faiss-cpu && pip install 'faiss-gpu>=1.15,<1.16'"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What runs the graphs and what searches the packs. Raises InputError for values that do not fit together."""

    engine: str = ORT  # one of ENGINES
    folder: Path | None = None  # of built engines; None for the bundle's own folder for `engine`
    search: str = CPU_SEARCH  # one of SEARCHES

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"unknown engine '{self.engine}'; must be one of {', '.join(ENGINES)}")
        if self.folder is not None and not self.built:
            raise InputError(f"'{self.folder}' is a folder of built engines, but engine '{ORT}' runs the bundle's own "
                             "graphs; name the engine that they were built for with --engine")
        if self.search not in SEARCHES:
            raise InputError(f"unknown search '{self.search}'; must be one of {', '.join(SEARCHES)}")

    @property
    def built(self) -> bool:
        """Return whether `engine` runs engines built from the bundle's graphs, rather than the graphs themselves."""
        return self.engine != ORT

    @property
    def on_gpu(self) -> bool:
        """Return whether this needs a GPU, or files built for one. Either may become available while a server runs."""
        return self.built or self.search != CPU_SEARCH

    def read_engines(self, bundle: Path) -> EngineSet | None:
        """Read and verify the bundle's engines without opening them; None if its own graphs run.

        Raises BackendError, with the command that builds them, if they are missing or cannot be used.
        """
        if not self.built:
            return None
        folder = self.folder or default_engine_folder(bundle, self.engine)
        with _rebuild_hint(build_command(bundle, self.engine, folder=folder)):
            return EngineSet(folder, read_engine_manifest(folder, bundle, self.engine))


@dataclass(frozen=True, slots=True)
class EngineSet:
    """The verified engines of one folder, opened one by one. All errors are BackendErrors."""

    folder: Path
    built: EngineManifest

    def open_graph(self, name: str) -> GraphEngine:
        """Open a graph without state: VISION, IMAGE or TEXT."""
        with _rebuild_hint(self.built.rebuild_command()):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.onnx.device_decoder import open_cuda_graph

                return open_cuda_graph(self.folder, self.built, name)
            from gog_edge.engines.tensorrt.graph import open_graph

            return open_graph(self.folder, self.built, name)

    def open_decoder(self, shape: DecoderShape, context: int) -> DecoderEngine:
        """Open the decoder of dimensions `shape`. `context` is the number of tokens that a cache should hold.

        The capacity of its caches was fixed when it was built and may differ from `context`.
        """
        with _rebuild_hint(self.built.rebuild_command()):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.onnx.device_decoder import open_cuda_decoder

                return open_cuda_decoder(self.folder, self.built)
            from gog_edge.engines.tensorrt.decoder import open_decoder

            return open_decoder(self.folder, self.built, shape)

    def bytes(self, names: Sequence[str]) -> int:
        """Return the size of the named graphs' engines, weights included, in bytes."""
        with _rebuild_hint(self.built.rebuild_command()):
            stems = tuple(self.built.graph(name).file for name in names)
        return sum(entry.size for entry in self.built.files if entry.path.startswith(stems))

    def cache(self) -> Path:
        """Return the folder for data computed with exactly these engines; it may not exist if it cannot be created."""
        from gog_edge.engines.onnx.prepacked import cache_key

        folder = self.folder / CACHE_FOLDER / f"{self.built.engine}-{cache_key(self.built.files)}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextmanager
def _rebuild_hint(command: str) -> Iterator[None]:
    """Turn ArtifactErrors into BackendErrors that end with the build command.

    Damaged engines can be rebuilt from the bundle, so the bundle itself is not at fault.
    """
    try:
        yield
    except ArtifactError as exc:
        message = str(exc)
        if BUILD_COMMAND not in message:
            message = f"{message.partition('; build them again')[0]}; build them again: {command}"
        raise BackendError(message) from exc
