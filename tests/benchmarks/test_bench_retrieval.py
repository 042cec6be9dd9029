import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_retrieval
from benchmarks.bench_retrieval import as_groups, as_table, vector_line
from benchmarks.retrieval.corpus import PICTURES, make_corpus
from benchmarks.retrieval.engines import PEERS, environments, open_engines, peer_names
from benchmarks.retrieval.race import Figures, race
from benchmarks.retrieval.vectors import BLOCK, CROPS, World, write_shards
from gog_edge.errors import ArtifactError
from gog_edge.retrieval.vectors.shards import VectorShards

ROWS = 3_000


@pytest.fixture(scope="module")
def world():
    return World.make()


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    return VectorShards.open(write_shards(world, 20_000, tmp_path_factory.mktemp("vectors")), world.dim)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_made_vectors_have_the_statistics_that_they_claim(world, shards):
    rows = shards.take(np.sort(np.random.default_rng(0).choice(len(shards), 4_000, replace=False)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    between = (rows[:2_000] @ rows[2_000:].T).ravel()
    assert 0.45 < np.median(between) < 0.57
    variances = np.linalg.eigvalsh(np.cov(rows.T))
    assert 80 < variances.sum() ** 2 / (variances**2).sum() < 130
    follows = np.einsum("nd,nd->n", shards.take(np.arange(4_000)), shards.take(np.arange(1, 4_001)))
    assert 0.01 < np.mean(follows > 0.98) < 0.04  # nearly the one before
    assert 0.55 < np.mean(follows > 0.88) < 0.8  # of the same thing


def test_the_same_seed_makes_the_same_and_what_is_there_is_kept(world, tmp_path):
    files = write_shards(world, 200, tmp_path)
    before = [path.stat().st_mtime_ns for path, _ in files]
    assert [path.stat().st_mtime_ns for path, _ in write_shards(World.make(), 200, tmp_path)] == before
    np.testing.assert_array_equal(World.make().block(0, 50), world.block(0, 50))
    assert not np.array_equal(World.make(seed=1).block(0, 50), world.block(0, 50))
    assert BLOCK == 65_536


def test_crops_are_views_of_stored_things_that_are_not_stored(world, shards):
    pictures = world.pictures(shards, 40, seed=3)
    assert pictures.shape == (40, CROPS, world.dim) and pictures.dtype == np.float32
    stored = np.concatenate(list(shards.blocks()))
    nearest = (pictures.reshape(-1, world.dim) @ stored.T).max(axis=1)
    assert nearest.max() < 0.97 and 0.6 < np.mean(nearest > 0.75) < 0.95  # the others show what is not stored
    among = np.einsum("pcd,pkd->pck", pictures, pictures)[:, 0, 1:]
    assert among[:, [2, 5]].mean() > among[:, [0, 1, 3, 4, 6]].mean() + 0.1  # crops 0, 3 and 6 show the same thing


def test_the_benchmark_measures_ours_at_every_size(tmp_path, capsys):
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


def test_a_peer_that_is_not_here_is_named_with_what_it_needs(world, tmp_path):
    corpus = make_corpus(world, 300, tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    homes = {"usearch": tmp_path / "nowhere", "qdrant": tmp_path / "env"}
    engines, missing = open_engines(corpus.folder, corpus.rows, ["usearch", "qdrant"], homes, 1)
    try:
        assert [engine.name for engine in engines] == ["ours"]
        assert set(missing) == {"usearch f16", "usearch i8", "qdrant local"}
        assert "no Python in" in missing["usearch i8"] and "usearch==" in missing["usearch i8"]
        assert "qdrant" in missing["qdrant local"]
        (figures,) = race(corpus, engines, 1)
        assert figures.recall10 == 1.0 and figures.over_ours_8 == 1.0 and figures.resident_mib > 20
    finally:
        for engine in engines:
            engine.close()


def test_unknown_peers_and_environments_are_refused():
    assert peer_names("all") == list(PEERS) and peer_names("none") == []
    with pytest.raises(ArtifactError, match="no peer milvus; there are usearch"):
        peer_names("lancedb,milvus")
    assert environments(["usearch=/x"]) == {"usearch": Path("/x")}
    for wrong in ("usearch", "usearch=", "milvus=/x"):
        with pytest.raises(ArtifactError, match="NAME=PATH"):
            environments([wrong])


def test_recall_counts_the_nearest_that_were_found(world, tmp_path):
    corpus = make_corpus(world, 300, tmp_path)
    assert corpus.recall(corpus.truth) == 1.0 and corpus.recall(corpus.truth[:3, :1]) == 1.0
    half = corpus.truth.copy()
    half[..., 5:] = -1
    assert corpus.recall(half) == 0.5 and corpus.recall(half, 1) == 1.0
    assert corpus.recall(corpus.truth[..., ::-1], 1) == 0.0


def test_the_best_peer_is_the_quickest_that_finds_enough_at_the_largest_size():
    ours = Figures("ours", "", 10**6, {}, 0.99, 0.955, 0.3, 0.4, 1.0, 2.0, 1.0, 1.0, 300.0, 150.0, 9e3, 0.1, 999)
    small = replace(ours, rows=10**5)
    peers = [
        replace(ours, engine="quick but blind", recall10=0.90, over_ours_8=0.5),
        replace(ours, engine="good", over_ours_8=3.0, over_ours_1=4.0),
        replace(ours, engine="better", over_ours_8=2.5, over_ours_1=5.0),
        replace(ours, engine="far off", over_ours_8=500.0, over_ours_1=900.0),
        replace(small, engine="small", over_ours_8=0.1),
    ]
    line = vector_line([small, ours, *peers])
    assert (line["best_peer"], line["speed_over_best_peer"], line["best_peer_rows"]) == ("better", 2.5, 10**6)
    assert (line["best_peer_1_crop"], line["speed_over_best_peer_1_crop"]) == ("good", 4.0)
    assert line["p50_ms_8_crops_1m"] == 1.0 and line["p50_ms_1_crop_100k"] == 0.3 and line["recall10_1m"] == 0.955
    groups = as_groups([small, ours, *peers])
    assert set(groups["1,000,000 vectors, eight crops"]) == {"ours", "good", "better"}
    assert as_table([small, ours, *peers]).row_count == 7
