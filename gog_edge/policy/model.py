"""A policy folder, opened: vision encoder and decoder ready to run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from onnxruntime import InferenceSession
from tokenizers import Tokenizer

from gog_edge.engines.ort import OrtDecoder, OrtGraph, open_session, physical_cores
from gog_edge.engines.packed import CACHE, WORTH_BYTES, cache_key, packed_graph
from gog_edge.errors import BackendError
from gog_edge.policy.embeddings import EmbeddingTable
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    PREFILL_GRAPH,
    TOKENIZER,
    VISION_GRAPH,
    PolicyManifest,
    read_manifest,
)
from gog_edge.policy.session import Decoder, Session
from gog_edge.policy.vision import VisionEncoder

BYTES_A_THREAD = 32 * 2**20  # of decoder weights


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """The parts that every conversation shares."""

    manifest: PolicyManifest
    vision: VisionEncoder
    decoder: Decoder
    cache: Path  # folder for what was worked out for this model on this machine; need not be there

    @classmethod
    def open(
        cls, folder: Path, *, threads: int | None = None, context: int | None = None, prefill: bool = True
    ) -> Self:
        """Verify and load a policy folder.

        `threads`: at most so many, one for each physical core when None; a small decoder takes fewer. `context`:
        tokens of one conversation, at most and by default what the manifest says. `prefill`: use the graph for many
        tokens at a time where there is one. Raises ArtifactError or BackendError.
        """
        manifest = read_manifest(folder)
        if manifest.engine != "ort":
            raise BackendError(f"'{folder}' was exported for engine '{manifest.engine}'; this version runs 'ort'")
        capacity = min(context or manifest.max_context, manifest.max_context)
        cache = folder / CACHE / cache_key(manifest.files)
        with ThreadPoolExecutor(2) as beside:  # the graphs load at the same time
            tower = beside.submit(_open_vision, folder, cache, manifest, threads)
            most = _decoder_threads(folder, threads)
            filler = beside.submit(_open_prefill, folder, cache, most) if prefill and manifest.weights.prefill else None
            path, optimised = _form_here(folder / DECODER_GRAPH, cache)
            engine = OrtDecoder(
                path, capacity=capacity, threads=most, optimised=optimised, prefill=filler.result() if filler else None
            )
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            decoder = Decoder(engine, manifest, EmbeddingTable.open(folder, manifest), tokenizer)
            return cls(manifest, tower.result(), decoder, cache)

    def new_session(self) -> Session:
        """An empty conversation with a cache of its own."""
        return Session(self.decoder, self.decoder.engine.new_cache())


def graph_bytes(graph: Path) -> int:
    """A graph's file and its weights."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _open_vision(folder: Path, cache: Path, manifest: PolicyManifest, threads: int | None) -> VisionEncoder:
    path, optimised = _form_here(folder / VISION_GRAPH, cache)
    return VisionEncoder(OrtGraph(path, threads=threads, optimised=optimised), manifest.vision)


def _open_prefill(folder: Path, cache: Path, threads: int) -> InferenceSession:
    path, optimised = _form_here(folder / PREFILL_GRAPH, cache)
    return open_session(path, threads=threads, optimised=optimised)


def _form_here(graph: Path, cache: Path) -> tuple[Path, bool]:
    """The graph to load on this machine, and whether it is optimised already."""
    path = packed_graph(graph, cache) if graph_bytes(graph) >= WORTH_BYTES else graph
    return path, path != graph


def _decoder_threads(folder: Path, most: int | None) -> int:
    # Where a step takes a millisecond, threads wait for each other longer than they work, more so on a busy machine.
    return min(most or physical_cores(), 1 + graph_bytes(folder / DECODER_GRAPH) // BYTES_A_THREAD)
