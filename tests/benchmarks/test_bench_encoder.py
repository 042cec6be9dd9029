import json

import numpy as np
import pytest
from tiny_clip import VISION, write_tiny_clip

from benchmarks import bench_encoder
from benchmarks.bench_encoder import EAGER, as_rows, as_table, compare_encoders
from gog_edge.errors import BackendError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder")


@pytest.fixture(scope="module")
def tiny(work):
    write_tiny_clip(work / "checkpoints" / "tiny", VISION | {"width": 64})
    return str(work / "checkpoints" / "tiny")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_encoder, "STREAM", (2,))


def test_both_precisions_are_compared_with_open_clip(work, tiny, tmp_path, capsys):
    arguments = ["--model", tiny, "--work", str(work), "--out", str(tmp_path / "results"), "--rounds", "3",
                 "--threads", "1"]  # fmt: skip
    assert bench_encoder.main(arguments) == 0
    output = capsys.readouterr().out
    line = json.loads(output.splitlines()[-1])
    for precision in ("fp32", "int8"):
        for batch in (1, 8):
            ratio = line["ratios"][f"ours, {precision}"][f"batch {batch}"]
            assert line[f"{precision}_over_eager_batch_{batch}"] == ratio > 0
    assert line["int8_min_cosine"] >= 0.99 and "open_clip 3" in line["about"] and "processor" in output
    assert list(line["ms"]) == [EAGER, "ours, fp32", "ours, int8"] and set(line["ratios"]) == set(list(line["ms"])[1:])
    assert all(ms > 0 for parts in line["ms"].values() for ms in parts.values())
    assert json.loads((tmp_path / "results" / "encoder-tiny.json").read_text()) == line


def test_an_existing_export_is_used_again(work, tiny):
    before = (work / "tiny" / "int8" / "manifest.json").stat().st_mtime_ns
    figures = compare_encoders(work, model=tiny, threads=1, rounds=3, batches=(2,))
    assert (work / "tiny" / "int8" / "manifest.json").stat().st_mtime_ns == before
    assert list(figures.ms[EAGER]) == ["batch 2", "preprocess"]
    rows = as_rows(figures)
    assert len(as_table(figures).columns) == {len(row) for row in rows}.pop() == 5
    assert rows[0][1].endswith("(1.00)") and f"({figures.ratios['ours, int8']['batch 2']:.2f})" in rows[2][1]
    assert figures.throughput["ours, int8"][2].images_s > 0


def test_ratios_are_medians_of_the_ratios_within_rounds():
    seconds = {"batch 1": np.array([[1.0, 10.0, 2.0], [0.5, 5.0, 1.0]])}
    ms, ratios = bench_encoder._medians([EAGER, "ours"], seconds)
    assert ms == {EAGER: {"batch 1": 2000.0}, "ours": {"batch 1": 1000.0}} and ratios == {"ours": {"batch 1": 2.0}}


def test_an_unknown_model_is_reported(tmp_path, capsys):
    assert bench_encoder.main(["--model", "ViT-Z-1", "--work", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "open_clip eager: its process ended" in capsys.readouterr().err
    with pytest.raises(BackendError, match=r"export_clip.*none\.safetensors"):
        bench_encoder._export("ViT-B-32", tmp_path / "none.safetensors", tmp_path / "out", "fp32")
