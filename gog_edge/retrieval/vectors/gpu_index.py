"""Search a space exactly with FAISS on an NVIDIA GPU (`--search faiss-gpu`).

The vectors are held as float16 in several flat indexes ("slabs"): FAISS moves a whole index with each addition
(`FlatIndex::add`), so that a single one would need its memory twice. FAISS returns at most MAX_NEIGHBOURS rows of a
query on a GPU (`faiss/gpu/utils/DeviceDefs.cuh`); a filtered search scans the shards on the CPU instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import faiss
import numpy as np

from gog_edge.engines.cuda import LOST_DEVICE_CODES
from gog_edge.engines.registry import FAISS_GPU_INSTALL
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.retrieval.vectors.faiss_index import RowHits, Scores, VectorIndex, omp_threads
from gog_edge.retrieval.vectors.shards import BLOCK_ROWS, Ids, Rows, VectorShards
from gog_edge.types import Vectors

MAX_NEIGHBOURS = 2048
SLAB_ROWS = 8 * BLOCK_ROWS
MARGIN = 8  # rows fetched beyond those wanted: the GPU rounds queries to float16, which may swap the last ranks
TEMP_BYTES = 256 * 2**20  # scratch memory; FAISS's default is 1.5 GiB
Call: TypeAlias = Callable[[Callable[[], Any]], Any]  # runs a function in the thread that owns the GPU
_faiss: Any = faiss  # its type stubs lack `knn` and the GPU classes
_T = TypeVar("_T")


# --- the GPU ----------------------------------------------------------------------------------


def check_gpu(device: int = 0) -> None:
    """Check that FAISS can use a GPU.

    Raises:
        BackendError: FAISS is built without CUDA, or the device does not exist.
    """
    if not hasattr(_faiss, "StandardGpuResources"):
        raise BackendError(f"faiss {faiss.__version__} is built for the CPU; {FAISS_GPU_INSTALL} (a wheel exists for "
                           "x86-64 Linux only), or search on the CPU")
    count = _faiss.get_num_gpus()
    if not 0 <= device < count:
        raise BackendError(f"faiss finds {count} GPUs, number {device} was requested; run gog-edge doctor, or search "
                           "on the CPU")


class GpuThread:
    """A thread that runs functions one after the other: FAISS's GPU resources must not be used concurrently."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gpu-search")

    def call(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns. Raises BackendError for an error of FAISS; other exceptions pass unchanged."""
        try:
            return self._executor.submit(work).result()
        except RuntimeError as exc:
            raise _backend_error(exc) from exc

    def close(self) -> None:
        """Stop the thread. Further calls do nothing."""
        self._executor.shutdown()


class FaissGpu:
    """A GPU with scratch memory and the thread that uses them; the indexes of several packs may share it."""

    _resources: Any = None

    def __init__(self, device: int = 0, temp_bytes: int = TEMP_BYTES) -> None:
        """Allocate scratch memory. Raises BackendError as `check_gpu` does, OutOfDeviceMemory if it does not fit."""
        check_gpu(device)
        self.device = device
        self._thread = GpuThread()
        try:
            self._resources = self.call(lambda: _make_resources(temp_bytes))
        except BaseException:
            self._thread.close()
            raise

    def call(self, work: Callable[[], _T]) -> _T:
        """Run a function in the thread of the GPU. Raises BackendError for an error of FAISS."""
        return self._thread.call(work)

    def flat(self, dim: int) -> Any:
        """Return an empty float16 index with the inner product as metric. Only within `call`."""
        config = _faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = self.device, True
        return _faiss.GpuIndexFlatIP(self._resources, dim, config)

    def make_index(self, shards: VectorShards, tombstones: Ids) -> GpuVectorIndex:
        """Return an index of a space on this GPU, as `Pack.open` takes it. Raises as `GpuVectorIndex.on_gpu` does."""
        return GpuVectorIndex.on_gpu(shards, self, tombstones=tombstones)

    def close(self) -> None:
        """Free the scratch memory and stop the thread. Indexes must be closed before; further calls do nothing."""
        if self._resources is not None:
            self.call(self._free)
        self._thread.close()

    def _free(self) -> None:
        self._resources = None


def _make_resources(temp_bytes: int) -> Any:
    resources = _faiss.StandardGpuResources()
    resources.setTempMemory(temp_bytes)
    return resources


def _backend_error(exc: RuntimeError) -> BackendError:
    """Convert FAISS's error; the reason is at the end of its message, after the place in FAISS's sources."""
    reason = str(exc).rpartition("Error: ")[2][:300]
    number = re.search(r"CUDA error (\d+)", reason)
    if number and int(number[1]) in LOST_DEVICE_CODES:
        return DeviceLost(f"the GPU can no longer be used by this process ({reason}); restart it")
    if "alloc fail" in reason or "out of memory" in reason:
        return OutOfDeviceMemory(f"the GPU has no memory left for faiss ({reason})")
    return BackendError(f"faiss could not use the GPU ({reason}); run gog-edge doctor, or search on the CPU")


# --- indexes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slab:
    """A FAISS index over consecutive rows."""

    index: Any
    first: int  # its first row


@dataclass(frozen=True, slots=True)
class GpuPart:
    """All rows of some shards, in slabs; an `IndexPart`."""

    shards: VectorShards
    call: Call
    slabs: list[Slab] = field(default_factory=list)
    candidates: int = MARGIN  # not 0: rows are rescored with the stored vectors, so that scores equal those of the CPU

    @classmethod
    def filled(cls, shards: VectorShards, make_index: Callable[[], Any], call: Call) -> GpuPart:
        """Copy all rows into indexes of SLAB_ROWS rows each. On an error, the memory is freed."""
        part, start = cls(shards, call), 0
        try:
            for block in shards.blocks():
                if start % SLAB_ROWS == 0:
                    part.slabs.append(Slab(call(make_index), start))
                call(partial(part.slabs[-1].index.add, block))
                start += len(block)
        except BaseException:
            part.clear()
            raise
        return part

    def fetch_count(self, k: int, rows_per_id: float) -> float:
        """Return how many rows to fetch for the nearest `k` ids, with `rows_per_id` rows each on average."""
        return k * rows_per_id + MARGIN

    def search(self, queries: Vectors, count: int, *, without: Rows | None = None, effort: int = 1) -> RowHits:
        """Return the nearest `count` rows per query, at most MAX_NEIGHBOURS without a filter. `effort` has no effect.
        """
        if without is not None:
            return scan_rows(self.shards, queries, count, without)
        found: RowHits = self.call(lambda: search_slabs(self.slabs, queries, min(count, MAX_NEIGHBOURS)))
        return found

    def clear(self) -> None:
        """Free the indexes. Further calls do nothing."""
        if self.slabs:
            self.call(self.slabs.clear)


class GpuVectorIndex(VectorIndex):
    """A `VectorIndex` that takes its candidates from exact search on a GPU."""

    def __init__(self, part: GpuPart, tombstones: Ids) -> None:
        super().__init__(part, None, part.shards, tombstones, threads=1)
        self._part = part

    @classmethod
    def on_gpu(cls, shards: VectorShards, gpu: FaissGpu, *, tombstones: Ids) -> GpuVectorIndex:
        """Copy all vectors to the GPU.

        Raises:
            OutOfDeviceMemory: They do not fit; the message states their size.
            PackError: A file was truncated after it was opened.
        """
        try:
            return cls(GpuPart.filled(shards, lambda: gpu.flat(shards.dim), gpu.call), tombstones)
        except OutOfDeviceMemory as exc:
            size = vectors_bytes(len(shards), shards.dim) / 2**30
            raise OutOfDeviceMemory(f"{len(shards):,} vectors of {shards.dim} dimensions take {size:.1f} GiB of a GPU: "
                                    f"{exc}; search them on the CPU") from exc

    def close(self) -> None:
        """Free the GPU's memory. No search may be running; further calls do nothing."""
        super().close()
        self._part.clear()


def vectors_bytes(rows: int, dim: int) -> int:
    """Return the GPU memory for copying rows: float16 values and a norm each, with the growing slab counted twice."""
    return (rows + min(rows, SLAB_ROWS)) * (2 * dim + 4)


def search_slabs(slabs: Sequence[Slab], queries: Vectors, count: int) -> RowHits:
    """Return the nearest `count` rows of each query [n, dim] over all slabs, in no order: [n, at most count] each."""
    found = [(*slab.index.search(queries, min(count, slab.index.ntotal)), slab.first) for slab in slabs]
    scores = np.concatenate([scores for scores, _, _ in found], axis=1)
    rows = np.concatenate([np.where(rows < 0, -1, rows + first) for _, rows, first in found], axis=1)
    return _best(np.where(rows < 0, np.float32(-np.inf), scores), rows, count)


def scan_rows(shards: VectorShards, queries: Vectors, count: int, without: Rows) -> RowHits:
    """Return the nearest `count` rows of each query that are not in `without`, by a scan of all stored vectors."""
    hidden = np.zeros(len(shards), dtype=bool)
    hidden[without] = True
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    start = 0
    for block in shards.blocks():
        visible = np.flatnonzero(~hidden[start : start + len(block)])
        if len(visible):
            with omp_threads(1):
                found = _faiss.knn(queries, block[visible], min(count, len(visible)), faiss.METRIC_INNER_PRODUCT)
            scores, rows = _best(np.concatenate([scores, found[0]], axis=1),
                                 np.concatenate([rows, visible[found[1]] + start], axis=1), count)
        start += len(block)
    return scores, rows


def _best(scores: Scores, rows: Rows, count: int) -> RowHits:
    """Return the `count` highest scores of each row of [n, c], in no order, and their rows."""
    if scores.shape[1] <= count:
        return scores, rows
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
