"""What a bundle will take of the memory, reckoned before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gog_edge.bundle import Bundle
from gog_edge.engines.manifest import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.registry import CPU_SEARCH, EngineSet
from gog_edge.errors import BackendError, InputError, NotEnoughMemory
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
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
MEMINFO = "proc/meminfo"
CONTROL_GROUP = "sys/fs/cgroup"


# Where a GPU has memory of its own, that of built engines lies there, and that of a search by a GPU.
ENGINE_PARTS, SEARCH_PARTS = ("weights", "conversations", "pictures", "prefill"), ("vectors",)
PARTS = (*ENGINE_PARTS, *SEARCH_PARTS, "index", "switch", "program")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose. Mapped files count in full: a box that cannot hold them reads them again at every step."""

    weights: int  # of the policy; on a GPU, which needs all engines whole, those of the encoder too
    conversations: int  # keys and values of every conversation at its longest, and of the prompt
    pictures: int  # scratch memory of the vision tower for the largest picture
    prefill: int  # scratch memory of one prefill step
    index: int  # packs' indexes, and the encoder where it is not on a GPU; texts are read as they are asked for
    switch: int = 0  # the largest pack's index again: a new generation is opened beside the old one
    program: int = PROGRAM_BYTES
    vectors: int = 0  # of packs that a GPU searches, the largest twice as `switch` says, and its scratch memory
    on_device: tuple[str, ...] = ()  # parts that lie in a GPU's own memory

    @property
    def total(self) -> int:
        """All of it."""
        return self._sum(PARTS)

    @property
    def device(self) -> int:
        """What lies in a GPU's own memory."""
        return self._sum(self.on_device)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {as_size(getattr(self, name))}" for name in PARTS if getattr(self, name))
        return f"{as_size(self.total)}: {parts}" + f"; {as_size(self.device)} of it on the GPU" * bool(self.on_device)

    def check(self, free: int | None, device_free: int | None = None) -> MemoryPlan:
        """NotEnoughMemory, with advice, when this is more than is free, in bytes; None is not known."""
        if self.on_device and device_free is not None and self.device > device_free:
            raise self._refusal(self.on_device, device_free, "free on the GPU")
        host = tuple(name for name in PARTS if name not in self.on_device)
        if free is not None and self._sum(host) > free:
            raise self._refusal(host, free, "free")
        return self

    def _sum(self, names: Iterable[str]) -> int:
        return sum(int(getattr(self, name)) for name in names)

    def _refusal(self, names: tuple[str, ...], free: int, where: str) -> NotEnoughMemory:
        return NotEnoughMemory(f"the bundle takes {self}; {as_size(free)} are {where}: {self._advice(names, free)}")

    def _advice(self, names: tuple[str, ...], free: int) -> str:
        most = max((name for name in names if name in _ADVICE), key=lambda name: int(getattr(self, name)))
        if self._sum(names) - int(getattr(self, most)) > free:
            return "close other programs, or take a smaller model"
        return _ADVICE[most]


_ADVICE = {
    "weights": "export the policy with --precision int4 (and --second none), or a smaller checkpoint",
    "conversations": "export it, or build its engines, with a smaller --context, or answer fewer questions at a time "
    "([limits] concurrent in bundle.toml)",
    "pictures": "set a smaller max_pixels in the checkpoint's preprocessor_config.json and export it again",
    "vectors": "leave out a pack, or search it on the CPU",
    "index": "leave out a pack, or build it with a smaller index",
}


def fit_memory(
    bundle: Bundle, engines: EngineSet | None = None, on_plan: Callable[[MemoryPlan], None] | None = None, *,
    search: str = CPU_SEARCH,
) -> None:
    """Reckon what a bundle will take, tell it to `on_plan`, and refuse with NotEnoughMemory what does not fit here."""
    device_free, integrated = (None, False) if engines is None and search == CPU_SEARCH else _device()
    plan = plan_memory(bundle, engines, search=search, integrated=integrated)
    if on_plan is not None:
        on_plan(plan)
    plan.check(free_memory(), device_free)


