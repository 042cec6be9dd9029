"""Vectors searched on a GPU by FAISS: exactly, in halves; or by an index of a kind that FAISS has there.

FAISS has flat vectors and inverted lists of flat, scalar or product codes on a GPU. What packs are usually built with,
fast-scan codes, RaBitQ and HNSW graphs, it has not: `GpuVectorIndex` is made from a pack's vectors instead, and finds
the exactly nearest as long as they fit, two bytes a dimension. Its resources belong to one thread
(`faiss/gpu/StandardGpuResources.h`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import faiss

from gog_edge.engines.choice import FAISS_GPU_INSTALL
from gog_edge.engines.cuda import LOST
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.retrieval.index import Found, VectorIndex
from gog_edge.retrieval.slabs import MOST, SLAB_ROWS, SlabPart
from gog_edge.retrieval.vectors import Ids, VectorShards
from gog_edge.types import Vectors

_faiss: Any = faiss  # the CPU's build lacks all that is used of the GPU
_T = TypeVar("_T")
TEMP_BYTES = 256 * 2**20  # scratch memory; FAISS's own choice takes 1.5 GiB
_KINDS = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer,
          faiss.IndexIVFPQ)  # those derived from them are others  # fmt: skip


def check_gpu(device: int = 0) -> None:
    """BackendError with what to do where FAISS here cannot use a GPU, or not that one."""
    if not hasattr(_faiss, "StandardGpuResources"):
        raise BackendError(f"faiss {faiss.__version__} here is built for the CPU; {FAISS_GPU_INSTALL} (x86-64 Linux "
                           "alone has such a wheel), or search on the CPU")
    count = _faiss.get_num_gpus()
    if not 0 <= device < count:
        raise BackendError(f"faiss sees {count} GPUs, asked for is number {device}; look with gog-edge doctor, or "
                           "search on the CPU")


def check_kind(index: Any) -> None:
    """BackendError where FAISS has no such index on a GPU."""
    half = type(index) is faiss.IndexScalarQuantizer and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    if not half and type(index) not in _KINDS:
        raise BackendError(f"faiss has no {type(index).__name__} on a GPU; it has Flat, SQfp16 and inverted lists of "
                           "Flat, SQ and PQ: build such an index, or search the vectors exactly")


def check_bounds(k: int, nprobe: int = 1) -> None:
    """BackendError where a search asks for more than FAISS gives on a GPU."""
    for name, value in (("k", k), ("nprobe", nprobe)):
        if not 1 <= value <= MOST:
            raise BackendError(f"{name} = {value}: faiss takes 1 to {MOST} on a GPU; ask so, or search on the CPU")


class OneThread:
    """A thread that does what others ask for, one after the other."""

    def __init__(self) -> None:
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="gpu-search")

    def call(self, work: Callable[[], _T]) -> _T:
        """What `work` gives, or its error; BackendError where FAISS refused."""
        try:
            return self._owner.submit(work).result()
        except RuntimeError as exc:
            raise _as_ours(exc) from exc

    def close(self) -> None:
        """End the thread. A second time does nothing."""
        self._owner.shutdown()


class Gpu:
    """A GPU, scratch memory on it, and the one thread that uses both; the indexes of several packs may share it."""

    _resources: Any = None

    def __init__(self, device: int = 0, temp_bytes: int = TEMP_BYTES) -> None:
        """Raises BackendError as `check_gpu` does, OutOfDeviceMemory where there is no room for `temp_bytes`."""
        check_gpu(device)
        self.device = device
        self._owner = OneThread()
        try:
            self._resources = self.call(lambda: _resources(temp_bytes))
        except BaseException:
            self._owner.close()
            raise

    def call(self, work: Callable[[], _T]) -> _T:
        """Do FAISS's work in the owner's thread. Raises BackendError where it refuses."""
        return self._owner.call(work)

    def flat(self, dim: int) -> Any:
        """An empty index of halves that compares by inner product; only within `call`."""
        config = _faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = self.device, True
        return _faiss.GpuIndexFlatIP(self._resources, dim, config)

    def moved(self, index: Any) -> GpuIndex:
        """A copy of a CPU's index. Raises BackendError where there is no such kind, OutOfDeviceMemory."""
        check_kind(index)

        def move() -> Any:
            options = _faiss.GpuClonerOptions()
            options.useFloat16 = True
            return _faiss.index_cpu_to_gpu(self._resources, self.device, index, options)

        return GpuIndex(self, self.call(move))

    def index(self, shards: VectorShards, tombstones: Ids) -> GpuVectorIndex:
        """A pack's vectors on this GPU: a `pack.MakeIndex`. Raises as `GpuVectorIndex.on_gpu` does."""
        return GpuVectorIndex.on_gpu(shards, self, tombstones=tombstones)

    def close(self) -> None:
        """Give back the scratch memory and end the thread; indexes must be closed before. Twice does nothing."""
        if self._resources is not None:
            self.call(self._forget)
        self._owner.close()

    def _forget(self) -> None:
        self._resources = None


