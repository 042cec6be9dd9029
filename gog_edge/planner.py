"""Memory planning: estimate what a bundle needs before anything is loaded, and refuse what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gog_edge.bundle import Bundle
from gog_edge.config import Limits
from gog_edge.engines.base import PREFILL_CHUNK
from gog_edge.engines.manifest import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.registry import CPU_SEARCH, EngineSet
from gog_edge.errors import BackendError, InputError, NotEnoughMemory
from gog_edge.files import folder_bytes
from gog_edge.picture import RESULT_BYTES, decoding_bytes
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    VISION_GRAPH,
    PolicyManifest,
    TextSpec,
    read_manifest,
)
from gog_edge.policy.vision import VisionSpec
from gog_edge.retrieval.manifest import Space
from gog_edge.retrieval.manifest import read_manifest as read_pack

_Spaces: TypeAlias = list[tuple[Space, int]]  # spaces of vectors, with the length of a vector
FP32_BYTES, FP16_BYTES = 4, 2
ID_BYTES = 24  # per vector: its id, and its place in the sorted list of ids
PROCESS_BYTES = 160 * 2**20  # Python, ONNX Runtime, FAISS and the server; measured with the atlas, less its other parts
# ONNX Runtime's own operators allocate more for the vision tower than `vision_bytes` counts. Measured on towers of the
# width of Qwen2.5-VL-7B, 0.2 to 3 million pixels: 1.4 to 1.6 times as much; of the width of Qwen3-VL: 0.9 to 1.1 times.
ORT_VISION_FACTOR = 1.6
# A decoded picture takes 3 bytes a pixel, and 4 in each of the copies that the policy and the search resize.
DECODED_BYTES = 11
MEMINFO = "proc/meminfo"
CONTROL_GROUP = "sys/fs/cgroup"

# Parts of the plan that built engines, or a search on the GPU, place in a discrete GPU's own memory.
ENGINE_PARTS, SEARCH_PARTS = ("weights", "conversations", "pictures", "prefill"), ("vectors",)
PARTS = (*ENGINE_PARTS, *SEARCH_PARTS, "index", "switch", "decoding", "program")

# What to do when one part is too large.
_ADVICE = {
    "weights": "export the policy with --precision int4 (and --cpu-layout none), or a smaller checkpoint",
    "conversations": "export it, or build its engines, with a smaller --context, or answer fewer questions at a time "
    "([limits] concurrent in bundle.toml)",
    "pictures": "set a smaller max_pixels in the checkpoint's preprocessor_config.json and export it again",
    "vectors": "remove a pack, or search on the CPU",
    "decoding": "accept smaller pictures ([limits] picture_pixels and decoded_pixels in bundle.toml)",
    "index": "remove a pack, or build it with a smaller index",
}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Peak memory by purpose, in bytes.

    Memory-mapped files count in full: if they do not fit, they are read from disk again at every step.
    """

    weights: int  # of the policy; for built engines also of the encoder, since a GPU needs all weights resident
    conversations: int  # KV caches of all conversations at their full length, and of the prompt
    pictures: int  # activations of the vision tower for the largest picture
    prefill: int  # activations of one prefill step
    index: int  # the packs' indexes, the text encoder, and the encoder unless on a GPU; texts are read on demand
    switch: int = 0  # the largest index a second time: a new pack generation is opened before the old one is closed
    program: int = PROCESS_BYTES
    decoding: int = 0  # the picture that is being decoded, and decoded pictures
    vectors: int = 0  # of packs searched on a GPU, the largest twice as for `switch`, and scratch memory
    on_device: tuple[str, ...] = ()  # names of the parts in a discrete GPU's own memory

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return self._sum(PARTS)

    @property
    def device(self) -> int:
        """Return the sum of the parts in a discrete GPU's own memory."""
        return self._sum(self.on_device)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(getattr(self, name))}" for name in PARTS if getattr(self, name))
        on_gpu = f"; {format_size(self.device)} of it on the GPU" if self.on_device else ""
        return f"{format_size(self.total)}: {parts}{on_gpu}"

    def check(self, free: int | None, device_free: int | None = None) -> MemoryPlan:
        """Return this plan. Raise NotEnoughMemory, with advice, if it exceeds the free bytes; None means unknown."""
        if self.on_device and device_free is not None and self.device > device_free:
            raise self._error(self.on_device, device_free, "free on the GPU")
        host = tuple(name for name in PARTS if name not in self.on_device)
        if free is not None and self._sum(host) > free:
            raise self._error(host, free, "free")
        return self

    def _sum(self, names: Iterable[str]) -> int:
        return sum(int(getattr(self, name)) for name in names)

    def _error(self, names: tuple[str, ...], free: int, where: str) -> NotEnoughMemory:
        return NotEnoughMemory(
            f"the bundle needs up to {self}; only {format_size(free)} are {where}: {self._advice(names, free)}"
        )

    def _advice(self, names: tuple[str, ...], free: int) -> str:
        largest = max((name for name in names if name in _ADVICE), key=lambda name: int(getattr(self, name)))
        if self._sum(names) - int(getattr(self, largest)) > free:
            return "close other programs, or use a smaller model"
        return _ADVICE[largest]


