import json
import os
import subprocess
import sys

import pytest

from benchmarks import bench_build
from benchmarks.bench_build import EMBEDDING, INDEXING, READING, main, same_content, stage_of
from benchmarks.support.resources import process_usage

libzim = pytest.importorskip("libzim")


def test_a_build_is_measured_killed_and_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_build, "SAMPLE_S", 0.02)
    arguments = ["--articles", "40,80", "--kills", "1", "--work", str(tmp_path / "work"), "--out",
                 str(tmp_path / "build.json")]  # fmt: skip
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "build.json").read_text()) == line
    assert line["size_growth"] == 2 and line["killed"]["same_as_unbroken"] is True
    assert line["killed"]["kills"] <= 1 and line["killed"]["whole_shards_embedded_again"] == 0
    assert set(line["memory_growth"]) == {READING, EMBEDDING}
    assert all(stage["peak_mib"] > 50 for stages in line["stages"].values() for stage in stages.values())
    work = tmp_path / "work"
    assert same_content(work / "pack-40", work / "pack-killed") and not same_content(work / "pack-40", work / "pack-80")


def test_the_stage_follows_from_the_files(tmp_path):
    assert stage_of(tmp_path) == READING
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "000001.sqlite").touch()
    assert stage_of(tmp_path) == EMBEDDING
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "000001.faiss").touch()
    assert stage_of(tmp_path) == INDEXING


def test_usage_includes_the_memory_of_child_processes():
    code = "import sys; block = bytearray(int(sys.argv[1]) << 20); print(flush=True); input()"
    usages = []
    for size in (0, 100):  # MiB
        before = process_usage(os.getpid())
        child = subprocess.Popen([sys.executable, "-S", "-c", code, str(size)], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        child.stdout.readline()
        alone, together = process_usage(child.pid), process_usage(os.getpid())
        child.communicate("\n")
        assert together.memory_mib - before.memory_mib == pytest.approx(alone.memory_mib, abs=5)
        usages.append(alone.memory_mib)
    assert usages[1] - usages[0] == pytest.approx(100, abs=5)
    assert process_usage(child.pid).memory_mib == 0  # it has ended