@dataclass(frozen=True, slots=True)
class GpuIndex:
    """An index that was moved to a GPU; may be searched from several threads."""

    gpu: Gpu
    index: Any

    def search(self, queries: Vectors, k: int, nprobe: int = 1) -> Found:
        """Scores and numbers [n, k] of the nearest of each query [n, dim] float32; `nprobe` counts for lists only.

        Raises BackendError for a k or nprobe beyond 1 to `MOST`.
        """
        check_bounds(k, nprobe)
        lists = hasattr(self.index, "nlist")
        params = _faiss.SearchParametersIVF(nprobe=min(nprobe, self.index.nlist)) if lists else None
        found: Found = self.gpu.call(lambda: self.index.search(queries, k, params=params))
        return found

    def to_cpu(self) -> Any:
        """A copy on the CPU."""
        return self.gpu.call(lambda: _faiss.index_gpu_to_cpu(self.index))

    def save(self, path: Path) -> None:
        """Write a file that FAISS reads anywhere, by way of the CPU: what lies on a GPU cannot be written."""
        beside = path.with_name(path.name + ".part")
        faiss.write_index(self.to_cpu(), str(beside))
        beside.replace(path)


class GpuVectorIndex(VectorIndex):
    """The exactly nearest vectors of a pack's space, as `VectorIndex` tells them, proposed by a GPU."""

    def __init__(self, part: SlabPart, tombstones: Ids) -> None:
        super().__init__(part, None, part.shards, tombstones, threads=1)
        self._slabs = part

    @classmethod
    def on_gpu(cls, shards: VectorShards, gpu: Gpu, *, tombstones: Ids) -> GpuVectorIndex:
        """Copy all vectors to the GPU. Raises OutOfDeviceMemory with what they take, PackError for damaged files."""
        try:
            return cls(SlabPart.filled(shards, lambda: gpu.flat(shards.dim), gpu.call), tombstones)
        except OutOfDeviceMemory as exc:
            size = vectors_bytes(len(shards), shards.dim) / 2**30
            raise OutOfDeviceMemory(f"{len(shards):,} vectors of {shards.dim} dimensions take {size:.1f} GiB of a GPU: "
                                  f"{exc}; search them on the CPU") from exc

    def close(self) -> None:
        """Give back the GPU's memory; nobody may be searching. A second time does nothing."""
        super().close()
        self._slabs.clear()


def vectors_bytes(rows: int, dim: int) -> int:
    """Memory that rows take on a GPU while they are copied: halves, a norm each, and the growing slab twice."""
    return (rows + min(rows, SLAB_ROWS)) * (2 * dim + 4)


def _resources(temp_bytes: int) -> Any:
    resources = _faiss.StandardGpuResources()
    resources.setTempMemory(temp_bytes)
    return resources


def _as_ours(exc: RuntimeError) -> BackendError:
    """FAISS's error by its last words: the first tell where in its sources it stands."""
    said = str(exc).rpartition("Error: ")[2][:300]
    number = re.search(r"CUDA error (\d+)", said)
    if number and int(number[1]) in LOST:
        return DeviceLost(f"the GPU is lost to this process ({said}); start it again")
    if "alloc fail" in said or "out of memory" in said:
        return OutOfDeviceMemory(f"the GPU has no more memory for faiss ({said})")
    return BackendError(f"faiss could not use the GPU ({said}); look with gog-edge doctor, or search on the CPU")