def check_memory(
    bundle: Bundle, engines: EngineSet | None = None, on_plan: Callable[[MemoryPlan], None] | None = None, *,
    search: str = CPU_SEARCH,
) -> None:
    """Plan a bundle's memory, pass the plan to `on_plan`, and raise NotEnoughMemory if it does not fit this machine."""
    device_free, integrated = (None, False) if engines is None and search == CPU_SEARCH else _gpu_memory()
    plan = plan_memory(bundle, engines, search=search, integrated=integrated)
    if on_plan is not None:
        on_plan(plan)
    plan.check(available_memory(), device_free)


def plan_memory(
    bundle: Bundle, engines: EngineSet | None = None, *, search: str = CPU_SEARCH, integrated: bool = False
) -> MemoryPlan:
    """Estimate the peak memory of an opened bundle.

    Args:
        bundle: the bundle.
        engines: built engines that run on a GPU; None if the bundle's graphs run on the CPU.
        search: one of SEARCHES.
        integrated: the GPU shares the host's memory.

    Raises:
        ArtifactError: a part of the bundle cannot be read.
        BackendError: `engines` lacks a graph.
    """
    spaces = {pack: _spaces(bundle, pack) for pack in bundle.packs}
    indexes = [_index_bytes(pack, own, search) for pack, own in spaces.items()]
    index, switch, vectors = sum(indexes), max(indexes, default=0), _gpu_vectors_bytes(spaces.values(), search)
    if engines is None:
        index += folder_bytes(bundle.encoder)
    if bundle.text_encoder is not None:
        index += folder_bytes(bundle.text_encoder)
    on_device = _device_parts(engines, search) if not integrated else ()
    towers = 0 if engines is None else engines.bytes((IMAGE, TEXT))
    if not isinstance(bundle.policy, Path):  # the policy runs on a remote server
        return MemoryPlan(towers, 0, 0, 0, index, switch, decoding=picture_bytes(bundle.limits), vectors=vectors,
                          on_device=on_device)
    manifest = read_manifest(bundle.policy)
    pictures = vision_bytes(manifest.vision)
    if engines is None:
        weights = _weights_bytes(bundle.policy, manifest)
        context, item_bytes = manifest.max_context, FP16_BYTES if manifest.runs_native else FP32_BYTES
        pictures = pictures if manifest.runs_native else int(ORT_VISION_FACTOR * pictures)
    else:
        weights = towers + engines.bytes((DECODER, VISION))
        context, item_bytes = engines.built.context, FP16_BYTES
    return MemoryPlan(
        weights=weights,
        # one cache for the prompt, from which each conversation is copied
        conversations=(1 + bundle.limits.concurrent) * context * kv_bytes(manifest.text, item_bytes),
        pictures=pictures,
        prefill=prefill_bytes(manifest.text),
        index=index,
        switch=switch,
        decoding=picture_bytes(bundle.limits),
        vectors=vectors,
        on_device=on_device,
    )


