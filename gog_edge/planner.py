"""What a bundle will take of the memory, reckoned before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from gog_edge.bundle import Bundle
from gog_edge.errors import InputError, NotEnoughMemory
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    PREFILL_GRAPH,
    VISION_GRAPH,
    PolicyManifest,
    TextSpec,
    VisionSpec,
    read_manifest,
)
from gog_edge.policy.session import CHUNK
from gog_edge.retrieval.manifest import Space
from gog_edge.retrieval.manifest import read_manifest as read_pack

FLOAT_BYTES, HALF_BYTES = 4, 2
ID_BYTES = 24  # a row's id, and where it stands in the order of ids
PROGRAM_BYTES = 160 * 2**20  # Python, ONNX Runtime, FAISS and the server: a serving atlas, less its parts
MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose. Mapped files count in full: a box that cannot hold them reads them again at every step."""

    weights: int
    conversations: int  # keys and values of every conversation at its longest, and of the prompt
    pictures: int  # scratch memory of the vision tower for the largest picture
    prefill: int  # scratch memory of one prefill step
    index: int  # packs' indexes, and the encoder; texts are read as they are asked for
    switch: int = 0  # the largest pack's index again: a new generation is opened beside the old one
    program: int = PROGRAM_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {as_size(getattr(self, field.name))}" for field in fields(self))
        return f"{as_size(self.total)}: {parts}"

    def check(self, free: int | None) -> Self:
        """NotEnoughMemory, with advice, when this is more than `free` bytes; None is not known."""
        if free is not None and self.total > free:
            raise NotEnoughMemory(f"the bundle takes {self}; {as_size(free)} are free: {self._advice(free)}")
        return self

    def _advice(self, free: int) -> str:
        most = max(("weights", "conversations", "pictures", "index"), key=lambda name: int(getattr(self, name)))
        if self.total - int(getattr(self, most)) > free:
            return "close other programs, or take a smaller model"
        return {
            "weights": "export the policy with --precision int4 (and --no-prefill), or a smaller checkpoint",
            "conversations": "export it with a smaller --context, or answer fewer questions at a time ([limits] "
            "concurrent in bundle.toml)",
            "pictures": "set a smaller max_pixels in the checkpoint's preprocessor_config.json and export it again",
            "index": "leave out a pack, or build it with a smaller index",
        }[most]


def plan_memory(bundle: Bundle) -> MemoryPlan:
    """What an opened bundle takes at most. Raises ArtifactError where a part cannot be read."""
    packs = [0 if pack in bundle.servers else _index_bytes(pack) for pack in bundle.packs]
    index, switch = _bytes(bundle.encoder) + sum(packs), max(packs)
    if not isinstance(bundle.policy, Path):
        return MemoryPlan(0, 0, 0, 0, index, switch)  # another server holds the policy
    manifest = read_manifest(bundle.policy)
    conversations = 1 + bundle.limits.concurrent  # each forks from the prompt's own
    return MemoryPlan(
        weights=_weights(bundle.policy, manifest),
        conversations=conversations * manifest.max_context * kv_bytes(manifest.text),
        pictures=vision_bytes(manifest.vision),
        prefill=prefill_bytes(manifest.text),
        index=index,
        switch=switch,
    )


def kv_bytes(spec: TextSpec) -> int:
    """Bytes of keys and values that one token takes."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * FLOAT_BYTES


def vision_bytes(spec: VisionSpec) -> int:
    """Scratch memory for the largest picture: the widest layer's values, and several of the stream's width."""
    return spec.max_pixels // spec.patch**2 * (4 * spec.intermediate + 10 * spec.hidden) * FLOAT_BYTES


def prefill_bytes(spec: TextSpec) -> int:
    """Scratch memory of one chunk through the decoder."""
    return CHUNK * (5 * spec.intermediate + 12 * spec.hidden) * FLOAT_BYTES


def free_memory() -> int | None:
    """Bytes that can be had without swapping, within this process's control group; None where nobody says."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _index_bytes(pack: Path) -> int:
    """What the search holds in memory; vectors that candidates are compared with are read as they are needed."""
    manifest = read_pack(pack)
    dim = 0 if manifest.encoder is None else manifest.encoder.dim
    return sum(_space_bytes(pack, space, dim) for space in (manifest.images, manifest.captions))


def _space_bytes(pack: Path, space: Space, dim: int) -> int:
    """The index, the vectors beside it, which are held whole, and the ids of all."""
    indexed, file = (0, 0) if space.index is None else (space.index.rows, (pack / space.index.path).stat().st_size)
    return file + (space.rows - indexed) * dim * HALF_BYTES + space.rows * ID_BYTES


def _weights(folder: Path, manifest: PolicyManifest) -> int:
    widened = 2 if manifest.precision == "fp16" else 1  # stored in halves, computed in float32
    graphs = (path for name in (DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH) for path in folder.glob(f"{name}*"))
    return widened * sum(path.stat().st_size for path in graphs)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def as_size(count: int) -> str:
    """Bytes for people, as 1.5 GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def parse_size(text: str) -> int:
    """Bytes from what people write, as 512M, 2G or 1.5GiB; InputError when it is no such size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"'{text}' is no size; write it as 512M or 2G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
