import json
import shutil
import subprocess
import sys
import time

import onnxruntime
import psutil
import pytest

from export import build_engines as command
from export import check_lifted
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.manifest import read_built


def last_line(said):
    return json.loads(said.splitlines()[-1])


def test_a_bundle_gets_engines_in_its_own_folder(tmp_path, capsys):
    engine = "ort-cuda"
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "atlas")
    assert command.main([str(tmp_path / "atlas"), "--engine", engine, "--context", "512"]) == 0
    line = last_line(capsys.readouterr().out)
    out = tmp_path / "atlas" / "engines" / engine
    assert line["out"] == str(out) and line["engine"] == engine and line["context"] == 512
    assert read_built(out, tmp_path / "atlas", engine).parity == line["parity"] != {}
    assert line["parity"]["decoder"]["logits_cosine"] > 0.999
    assert [entry["sm"] for entry in line["graphs"]] == [None] * 4 and line["peak_mib"] > 50


def test_the_last_line_names_each_graph_for_each_gpu(tmp_path):
    """As from a shell, with the other processes that building starts."""
    done = subprocess.run(
        [sys.executable, "-m", "export.build_engines", str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm",
         "120,86", "--out", str(tmp_path / "out"), "--no-parity"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = last_line(done.stdout)
    assert line["parity"] == {} and line["version"].startswith("1.7")
    assert [(entry["name"], entry["sm"]) for entry in line["graphs"]][:3] == [
        ("decoder", 86), ("decoder", 120), ("vision", 86)]  # fmt: skip
    for entry in line["graphs"]:
        assert entry["bytes"] == (tmp_path / "out" / entry["file"]).stat().st_size
        assert entry["weights"] < entry["bytes"] < 1.25 * entry["weights"] + (32 << 20)
        assert entry["seconds"] > 0 and entry["layers"] > 5 and entry["peak_mib"] > 50
    decoder = line["graphs"][0]
    assert decoder["kv_cache_update"] == 2 * decoder["attention"] == 12


def test_a_killed_command_leaves_what_was_there(tmp_path):
    """Nor does the process that it had begun go on."""
    out = tmp_path / "out"
    asked = [str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm", "86", "--out", str(out), "--no-parity"]
    assert command.main([*asked, "--context", "256"]) == 0
    killed = subprocess.Popen([sys.executable, "-m", "export.build_engines", *asked])
    while not (tmp_path / "out.part" / "decoder.engine").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    begun = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    assert begun and not psutil.wait_procs(begun, timeout=60)[1]
    assert read_built(out, DEFAULT_BUNDLE, "tensorrt-rtx").context == 256
    assert command.main(asked) == 0
    assert read_built(out, DEFAULT_BUNDLE, "tensorrt-rtx").context == 2048
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options, said", [
    (["--engine", "tensorrt-rtx", "--sm", "90"], "builds no engines for SM 90"),
    (["--engine", "tensorrt-rtx", "--context", "64"], "give --context at least 128"),
    (["--engine", "tensorrt"], "'tensorrt' is not to be had here"),
    (["--engine", "ort"], "engines of 'ort' cannot be built"),
])  # fmt: skip
def test_refusals_are_one_line(tmp_path, capsys, options, said):
    assert command.main([str(DEFAULT_BUNDLE), "--out", str(tmp_path / "out"), *options]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and said in errors[-1]
    assert not (tmp_path / "out").exists()


def test_what_is_no_bundle_is_refused(tmp_path, capsys):
    assert command.main([str(tmp_path), "--engine", "ort-cuda"]) == 1
    assert "is this the folder of a bundle?" in capsys.readouterr().err


def test_gpus_are_numbers(capsys):
    with pytest.raises(SystemExit):
        command.main([str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm", "8.6,ada"])
    assert "'8.6,ada' is no list of compute capabilities, such as 86,89,120" in capsys.readouterr().err


def test_an_onnx_runtime_that_is_too_old_compares_nothing_and_says_so(tmp_path, monkeypatch, capsys):
    """Nothing is left out unless that was asked for."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    asked = [str(DEFAULT_BUNDLE), "--engine", "ort-cuda", "--context", "512", "--out", str(tmp_path / "out")]
    assert command.main(asked) == 1
    assert "build with --no-parity" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command.main([*asked, "--no-parity"]) == 0
    assert last_line(capsys.readouterr().out)["parity"] == {}


def test_graphs_are_compared_without_building(capsys):
    asked = [str(DEFAULT_BUNDLE), "--kind", "decomposed"]
    assert check_lifted.main([*asked, "--context", "512"]) == 0
    report = last_line(capsys.readouterr().out)
    assert report["kind"] == "decomposed" and report.keys() >= {"decoder", "vision", "image", "text"}
    assert check_lifted.main([*asked, "--context", "1000000"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
