import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.indexing.index_writer import build_index
from gog_edge.retrieval.vectors.faiss_index import MAX_K, THOROUGH, VectorIndex, read_index
from gog_edge.retrieval.vectors.shards import VectorShards

DIM = 32
NONE = np.empty(0, dtype=np.int64)
KINDS = [
    ("SQfp16", None),
    ("HNSW16,SQ8", {"efSearch": 64}),
    ("IVF8,Flat", {"nprobe": 8}),
    ("IVF8,SQ8", {"nprobe": 8}),
    ("IVF8,PQ16x4fsr", {"nprobe": 8}),
    ("IVF16(PQ8x4fs,RFlat),PQ16x4fsr", {"nprobe": 16}),
    ("IVF8,RaBitQfs", {"nprobe": 8}),
]


def unit(rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float16).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(folder, ids, vectors, cut=None):
    """Two shards, cut anywhere."""
    cut, files = len(ids) // 2 if cut is None else cut, []
    for name, part in (("one", slice(0, cut)), ("two", slice(cut, None))):
        np.save(folder / f"{name}.npy", vectors[part].astype(np.float16))
        np.save(folder / f"{name}.ids.npy", ids[part])
        files.append((folder / f"{name}.npy", folder / f"{name}.ids.npy"))
    return files


def opened(folder, ids, vectors, *, indexed=None, tombstones=NONE, factory="SQfp16", params=None):
    """An index over the first `indexed` rows; the others are the delta."""
    files = stored(folder, ids, vectors, indexed)
    entry = None
    if indexed is None or indexed:
        base = VectorShards.open(files[: 2 if indexed is None else 1], DIM)
        entry = build_index(folder, "a.faiss", base, unit(64, seed=9), factory=factory, params=params, recall=0.5)
    return VectorIndex.open(folder, entry, VectorShards.open(files, DIM), tombstones=tombstones), entry


def exact(queries, ids, vectors, k, hidden=NONE):
    """The k nearest distinct live ids of each query, by NumPy."""
    scores = np.where(np.isin(ids, hidden), -np.inf, queries @ vectors.astype(np.float16).astype(np.float32).T)
    found = []
    for row in np.argsort(-scores, axis=1, kind="stable"):
        live = [ids[one] for one in row if ids[one] not in hidden]
        found.append(list(dict.fromkeys(live))[:k])
    return np.array(found)


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_every_kind_finds_ids_of_base_and_delta_and_nothing_dead(tmp_path, factory, params):
    vectors, ids = unit(600), np.arange(600, dtype=np.int64) * 3 + 7
    dead = ids[[0, 599, 598]]
    index, entry = opened(tmp_path, ids, vectors, indexed=560, tombstones=dead, factory=factory, params=params)
    assert entry.rows == 560 and entry.factory == factory and len(index) == 597
    hits = index.search(vectors[[5, 590, 0, 599]], 3)
    assert hits.ids[:2, 0].tolist() == [ids[5], ids[590]]
    np.testing.assert_allclose(hits.scores[:2, 0], 1, atol=0.002)
    assert not np.isin(hits.ids, dead).any()
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    wanted = exact(unit(50, seed=3), ids, vectors, 10, dead)
    found = index.search(unit(50, seed=3), 10).ids
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)]) > 0.9


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_compressed_indexes_score_by_the_stored_vectors(tmp_path, factory, params):
    vectors, ids = unit(400), np.arange(400, dtype=np.int64)
    index, entry = opened(tmp_path, ids, vectors, factory=factory, params=params)
    queries = unit(20, seed=4)
    hits = index.search(queries, 5)
    cosines = np.einsum("nd,nkd->nk", queries, index.shards.take(hits.ids.ravel()).reshape(20, 5, DIM))
    np.testing.assert_allclose(hits.scores, cosines, atol=1e-5)
    assert (entry.candidates == 0) == (factory == "SQfp16")


def test_without_an_entry_everything_is_searched_exactly(tmp_path):
    vectors, ids = unit(50), np.random.default_rng(2).permutation(50).astype(np.int64)
    index, entry = opened(tmp_path, ids, vectors, indexed=0)
    queries = unit(4, seed=1)
    assert entry is None
    np.testing.assert_array_equal(index.search(queries, 5).ids, exact(queries, ids, vectors, 5))


