"""A policy folder, opened: vision encoder and decoder ready to run."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from onnxruntime import InferenceSession
from tokenizers import Tokenizer

from gog_edge.engines import native
from gog_edge.engines.base import DecoderEngine, GraphEngine
from gog_edge.engines.built import ORT, VISION
from gog_edge.engines.choice import EngineSet
from gog_edge.engines.ort import OrtDecoder, OrtGraph, open_session, physical_cores
from gog_edge.engines.packed import CACHE, WORTH_BYTES, cache_key, forget_others, packed_graph
from gog_edge.errors import BackendError
from gog_edge.policy.embeddings import EmbeddingTable
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    TOKENIZER,
    PolicyManifest,
    TextSpec,
    read_manifest,
)
from gog_edge.policy.session import Decoder, Session
from gog_edge.policy.vision import VisionEncoder

BYTES_A_THREAD = 32 * 2**20  # of decoder weights
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """The parts that every conversation shares."""

    manifest: PolicyManifest
    vision: VisionEncoder
    decoder: Decoder
    cache: Path  # folder for what was worked out for this model on this machine; need not be there
    form: str  # of its weights that runs: what is kept in `cache` of keys and values is of one form
    runs_on: str  # what, beside all that `cache` is for, the time of a step depends on

    @classmethod
    def open(
        cls, folder: Path, *, threads: int | None = None, context: int | None = None, second: bool = True,
        engines: EngineSet | None = None,
    ) -> PolicyModel:
        """Verify and load a policy folder.

        `threads`: at most so many, one for each physical core when None; a small decoder takes fewer. `context`:
        tokens of one conversation, at most and by default what the manifest says, or what `engines` were built for.
        `second`: use the second form of the decoder's weights, where there is one and this processor runs it.
        `engines`: run these, built from the folder's graphs, in place of the graphs themselves. Raises ArtifactError
        or BackendError.
        """
        manifest = read_manifest(folder)
        if manifest.engine != ORT:
            raise BackendError(f"'{folder}' was exported for engine '{manifest.engine}'; this version runs '{ORT}'")
        capacity = min(context or manifest.max_context, manifest.max_context)
        parts = engines or OwnGraphs(folder, manifest, threads, second)
        with ThreadPoolExecutor(1) as beside:  # the graphs load at the same time
            tower = beside.submit(parts.open_graph, VISION)
            engine = parts.open_decoder(manifest.text, capacity)
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            decoder = Decoder(engine, manifest, EmbeddingTable.open(folder, manifest), tokenizer, context=capacity)
            vision = VisionEncoder(tower.result(), manifest.vision)
            form = "engines" if engines else _form(manifest, second)
            runs_on = _gpu() if engines else f"{_decoder_threads(folder, threads)} threads, {form}"
            return cls(manifest, vision, decoder, parts.cache(), form, runs_on)

    @property
    def small(self) -> bool:
        """Whether its decoder is so small that nothing which is worked out for it is worth keeping."""
        sizes = (entry.size for entry in self.manifest.files if entry.path.startswith(DECODER_GRAPH))
        return sum(sizes) < WORTH_BYTES

    def new_session(self) -> Session:
        """An empty conversation with a cache of its own."""
        return Session(self.decoder, self.decoder.engine.new_cache())


@dataclass(frozen=True, slots=True)
class OwnGraphs:
    """A policy folder's own graphs, which ONNX Runtime runs on the processor."""

    folder: Path
    manifest: PolicyManifest
    threads: int | None
    second: bool

    def open_graph(self, name: str) -> GraphEngine:
        """The vision tower in its quickest form here."""
        if self.second and self.manifest.native_here:
            return OrtGraph(self.folder / NATIVE_VISION_GRAPH, threads=self.threads, operators=native.library())
        path, optimised = self._form_here(f"{name}.onnx")
        return OrtGraph(path, threads=self.threads, optimised=optimised)

    def open_decoder(self, spec: TextSpec, context: int) -> DecoderEngine:
        """The decoder in its quickest form here; its caches hold `context` tokens."""
        most = _decoder_threads(self.folder, self.threads)
        if self.second and self.manifest.native:
            if self.manifest.native_here:
                return self._open_native(context, most)
            _log.warning("'%s' runs on ONNX Runtime's operators, which take about twice as long as ours: %s",
                         self.folder, native.why_none())  # fmt: skip
        with ThreadPoolExecutor(1) as beside:
            wanted = self.second and self.manifest.weights.prefill
            filler = beside.submit(self._open_prefill, most) if wanted else None
            path, optimised = self._form_here(DECODER_GRAPH)
            return OrtDecoder(path, capacity=context, threads=most, optimised=optimised, prefill=filler)

    def cache(self) -> Path:
        """Folder for what is worked out with these graphs on this processor; need not be there."""
        return self.folder / CACHE / cache_key(self.manifest.files)

    def _open_native(self, context: int, threads: int) -> OrtDecoder:
        graph = self.folder / NATIVE_DECODER_GRAPH
        if graph_bytes(graph) >= WORTH_BYTES:  # its weights are mapped as they are, but a prompt is worth keeping
            try:
                self.cache().mkdir(parents=True, exist_ok=True)
                forget_others(self.cache())
            except OSError as exc:
                _log.warning("the prompt cannot be kept in '%s' (%s): every start computes it", self.cache(), exc)
        return OrtDecoder(graph, capacity=context, threads=threads, operators=native.library())

    def _open_prefill(self, threads: int) -> InferenceSession:
        path, optimised = self._form_here(PREFILL_GRAPH)
        return open_session(path, threads=threads, optimised=optimised)

    def _form_here(self, name: str) -> tuple[Path, bool]:
        """The graph to load on this machine, and whether it is optimised already."""
        graph = self.folder / name
        size = graph_bytes(graph)
        path = packed_graph(graph, self.cache(), size) if size >= WORTH_BYTES else graph
        return path, path != graph


def graph_bytes(graph: Path) -> int:
    """A graph's file and its weights."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _form(manifest: PolicyManifest, second: bool) -> str:
    """Whose operators run a policy's own graphs."""
    library = native.library() if second and manifest.native else None
    return library.stem if library else "ort"


def _gpu() -> str:
    from gog_edge.engines.cuda import device_properties  # a box that serves on the CPU loads no part of another runtime

    try:
        return device_properties().name
    except BackendError:  # none here, as where rewritten graphs are compared with their own
        return "no GPU"


def _decoder_threads(folder: Path, most: int | None) -> int:
    # Where a step takes a millisecond, threads wait for each other longer than they work, more so on a busy machine.
    return min(most or physical_cores(), 1 + graph_bytes(folder / DECODER_GRAPH) // BYTES_A_THREAD)
