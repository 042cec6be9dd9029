"""What needs no GPU runs on FAISS's own CPU indexes; where there is one, `benchmarks.retrieval.gpu` checks the rest."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest
from test_index import DIM, NONE, exact, stored, unit

from benchmarks.retrieval import gpu as bench
from benchmarks.retrieval.corpus import make_corpus
from benchmarks.retrieval.vectors import World
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory, PackError
from gog_edge.files import write_json
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.vectors.faiss_index import MAX_K, VectorIndex
from gog_edge.retrieval.vectors.gpu_index import (
    MOST,
    SLAB_ROWS,
    Gpu,
    GpuVectorIndex,
    OneThread,
    SlabPart,
    check_bounds,
    check_gpu,
    check_kind,
    nearest_rows,
    search_slabs,
    vectors_bytes,
)
from gog_edge.retrieval.vectors.shards import VectorShards

without_gpu = pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="there is a GPU here")


def halves(dim=DIM):
    return faiss.index_factory(dim, "SQfp16", faiss.METRIC_INNER_PRODUCT)


@pytest.fixture
def thread():
    one = OneThread()
    yield one
    one.close()


def opened(folder, ids, vectors, thread, tombstones=NONE):
    shards = VectorShards.open(stored(folder, ids, vectors), DIM)
    return GpuVectorIndex(SlabPart.filled(shards, halves, thread.call), tombstones)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """More rows than one slab holds."""
    folder, rows = tmp_path_factory.mktemp("large"), SLAB_ROWS + 70_000
    vectors = np.random.default_rng(0).standard_normal((rows, 4), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "v.npy", vectors.astype(np.float16))
    np.save(folder / "i.npy", np.arange(rows, dtype=np.int64))
    return VectorShards.open([(folder / "v.npy", folder / "i.npy")], 4), vectors.astype(np.float16).astype(np.float32)


@without_gpu
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(BackendError, match="faiss-cpu && pip install 'faiss-gpu|doctor"):
        check_gpu()
    with pytest.raises(BackendError, match="search on the CPU"):
        Gpu()


class OnCpu(Gpu):
    """All of it but the GPU: FAISS's same halves on the CPU."""

    def __init__(self):
        self._owner = OneThread()

    def flat(self, dim):
        return halves(dim)


def test_a_pack_opens_on_it_and_finds_what_it_finds_without(little_pack_folder, tiny_encoder):
    gpu = OnCpu()
    with_it = Pack.open(little_pack_folder, tiny_encoder, make_index=gpu.index)
    without = Pack.open(little_pack_folder, tiny_encoder)
    for one, other in ((with_it.images, without.images), (with_it.captions, without.captions)):
        queries = one.shards.take(np.arange(min(6, len(one))))
        np.testing.assert_allclose(one.search(queries, 3).scores, other.search(queries, 3).scores, atol=1e-6)
    for pack in (with_it, without):
        pack.close()
    gpu.close()


def test_a_pack_that_is_refused_gives_the_memory_back(little_pack_folder, tiny_encoder, tmp_path):
    shutil.copytree(little_pack_folder, tmp_path / "pack")
    manifest = read_manifest(tmp_path / "pack")
    lying = replace(manifest, counts=replace(manifest.counts, images=1_000_000))
    write_json(tmp_path / "pack/MANIFEST.json", lying.to_json())
    gpu, made = OnCpu(), []

    def make_index(shards, tombstones):
        made.append(gpu.index(shards, tombstones))
        return made[-1]

    with pytest.raises(PackError, match="disagree"):
        Pack.open(tmp_path / "pack", tiny_encoder, make_index=make_index)
    assert len(made) == 2 and not any(index._slabs.slabs for index in made)
    gpu.close()


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF4,Flat", "IVF4,SQ8", "IVF4,SQfp16", "IVF4,PQ4"])
def test_kinds_that_faiss_has_on_a_gpu(factory):
    check_kind(faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT))


