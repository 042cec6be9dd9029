import errno
from pathlib import Path

import faiss
import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.indexing import index_writer
from gog_edge.indexing.index_planning import EXACT_ROWS, exact_nearest, list_count, plans
from gog_edge.indexing.index_writer import build_index
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import VectorShards

DIM = 64
NONE = np.empty(0, dtype=np.int64)


def clustered(rows, seed):
    """Unit vectors around centres that all seeds share."""
    centres = np.random.default_rng(77).normal(size=(60, DIM))
    rng = np.random.default_rng(seed)
    vectors = (centres[rng.integers(0, 60, rows)] + 1.3 * rng.normal(size=(rows, DIM))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(folder, vectors):
    np.save(folder / "v.npy", vectors.astype(np.float16))
    np.save(folder / "i.npy", np.arange(len(vectors), dtype=np.int64))
    return VectorShards.open([(folder / "v.npy", folder / "i.npy")], vectors.shape[1])


@pytest.fixture
def shards(tmp_path):
    return stored(tmp_path, clustered(3_000, 1))


def kinds(found):
    return [plan.factory.rpartition(",")[2] for plan in found]


def test_the_size_and_the_memory_choose():
    assert kinds(plans(EXACT_ROWS, 512))[0] == "SQfp16"
    assert kinds(plans(10**6, 512)) == ["PQ256x4fsr", "PQ128x4fsr", "RaBitQfs", "SQ8"]
    assert kinds(plans(10**6, 512, 150 * 10**6)) == ["PQ128x4fsr", "RaBitQfs"]
    assert kinds(plans(8 * 10**6, 512, 10**9)) == ["PQ128x4fsr", "RaBitQfs"]
    assert kinds(plans(10**6, 518)) == ["SQ8"]  # codes of a dimension that eight does not divide are not made
    with pytest.raises(PackError, match="fits 1000000 bytes of memory; the smallest takes"):
        plans(10**6, 512, 10**6)


def test_eight_million_pictures_fit_two_gigabytes():
    table = {plan.factory.rpartition(",")[2]: plan.bytes for plan in plans(8 * 10**6, 512)}
    assert table["PQ256x4fsr"] < 2 * 10**9 and table["SQ8"] > 6 * 10**9


def test_lists_grow_with_the_root_of_the_rows_and_are_never_empty():
    assert [list_count(rows) for rows in (1, 2_000, 10**5, 10**6, 8 * 10**6, 10**9)] == [
        1, 125, 1_024, 4_096, 8_192, 65_536
    ]  # fmt: skip


@pytest.mark.parametrize("place", range(4))
def test_what_a_plan_says_of_its_memory_is_what_its_file_takes(tmp_path, place):
    rows = 20_000
    plan = [plan for plan in plans(rows, DIM) if not plan.exact][place]
    shards = stored(tmp_path, clustered(rows, 2))
    entry = build_index(tmp_path, "a.faiss", shards, clustered(40, 3), factory=plan.factory, recall=0.1)
    size = (tmp_path / entry.path).stat().st_size + 9 * rows
    assert size == pytest.approx(plan.bytes, rel=0.06)


def test_a_small_pack_is_searched_exactly_and_said_to_be(tmp_path, shards):
    entry = build_index(tmp_path, "index/a.faiss", shards, clustered(80, 3))
    assert (entry.factory, entry.recall, entry.candidates, entry.rows) == ("SQfp16", 1.0, 0, 3_000)
    assert entry.path == "index/a.faiss" and entry.queries == 80 and entry.held_out
    assert entry.p50_ms_1 > 0 and entry.p50_ms_8 > 0


@pytest.mark.parametrize("recall", [0.7, 0.95])
def test_the_way_to_search_that_is_found_reaches_the_recall_on_other_queries(tmp_path, monkeypatch, shards, recall):
    monkeypatch.setattr(index_writer, "EXACT_MS", 0.0)
    entry = build_index(tmp_path, "a.faiss", shards, clustered(400, 3), recall=recall)
    assert entry.factory.startswith("IVF") and entry.recall >= recall and entry.candidates > 0
    index = VectorIndex.open(tmp_path, entry, shards, tombstones=NONE)
    queries = clustered(300, 4)
    found, wanted = index.search(queries, 10).ids, exact_nearest(shards, queries, 10)
    measured = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)])
    assert measured == pytest.approx(entry.recall, abs=0.04)


