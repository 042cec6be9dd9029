import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import faiss
import numpy as np
import pytest
from vector_files import DIM, NO_IDS, exact_ids, unit_vectors, write_shards

from gog_edge.errors import PackError
from gog_edge.indexing.vectors.index_writer import build_index
from gog_edge.retrieval.vectors.faiss_index import MAX_K, MAX_ROWS_FETCHED, VectorIndex, read_index
from gog_edge.retrieval.vectors.shards import VectorShards

KINDS = [
    ("SQfp16", None),
    ("HNSW16,SQ8", {"efSearch": 64}),
    ("IVF8,Flat", {"nprobe": 8}),
    ("IVF8,SQ8", {"nprobe": 8}),
    ("IVF8,PQ16x4fsr", {"nprobe": 8}),
    ("IVF16(PQ8x4fs,RFlat),PQ16x4fsr", {"nprobe": 16}),
    ("IVF8,RaBitQfs", {"nprobe": 8}),
]


def open_index(folder, ids, vectors, *, indexed=None, tombstones=NO_IDS, factory="SQfp16", params=None):
    """Open an index over the first `indexed` rows (default: all), with the others as delta. Return it and its entry."""
    files = write_shards(folder, ids, vectors, indexed)
    entry = None
    if indexed is None or indexed:
        base = VectorShards.open(files[: 2 if indexed is None else 1], DIM)
        queries = unit_vectors(64, seed=9)
        entry = build_index(folder, "a.faiss", base, queries, factory=factory, params=params, recall=0.5)
    return VectorIndex.open(folder, entry, VectorShards.open(files, DIM), tombstones=tombstones), entry


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_every_type_finds_ids_of_base_and_delta_but_no_deleted_ones(tmp_path, factory, params):
    vectors, ids = unit_vectors(600), np.arange(600, dtype=np.int64) * 3 + 7
    deleted = ids[[0, 599, 598]]
    index, entry = open_index(tmp_path, ids, vectors, indexed=560, tombstones=deleted, factory=factory, params=params)
    assert entry.rows == 560 and entry.factory == factory and len(index) == 597
    hits = index.search(vectors[[5, 590, 0, 599]], 3)
    assert hits.ids[:2, 0].tolist() == [ids[5], ids[590]]
    np.testing.assert_allclose(hits.scores[:2, 0], 1, atol=0.002)
    assert not np.isin(hits.ids, deleted).any()
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    expected = exact_ids(unit_vectors(50, seed=3), ids, vectors, 10, deleted)
    found = index.search(unit_vectors(50, seed=3), 10).ids
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)]) > 0.9


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_scores_are_cosines_of_the_stored_vectors(tmp_path, factory, params):
    vectors, ids = unit_vectors(400), np.arange(400, dtype=np.int64)
    index, entry = open_index(tmp_path, ids, vectors, factory=factory, params=params)
    queries = unit_vectors(20, seed=4)
    hits = index.search(queries, 5)
    cosines = np.einsum("nd,nkd->nk", queries, vectors.astype(np.float16).astype(np.float32)[hits.ids])
    np.testing.assert_allclose(hits.scores, cosines, atol=1e-5)
    assert (entry.candidates == 0) == (factory == "SQfp16")


def test_without_an_entry_the_search_is_exact(tmp_path):
    vectors, ids = unit_vectors(50), np.random.default_rng(2).permutation(50).astype(np.int64)
    index, entry = open_index(tmp_path, ids, vectors, indexed=0)
    queries = unit_vectors(4, seed=1)
    assert entry is None
    np.testing.assert_array_equal(index.search(queries, 5).ids, exact_ids(queries, ids, vectors, 5))


def test_rows_of_one_id_are_one_hit_with_the_best_score(tmp_path):
    vectors, ids = unit_vectors(240), np.repeat(np.arange(40, dtype=np.int64), 6)
    index, _ = open_index(tmp_path, ids, vectors, indexed=200)
    queries = unit_vectors(9, seed=5)
    hits = index.search(queries, 40)
    np.testing.assert_array_equal(hits.ids, exact_ids(queries, ids, vectors, 40))
    best = (queries @ vectors.astype(np.float16).astype(np.float32).T).reshape(9, 40, 6).max(axis=2)
    np.testing.assert_allclose(hits.scores, np.take_along_axis(best, hits.ids, axis=1), atol=1e-3)
    assert index.search(queries, 1000).ids.shape == (9, 40)


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_ids_behind_many_hidden_ones_are_found(tmp_path, factory, params):
    vectors, ids = unit_vectors(1500), np.arange(1500, dtype=np.int64)
    query = unit_vectors(2, seed=6)
    near = exact_ids(query[:1], ids, vectors, 1200)[0]
    index, _ = open_index(tmp_path, ids, vectors, factory=factory, params=params, tombstones=np.sort(near[:900]))
    hits = index.search(query, 5, without=near[900:1200])
    assert hits.ids.shape == (2, 5) and (hits.ids >= 0).all() and not np.isin(hits.ids, near).any()
    assert len(set(hits.ids[0]) & set(exact_ids(query[:1], ids, vectors, 8, near)[0])) >= 4


