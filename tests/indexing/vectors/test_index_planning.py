import errno
from pathlib import Path

import faiss
import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.indexing.vectors import index_writer
from gog_edge.indexing.vectors.index_planning import EXACT_ROWS, exact_nearest, list_count, plans
from gog_edge.indexing.vectors.index_writer import build_index
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import VectorShards

DIM = 64
NONE = np.empty(0, dtype=np.int64)


def clustered(rows, seed):
    """Return unit vectors around centres that are the same for all seeds."""
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


def test_the_plans_depend_on_size_and_memory():
    assert kinds(plans(EXACT_ROWS, 512))[0] == "SQfp16"
    assert kinds(plans(10**6, 512)) == ["PQ256x4fsr", "PQ128x4fsr", "RaBitQfs", "SQ8"]
    assert kinds(plans(10**6, 512, 150 * 10**6)) == ["PQ128x4fsr", "RaBitQfs"]
    assert kinds(plans(8 * 10**6, 512, 10**9)) == ["PQ128x4fsr", "RaBitQfs"]
    assert kinds(plans(10**6, 518)) == ["SQ8"]  # product quantisation needs a dimension divisible by 8
    with pytest.raises(PackError, match="fits 1000000 bytes of memory; the smallest takes"):
        plans(10**6, 512, 10**6)


def test_eight_million_vectors_fit_two_gigabytes():
    table = {plan.factory.rpartition(",")[2]: plan.bytes for plan in plans(8 * 10**6, 512)}
    assert table["PQ256x4fsr"] < 2 * 10**9 and table["SQ8"] > 6 * 10**9


def test_the_number_of_lists_grows_with_the_square_root_of_the_rows():
    assert [list_count(rows) for rows in (1, 2_000, 10**5, 10**6, 8 * 10**6, 10**9)] == [
        1, 125, 1_024, 4_096, 8_192, 65_536
    ]  # fmt: skip


@pytest.mark.parametrize("place", range(4))
def test_the_planned_memory_is_the_size_of_the_file(tmp_path, place):
    rows = 20_000
    plan = [plan for plan in plans(rows, DIM) if not plan.exact][place]
    shards = stored(tmp_path, clustered(rows, 2))
    entry = build_index(tmp_path, "a.faiss", shards, clustered(40, 3), factory=plan.factory, recall=0.1)
    size = (tmp_path / entry.path).stat().st_size + 9 * rows
    assert size == pytest.approx(plan.bytes, rel=0.06)


def test_a_small_pack_gets_an_exact_index(tmp_path, shards):
    entry = build_index(tmp_path, "index/a.faiss", shards, clustered(80, 3))
    assert (entry.factory, entry.recall, entry.candidates, entry.rows) == ("SQfp16", 1.0, 0, 3_000)
    assert entry.path == "index/a.faiss" and entry.queries == 80 and entry.held_out
    assert entry.p50_ms_1 > 0 and entry.p50_ms_8 > 0


@pytest.mark.parametrize("recall", [0.7, 0.95])
def test_the_tuned_parameters_reach_the_recall_on_other_queries(tmp_path, monkeypatch, shards, recall):
    monkeypatch.setattr(index_writer, "EXACT_MS", 0.0)
    entry = build_index(tmp_path, "a.faiss", shards, clustered(400, 3), recall=recall)
    assert entry.factory.startswith("IVF") and entry.recall >= recall and entry.candidates > 0
    index = VectorIndex.open(tmp_path, entry, shards, tombstones=NONE)
    queries = clustered(300, 4)
    found, wanted = index.search(queries, 10).ids, exact_nearest(shards, queries, 10)
    measured = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)])
    assert measured == pytest.approx(entry.recall, abs=0.04)


def test_without_queries_noisy_stored_vectors_are_used_and_marked(tmp_path, shards):
    entry = build_index(tmp_path, "a.faiss", shards, None)
    assert not entry.held_out and entry.queries == 512
    assert not build_index(tmp_path, "a.faiss", shards, np.empty((0, DIM), np.float32)).held_out


