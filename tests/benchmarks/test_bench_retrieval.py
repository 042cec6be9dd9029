import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_retrieval
from benchmarks.bench_retrieval import as_groups, as_table, vector_line
from benchmarks.peers.registry import parse_names
from benchmarks.retrieval.comparison import Figures, compare
from benchmarks.retrieval.corpus import CROPS, PICTURES, Corpus, SyntheticVectors, make_corpus, write_shards
from benchmarks.retrieval.engines import PEERS, open_engines
from gog_edge.retrieval.vectors.shards import VectorShards

ROWS = 3_000


@pytest.fixture(scope="module")
def source():
    return SyntheticVectors.make()


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    return VectorShards.open(write_shards(source, 20_000, tmp_path_factory.mktemp("vectors")), source.dim)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_synthetic_vectors_have_the_documented_statistics(source, shards):
    rows = shards.take(np.sort(np.random.default_rng(0).choice(len(shards), 4_000, replace=False)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    between = (rows[:2_000] @ rows[2_000:].T).ravel()
    assert 0.45 < np.median(between) < 0.57
    variances = np.linalg.eigvalsh(np.cov(rows.T))
    assert 80 < variances.sum() ** 2 / (variances**2).sum() < 130
    successive = np.einsum("nd,nd->n", shards.take(np.arange(4_000)), shards.take(np.arange(1, 4_001)))
    assert 0.01 < np.mean(successive > 0.98) < 0.04  # nearly equal to the predecessor
    assert 0.55 < np.mean(successive > 0.88) < 0.8  # of the same entity


def test_vectors_depend_on_the_seed_alone_and_existing_files_are_kept(source, tmp_path):
    files = write_shards(source, 200, tmp_path)
    before = [path.stat().st_mtime_ns for path, _ in files]
    assert [path.stat().st_mtime_ns for path, _ in write_shards(SyntheticVectors.make(), 200, tmp_path)] == before
    np.testing.assert_array_equal(SyntheticVectors.make().block(0, 50), source.block(0, 50))
    assert not np.array_equal(SyntheticVectors.make(seed=1).block(0, 50), source.block(0, 50))


def test_crops_are_views_of_stored_entities_and_not_stored(source, shards):
    pictures = source.pictures(shards, 40, seed=3)
    assert pictures.shape == (40, CROPS, source.dim) and pictures.dtype == np.float32
    stored = np.concatenate(list(shards.blocks()))
    nearest = (pictures.reshape(-1, source.dim) @ stored.T).max(axis=1)
    assert nearest.max() < 0.97 and 0.6 < np.mean(nearest > 0.75) < 0.95  # the others show what is not stored
    first = np.einsum("pcd,pkd->pck", pictures, pictures)[:, 0, 1:]
    assert first[:, [2, 5]].mean() > first[:, [0, 1, 3, 4, 6]].mean() + 0.1  # crops 0, 3 and 6 show the same entity


def test_ours_is_measured_at_every_size(tmp_path, capsys):
    arguments = ["--sizes", f"{ROWS},4000", "--peers", "none", "--rounds", "1", "--threads", "1",
                 "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]  # fmt: skip
    assert bench_retrieval.main(arguments) == 0
    line = last_line(capsys)
    for size in ("3k", "4k"):
        assert line[f"p50_ms_1_crop_{size}"] > 0 and line[f"p50_ms_8_crops_{size}"] > 0
        assert line[f"recall10_{size}"] == 1.0 and 20 < line[f"resident_mib_{size}"] < 500
    assert "speed_over_best_peer" not in line and line["missing"] == {}
    assert [one["rows"] for one in line["vectors"]] == [ROWS, 4_000]
    assert all(one["build_rows_s"] > 0 and one["searches"] >= 2 * PICTURES for one in line["vectors"])
    (written,) = (tmp_path / "out").glob("*.json")
    assert json.loads(written.read_text()) == line
    with Image.open(written.with_suffix(".png")) as picture:
        assert picture.width == 1000


def test_missing_peers_are_reported_with_what_they_need(source, tmp_path):
    corpus = make_corpus(source, 300, tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    environments = {"usearch": tmp_path / "nowhere", "qdrant": tmp_path / "env"}
    engines, missing = open_engines(corpus.folder, corpus.rows, ["usearch", "qdrant"], environments, 1)
    try:
        assert [engine.name for engine in engines] == ["ours"]
        assert set(missing) == {"usearch f16", "usearch i8", "qdrant local"}
        assert "python' does not exist" in missing["usearch i8"] and "usearch==" in missing["usearch i8"]
        assert "qdrant" in missing["qdrant local"]
        (figures,) = compare(corpus, engines, 1)
        assert figures.recall10 == 1.0 and figures.over_ours_8 == 1.0 and figures.resident_mib > 20
    finally:
        for engine in engines:
            engine.close()


def test_the_peers_of_the_retrieval_benchmark_are_named():
    assert parse_names("all", PEERS) == ["usearch", "lancedb", "clip-retrieval", "qdrant"]


def test_the_exact_result_equals_a_search_in_numpy(source, tmp_path):
    corpus = make_corpus(source, 300, tmp_path)
    ((vectors, ids),) = json.loads((corpus.folder / "shards.json").read_text())
    stored, queries = np.load(vectors).astype(np.float32), np.load(corpus.folder / "queries.npy")
    nearest = np.argsort(-(queries @ stored.T), axis=-1, kind="stable")[..., :10]
    assert (np.load(ids)[nearest] == corpus.truth).mean() > 0.999  # rounding may swap equal neighbours


def test_recall_counts_the_nearest_that_were_found(tmp_path):
    corpus = Corpus(tmp_path, 4, np.array([[[1, 2, 3, 4]], [[5, 6, 7, 8]]]))
    assert corpus.recall(np.array([[[4, 3, 2, 1]], [[8, 7, 6, 5]]]), 4) == 1.0
    assert corpus.recall(np.array([[[1, 2, 9, 9]], [[5, 9, 9, 9]]]), 4) == 3 / 8
    assert corpus.recall(np.array([[[1, 9, 9, 9]], [[9, 5, 9, 9]]]), 1) == 0.5
    assert corpus.recall(np.array([[[2, 1, 9, 9]]]), 2) == 1.0  # only the first picture


def test_the_best_peer_is_the_fastest_with_sufficient_recall_at_the_largest_size():
    ours = Figures("ours", "", 10**6, {}, 0.99, 0.955, 0.3, 0.4, 1.0, 2.0, 1.0, 1.0, 300.0, 150.0, 9e3, 0.1, 999)
    small = replace(ours, rows=10**5)
    peers = [
        replace(ours, engine="low recall", recall10=0.90, over_ours_8=0.5),
        replace(ours, engine="good", over_ours_8=3.0, over_ours_1=4.0),
        replace(ours, engine="better", over_ours_8=2.5, over_ours_1=5.0),
        replace(ours, engine="slow", over_ours_8=500.0, over_ours_1=900.0),
        replace(small, engine="small", over_ours_8=0.1),
    ]
    line = vector_line([small, ours, *peers])
    assert (line["best_peer"], line["speed_over_best_peer"], line["best_peer_rows"]) == ("better", 2.5, 10**6)
    assert (line["best_peer_1_crop"], line["speed_over_best_peer_1_crop"]) == ("good", 4.0)
    assert line["p50_ms_8_crops_1m"] == 1.0 and line["p50_ms_1_crop_100k"] == 0.3 and line["recall10_1m"] == 0.955
    groups = as_groups([small, ours, *peers])
    assert set(groups["1,000,000 vectors, eight crops"]) == {"ours", "good", "better"}
    assert as_table([small, ours, *peers]).row_count == 7