def test_without_applies_to_one_call_only(tmp_path):
    vectors, ids = unit_vectors(300), np.repeat(np.arange(100, dtype=np.int64), 3)
    index, _ = open_index(tmp_path, ids, vectors)
    hits = index.search(vectors[[30]], 3, without=np.array([10, 10, 12345]))
    assert 10 not in hits.ids and (hits.ids >= 0).all()
    assert index.search(vectors[[30]], 3).ids[0, 0] == 10
    assert index.search(vectors[[30]], 10_000, without=ids).ids.shape == (1, 0)


def test_k_is_clipped_to_the_number_of_live_ids(tmp_path):
    vectors, ids = unit_vectors(6), np.arange(6, dtype=np.int64)
    index, _ = open_index(tmp_path, ids, vectors, tombstones=ids[:2])
    assert index.search(vectors[:1], 10**9).ids.shape == (1, 4)
    assert index.search(vectors[:0], 3).ids.shape == (0, 3)
    assert index.search(vectors[:1], 0).ids.shape == (1, 0)
    assert index.search(vectors[:1], -5).ids.shape == (1, 0)
    assert MAX_K <= 2048 and MAX_K < MAX_ROWS_FETCHED


def test_results_are_the_same_alone_in_a_batch_and_from_many_threads(tmp_path):
    vectors, ids = unit_vectors(2000), np.arange(2000, dtype=np.int64)
    factory, params = "IVF16,PQ16x4fsr", {"nprobe": 6}
    index, _ = open_index(tmp_path, ids, vectors, factory=factory, params=params, tombstones=ids[::7])
    queries = unit_vectors(200, seed=8)
    batch = index.search(queries, 10)
    with ThreadPoolExecutor(6) as pool:
        single = list(pool.map(lambda one: index.search(one, 10), np.split(queries, 200)))
    np.testing.assert_array_equal(batch.ids, np.concatenate([one.ids for one in single]))
    np.testing.assert_allclose(batch.scores, np.concatenate([one.scores for one in single]), atol=1e-6)


def test_a_search_restores_the_number_of_openmp_threads(tmp_path):
    index, _ = open_index(tmp_path, np.arange(99), unit_vectors(99))
    faiss.omp_set_num_threads(2)
    index.search(unit_vectors(8), 3)
    assert faiss.omp_get_max_threads() == 2


def test_an_open_index_is_unaffected_when_its_file_is_replaced(tmp_path):
    vectors, ids = unit_vectors(500), np.arange(500, dtype=np.int64)
    index, _ = open_index(tmp_path, ids, vectors)
    before = index.search(vectors[:20], 3)
    (tmp_path / "new").mkdir()
    build_index(tmp_path, "a.faiss", VectorShards.open(write_shards(tmp_path / "new", ids, -vectors), DIM), None)
    np.testing.assert_array_equal(index.search(vectors[:20], 3).ids, before.ids)


def test_files_that_disagree_with_the_entry_are_refused(tmp_path):
    vectors, ids = unit_vectors(100), np.arange(100, dtype=np.int64)
    index, entry = open_index(tmp_path, ids, vectors, factory="IVF8,SQ8", params={"nprobe": 4})
    for wrong in (replace(entry, rows=90), replace(entry, rows=200)):
        with pytest.raises(PackError, match="has 100 vectors"):
            VectorIndex.open(tmp_path, wrong, index.shards, tombstones=NO_IDS)
    for params in ({"efSearch": 8}, {"nprobe": 0}):
        with pytest.raises(PackError, match="search parameters"):
            VectorIndex.open(tmp_path, replace(entry, params=params), index.shards, tombstones=NO_IDS)
    for name, metric in (("Flat", faiss.METRIC_L2), ("IDMap,Flat", faiss.METRIC_INNER_PRODUCT)):
        other = faiss.index_factory(DIM, name, metric)
        other.add_with_ids(vectors, ids) if name != "Flat" else other.add(vectors)
        faiss.write_index(other, str(tmp_path / "a.faiss"))
        with pytest.raises(PackError, match="a.faiss"):
            VectorIndex.open(tmp_path, entry, index.shards, tombstones=NO_IDS)


