"""Checks and commands of the installer, with copies of Jetsons' files, and the memory budgets in jetson/README.md.

Nothing here was run on a Jetson.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_machines import agx_orin, orin_nano, pc, thor, write_files

from benchmarks.jetson_budget import as_rows, compute_all, engine_bytes, parse_arguments
from gog_edge.exporting.policy.random_checkpoint import SHAPES, shape_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "jetson" / "install.sh"


def install(*args):
    line = ["bash", str(SCRIPT), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def python(tmp_path):
    """Return a function that creates an interpreter of a version, with a TensorRT version or none."""

    def make(minor, tensorrt=""):
        path = tmp_path / f"python3.{minor}"
        has = f'echo "{tensorrt}"' if tensorrt else "exit 1"
        path.write_text(f'#!/bin/sh\ncase "$2" in *tensorrt*) {has} ;; *) echo {minor} ;; esac\n')
        path.chmod(0o755)
        return path

    return make


def test_the_script_has_valid_syntax():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(Path("/etc/nv_tegra_release").exists(), reason="this is a Jetson")
def test_a_machine_that_is_not_a_jetson(tmp_path):
    done = install("--venv", tmp_path / "venv")
    assert done.returncode == 1 and "this is not a Jetson; on a PC: pip install" in done.stderr
    assert not (tmp_path / "venv").exists()
    assert install("--root", pc(tmp_path / "pc")).returncode == 1


@pytest.mark.parametrize(("line", "message"), [
    ("# R35 (release), REVISION: 4.1, GCID: 33958178\n", "is not JetPack 7 (38, 39)"),
    ("# R40 (release), REVISION: 1.0, GCID: 1\n", "is not JetPack 7 (38, 39)"),
    ("Ubuntu\n", "must name a release of Jetson Linux, got 'Ubuntu'"),
    ("", "must name a release of Jetson Linux, got ''"),
])  # fmt: skip
def test_unsupported_releases(tmp_path, python, line, message):
    root = write_files(tmp_path, {"etc/nv_tegra_release": line})
    done = install("--root", root, "--python", python(12, "10.3"), "--dry-run")
    assert done.returncode == 1 and message in done.stderr and "+" not in done.stdout


@pytest.mark.parametrize("args", [(), ("--cpu",)])
def test_jetpack_6_is_not_supported(tmp_path, python, args):
    done = install("--root", agx_orin(tmp_path / "root"), "--python", python(10, "10.3.0"), "--dry-run", *args)
    assert done.returncode == 1 and "+" not in done.stdout
    assert "JetPack 6 is not supported; install JetPack 7.2, which supports Orin" in done.stderr


@pytest.mark.parametrize("args", [(), ("--cpu",)])
def test_a_python_that_is_too_old(tmp_path, python, args):
    root = orin_nano(tmp_path / "root")
    done = install("--root", root, "--python", python(10, "10.16.2.10"), "--dry-run", *args)
    assert done.returncode == 1 and "Python 3.11 or later is required; install one" in done.stderr


def test_installation_for_the_cpu(tmp_path, python):
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12), "--cpu", "--dry-run", "--venv",
                   tmp_path / "venv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cuda-bindings" not in done.stdout and "--system-site-packages" not in done.stdout
    assert "doctor --engine ort" in done.stdout and not (tmp_path / "venv").exists()


@pytest.mark.parametrize("board", [orin_nano, thor])
def test_installation_on_jetpack_7(tmp_path, python, board):
    done = install("--root", board(tmp_path / "root"), "--python", python(12, "10.16.2.10"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "TensorRT 10.16.2.10" in done.stdout
    assert re.search(r"-m venv --system-site-packages", done.stdout)
    assert r"cuda-bindings\>=13\,\<14" in done.stdout
    assert "/gog-edge export engines BUNDLE --engine tensorrt\n" in done.stdout


def test_without_tensorrt(tmp_path, python):
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12), "--dry-run")
    assert done.returncode == 1 and "sudo apt install nvidia-jetpack" in done.stderr


def test_installation_without_a_network(tmp_path, python):
    args = ("--root", orin_nano(tmp_path / "root"), "--python", python(12, "10.16"), "--dry-run", "--wheels")
    (tmp_path / "wheels").mkdir()
    done = install(*args, tmp_path / "wheels")
    assert done.returncode == 1 and "must contain gog_edge-*-any.whl" in done.stderr
    (tmp_path / "wheels/gog_edge-0.1.0-py3-none-linux_x86_64.whl").touch()
    assert install(*args, tmp_path / "wheels").returncode == 1
    (tmp_path / "wheels/gog_edge-0.1.0-py3-none-any.whl").touch()
    done = install(*args, tmp_path / "wheels")
    assert done.returncode == 0 and f"--no-index --find-links {tmp_path / 'wheels'}" in done.stdout


def test_the_wheel_for_a_jetson_contains_no_compiled_code():
    """Native operators would make it specific to the PC that builds it."""
    text = (ROOT / "jetson" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall("^ .* pip wheel .*$", text, re.MULTILINE)
    assert command.split()[0] == "GOG_EDGE_NATIVE=off"


def test_an_existing_environment_is_kept(tmp_path, python):
    write_files(tmp_path, {"venv/bin/python": ""})
    (tmp_path / "venv/bin/python").chmod(0o755)
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12, "10.16"), "--dry-run", "--venv",
                   tmp_path / "venv")  # fmt: skip
    assert done.returncode == 0 and "-m venv" not in done.stdout and "pip install" in done.stdout


@pytest.mark.parametrize("args", [("--gpu",), ("--venv",), ("--wheels",)])
def test_invalid_options(args):
    done = install(*args)
    assert done.returncode == 2 and "--help" in done.stderr
    assert install("--help").stdout.startswith("usage: ")


# --- budgets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budgets():
    return compute_all(parse_arguments([]))


def test_fp16_engines_have_two_bytes_per_weight():
    for name in SHAPES:
        shape = shape_of(name)
        tensors = shape.tensors()
        table = next(tensor.numel() for key, tensor in tensors.items() if "embed_tokens" in key)
        weights = sum(tensor.numel() for tensor in tensors.values())
        weights -= 0 if shape.config.tie_word_embeddings else table
        engines = engine_bytes(name, "fp16")
        assert engines.decoder + engines.vision == pytest.approx(2 * weights, rel=0.001)
        assert engine_bytes(name, "int4").decoder < 0.5 * engines.decoder


def test_boards_that_a_model_fits(budgets):
    fits = {(one.model, one.precision, one.context): set(one.tokens_s) for one in budgets}
    assert "Orin Nano" in fits["qwen3-vl-2b", "int4", 4096] and "Orin Nano" not in fits["qwen3-vl-8b", "int4", 4096]
    assert "Orin NX" in fits["qwen2.5-vl-7b", "int4", 8192] and "Orin NX" not in fits["qwen2.5-vl-7b", "fp16", 4096]
    assert all({"AGX Orin", "Thor"} <= boards for boards in fits.values())
    for one in budgets:
        assert all((left >= 0) == (board in one.tokens_s) for board, left in one.left.items())


def test_a_longer_context_needs_a_larger_cache(budgets):
    short, long = (next(one for one in budgets if (one.model, one.precision, one.context) == ("qwen3-vl-8b", "int4", n))
                   for n in (4096, 8192))  # fmt: skip
    assert long.total - short.total == 2 * 4096 * 144 * 1024  # 2 caches, 144 KiB for each token
    assert long.tokens_s["Thor"] < short.tokens_s["Thor"]


def test_the_readme_contains_the_commands_table(budgets):
    text = (ROOT / "jetson" / "README.md").read_text(encoding="utf-8")
    rows = [f"| {' | '.join(row)} |" for row in as_rows(budgets)]
    missing = [row for row in rows if row not in text]
    assert not missing, "python -m benchmarks.jetson_budget now prints:\n" + "\n".join(rows)
    assert "Not tested on a Jetson" in text
