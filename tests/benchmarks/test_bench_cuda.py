import json
import shutil

import pytest

from benchmarks import bench_cuda
from benchmarks.support.resources import device_bandwidth
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.cuda import device_properties
from gog_edge.errors import BackendError


def test_the_processor_is_measured_and_missing_engines_are_reported(capsys):
    assert bench_cuda.main(["--engine", "ort,ort-cuda,tensorrt-rtx", "--scale", "0.05", "--repeats", "1"]) == 0
    output = capsys.readouterr().out
    line = json.loads(output.splitlines()[-1])
    assert set(line["engines"]) == {"ort"} and min(line["engines"]["ort"].values()) > 0
    for name in ("ort-cuda", "tensorrt-rtx"):
        assert f"{DEFAULT_BUNDLE} --engine {name}" in line["missing"][name]
        assert f"{name} is missing: " in output.replace("\n", " ")


def test_a_run_without_an_available_engine_fails(tmp_path, capsys):
    assert bench_cuda.main(["--engine", "ort-cuda"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["engines"] == {}
    assert bench_cuda.main([str(tmp_path)]) == 1 and "bundle.toml' does not exist" in capsys.readouterr().err
    assert bench_cuda.main(["--engine", "vulkan"]) == 2 and "vulkan" in capsys.readouterr().err


def test_a_remote_policy_is_refused(tmp_path, capsys):
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines", "cache"))
    where = tmp_path / "bundle" / "bundle.toml"
    remote = 'url = "http://127.0.0.1:1/v1"\nmodel = "m"\ndialect = "atlas"\nfactor = 28'
    where.write_text(where.read_text().replace('path = "policy"', remote))
    assert bench_cuda.main([str(tmp_path / "bundle")]) == 1
    assert "must be local, but a server runs it" in capsys.readouterr().err


def test_the_memory_bandwidth_of_a_gpu_is_measured_if_there_is_one():
    try:
        device_properties()
    except BackendError as exc:
        with pytest.raises(BackendError) as caught:
            device_bandwidth(tries=1, size=1 << 20)
        assert str(caught.value) == str(exc)
    else:
        assert device_bandwidth(tries=2, size=1 << 26) > 1e9