def test_a_slow_exact_index_is_kept_if_no_other_reaches_the_recall(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(index_writer, "EXACT_MS", 0.0)
    monkeypatch.setattr("gog_edge.indexing.vectors.index_planning.CANDIDATES", (10,))
    monkeypatch.setattr("gog_edge.indexing.vectors.index_planning.NPROBES", (1,))
    monkeypatch.setattr("gog_edge.indexing.vectors.index_planning.EF_SEARCHES", (10,))
    entry = build_index(tmp_path, "a.faiss", shards, clustered(100, 3), recall=0.999)
    assert entry.factory == "SQfp16" and entry.recall == 1.0
    assert VectorIndex.open(tmp_path, entry, shards, tombstones=NONE).search(clustered(1, 5), 3).ids.min() >= 0


def test_an_unreachable_recall_is_refused_with_the_best_one(tmp_path, shards):
    with pytest.raises(PackError, match=r"recall@10 of 100\.0%; the best, 'IVF64,PQ8x4fsr'.* reaches \d+\.\d%"):
        build_index(tmp_path, "a.faiss", shards, clustered(200, 3), factory="IVF64,PQ8x4fsr", recall=1.0)
    assert not (tmp_path / "a.faiss").exists()


def test_given_parameters_are_used_and_measured(tmp_path, shards):
    entry = build_index(tmp_path, "a.faiss", shards, clustered(80, 3), factory="IVF32,SQ8", params={"nprobe": 1})
    assert entry.params == {"nprobe": 1} and entry.recall < 0.95


@pytest.mark.parametrize("factory", ["IVF9000,SQ8", "Nonsense", "IDMap,Flat", "PCA8,IVF8,Flat", "IVF8,PQ7x4fs"])
def test_unsupported_factories_are_refused(tmp_path, shards, factory):
    with pytest.raises(PackError):
        build_index(tmp_path, "a.faiss", shards, clustered(20, 3), factory=factory)


def test_missing_vectors_and_queries_of_another_dimension_are_refused(tmp_path, shards):
    with pytest.raises(PackError, match="at least one vector"):
        build_index(tmp_path, "a.faiss", VectorShards.open([], DIM), None)
    with pytest.raises(PackError, match=r"shape \[n, 64\], got \(5, 32\)"):
        build_index(tmp_path, "a.faiss", shards, np.zeros((5, 32), np.float32))


def test_very_few_vectors_are_indexed(tmp_path):
    for rows in (1, 2, 9):
        shards = stored(tmp_path, clustered(rows, 1))
        entry = build_index(tmp_path, "a.faiss", shards, None)
        assert entry.recall == 1.0 and entry.recall_k == min(rows, 10)


def test_a_full_disk_is_reported_and_the_previous_file_remains(tmp_path, shards):
    build_index(tmp_path, "a.faiss", shards, None)
    before = (tmp_path / "a.faiss").read_bytes()
    (tmp_path / "a.faiss.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the index cannot be written") as raised:
        build_index(tmp_path, "a.faiss", shards, None)
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "a.faiss").read_bytes() == before and not (tmp_path / "a.faiss.part").exists()
    assert Path("/dev/full").exists()


def test_blockwise_exact_search_equals_faiss(tmp_path):
    vectors = clustered(70_000, 6)  # more than a block
    shards = stored(tmp_path, vectors)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors.astype(np.float16).astype(np.float32))
    queries, reported = clustered(30, 7), []
    found = exact_nearest(shards, queries, 10, lambda *progress: reported.append(progress))
    wanted = flat.search(queries, 10)[1]
    assert np.mean(found == wanted) > 0.99  # equal scores may be in another order
    assert [done for _, done, _ in reported] == [65_536, 70_000] and {total for *_, total in reported} == {70_000}


def test_every_stage_is_reported(tmp_path, shards):
    reported = []
    build_index(tmp_path, "a.faiss", shards, None, factory="IVF32,SQ8", on_progress=lambda *one: reported.append(one))
    stages = list(dict.fromkeys(stage for stage, _, _ in reported))
    assert stages == ["exact search", "training", "indexing", "measuring"]
    assert ("indexing", 3_000, 3_000) in reported
