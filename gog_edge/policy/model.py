"""The decoder's embedding table: mapped from disk, rows widened when asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

from gog_edge.engines.base import Array, DecoderEngine, Floats, GraphEngine
from gog_edge.engines.manifest import ORT, VISION
from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.prepacked import CACHE, WORTH_BYTES, cache_key, forget_others, packed_graph
from gog_edge.engines.onnx.session import OrtGraph, open_session, physical_cores
from gog_edge.engines.registry import EngineSet
from gog_edge.errors import ArtifactError, BackendError
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    EMBEDDING_SCALES,
    EMBEDDINGS,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    TOKENIZER,
    PolicyManifest,
    TextSpec,
    read_manifest,
)
from gog_edge.policy.vision import VisionEncoder


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Rows [vocab, hidden]: float32 or float16, or 8-bit numbers about 128 with a scale for each block."""

    rows: Array
    scales: Floats | None = None  # [vocab, blocks]

    @classmethod
    def open(cls, folder: Path, manifest: PolicyManifest) -> EmbeddingTable:
        """Map a policy folder's table. ArtifactError when it has not the manifest's shape."""
        rows = np.load(folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        blocks = manifest.weights.embeddings
        scales = np.load(folder / EMBEDDING_SCALES, mmap_mode="r", allow_pickle=False) if blocks else None
        vocab, hidden = manifest.text.vocab, manifest.text.hidden
        size = (blocks.size or hidden) if blocks else 1
        expected = (vocab, -(-hidden // size) * size)
        if rows.shape != expected or (scales is not None and scales.shape[1] * size != expected[1]):
            raise ArtifactError(
                f"'{folder / EMBEDDINGS}' has shape {rows.shape}, the manifest wants {expected}; export again"
            )
        return cls(rows, scales)

    def take(self, ids: Array, hidden: int) -> Floats:
        """Embeddings [T, hidden] float32 of ids [T]."""
        rows = self.rows[ids]
        if self.scales is None:
            return np.asarray(rows, np.float32)
        scales = self.scales[ids]
        centred = rows.astype(np.float32).reshape(len(ids), scales.shape[1], -1) - 128
        return np.ascontiguousarray((centred * scales[:, :, None]).reshape(len(ids), -1)[:, :hidden])


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


Positions: TypeAlias = NDArray[np.int64]  # [3, T]: time, height, width


class Decoder:
    """A decoder with its embedding table, rotary angles and tokenizer; shared by all sessions."""

    def __init__(
        self, engine: DecoderEngine, manifest: PolicyManifest, table: EmbeddingTable, tokenizer: Tokenizer, *,
        context: int | None = None,
    ) -> None:
        """`tokenizer` is from now on this decoder's own. `context`: tokens of one conversation, fewer than fit."""
        self.engine = engine
        self.capacity = min(context or engine.capacity, engine.capacity)
        self.manifest = manifest
        self.table = table
        self.tokenizer = tokenizer
        self.eos = frozenset(manifest.eos)
        self.image_token = manifest.image_token
        self.never_drafted = self.eos | {self.image_token}
        # Special tokens come from the chat format's strings only: in what people or articles say they are plain text.
        tokenizer.encode_special_tokens = False
        self.markup = {text: self.encode(text) for text in asdict(manifest.chat).values()}
        tokenizer.encode_special_tokens = True
        spec = manifest.text
        half = spec.head_dim // 2
        exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
        self._frequencies: Floats = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
        self._axes = rotary_axes(spec)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def embed(self, ids: Sequence[int]) -> Floats:
        """Ids [T] -> embeddings [T, hidden] float32."""
        return self.table.take(np.asarray(ids, np.int64), self.manifest.text.hidden)

    def rotary(self, positions: Positions) -> tuple[Floats, Floats]:
        """Positions [3, T] -> cos, sin [T, head_dim / 2]."""
        angles = positions[self._axes].T.astype(np.float32) * self._frequencies
        return np.cos(angles), np.sin(angles)


def rotary_axes(spec: TextSpec) -> NDArray[np.int64]:
    """[head_dim / 2]: the axis that turns each rotary pair, 0 time, 1 row, 2 column.

    In blocks one after the other, or, interleaved, in turns as far as rows and columns reach, the rest time.
    """
    if not spec.mrope_interleaved:
        return np.repeat(np.arange(len(spec.mrope_section)), spec.mrope_section)
    axes = np.zeros(spec.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * spec.mrope_section[axis] : 3] = axis
    return axes