@pytest.mark.parametrize("factory", ["SQ8", "HNSW8,SQ8", "IVF4,PQ4x4fsr", "IVF4,RaBitQfs", "IVF4,RaBitQ", "IVF4,PQ4+4"])
def test_kinds_that_faiss_has_not(factory):
    index = faiss.index_factory(16, factory, faiss.METRIC_L2 if "+" in factory else faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(BackendError, match=f"no {type(index).__name__} on a GPU; it has Flat"):
        check_kind(index)


@pytest.mark.parametrize(("k", "nprobe", "said"), [(0, 1, "k = 0"), (MOST + 1, 1, "k = 2049"), (1, 0, "nprobe = 0"),
                                                    (1, MOST + 1, "nprobe = 2049")])  # fmt: skip
def test_what_is_beyond_faisss_bounds_is_refused(k, nprobe, said):
    with pytest.raises(BackendError, match=f"{said}: faiss takes 1 to {MOST}"):
        check_bounds(k, nprobe)
    check_bounds(MOST, MOST)


def test_all_is_done_in_one_thread_whoever_asks(tmp_path, thread):
    names = set()
    shards = VectorShards.open(stored(tmp_path, np.arange(40, dtype=np.int64), unit(40)), DIM)

    def call(work):
        def told():
            names.add(threading.current_thread().name)
            return work()

        return thread.call(told)

    index = GpuVectorIndex(SlabPart.filled(shards, halves, call), NONE)
    with ThreadPoolExecutor(8) as visitors:
        hits = list(visitors.map(lambda one: index.search(unit(9, seed=one), 3).ids, range(30)))
    assert len(hits) == 30 and names == {"gpu-search_0"}
    index.close()


@pytest.mark.parametrize(("said", "kind"), [
    ("Error in A at B.cpp:3: Error: 'err == cudaSuccess' failed: StandardGpuResources: alloc fail type FlatData dev 0 "
     "space Device stream 0x1 size 9 bytes (cudaMalloc error out of memory [2])", OutOfDeviceMemory),
    ("Error in GpuIndex::GpuIndex(...) at /project/faiss/gpu/GpuIndex.cu:65: Error: 'config_.device < getNumDevices()' "
     "failed: Invalid GPU device 0", BackendError),
    ("Error in C at D.cu:7: Error: 'err__ == cudaSuccess' failed: CUDA error 719 launch failure", DeviceLost),
])  # fmt: skip
def test_faisss_own_errors_are_told_as_ours(thread, said, kind):
    def refuse():
        raise RuntimeError(said)

    with pytest.raises(kind, match="failed: " + said.rpartition("failed: ")[2][:20]) as told:
        thread.call(refuse)
    assert type(told.value) is kind


def test_other_errors_stay_as_they_are(thread):
    with pytest.raises(KeyError):
        thread.call(lambda: {}["none"])


def test_it_finds_the_exactly_nearest_with_the_cpus_scores(tmp_path, thread):
    vectors, ids = unit(600), np.arange(600, dtype=np.int64) * 3 + 7
    dead = ids[[0, 599, 5]]
    index = opened(tmp_path, ids, vectors, thread, dead)
    queries = unit(50, seed=3)
    hits = index.search(queries, 10)
    np.testing.assert_array_equal(hits.ids, exact(queries, ids, vectors, 10, dead))
    on_cpu = VectorIndex.open(tmp_path, None, index.shards, tombstones=dead).search(queries, 10)
    np.testing.assert_allclose(hits.scores, on_cpu.scores, atol=1e-6)
    assert len(index) == 597


def test_rows_of_one_id_are_one_hit(tmp_path, thread):
    vectors, ids = unit(240), np.repeat(np.arange(40, dtype=np.int64), 6)
    index = opened(tmp_path, ids, vectors, thread)
    queries = unit(9, seed=5)
    np.testing.assert_array_equal(index.search(queries, 40).ids, exact(queries, ids, vectors, 40))


def test_where_all_that_a_gpu_may_tell_is_hidden_what_lies_behind_is_found(tmp_path, thread):
    vectors, ids = unit(5000), np.arange(5000, dtype=np.int64)
    query = unit(2, seed=6)
    near = exact(query[:1], ids, vectors, MOST + 500)[0]
    index = opened(tmp_path, ids, vectors, thread, np.sort(near[:MOST]))
    hits = index.search(query, 5, without=near[MOST:])
    np.testing.assert_array_equal(hits.ids, exact(query, ids, vectors, 5, near))
    assert index.search(query, 5).ids[0, 0] == near[MOST]


def test_more_ids_than_a_gpu_tells_rows_are_found(tmp_path, thread):
    vectors, ids = unit(6000), np.repeat(np.arange(1500, dtype=np.int64), 4)
    index = opened(tmp_path, ids, vectors, thread)
    query = unit(1, seed=8)
    found = index.search(query, 5000).ids
    assert found.shape == (1, MAX_K)
    np.testing.assert_array_equal(found, exact(query, ids, vectors, MAX_K))


def test_rows_of_several_slabs_are_compared_with_each_other(large, thread):
    shards, vectors = large
    part = SlabPart.filled(shards, lambda: halves(4), thread.call)
    assert [slab.first for slab in part.slabs] == [0, SLAB_ROWS] and part.slabs[1].index.ntotal == 70_000
    queries = vectors[[3, SLAB_ROWS + 5]]
    scores, rows = search_slabs(part.slabs, queries, 20)
    nearest = np.argsort(-(queries @ vectors.T), axis=1)[:, :20]
    assert scores.shape == (2, 20)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, nearest, strict=True)]) >= 19
    scores, rows = nearest_rows(shards, queries, 20, np.array([3]))
    assert 3 not in rows and SLAB_ROWS + 5 in rows[1]


def test_closing_twice_and_searching_after(tmp_path, thread):
    index = opened(tmp_path, np.arange(9, dtype=np.int64), unit(9), thread)
    index.close()
    index.close()
    assert not index._slabs.slabs


def test_a_space_without_vectors(tmp_path, thread):
    index = opened(tmp_path, NONE, unit(1)[:0], thread)
    assert index.search(unit(2), 3).ids.shape == (2, 0)


def test_what_vectors_take():
    assert vectors_bytes(1_000, 512) == 2 * 1_000 * 1_028
    assert 8_000_000 * 1_028 < vectors_bytes(8_000_000, 512) < 9_000_000 * 1_028


@without_gpu
def test_the_benchmark_measures_nothing_without_a_gpu(tmp_path, capsys):
    assert bench.main(["--work", str(tmp_path), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("nothing was measured: faiss ") and not said.out and not list(tmp_path.iterdir())


def test_the_benchmark_finds_what_exact_search_finds(tmp_path):
    gpu = OnCpu()
    figures = bench.measure(make_corpus(World.make(32), 3_000, tmp_path), gpu, rounds=5)
    assert figures.rows == 3_000 and figures.recall10 > 0.99 and 0 < figures.p50_ms_1 <= figures.p95_ms_1
    gpu.close()
