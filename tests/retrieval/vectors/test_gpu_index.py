"""The logic around a GPU's indexes, tested with FAISS's exact index on the CPU; with a GPU, also on the GPU itself."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest
from vector_files import DIM, NO_IDS, exact_ids, unit_vectors, write_shards

from benchmarks.retrieval import gpu as bench
from benchmarks.retrieval.corpus import SyntheticVectors, make_corpus
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory, PackError
from gog_edge.files import write_json
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.vectors.faiss_index import MAX_K
from gog_edge.retrieval.vectors.gpu_index import (
    MAX_NEIGHBOURS,
    SLAB_ROWS,
    FaissGpu,
    GpuPart,
    GpuThread,
    GpuVectorIndex,
    check_gpu,
    scan_rows,
    search_slabs,
    vectors_bytes,
)
from gog_edge.retrieval.vectors.shards import VectorShards

without_gpu = pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="needs a machine without a GPU")
with_gpu = pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU that faiss can use")


@pytest.fixture
def thread():
    one = GpuThread()
    yield one
    one.close()


def open_index(folder, ids, vectors, thread, tombstones=NO_IDS):
    shards = VectorShards.open(write_shards(folder, ids, vectors), vectors.shape[1])
    part = GpuPart.filled(shards, lambda: faiss.IndexFlatIP(shards.dim), thread.call)
    return GpuVectorIndex(part, tombstones)


# --- results ------------------------------------------------------------------------------------


def test_four_known_vectors_give_the_known_ids_and_cosines(tmp_path, thread):
    vectors = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], dtype=np.float32)
    index = open_index(tmp_path, np.array([10, 11, 11, 12]), vectors, thread)
    hits = index.search(np.array([[1, 0], [0, 1]], dtype=np.float32), 3)
    assert hits.ids.tolist() == [[10, 11, 12], [12, 11, 10]]
    np.testing.assert_allclose(hits.scores, [[1, 0.8, 0], [1, 0.8, 0]], atol=5e-4)  # stored as float16
    assert index.search(np.array([[1, 0]], dtype=np.float32), 3, without=np.array([11])).ids.tolist() == [[10, 12]]


def test_results_equal_exact_search_by_numpy(tmp_path, thread):
    vectors, ids = unit_vectors(600), np.arange(600, dtype=np.int64) * 3 + 7
    deleted = ids[[0, 599, 5]]
    index = open_index(tmp_path, ids, vectors, thread, deleted)
    queries = unit_vectors(50, seed=3)
    hits = index.search(queries, 10)
    np.testing.assert_array_equal(hits.ids, exact_ids(queries, ids, vectors, 10, deleted))
    stored = vectors.astype(np.float16).astype(np.float32)
    cosines = np.einsum("nd,nkd->nk", queries, stored[(hits.ids - 7) // 3])
    np.testing.assert_allclose(hits.scores, cosines, atol=1e-6)
    assert len(index) == 597


def test_rows_of_one_id_are_one_hit(tmp_path, thread):
    vectors, ids = unit_vectors(240), np.repeat(np.arange(40, dtype=np.int64), 6)
    index = open_index(tmp_path, ids, vectors, thread)
    queries = unit_vectors(9, seed=5)
    np.testing.assert_array_equal(index.search(queries, 40).ids, exact_ids(queries, ids, vectors, 40))


def test_ids_behind_all_the_rows_that_a_gpu_returns_are_found(tmp_path, thread):
    vectors, ids = unit_vectors(5000), np.arange(5000, dtype=np.int64)
    query = unit_vectors(2, seed=6)
    near = exact_ids(query[:1], ids, vectors, MAX_NEIGHBOURS + 500)[0]
    index = open_index(tmp_path, ids, vectors, thread, np.sort(near[:MAX_NEIGHBOURS]))
    hits = index.search(query, 5, without=near[MAX_NEIGHBOURS:])
    np.testing.assert_array_equal(hits.ids, exact_ids(query, ids, vectors, 5, near))
    assert index.search(query, 5).ids[0, 0] == near[MAX_NEIGHBOURS]


def test_more_ids_than_a_gpu_returns_rows_are_found(tmp_path, thread):
    vectors, ids = unit_vectors(6000), np.repeat(np.arange(1500, dtype=np.int64), 4)
    index = open_index(tmp_path, ids, vectors, thread)
    query = unit_vectors(1, seed=8)
    found = index.search(query, 5000).ids
    assert found.shape == (1, MAX_K)
    np.testing.assert_array_equal(found, exact_ids(query, ids, vectors, MAX_K))


def test_a_space_without_vectors_has_no_hits(tmp_path, thread):
    index = open_index(tmp_path, NO_IDS, unit_vectors(1)[:0], thread)
    assert index.search(unit_vectors(2), 3).ids.shape == (2, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """More rows than one slab holds."""
    folder, rows = tmp_path_factory.mktemp("large"), SLAB_ROWS + 70_000
    vectors = np.random.default_rng(0).standard_normal((rows, 4), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "v.npy", vectors.astype(np.float16))
    np.save(folder / "i.npy", np.arange(rows, dtype=np.int64))
    return VectorShards.open([(folder / "v.npy", folder / "i.npy")], 4), vectors.astype(np.float16).astype(np.float32)


def test_rows_of_several_slabs_are_compared_with_each_other(large, thread):
    shards, vectors = large
    part = GpuPart.filled(shards, lambda: faiss.IndexFlatIP(4), thread.call)
    assert [slab.first for slab in part.slabs] == [0, SLAB_ROWS] and part.slabs[1].index.ntotal == 70_000
    queries = vectors[[3, SLAB_ROWS + 5]]
    cosines = queries @ vectors.T
    lowest = np.sort(cosines, axis=1)[:, -20]
    scores, rows = search_slabs(part.slabs, queries, 20)
    assert rows.shape == (2, 20) and [len(set(own)) for own in rows] == [20, 20]
    assert (np.take_along_axis(cosines, rows, axis=1) >= lowest[:, None] - 1e-6).all()
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-6)
    assert {3} <= set(rows[0]) and {SLAB_ROWS + 5} <= set(rows[1])
    scores, rows = scan_rows(shards, queries, 20, np.array([3]))
    assert 3 not in rows and SLAB_ROWS + 5 in rows[1]
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-6)


@with_gpu
def test_a_gpu_finds_what_exact_search_on_the_cpu_finds(tmp_path):
    vectors, ids = unit_vectors(20_000), np.arange(20_000, dtype=np.int64)
    deleted = ids[::9]
    shards = VectorShards.open(write_shards(tmp_path, ids, vectors), DIM)
    queries = unit_vectors(64, seed=2)
    reference = faiss.IndexFlatIP(DIM)
    reference.add(vectors.astype(np.float16).astype(np.float32))
    scores, rows = reference.search(queries, 40)
    gpu = FaissGpu()
    index = gpu.make_index(shards, deleted)
    hits = index.search(queries, 10)
    for n in range(len(queries)):
        live = [row for row in rows[n].tolist() if row % 9]
        assert hits.ids[n].tolist() == live[:10]
        np.testing.assert_allclose(hits.scores[n], [scores[n][rows[n].tolist().index(row)] for row in live[:10]],
                                   atol=1e-5)
    index.close()
    gpu.close()


@with_gpu
def test_vectors_that_do_not_fit_a_gpu_are_refused(tmp_path):
    shards = VectorShards.open(write_shards(tmp_path, np.arange(9), unit_vectors(9)), DIM)
    with pytest.raises(BackendError):
        FaissGpu(faiss.get_num_gpus())
    gpu = FaissGpu()
    index = gpu.make_index(shards, NO_IDS)
    assert index.search(unit_vectors(9)[[4]], 1).ids.tolist() == [[4]]
    index.close()
    gpu.close()


# --- packs --------------------------------------------------------------------------------------


def test_a_pack_opened_with_it_finds_the_nearest_stored_vectors(little_pack_folder, tiny_encoder, thread):
    def make_index(shards, tombstones):
        return GpuVectorIndex(GpuPart.filled(shards, lambda: faiss.IndexFlatIP(shards.dim), thread.call), tombstones)

    pack = Pack.open(little_pack_folder, tiny_encoder, make_index=make_index)
    for space in ("images", "captions"):
        assert isinstance(getattr(pack, space), GpuVectorIndex)
        (shard,) = getattr(pack.manifest, space).shards
        vectors = np.load(little_pack_folder / shard.vectors).astype(np.float32)
        ids = np.load(little_pack_folder / shard.ids)
        queries = vectors[:6]
        hits = getattr(pack, space).search(queries, 3)
        np.testing.assert_allclose(hits.scores, np.sort(queries @ vectors.T, axis=1)[:, :-4:-1], atol=1e-6)
        cosines = np.take_along_axis(queries @ vectors.T, np.searchsorted(ids, hits.ids), axis=1)
        np.testing.assert_allclose(hits.scores, cosines, atol=1e-6)
    pack.close()


def test_a_pack_that_fails_to_open_frees_the_memory(little_pack_folder, tiny_encoder, tmp_path, thread):
    shutil.copytree(little_pack_folder, tmp_path / "pack")
    manifest = read_manifest(tmp_path / "pack")
    wrong = replace(manifest, counts=replace(manifest.counts, images=1_000_000))
    write_json(tmp_path / "pack/MANIFEST.json", wrong.to_json())
    parts = []

    def make_index(shards, tombstones):
        parts.append(GpuPart.filled(shards, lambda: faiss.IndexFlatIP(shards.dim), thread.call))
        assert parts[-1].slabs
        return GpuVectorIndex(parts[-1], tombstones)

    with pytest.raises(PackError, match="disagree"):
        Pack.open(tmp_path / "pack", tiny_encoder, make_index=make_index)
    assert len(parts) == 2 and not any(part.slabs for part in parts)


def test_an_index_may_be_closed_twice(tmp_path, thread):
    shards = VectorShards.open(write_shards(tmp_path, np.arange(9), unit_vectors(9)), DIM)
    part = GpuPart.filled(shards, lambda: faiss.IndexFlatIP(DIM), thread.call)
    index = GpuVectorIndex(part, NO_IDS)
    index.close()
    index.close()
    assert not part.slabs


def test_a_failure_while_vectors_are_copied_frees_the_memory(large, thread):
    made = []

    class Full(Exception):
        pass

    def make_index():
        if made:
            raise Full
        made.append(faiss.IndexFlatIP(4))
        return made[0]

    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuPart, "clear", lambda self, clear=GpuPart.clear: (parts.append(self), clear(self)))
        with pytest.raises(Full):
            GpuPart.filled(large[0], make_index, thread.call)
    assert len(parts) == 1 and not parts[0].slabs


# --- the thread and its errors ------------------------------------------------------------------


def test_all_work_is_done_in_one_thread(tmp_path, thread):
    names = set()
    shards = VectorShards.open(write_shards(tmp_path, np.arange(40, dtype=np.int64), unit_vectors(40)), DIM)

    def call(work):
        def recorded():
            names.add(threading.current_thread().name)
            return work()

        return thread.call(recorded)

    index = GpuVectorIndex(GpuPart.filled(shards, lambda: faiss.IndexFlatIP(DIM), call), NO_IDS)
    with ThreadPoolExecutor(8) as callers:
        hits = list(callers.map(lambda one: index.search(unit_vectors(9, seed=one), 3).ids, range(30)))
    assert len(hits) == 30 and names == {"gpu-search_0"}
    index.close()


@pytest.mark.parametrize(("message", "kind"), [
    ("Error in A at B.cpp:3: Error: 'err == cudaSuccess' failed: StandardGpuResources: alloc fail type FlatData dev 0 "
     "space Device stream 0x1 size 9 bytes (cudaMalloc error out of memory [2])", OutOfDeviceMemory),
    ("Error in GpuIndex::GpuIndex(...) at /project/faiss/gpu/GpuIndex.cu:65: Error: 'config_.device < getNumDevices()' "
     "failed: Invalid GPU device 0", BackendError),
    ("Error in C at D.cu:7: Error: 'err__ == cudaSuccess' failed: CUDA error 719 launch failure", DeviceLost),
])  # fmt: skip
def test_errors_of_faiss_are_converted(thread, message, kind):
    def fail():
        raise RuntimeError(message)

    with pytest.raises(kind, match="failed: " + message.rpartition("failed: ")[2][:20]) as raised:
        thread.call(fail)
    assert type(raised.value) is kind


def test_other_errors_pass_unchanged(thread):
    with pytest.raises(KeyError):
        thread.call(lambda: {}["none"])


@without_gpu
def test_without_a_gpu_the_error_says_what_to_install():
    with pytest.raises(BackendError, match="faiss-cpu && pip install 'faiss-gpu|doctor"):
        check_gpu()
    with pytest.raises(BackendError, match="search on the CPU"):
        FaissGpu()


def test_the_planned_memory_is_that_of_float16_vectors_and_norms():
    assert vectors_bytes(1_000, 512) == 2_056_000  # twice 1,000 rows of 1,024 + 4 bytes
    assert vectors_bytes(8_000_000, 512) == 8_762_968_064  # 8,000,000 + 524,288 rows


# --- the benchmark ------------------------------------------------------------------------------


@without_gpu
def test_the_benchmark_needs_a_gpu(tmp_path, capsys):
    assert bench.main(["--work", str(tmp_path), "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: faiss ") and not printed.out and not list(tmp_path.iterdir())


class FlatOnCpu:
    """Gives FAISS's exact index on the CPU in place of the GPU's."""

    def call(self, work):
        return work()

    def flat(self, dim):
        return faiss.IndexFlatIP(dim)


def test_the_benchmark_measures_recall_against_exact_search(tmp_path):
    figures = bench.measure(make_corpus(SyntheticVectors.make(32), 3_000, tmp_path), FlatOnCpu(), rounds=5)
    assert figures.rows == 3_000 and figures.recall10 > 0.99 and 0 < figures.p50_ms_1 <= figures.p95_ms_1
