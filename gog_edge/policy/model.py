"""Open a policy folder: the decoder with its tokenizer and embedding table, the vision tower, and what runs them."""

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
from gog_edge.engines.manifest import CACHE_FOLDER, ORT, VISION
from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.prepacked import MIN_CACHED_BYTES, cache_key, prepacked_graph, remove_stale_caches
from gog_edge.engines.onnx.session import OrtGraph, open_session, physical_cores
from gog_edge.engines.registry import EngineSet
from gog_edge.errors import BackendError
from gog_edge.files import map_array, open_tokenizer
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

Positions: TypeAlias = NDArray[np.int64]  # [3, T]: time, height, width

BYTES_PER_THREAD = 32 * 2**20  # of decoder weights: a smaller share takes less time than the threads' synchronisation
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """The token embeddings [vocab, hidden], memory-mapped: float32, float16, or uint8 with a zero point of 128."""

    rows: Array
    scales: Floats | None = None  # [vocab, blocks] float32, for uint8 rows

    @classmethod
    def open(cls, folder: Path, manifest: PolicyManifest) -> EmbeddingTable:
        """Map the table of a policy folder.

        Raises:
            ArtifactError: it is damaged, or its shape or dtype is not that of the manifest.
        """
        blocks, (vocab, hidden) = manifest.weights.embeddings, (manifest.text.vocab, manifest.text.hidden)
        if blocks is None:
            return cls(map_array(folder / EMBEDDINGS, (vocab, hidden), ("float32", "float16"), what="policy"))
        size = blocks.size or hidden
        count = -(-hidden // size)  # blocks of a row
        return cls(map_array(folder / EMBEDDINGS, (vocab, count * size), ("uint8",), what="policy"),
                   map_array(folder / EMBEDDING_SCALES, (vocab, count), ("float32",), what="policy"))

    def lookup(self, ids: Array, hidden: int) -> Floats:
        """Return the embeddings [T, hidden] float32 of ids [T]."""
        rows = self.rows[ids]
        if self.scales is None:
            return np.asarray(rows, np.float32)
        scales = self.scales[ids]
        centred = rows.astype(np.float32).reshape(len(ids), scales.shape[1], -1) - 128
        return np.ascontiguousarray((centred * scales[:, :, None]).reshape(len(ids), -1)[:, :hidden])


class Decoder:
    """A decoder engine with its embedding table, rotary embedding and tokenizer; shared by all sessions."""

    def __init__(
        self, engine: DecoderEngine, manifest: PolicyManifest, table: EmbeddingTable, tokenizer: Tokenizer, *,
        context: int | None = None,
    ) -> None:
        """`tokenizer` is modified and must not be shared. `context`: tokens per conversation, at most the capacity."""
        self.engine = engine
        self.capacity = min(context or engine.capacity, engine.capacity)
        self.manifest = manifest
        self.table = table
        self.tokenizer = tokenizer
        self.eos = frozenset(manifest.eos)
        self.image_token = manifest.image_token
        self.never_drafted = self.eos | {self.image_token}
        # Special tokens come only from the strings of the chat format; in all other text they are plain text.
        tokenizer.encode_special_tokens = False
        self.template_ids = {text: self.encode(text) for text in asdict(manifest.chat).values()}
        tokenizer.encode_special_tokens = True
        spec = manifest.text
        half = spec.head_dim // 2
        exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
        self._frequencies: Floats = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
        self._axes = rotary_axes(spec)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def embed(self, ids: Sequence[int]) -> Floats:
        """Return the embeddings [T, hidden] float32 of ids [T]."""
        return self.table.lookup(np.asarray(ids, np.int64), self.manifest.text.hidden)

    def rotary(self, positions: Positions) -> tuple[Floats, Floats]:
        """Return the rotary tables cos and sin [T, head_dim / 2] for positions [3, T]."""
        angles = positions[self._axes].T.astype(np.float32) * self._frequencies
        return np.cos(angles), np.sin(angles)


def rotary_axes(spec: TextSpec) -> NDArray[np.int64]:
    """Return the axis of each rotary pair [head_dim / 2]: 0 time, 1 row, 2 column.

    The axes are in consecutive blocks (M-RoPE of Qwen2.5-VL), or interleaved, with time for the remaining pairs
    (Qwen3-VL).
    """
    if not spec.mrope_interleaved:
        return np.repeat(np.arange(len(spec.mrope_section)), spec.mrope_section)
    axes = np.zeros(spec.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * spec.mrope_section[axis] : 3] = axis
    return axes


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """An open policy folder; shared by all conversations."""

    manifest: PolicyManifest
    vision: VisionEncoder
    decoder: Decoder
    cache_dir: Path  # values computed for this model on this machine; does not exist where nothing is cached
    kernels: str  # what runs the weights; cached keys and values are only valid for the same kernels
    device: str  # what the time of a step depends on besides the model: the GPU, or threads and kernels

    @classmethod
    def open(
        cls, folder: Path, *, threads: int | None = None, context: int | None = None, cpu_layout: bool = True,
        engines: EngineSet | None = None,
    ) -> PolicyModel:
        """Verify and load a policy folder.

        Args:
            folder: the policy folder.
            threads: upper limit of CPU threads, by default the number of physical cores; small decoders use fewer.
            context: tokens per conversation, by default and at most as in the manifest, or as `engines` were built.
            cpu_layout: use the weights in the CPU layout (native or prefill graphs), if the policy has them and this
                CPU supports them.
            engines: engines that were built from the folder's graphs, to run instead of these graphs.

        Raises:
            ArtifactError: a file is missing, altered or inconsistent.
            BackendError: the graphs cannot run on this machine.
        """
        manifest = read_manifest(folder)
        if manifest.engine != ORT:
            raise BackendError(
                f"'{folder}' was exported for engine '{manifest.engine}', this version supports '{ORT}'; export the "
                "checkpoint again"
            )
        capacity = min(context or manifest.max_context, manifest.max_context)
        graphs = engines or FolderGraphs(folder, manifest, threads, cpu_layout)
        with ThreadPoolExecutor(1) as executor:  # the vision tower loads while the decoder does
            tower = executor.submit(graphs.open_graph, VISION)
            engine = graphs.open_decoder(manifest.text, capacity)
            tokenizer = open_tokenizer(folder / TOKENIZER, what="policy")
            decoder = Decoder(engine, manifest, EmbeddingTable.open(folder, manifest), tokenizer, context=capacity)
            vision = VisionEncoder(tower.result(), manifest.vision)
            kernels = "engines" if engines else _cpu_kernels(manifest, cpu_layout)
            device = _gpu_name() if engines else f"{_decoder_threads(folder, threads)} threads, {kernels}"
            return cls(manifest, vision, decoder, graphs.cache(), kernels, device)

    @property
    def is_small(self) -> bool:
        """Return whether the decoder is so small that recomputing is faster than caching on disk."""
        sizes = (entry.size for entry in self.manifest.files if entry.path.startswith(DECODER_GRAPH))
        return sum(sizes) < MIN_CACHED_BYTES


@dataclass(frozen=True, slots=True)
class FolderGraphs:
    """The graphs of a policy folder on ONNX Runtime's CPU provider, opened like an `EngineSet`."""

    folder: Path
    manifest: PolicyManifest
    threads: int | None
    cpu_layout: bool

    def open_graph(self, name: str) -> GraphEngine:
        """Open the vision tower with the fastest kernels that this CPU supports."""
        if self.cpu_layout and self.manifest.runs_native:
            return OrtGraph(self.folder / NATIVE_VISION_GRAPH, threads=self.threads, operators=native.library())
        path, optimized = self._prepacked(f"{name}.onnx")
        return OrtGraph(path, threads=self.threads, optimized=optimized)

    def open_decoder(self, spec: TextSpec, context: int) -> DecoderEngine:
        """Open the decoder with the fastest kernels that this CPU supports; its caches hold `context` tokens."""
        threads = _decoder_threads(self.folder, self.threads)
        if self.cpu_layout and self.manifest.has_native:
            if self.manifest.runs_native:
                return self._open_native(spec, context, threads)
            _log.warning("'%s' runs on ONNX Runtime's operators, as the faster native ones are not available: %s",
                         self.folder, native.unavailable_reason())  # fmt: skip
        with ThreadPoolExecutor(1) as executor:
            has_prefill = self.cpu_layout and self.manifest.weights.prefill
            prefill = executor.submit(self._open_prefill, threads) if has_prefill else None
            path, optimized = self._prepacked(DECODER_GRAPH)
            decoder = OrtDecoder(path, capacity=context, threads=threads, optimized=optimized, prefill=prefill)
        decoder.check_shape(spec)
        return decoder

    def cache(self) -> Path:
        """Return the folder for values computed with these graphs on this CPU; it may not exist."""
        return self.folder / CACHE_FOLDER / cache_key(self.manifest.files)

    def _open_native(self, spec: TextSpec, context: int, threads: int) -> OrtDecoder:
        graph = self.folder / NATIVE_DECODER_GRAPH
        if graph_bytes(graph) >= MIN_CACHED_BYTES:  # native weights need no prepacking, but the prompt is cached
            try:
                self.cache().mkdir(parents=True, exist_ok=True)
                remove_stale_caches(self.cache())
            except OSError as exc:
                _log.warning("the prompt cannot be cached in '%s' (%s); every start computes it", self.cache(), exc)
        decoder = OrtDecoder(graph, capacity=context, threads=threads, operators=native.library())
        decoder.check_shape(spec)
        return decoder

    def _open_prefill(self, threads: int) -> InferenceSession:
        path, optimized = self._prepacked(PREFILL_GRAPH)
        return open_session(path, threads=threads, optimized=optimized)

    def _prepacked(self, name: str) -> tuple[Path, bool]:
        """Return the graph to load, and whether it is optimized and its weights are prepacked."""
        graph = self.folder / name
        size = graph_bytes(graph)
        path = prepacked_graph(graph, self.cache(), size) if size >= MIN_CACHED_BYTES else graph
        return path, path != graph


def graph_bytes(graph: Path) -> int:
    """Return the size of a graph file with its external weights."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _cpu_kernels(manifest: PolicyManifest, cpu_layout: bool) -> str:
    library = native.library() if cpu_layout and manifest.has_native else None
    return library.stem if library else "ort"


def _gpu_name() -> str:
    from gog_edge.engines.cuda import device_properties  # not imported where the CPU runs the policy

    try:
        return device_properties().name
    except BackendError:  # no GPU: tests and parity checks run CUDA graphs on the CPU provider
        return "no GPU"


def _decoder_threads(folder: Path, limit: int | None) -> int:
    # A step of a small decoder takes about a millisecond, less than many threads need to synchronise.
    return min(limit or physical_cores(), 1 + graph_bytes(folder / DECODER_GRAPH) // BYTES_PER_THREAD)