def test_damaged_files_and_false_sizes_are_refused(tmp_path):
    vectors, ids = unit_vectors(300), np.arange(300, dtype=np.int64)
    index, entry = open_index(tmp_path, ids, vectors, factory="IVF8,SQ8", params={"nprobe": 4})
    path = tmp_path / "a.faiss"
    data = path.read_bytes()
    too_many_vectors = data.replace((300).to_bytes(8, "little"), (10**15).to_bytes(8, "little"))
    too_many_lists = data.replace((8).to_bytes(8, "little"), (2**39).to_bytes(8, "little"))
    for damaged in (b"", b"not an index", data[: len(data) // 2], too_many_lists, too_many_vectors):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(PackError, match="a.faiss"):
            VectorIndex.open(tmp_path, entry, index.shards, tombstones=NO_IDS)
    path.unlink()
    with pytest.raises(PackError, match="a.faiss"):
        VectorIndex.open(tmp_path, entry, index.shards, tombstones=NO_IDS)


def flat_of(rows, dim=DIM):
    index = faiss.IndexFlatIP(dim)
    index.add(unit_vectors(rows)[:, :dim])
    return index


def built(factory, rows=300):
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(unit_vectors(rows))
    index.add(unit_vectors(rows))
    return index


def with_other_centroids(quantizer):
    index = built("IVF8,SQ8")
    index.own_fields, index.quantizer = False, quantizer
    return index


def with_other_storage(storage):
    index = built("HNSW16,Flat")
    index.own_fields, index.storage = False, storage
    return index


def with_other_count(factory, count):
    index = built(factory)
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
    """FAISS wrote these after one part of a valid index was replaced by one that does not fit."""
    faiss.write_index(make(), str(tmp_path / "a.faiss"))
    with pytest.raises(PackError, match="a.faiss"):
        read_index(tmp_path / "a.faiss")


@pytest.mark.parametrize("factory", [factory for factory, _ in KINDS] + ["Flat", "IVF16_HNSW8,SQ8"])
def test_indexes_written_by_faiss_are_read(tmp_path, factory):
    faiss.write_index(built(factory, 700), str(tmp_path / "a.faiss"))
    assert read_index(tmp_path / "a.faiss").ntotal == 700


def test_close_stops_the_threads_and_may_be_called_twice(tmp_path):
    index, _ = open_index(tmp_path, np.arange(99), unit_vectors(99))
    index.search(unit_vectors(64), 3)
    helpers = [thread for thread in threading.enumerate() if thread in index._helpers._threads]
    index.close()
    index.close()
    assert not any(thread.is_alive() for thread in helpers)


@pytest.mark.parametrize(("factory", "params"), KINDS)
def test_a_file_cut_anywhere_is_refused(tmp_path, factory, params):
    """FAISS's own reader of mapped files ends the process if a file is cut within a number."""
    open_index(tmp_path, np.arange(400, dtype=np.int64), unit_vectors(400), factory=factory, params=params)
    data = (tmp_path / "a.faiss").read_bytes()
    read_index(tmp_path / "a.faiss")
    for size in (*range(200), *range(200, len(data), 997), *range(len(data) - 40, len(data))):
        (tmp_path / "cut.faiss").write_bytes(data[:size])
        with pytest.raises(PackError, match="cut.faiss"):
            read_index(tmp_path / "cut.faiss")


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,PQ4x4fs"])
@pytest.mark.parametrize("row", [-1, 400, 2**40])
def test_rows_in_lists_beyond_those_of_the_index_are_refused(tmp_path, factory, row):
    vectors = unit_vectors(400)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "good.faiss"))
    read_index(tmp_path / "good.faiss")
    number = next(number for number in range(8) if index.invlists.list_size(number))
    faiss.rev_swig_ptr(index.invlists.get_ids(number), 1)[0] = row
    faiss.write_index(index, str(tmp_path / "bad.faiss"))
    with pytest.raises(PackError, match=rf"list {number} must have rows from 0 to 399, got .*{row}"):
        read_index(tmp_path / "bad.faiss")


def test_an_index_that_was_not_trained_is_refused(tmp_path):
    index = faiss.index_factory(DIM, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    faiss.write_index(index, str(tmp_path / "a.faiss"))
    with pytest.raises(PackError, match="is not trained"):
        read_index(tmp_path / "a.faiss")
