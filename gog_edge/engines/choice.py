"""Which runtime runs a bundle's graphs: what was chosen on the command line, and the built engines that it leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gog_edge.engines.built import CACHE, ENGINES, FOLDER, ORT, ORT_CUDA, BuiltEngines, build_command, read_built
from gog_edge.errors import ArtifactError, BackendError, InputError

if TYPE_CHECKING:  # a box that serves on the CPU loads no other runtime, nor a part of one
    from gog_edge.engines.base import DecoderEngine, GraphEngine
    from gog_edge.engines.trt_decoder import DecoderShape


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """One of `ENGINES`, and where its engines lie. InputError for a runtime that there is not, or that needs none."""

    engine: str = ORT
    folder: Path | None = None  # of built engines; None: the bundle's own for that runtime

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"there is no engine '{self.engine}'; known are {', '.join(ENGINES)}")
        if self.folder is not None and not self.built:
            raise InputError(f"'{self.folder}' is a folder of built engines, and '{ORT}' runs the bundle's own graphs; "
                             "name the engine that they were built for, too")

    @property
    def built(self) -> bool:
        """Whether engines run that were built from the bundle's graphs, not these graphs themselves."""
        return self.engine != ORT

    def read(self, bundle: Path) -> EngineSet | None:
        """The bundle's engines, checked and not yet opened; None where its own graphs run. Raises BackendError."""
        if not self.built:
            return None
        folder = self.folder or bundle / FOLDER / self.engine
        with _mended_by(build_command(bundle, self.engine)):
            return EngineSet(folder, read_built(folder, bundle, self.engine), bundle)


@dataclass(frozen=True, slots=True)
class EngineSet:
    """The engines of a folder, as they are opened for the policy and the encoder. All errors are BackendErrors."""

    folder: Path
    built: BuiltEngines
    bundle: Path

    def open_graph(self, name: str) -> GraphEngine:
        """A graph without state: VISION, IMAGE or TEXT."""
        with _mended_by(self.built.rebuild(str(self.bundle))):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.ort import open_cuda_graph

                return open_cuda_graph(self.folder, self.built, name)
            from gog_edge.engines.trt import open_graph

            return open_graph(self.folder, self.built, name)

    def open_decoder(self, spec: DecoderShape, context: int) -> DecoderEngine:
        """The decoder; `spec` is the policy manifest's TextSpec, `context` the tokens that a cache has to hold.

        Its caches may hold fewer, as many as it was built for, or more, where that is part of the engine.
        """
        with _mended_by(self.built.rebuild(str(self.bundle))):
            if self.built.engine == ORT_CUDA:
                from gog_edge.engines.ort import open_cuda_decoder

                return open_cuda_decoder(self.folder, self.built, context=min(context, self.built.context))
            from gog_edge.engines.trt import open_decoder

            return open_decoder(self.folder, self.built, spec)

    def bytes(self, names: Sequence[str]) -> int:
        """Size of some graphs' engines with their weights."""
        stems = tuple(self.built.graph(name).file for name in names)
        return sum(entry.size for entry in self.built.files if entry.path.startswith(stems))

    def cache(self) -> Path:
        """Folder for what is worked out with these very engines; not there where it cannot be made."""
        from gog_edge.engines.packed import cache_key

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
        mend = "" if command in str(exc) else f"; build them again: {command}"
        raise BackendError(f"{exc}{mend}") from exc
