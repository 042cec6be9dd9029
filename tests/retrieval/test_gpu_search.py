"""Exact search by TensorRT: its graph's numbers on ONNX Runtime, its plan built, the search on `host_gpu`."""

import faiss
import numpy as np
import pytest
import tensorrt_rtx_bindings as trt
from host_gpu import HostRuntime, HostTensorRT, write_plan
from test_index import DIM, NONE, exact, stored, unit

from gog_edge.engines.built import SEARCH, TENSORRT_RTX, BuiltEngines, BuiltGraph
from gog_edge.engines.cuda import Cuda
from gog_edge.engines.ort import OrtGraph
from gog_edge.engines.trt_graph import TrtGraph
from gog_edge.engines.trt_plan import Plan
from gog_edge.errors import OutOfDeviceMemory
from gog_edge.exporting.engine_plan import PlanRequest, build_plan
from gog_edge.exporting.search_graph import search_profiles, write_search_graph
from gog_edge.retrieval import gpu_search
from gog_edge.retrieval.gpu_search import BLOCK_ROWS, NEAREST, SLACK, TrtVectorIndex, cut_short, likeliest
from gog_edge.retrieval.index import MAX_K, VectorIndex
from gog_edge.retrieval.vectors import VectorShards


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "search.onnx"
    write_search_graph(path, DIM)
    return path


@pytest.fixture
def runtime():
    return HostRuntime()


@pytest.fixture
def engine(graph, runtime, tmp_path):
    write_plan(tmp_path / "search.engine", graph, search_profiles(DIM))
    described = BuiltGraph(SEARCH, "search.engine", {}, profiles=search_profiles(DIM))
    built = BuiltEngines(TENSORRT_RTX, trt.__version__, (89,), 0, (described,), {}, ())
    return TrtGraph(Plan(HostTensorRT(runtime), Cuda(runtime), tmp_path, built, described), captured=0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(gpu_search, "BLOCK_ROWS", 700)
    monkeypatch.setattr(gpu_search, "READ_ROWS", 300)


def opened(engine, folder, ids, vectors, tombstones=NONE):
    shards = VectorShards.open(stored(folder, ids, vectors), DIM)
    return TrtVectorIndex.on_gpu(engine, shards, tombstones=tombstones)


def test_the_graph_finds_what_faiss_finds(graph):
    vectors, queries = unit(5000), unit(8, seed=1)
    said = OrtGraph(graph, threads=1).run({"queries": queries, "vectors": vectors.astype(np.float16)})
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors.astype(np.float16).astype(np.float32))
    scores, rows = index.search(queries, 32)
    assert said["scores"].shape == said["rows"].shape == (8, NEAREST) and said["rows"].dtype == np.int64
    assert np.abs(said["scores"][:, :32] - scores).max() < SLACK
    for found, true in zip(said["rows"], rows, strict=True):
        assert set(true) <= set(found)


def test_tensorrt_builds_it_for_three_gpus(graph, tmp_path):
    request = PlanRequest(TENSORRT_RTX, graph, tmp_path / "search.engine", search_profiles(DIM), (86, 89, 120), {})
    built = build_plan(request, lambda *_: None)
    assert built.layers["topk"] == 1 and built.size == (tmp_path / "search.engine").stat().st_size > 1000


@pytest.mark.parametrize("rows", [50, NEAREST + 1, 2000])
def test_it_finds_the_exactly_nearest(engine, small_blocks, tmp_path, rows):
    ids, vectors, queries = np.arange(rows) + 7, unit(rows), unit(70, seed=1)
    index = opened(engine, tmp_path, ids, vectors)
    hits = index.search(queries, 10)
    assert np.array_equal(hits.ids, exact(queries, ids, vectors, 10))
    assert np.allclose(hits.scores[:, 0], (queries @ vectors.T).max(axis=1), atol=1e-3)
    index.close()


def test_a_block_of_full_size_is_searched(engine, tmp_path):
    vectors, queries = unit(BLOCK_ROWS + 300), unit(4, seed=1)
    ids = np.arange(len(vectors))
    index = opened(engine, tmp_path, ids, vectors)
    scores = queries @ vectors.astype(np.float16).astype(np.float32).T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert np.array_equal(index.search(queries, 10).ids, expected)