def kv_bytes(spec: TextSpec, item_bytes: int = FP32_BYTES) -> int:
    """Return the size of one token's keys and values, in bytes."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * item_bytes


def vision_bytes(spec: VisionSpec) -> int:
    """Return an estimate of the vision tower's activations for the largest picture, in bytes.

    Counts 4 tensors [patches, intermediate] and 10 tensors [patches, hidden] that are alive at the same time.
    """
    return spec.max_pixels // spec.patch**2 * (4 * spec.intermediate + 10 * spec.hidden) * FP32_BYTES


def prefill_bytes(spec: TextSpec) -> int:
    """Return an estimate of the decoder's activations in one prefill step, in bytes.

    Counts 5 tensors [PREFILL_CHUNK, intermediate] and 12 tensors [PREFILL_CHUNK, hidden] that are alive at once.
    """
    return PREFILL_CHUNK * (5 * spec.intermediate + 12 * spec.hidden) * FP32_BYTES


def picture_bytes(limits: Limits) -> int:
    """Return the memory of the pictures of all questions at once, in bytes.

    One picture is decoded at a time, while its search may hold another. Every other question uses a decoded picture.
    """
    pixels = min(limits.decoded_pixels, limits.picture_pixels)
    decoding = decoding_bytes(limits.picture_pixels, limits.decoded_pixels) + RESULT_BYTES * pixels
    return max(decoding, DECODED_BYTES * pixels) + (limits.concurrent - 1) * DECODED_BYTES * pixels


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes available without swapping, within this process's control group; None if unknown."""
    free = read_meminfo(root, "MemAvailable")
    try:
        limit = (root / CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((root / CONTROL_GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if free is None or limit == "max" else min(free, int(limit) - used)


def read_meminfo(root: Path, name: str) -> int | None:
    """Return a field of `/proc/meminfo`, proc_meminfo(5), in bytes; None if unknown. Paths are relative to `root`."""
    try:
        lines = dict(line.split(":", 1) for line in (root / MEMINFO).read_text().splitlines() if ":" in line)
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def format_size(count: int) -> str:
    """Format a number of bytes, as "1.5 GiB" or "12 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def parse_size(text: str) -> int:
    """Parse a size such as "512M", "2G" or "1.5GiB" to bytes. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"a size must be a positive number with an optional unit, such as 512M or 2G, got '{text}'")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _gpu_memory() -> tuple[int | None, bool]:
    """Return the GPU's free bytes, None if unknown, and whether it shares the host's memory."""
    from gog_edge.engines.cuda import device_memory, device_properties

    try:
        return device_memory().free, device_properties().integrated
    except BackendError:
        return None, False  # opening the engines reports the problem


def _device_parts(engines: EngineSet | None, search: str) -> tuple[str, ...]:
    return (() if engines is None else ENGINE_PARTS) + (() if search == CPU_SEARCH else SEARCH_PARTS)


def _gpu_vectors_bytes(packs: Iterable[_Spaces], search: str) -> int:
    """Return the GPU memory that a search on the GPU needs."""
    if search == CPU_SEARCH:
        return 0
    from gog_edge.retrieval.vectors.gpu_index import TEMP_BYTES, vectors_bytes

    sizes = [sum(vectors_bytes(space.rows, dim) for space, dim in spaces) for spaces in packs]
    return TEMP_BYTES + sum(sizes) + max(sizes, default=0)


def _index_bytes(pack: Path, spaces: _Spaces, search: str) -> int:
    """Return the host memory that searching a pack needs; vectors for exact scores are read on demand."""
    if search != CPU_SEARCH:
        return sum(space.rows * ID_BYTES for space, _ in spaces)
    return sum(_space_bytes(pack, space, dim) for space, dim in spaces)


def _spaces(bundle: Bundle, pack: Path) -> _Spaces:
    """Return the vector spaces of a pack that are searched on this machine."""
    names = [] if pack in bundle.servers else ["images", "captions"]
    if bundle.text_encoder is not None:
        names.append("paragraphs")
    manifest = read_pack(pack) if names else None
    return [] if manifest is None else [(getattr(manifest, name), manifest.dim_of(name)) for name in names]


def _space_bytes(pack: Path, space: Space, dim: int) -> int:
    """Return the size of the index, of the vectors not in it (which are held in memory), and of all ids."""
    indexed, file = (0, 0) if space.index is None else (space.index.rows, (pack / space.index.path).stat().st_size)
    return file + (space.rows - indexed) * dim * FP16_BYTES + space.rows * ID_BYTES


def _weights_bytes(folder: Path, manifest: PolicyManifest) -> int:
    factor = 2 if manifest.precision == "fp16" else 1  # fp16 weights are converted to fp32 when they are loaded
    native, others = (NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH), (DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH)
    graphs = (path for name in (native if manifest.runs_native else others) for path in folder.glob(f"{name}*"))
    return factor * sum(path.stat().st_size for path in graphs)
