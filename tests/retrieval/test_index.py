import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.indexing.index_writer import build_index, choose_factory
from gog_edge.retrieval.index import MAX_K, ImageIndex, VectorShards

DIM = 16
NONE = np.empty(0, dtype=np.int64)


def unit(rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shard(folder, name, ids, vectors):
    np.save(folder / f"{name}.npy", vectors)
    np.save(folder / f"{name}.ids.npy", ids)
    return folder / f"{name}.npy", folder / f"{name}.ids.npy"


def opened(folder, ids, vectors, *, factory=None, params=None, delta=NONE, tombstones=NONE, dtype=np.float32):
    """An index of all rows that are not in `delta`, over two shards."""
    base = ~np.isin(ids, delta)
    entry = build_index(folder, "index/a.faiss", ids[base], vectors[base], factory, params)
    half = len(ids) // 2
    files = [
        shard(folder, "one", ids[:half], vectors[:half].astype(dtype)),
        shard(folder, "two", ids[half:], vectors[half:].astype(dtype)),
    ]
    shards = VectorShards.open(files, DIM)
    index = ImageIndex.open(folder / entry.path, entry.params, shards, delta=delta, tombstones=tombstones)
    return index, entry


FACTORIES = [
    (None, None),
    ("HNSW16,SQfp16", {"efSearch": 64}),
    ("IVF8,Flat", {"nprobe": 8}),
    ("IVF8,SQ8", {"nprobe": 8}),
]


@pytest.mark.parametrize(("factory", "params"), FACTORIES)
def test_every_kind_finds_ids_honours_tombstones_and_delta(tmp_path, factory, params):
    vectors, ids = unit(400), np.arange(400, dtype=np.int64) * 3 + 7
    index, entry = opened(
        tmp_path, ids, vectors, factory=factory, params=params, delta=ids[-20:], tombstones=ids[[0, 399]]
    )
    assert entry.recall > 0.9 and len(index) == 398
    hits = index.search(vectors[[5, 390, 0, 399]], 3)
    assert hits.ids[:2, 0].tolist() == [ids[5], ids[390]]
    np.testing.assert_allclose(hits.scores[:2, 0], 1, atol=0.01)
    assert not np.isin(hits.ids, ids[[0, 399]]).any()
    assert (np.diff(hits.scores, axis=1) <= 1e-6).all()


def test_exact_search_equals_numpy(tmp_path):
    vectors, ids = unit(50), np.arange(50, dtype=np.int64)
    index, entry = opened(tmp_path, ids, vectors)
    queries = unit(4, seed=1)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    np.testing.assert_array_equal(index.search(queries, 5).ids, expected)
    assert entry.factory == "Flat" and entry.recall == 1.0


def test_k_is_bounded_by_what_is_there(tmp_path):
    vectors, ids = unit(6), np.arange(6, dtype=np.int64)
    index, _ = opened(tmp_path, ids, vectors, tombstones=ids[:2])
    assert index.search(vectors[:1], 10**9).ids.shape == (1, 4)
    assert index.search(vectors[:0], 3).ids.shape == (0, 3)
    assert index.search(vectors[:1], 0).ids.shape == (1, 0)
    assert index.search(vectors[:1], -5).ids.shape == (1, 0)
    assert MAX_K <= 2048


def test_vectors_are_found_across_shards_in_any_order(tmp_path):
    vectors, ids = unit(30), np.random.default_rng(3).permutation(30).astype(np.int64) + 100
    index, _ = opened(tmp_path, ids, vectors, dtype=np.float16)
    picked = [ids[29], ids[0], ids[15]]
    np.testing.assert_allclose(index.take(picked), vectors[[29, 0, 15]], atol=1e-3)
    assert index.take([]).shape == (0, DIM)


def test_an_image_with_two_vectors_is_refused(tmp_path):
    files = [shard(tmp_path, "one", np.array([1, 2]), unit(2)), shard(tmp_path, "two", np.array([2]), unit(1))]
    with pytest.raises(PackError, match="image 2 has two vectors"):
        VectorShards.open(files, DIM)


@pytest.mark.parametrize(
    ("ids", "vectors"),
    [
        (np.array([1.0, 2.0]), unit(2)),
        (np.array([1]), unit(2)),
        (np.array([1, 2]), unit(2).astype(np.float64)),
        (np.array([1, 2]), unit(2)[:, :8]),
        (np.array([1, 2]), np.array([{}, {}], dtype=object)),
    ],
)
def test_shards_of_other_types_are_refused(tmp_path, ids, vectors):
    with pytest.raises(PackError):
        VectorShards.open([shard(tmp_path, "one", ids, vectors)], DIM)


def test_counts_that_disagree_and_foreign_files_are_refused(tmp_path):
    vectors, ids = unit(10), np.arange(10, dtype=np.int64)
    entry = build_index(tmp_path, "a.faiss", ids[:9], vectors[:9])
    shards = VectorShards.open([shard(tmp_path, "one", ids, vectors)], DIM)
    with pytest.raises(PackError, match="9 vectors"):
        ImageIndex.open(tmp_path / entry.path, {}, shards, delta=NONE, tombstones=NONE)
    (tmp_path / "b.faiss").write_bytes(b"not an index")
    with pytest.raises(PackError, match="b.faiss"):
        ImageIndex.open(tmp_path / "b.faiss", {}, shards, delta=NONE, tombstones=NONE)


def test_the_size_chooses_the_index():
    kinds = [choose_factory(rows)[0].split(",")[0] for rows in (250, 9_999, 10_000, 5_000_000)]
    assert kinds[:3] == ["Flat", "Flat", "HNSW32"] and kinds[3].startswith("IVF")