def test_what_is_dead_or_left_out_is_never_found(engine, small_blocks, tmp_path):
    ids, vectors, queries = np.arange(2000) // 2, unit(2000), unit(5, seed=1)
    dead = exact(queries, ids, vectors, 5)[:, :2].ravel()
    index = opened(engine, tmp_path, ids, vectors, np.unique(dead))
    assert np.array_equal(index.search(queries, 8).ids, exact(queries, ids, vectors, 8, dead))
    more = exact(queries, ids, vectors, 4, dead)[:, 0]
    hidden = np.concatenate([dead, more])
    assert np.array_equal(index.search(queries, 8, without=more).ids, exact(queries, ids, vectors, 8, hidden))


def test_more_than_a_block_gives_is_found_in_the_stored_vectors(engine, small_blocks, tmp_path):
    ids, vectors, queries = np.arange(1500), unit(1500), unit(2, seed=1)
    hits = opened(engine, tmp_path, ids, vectors).search(queries, MAX_K)
    assert np.array_equal(hits.ids, exact(queries, ids, vectors, MAX_K))


def test_near_ties_are_told_apart_by_the_stored_vectors(engine, small_blocks, tmp_path):
    """Hundreds of rows within roundoff of each other: halves alone would put them in any order."""
    middle = unit(1, seed=3)
    vectors = middle + 2e-4 * np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)
    vectors = np.concatenate([unit(1000), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)])
    ids = np.arange(len(vectors))
    hits, files = opened(engine, tmp_path, ids, vectors).search(middle, 5), stored(tmp_path, ids, vectors)
    on_cpu = VectorIndex.open(tmp_path, None, VectorShards.open(files, DIM), tombstones=NONE).search(middle, 5)
    assert np.allclose(hits.scores, on_cpu.scores, atol=1e-6)


def test_more_near_ties_than_a_block_gives_are_found(engine, small_blocks, tmp_path):
    middle = unit(1, seed=3)
    vectors = middle + 2e-3 * np.random.default_rng(0).normal(size=(600, DIM)).astype(np.float32)
    vectors = np.concatenate([vectors / np.linalg.norm(vectors, axis=1, keepdims=True), unit(1000)])
    ids, queries = np.arange(len(vectors)), np.concatenate([unit(3, seed=5), middle])
    hits, files = opened(engine, tmp_path, ids, vectors).search(queries, 5), stored(tmp_path, ids, vectors)
    on_cpu = VectorIndex.open(tmp_path, None, VectorShards.open(files, DIM), tombstones=NONE).search(queries, 5)
    assert np.allclose(hits.scores, on_cpu.scores, atol=1e-7) and np.array_equal(hits.ids[:3], on_cpu.ids[:3])


def test_no_room_leaves_nothing_on_the_gpu(engine, runtime, small_blocks, tmp_path):
    ids, vectors = np.arange(2000), unit(2000)
    runtime.total = runtime.held + 2 * 700 * DIM * 2
    held = runtime.held
    with pytest.raises(OutOfDeviceMemory, match="memory is taken"):
        opened(engine, tmp_path, ids, vectors)
    assert runtime.held == held


def test_all_that_roundoff_may_have_swapped_is_given_on():
    scores = np.array([[0.9, 0.5, 0.4995, 0.1], [0.8, 0.3, 0.2, 0.1]], np.float32)
    rows = np.arange(8).reshape(2, 4)
    more = np.array([[0.7, 0.4999], [0.25, 0.05]], np.float32), np.array([[20, 21], [22, 23]])
    kept, numbers = likeliest([(scores, rows), more], 3)
    assert numbers.tolist() == [[0, 20, 1, 21, 2], [4, 5, 22, 6, 7]]
    assert kept[0].tolist() == pytest.approx([0.9, 0.7, 0.5, 0.4999, 0.4995])


def test_queries_whose_likeliest_a_block_cannot_all_give_are_known():
    scores = np.array([[0.9, 0.5, 0.4], [0.9, 0.5, 0.4], [0.9, 0.5, 0.4]], np.float32)
    ends = [np.array([0.1, 0.499, 0.5], np.float32), np.array([0.2, 0.2, 0.497], np.float32)]
    assert cut_short(scores, ends, 2).tolist() == [False, True, True]
    assert cut_short(scores, ends[1:], 2).tolist() == [False] * 3
    assert not cut_short(scores, [], 2).any()