def test_without_queries_stored_vectors_with_noise_stand_in_and_are_owned_to(tmp_path, shards):
    entry = build_index(tmp_path, "a.faiss", shards, None)
    assert not entry.held_out and entry.queries == 512
    assert not build_index(tmp_path, "a.faiss", shards, np.empty((0, DIM), np.float32)).held_out


def test_where_no_compressed_index_finds_enough_exact_search_is_kept_though_slow(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(index_writer, "EXACT_MS", 0.0)
    monkeypatch.setattr("gog_edge.indexing.index_planning.CANDIDATES", (10,))
    monkeypatch.setattr("gog_edge.indexing.index_planning.NPROBES", (1,))
    monkeypatch.setattr("gog_edge.indexing.index_planning.EFFORTS", (10,))
    entry = build_index(tmp_path, "a.faiss", shards, clustered(100, 3), recall=0.999)
    assert entry.factory == "SQfp16" and entry.recall == 1.0
    assert VectorIndex.open(tmp_path, entry, shards, tombstones=NONE).search(clustered(1, 5), 3).ids.min() >= 0


def test_a_recall_that_nothing_reaches_is_refused_with_what_was_reached(tmp_path, shards):
    with pytest.raises(PackError, match=r"finds 100% of the 10 nearest; the best, 'IVF64,PQ8x4fsr'.* finds \d+\.\d%"):
        build_index(tmp_path, "a.faiss", shards, clustered(200, 3), factory="IVF64,PQ8x4fsr", recall=1.0)
    assert not (tmp_path / "a.faiss").exists()


def test_given_parameters_are_kept_and_measured(tmp_path, shards):
    entry = build_index(tmp_path, "a.faiss", shards, clustered(80, 3), factory="IVF32,SQ8", params={"nprobe": 1})
    assert entry.params == {"nprobe": 1} and entry.recall < 0.95


@pytest.mark.parametrize("factory", ["IVF9000,SQ8", "Nonsense", "IDMap,Flat", "PCA8,IVF8,Flat", "IVF8,PQ7x4fs"])
def test_factories_that_cannot_be_built_or_searched_are_refused(tmp_path, shards, factory):
    with pytest.raises(PackError):
        build_index(tmp_path, "a.faiss", shards, clustered(20, 3), factory=factory)


def test_no_vectors_and_queries_of_another_length_are_refused(tmp_path, shards):
    with pytest.raises(PackError, match="no vectors"):
        build_index(tmp_path, "a.faiss", VectorShards.open([], DIM), None)
    with pytest.raises(PackError, match=r"queries of shape \(5, 32\), wanted \[n, 64\]"):
        build_index(tmp_path, "a.faiss", shards, np.zeros((5, 32), np.float32))


def test_very_few_vectors_are_enough(tmp_path):
    for rows in (1, 2, 9):
        shards = stored(tmp_path, clustered(rows, 1))
        entry = build_index(tmp_path, "a.faiss", shards, None)
        assert entry.recall == 1.0 and entry.recall_k == min(rows, 10)


def test_a_full_disk_is_said_to_be_full_and_the_file_before_stays(tmp_path, shards):
    build_index(tmp_path, "a.faiss", shards, None)
    before = (tmp_path / "a.faiss").read_bytes()
    (tmp_path / "a.faiss.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the index cannot be written") as raised:
        build_index(tmp_path, "a.faiss", shards, None)
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "a.faiss").read_bytes() == before and not (tmp_path / "a.faiss.part").exists()
    assert Path("/dev/full").exists()


def test_exact_search_block_by_block_is_exact_search(tmp_path):
    vectors = clustered(70_000, 6)  # more than a block
    shards = stored(tmp_path, vectors)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors.astype(np.float16).astype(np.float32))
    queries, told = clustered(30, 7), []
    found = exact_nearest(shards, queries, 10, lambda *progress: told.append(progress))
    wanted = flat.search(queries, 10)[1]
    assert np.mean(found == wanted) > 0.99  # equal scores may change places
    assert [done for _, done, _ in told] == [65_536, 70_000] and {total for *_, total in told} == {70_000}


def test_progress_tells_every_stage(tmp_path, shards):
    told = []
    build_index(tmp_path, "a.faiss", shards, None, factory="IVF32,SQ8", on_progress=lambda *one: told.append(one))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["exact search", "training", "indexing", "measuring"]
    assert ("indexing", 3_000, 3_000) in told