def plan_memory(
    bundle: Bundle, engines: EngineSet | None = None, *, search: str = CPU_SEARCH, integrated: bool = False
) -> MemoryPlan:
    """What an opened bundle takes at most. Raises ArtifactError where a part cannot be read, BackendError of engines.

    `engines` run on a GPU, and one of `SEARCHES` may search there, in its own memory or, if it is `integrated`, in the
    host's.
    """
    packs = [pack for pack in bundle.packs if pack not in bundle.servers]
    indexes = [_index_bytes(pack, search) for pack in packs]
    index, switch, vectors = sum(indexes), max(indexes, default=0), _vectors_bytes(packs, search)
    if engines is None:
        index += _bytes(bundle.encoder)
    on_device = _on_device(engines, search) if not integrated else ()
    towers = 0 if engines is None else engines.bytes((IMAGE, TEXT))
    if not isinstance(bundle.policy, Path):  # another server holds the policy
        return MemoryPlan(towers, 0, 0, 0, index, switch, vectors=vectors, on_device=on_device)
    manifest = read_manifest(bundle.policy)
    own = (manifest.max_context, HALF_BYTES if manifest.native_here else FLOAT_BYTES)
    context, wide = own if engines is None else (engines.built.context, HALF_BYTES)
    return MemoryPlan(
        weights=_weights(bundle.policy, manifest) if engines is None else towers + engines.bytes((DECODER, VISION)),
        # each conversation forks from the prompt's own
        conversations=(1 + bundle.limits.concurrent) * context * kv_bytes(manifest.text, wide),
        pictures=vision_bytes(manifest.vision),
        prefill=prefill_bytes(manifest.text),
        index=index,
        switch=switch,
        vectors=vectors,
        on_device=on_device,
    )


def kv_bytes(spec: TextSpec, wide: int = FLOAT_BYTES) -> int:
    """Bytes of keys and values that one token takes, in numbers that are so many bytes `wide`."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * wide


def vision_bytes(spec: VisionSpec) -> int:
    """Scratch memory for the largest picture: the widest layer's values, and several of the stream's width."""
    return spec.max_pixels // spec.patch**2 * (4 * spec.intermediate + 10 * spec.hidden) * FLOAT_BYTES


def prefill_bytes(spec: TextSpec) -> int:
    """Scratch memory of one chunk through the decoder."""
    return CHUNK * (5 * spec.intermediate + 12 * spec.hidden) * FLOAT_BYTES


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping, within this process's control group; None where nobody says."""
    free = memory_of(root, "MemAvailable")
    try:
        limit = (root / CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((root / CONTROL_GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if free is None or limit == "max" else min(free, int(limit) - used)


def memory_of(root: Path, name: str) -> int | None:
    """Bytes of a line of `/proc/meminfo` (proc_meminfo(5)) below a root; None where it is not there."""
    try:
        lines = dict(line.split(":", 1) for line in (root / MEMINFO).read_text().splitlines() if ":" in line)
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _device() -> tuple[int | None, bool]:
    """Bytes that are free on the GPU, None where nobody says, and whether they are the host's."""
    from gog_edge.engines.cuda import device_memory, device_properties

    try:
        return device_memory().free, device_properties().integrated
    except BackendError:
        return None, False  # opening the engines says what is wrong


def _on_device(engines: EngineSet | None, search: str) -> tuple[str, ...]:
    return (() if engines is None else ENGINE_PARTS) + (() if search == CPU_SEARCH else SEARCH_PARTS)


def _vectors_bytes(packs: Iterable[Path], search: str) -> int:
    """What a search by a GPU holds there."""
    if search == CPU_SEARCH:
        return 0
    from gog_edge.retrieval.vectors.gpu_index import TEMP_BYTES, vectors_bytes

    taken = [sum(vectors_bytes(space.rows, dim) for space in spaces) for spaces, dim in map(_spaces, packs)]
    return TEMP_BYTES + sum(taken) + max(taken, default=0)


def _index_bytes(pack: Path, search: str) -> int:
    """What the search holds in the host's memory; vectors that candidates are compared with are read as needed."""
    spaces, dim = _spaces(pack)
    if search != CPU_SEARCH:
        return sum(space.rows * ID_BYTES for space in spaces)
    return sum(_space_bytes(pack, space, dim) for space in spaces)


def _spaces(pack: Path) -> tuple[tuple[Space, ...], int]:
    """All that is searched of a pack, and its vectors' dimensions."""
    manifest = read_pack(pack)
    return (manifest.images, manifest.captions), 0 if manifest.encoder is None else manifest.encoder.dim


def _space_bytes(pack: Path, space: Space, dim: int) -> int:
    """The index, the vectors beside it, which are held whole, and the ids of all."""
    indexed, file = (0, 0) if space.index is None else (space.index.rows, (pack / space.index.path).stat().st_size)
    return file + (space.rows - indexed) * dim * HALF_BYTES + space.rows * ID_BYTES


def _weights(folder: Path, manifest: PolicyManifest) -> int:
    widened = 2 if manifest.precision == "fp16" else 1  # stored in halves, computed in float32
    native, others = (NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH), (DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH)
    graphs = (path for name in (native if manifest.native_here else others) for path in folder.glob(f"{name}*"))
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