def test_rows_of_one_id_are_one_hit_with_the_best_score(tmp_path):
    vectors, ids = unit(240), np.repeat(np.arange(40, dtype=np.int64), 6)
    index, _ = opened(tmp_path, ids, vectors, indexed=200)
    queries = unit(9, seed=5)
    hits = index.search(queries, 40)
    np.testing.assert_array_equal(hits.ids, exact(queries, ids, vectors, 40))
    best = (queries @ vectors.astype(np.float16).astype(np.float32).T).reshape(9, 40, 6).max(axis=2)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(best, hits.ids, axis=1), atol=1e-3)
    assert index.search(queries, 1000).ids.shape == (9, 40)


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_where_all_that_is_near_is_hidden_what_lies_behind_is_found(tmp_path, factory, params):
    vectors, ids = unit(1500), np.arange(1500, dtype=np.int64)
    query = unit(2, seed=6)
    near = exact(query[:1], ids, vectors, 1200)[0]
    index, _ = opened(tmp_path, ids, vectors, factory=factory, params=params, tombstones=np.sort(near[:900]))
    hits = index.search(query, 5, without=near[900:1200])
    assert hits.ids.shape == (2, 5) and (hits.ids >= 0).all() and not np.isin(hits.ids, near).any()
    assert len(set(hits.ids[0]) & set(exact(query[:1], ids, vectors, 8, near)[0])) >= 4


def test_what_is_left_out_of_one_call_is_there_in_the_next(tmp_path):
    vectors, ids = unit(300), np.repeat(np.arange(100, dtype=np.int64), 3)
    index, _ = opened(tmp_path, ids, vectors)
    own = index.search(vectors[[30]], 3, without=np.array([10, 10, 12345]))
    assert 10 not in own.ids and (own.ids >= 0).all()
    assert index.search(vectors[[30]], 3).ids[0, 0] == 10
    assert index.search(vectors[[30]], 10_000, without=ids).ids.shape == (1, 0)


def test_k_is_bounded_by_what_is_there(tmp_path):
    vectors, ids = unit(6), np.arange(6, dtype=np.int64)
    index, _ = opened(tmp_path, ids, vectors, tombstones=ids[:2])
    assert index.search(vectors[:1], 10**9).ids.shape == (1, 4)
    assert index.search(vectors[:0], 3).ids.shape == (0, 3)
    assert index.search(vectors[:1], 0).ids.shape == (1, 0)
    assert index.search(vectors[:1], -5).ids.shape == (1, 0)
    assert MAX_K <= 2048 and MAX_K < THOROUGH


def test_a_query_finds_the_same_alone_in_a_batch_and_from_many_threads(tmp_path):
    vectors, ids = unit(2000), np.arange(2000, dtype=np.int64)
    factory, params = "IVF16,PQ16x4fsr", {"nprobe": 6}
    index, _ = opened(tmp_path, ids, vectors, factory=factory, params=params, tombstones=ids[::7])
    queries = unit(200, seed=8)
    together = index.search(queries, 10)
    with ThreadPoolExecutor(6) as pool:
        alone = list(pool.map(lambda one: index.search(one, 10), np.split(queries, 200)))
    np.testing.assert_array_equal(together.ids, np.concatenate([one.ids for one in alone]))
    np.testing.assert_allclose(together.scores, np.concatenate([one.scores for one in alone]), atol=1e-6)


def test_searching_leaves_the_thread_count_of_others_alone(tmp_path):
    index, _ = opened(tmp_path, np.arange(99), unit(99))
    faiss.omp_set_num_threads(2)
    index.search(unit(8), 3)
    assert faiss.omp_get_max_threads() == 2


def test_an_old_file_stays_searchable_while_a_new_one_takes_its_name(tmp_path):
    vectors, ids = unit(500), np.arange(500, dtype=np.int64)
    index, _ = opened(tmp_path, ids, vectors)
    before = index.search(vectors[:20], 3)
    (tmp_path / "new").mkdir()
    build_index(tmp_path, "a.faiss", VectorShards.open(stored(tmp_path / "new", ids, -vectors), DIM), None)
    np.testing.assert_array_equal(index.search(vectors[:20], 3).ids, before.ids)


