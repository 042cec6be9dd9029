import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from sample_machines import CUDA, NO_DRIVER, RTX, pc, sample_machine
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.cli.doctor import show_report
from gog_edge.doctor.examine import examine


def run(*args):
    return CliRunner().invoke(app, ["doctor", *args])


def test_the_table_ends_with_the_verdict():
    done = run()
    assert done.exit_code == 0
    assert "ort (the best that works here) can serve" in done.stdout.replace("\n", "")
    assert "machine" in done.stdout and "box" not in done.stdout


def test_one_json_object_and_nothing_else():
    done = run("--json", "--engine", "ort")
    value = json.loads(done.stdout)
    assert done.exit_code == 0 and value["serves"] and value["engine"] == "ort" and value["asked"]
    assert "ort" in value["engines_that_work"]
    assert {one["state"] for one in value["findings"]} <= {"ok", "missing", "wrong"}


def test_exit_code_1_when_it_cannot_serve(tmp_path):
    done = run("--bundle", str(tmp_path), "--json")
    assert done.exit_code == 1 and not json.loads(done.stdout)["serves"]


@pytest.mark.parametrize("library", ["onnxruntime", "faiss"])
def test_it_says_which_library_is_not_there(tmp_path, library):
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('there is no {library}', name='{library}')")
    done = subprocess.run(
        [sys.executable, "-c", "from gog_edge.cli import main; main()", "doctor", "--json", "--engine", "ort"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    value = json.loads(done.stdout)
    assert done.returncode == 1 and not value["serves"], done.stderr
    wanting = [one for one in value["findings"] if one["state"] != "ok" and library in json.dumps(one).lower()]
    assert wanting and "pip install" in json.dumps(wanting)


@pytest.mark.parametrize("args", [("--engine", "nvidia"), ("--engines", "somewhere")])
def test_what_there_is_not_is_refused(args):
    done = run(*args)
    assert done.exit_code == 2 and done.stderr.startswith("gog-edge: ")


def shown(report, width=70):
    console = Console(width=width, record=True, file=io.StringIO())
    show_report(report, console)
    return console.export_text()


def test_commands_are_not_broken_into_lines(tmp_path):
    text = shown(examine(DEFAULT_BUNDLE, "tensorrt-rtx", machine=sample_machine(pc(tmp_path), NO_DRIVER, CUDA)))
    assert f"\n  tensorrt-rtx: gog-edge export engines {DEFAULT_BUNDLE} --engine tensorrt-rtx\n" in text
    assert "cannot serve" in text


def test_a_gpu_is_told(tmp_path):
    text = shown(examine(DEFAULT_BUNDLE, machine=sample_machine(pc(tmp_path), RTX, CUDA)), 160)
    assert "NVIDIA GeForce RTX 4070, SM 89" in text and "580.95.05" in text
