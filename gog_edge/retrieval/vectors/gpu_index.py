"""Rows of a space in several FAISS indexes, one after the other: each small enough to grow beside itself.

FAISS on a GPU moves all that an index holds with each addition (`FlatIndex::add`), and takes no more than `MOST`
neighbours of a query (`faiss/gpu/utils/DeviceDefs.cuh`). What a query may not ask of them is found in the shards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import faiss
import numpy as np

from gog_edge.engines.cuda import LOST
from gog_edge.engines.registry import FAISS_GPU_INSTALL
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.retrieval.vectors.faiss_index import Found, Scores, VectorIndex, omp_threads
from gog_edge.retrieval.vectors.shards import BLOCK_ROWS, Ids, Rows, VectorShards
from gog_edge.types import Vectors

_faiss: Any = faiss  # its type stubs lack `knn`
MOST = 2048  # neighbours of a query, and lists that are looked into
SLAB_ROWS = 8 * BLOCK_ROWS
MARGIN = 8  # rows beyond those wanted: queries are rounded to halves there, so the last places may be swapped
Call: TypeAlias = Callable[[Callable[[], Any]], Any]  # does FAISS's work where it may be done


@dataclass(frozen=True, slots=True)
class Slab:
    """A FAISS index over consecutive rows."""

    index: Any
    first: int  # row of its number 0


@dataclass(frozen=True, slots=True)
class SlabPart:
    """All rows of some shards; an `index.Part`."""

    shards: VectorShards
    call: Call
    slabs: list[Slab] = field(default_factory=list)
    candidates: int = MARGIN  # that there are any: scores are those of the stored vectors, as on the CPU

    @classmethod
    def filled(cls, shards: VectorShards, new: Callable[[], Any], call: Call) -> SlabPart:
        """Read all rows into indexes that `new` gives, `SLAB_ROWS` into each. What fails leaves nothing behind."""
        part, at = cls(shards, call), 0
        try:
            for block in shards.blocks():
                if at % SLAB_ROWS == 0:
                    part.slabs.append(Slab(call(new), at))
                call(partial(part.slabs[-1].index.add, block))
                at += len(block)
        except BaseException:
            part.clear()
            raise
        return part

    def ask(self, k: int, crowd: float) -> float:
        """How many rows to ask for, to know the nearest `k` ids, `crowd` rows each on average."""
        return k * crowd + MARGIN

    def find(self, queries: Vectors, count: int, *, without: Rows | None = None, wider: int = 1) -> Found:
        """The nearest `count` rows of each query, or `MOST`; never one of `without`, then all the `count` there are."""
        if without is not None:
            return nearest_rows(self.shards, queries, count, without)
        found: Found = self.call(lambda: search_slabs(self.slabs, queries, min(count, MOST)))
        return found

    def clear(self) -> None:
        """Drop the indexes, where FAISS's work is done. A second time does nothing."""
        if self.slabs:
            self.call(self.slabs.clear)


def search_slabs(slabs: Sequence[Slab], queries: Vectors, count: int) -> Found:
    """The nearest `count` rows of each query [n, dim] over all slabs, in no order: [n, at most count] each."""
    found = [(*slab.index.search(queries, min(count, slab.index.ntotal)), slab.first) for slab in slabs]
    scores = np.concatenate([scores for scores, _, _ in found], axis=1)
    rows = np.concatenate([np.where(rows < 0, -1, rows + first) for _, rows, first in found], axis=1)
    return _best(np.where(rows < 0, np.float32(-np.inf), scores), rows, count)


def nearest_rows(shards: VectorShards, queries: Vectors, count: int, without: Rows) -> Found:
    """As `search_slabs`, from the stored vectors and never one of `without`: all of them are read."""
    hidden = np.zeros(len(shards), dtype=bool)
    hidden[without] = True
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    at = 0
    for block in shards.blocks():
        seen = np.flatnonzero(~hidden[at : at + len(block)])
        if len(seen):
            with omp_threads(1):
                near, numbers = _faiss.knn(queries, block[seen], min(count, len(seen)), faiss.METRIC_INNER_PRODUCT)
            near, numbers = np.concatenate([scores, near], axis=1), np.concatenate([rows, seen[numbers] + at], axis=1)
            scores, rows = _best(near, numbers, count)
        at += len(block)
    return scores, rows


def _best(scores: Scores, rows: Rows, count: int) -> Found:
    """The `count` best columns of each row of two arrays [n, c]."""
    if scores.shape[1] <= count:
        return scores, rows
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)


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