def test_files_that_do_not_belong_are_refused(tmp_path):
    vectors, ids = unit(100), np.arange(100, dtype=np.int64)
    index, entry = opened(tmp_path, ids, vectors, factory="IVF8,SQ8", params={"nprobe": 4})
    for wrong in (replace(entry, rows=90), replace(entry, rows=200)):
        with pytest.raises(PackError, match="holds 100 vectors"):
            VectorIndex.open(tmp_path, wrong, index.shards, tombstones=NONE)
    for params in ({"efSearch": 8}, {"nprobe": 0}):
        with pytest.raises(PackError, match="search parameters"):
            VectorIndex.open(tmp_path, replace(entry, params=params), index.shards, tombstones=NONE)
    for name, metric in (("Flat", faiss.METRIC_L2), ("IDMap,Flat", faiss.METRIC_INNER_PRODUCT)):
        other = faiss.index_factory(DIM, name, metric)
        other.add_with_ids(vectors, ids) if name != "Flat" else other.add(vectors)
        faiss.write_index(other, str(tmp_path / "a.faiss"))
        with pytest.raises(PackError, match="a.faiss"):
            VectorIndex.open(tmp_path, entry, index.shards, tombstones=NONE)


def test_damaged_and_lying_files_are_refused(tmp_path):
    vectors, ids = unit(300), np.arange(300, dtype=np.int64)
    index, entry = opened(tmp_path, ids, vectors, factory="IVF8,SQ8", params={"nprobe": 4})
    path = tmp_path / "a.faiss"
    whole = path.read_bytes()
    lying = whole.replace((300).to_bytes(8, "little"), (10**15).to_bytes(8, "little"))
    vast = whole.replace((8).to_bytes(8, "little"), (2**39).to_bytes(8, "little"))
    for damaged in (b"", b"not an index", whole[: len(whole) // 2], vast, lying):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(PackError, match="a.faiss"):
            VectorIndex.open(tmp_path, entry, index.shards, tombstones=NONE)
    path.unlink()
    with pytest.raises(PackError, match="a.faiss"):
        VectorIndex.open(tmp_path, entry, index.shards, tombstones=NONE)


def flat_of(rows, dim=DIM):
    index = faiss.IndexFlatIP(dim)
    index.add(unit(rows)[:, :dim])
    return index


def whole(factory, rows=300):
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(unit(rows))
    index.add(unit(rows))
    return index


def with_other_centroids(quantizer):
    index = whole("IVF8,SQ8")
    index.own_fields, index.quantizer = False, quantizer
    return index


def with_other_storage(storage):
    index = whole("HNSW16,Flat")
    index.own_fields, index.storage = False, storage
    return index


def with_other_count(factory, count):
    index = whole(factory)
    index.ntotal = count
    return index


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_other_centroids(flat_of(5)),
        lambda: with_other_centroids(flat_of(8, 16)),
        lambda: with_other_storage(flat_of(200)),
        lambda: with_other_storage(flat_of(300, 16)),
        lambda: with_other_count("Flat", 301),
        lambda: with_other_count("SQfp16", 299),
        lambda: with_other_count("HNSW16,SQ8", 400),
    ],
    ids=["centroids", "centroid width", "storage", "storage width", "more", "fewer", "graph"],
)
def test_indexes_whose_parts_disagree_are_refused(tmp_path, make):
    """Written by FAISS after one part of a real index was exchanged for one that does not fit."""
    faiss.write_index(make(), str(tmp_path / "a.faiss"))
    with pytest.raises(PackError, match="a.faiss"):
        read_index(tmp_path / "a.faiss")


@pytest.mark.parametrize("factory", [factory for factory, _ in KINDS] + ["Flat", "IVF16_HNSW8,SQ8"])
def test_indexes_as_faiss_writes_them_are_read(tmp_path, factory):
    faiss.write_index(whole(factory, 700), str(tmp_path / "a.faiss"))
    assert read_index(tmp_path / "a.faiss").ntotal == 700


def test_closing_ends_the_threads_and_may_be_done_twice(tmp_path):
    index, _ = opened(tmp_path, np.arange(99), unit(99))
    index.search(unit(64), 3)
    helpers = [thread for thread in threading.enumerate() if thread in index._helpers._threads]
    index.close()
    index.close()
    assert not any(thread.is_alive() for thread in helpers)
