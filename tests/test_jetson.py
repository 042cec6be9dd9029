"""What the installer refuses and what it would run, on copies of boxes' files; the budgets, and that they are told as
reckoned. Nothing here was run on a Jetson."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from boxes import agx_orin, lay, orin_nano, pc, thor

from benchmarks.jetson_budget import as_rows, engine_bytes, parsed, reckon_all
from gog_edge.exporting.policy.random_checkpoint import SHAPES, shape_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "jetson" / "install.sh"


def install(*args):
    line = ["bash", str(SCRIPT), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def python(tmp_path):
    """Gives an interpreter of a version; with TensorRT where one is named."""

    def make(minor, tensorrt=""):
        path = tmp_path / f"python3.{minor}"
        has = f'echo "{tensorrt}"' if tensorrt else "exit 1"
        path.write_text(f'#!/bin/sh\ncase "$2" in *tensorrt*) {has} ;; *) echo {minor} ;; esac\n')
        path.chmod(0o755)
        return path

    return make


def test_the_script_is_sound():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(Path("/etc/nv_tegra_release").exists(), reason="this is a Jetson")
def test_off_a_jetson_it_refuses_and_changes_nothing(tmp_path):
    done = install("--venv", tmp_path / "venv")
    assert done.returncode == 1 and "this is no Jetson; on a PC: pip install" in done.stderr
    assert not (tmp_path / "venv").exists()
    assert install("--root", pc(tmp_path / "pc")).returncode == 1


@pytest.mark.parametrize(("line", "said"), [
    ("# R35 (release), REVISION: 4.1, GCID: 33958178\n", "is not JetPack 7 (38, 39)"),
    ("# R40 (release), REVISION: 1.0, GCID: 1\n", "is not JetPack 7 (38, 39)"),
    ("Ubuntu\n", "names no release"),
    ("", "names no release"),
])  # fmt: skip
def test_another_release_is_refused(tmp_path, python, line, said):
    root = lay(tmp_path, {"etc/nv_tegra_release": line})
    done = install("--root", root, "--python", python(12, "10.3"), "--dry-run")
    assert done.returncode == 1 and said in done.stderr and "+" not in done.stdout


@pytest.mark.parametrize("args", [(), ("--cpu",)])
def test_jetpack_6_is_refused_with_what_to_install(tmp_path, python, args):
    done = install("--root", agx_orin(tmp_path / "root"), "--python", python(10, "10.3.0"), "--dry-run", *args)
    assert done.returncode == 1 and "+" not in done.stdout
    assert "JetPack 6 is not supported; install JetPack 7.2, which supports Orin" in done.stderr


@pytest.mark.parametrize("args", [(), ("--cpu",)])
def test_an_older_python(tmp_path, python, args):
    root = orin_nano(tmp_path / "root")
    done = install("--root", root, "--python", python(10, "10.16.2.10"), "--dry-run", *args)
    assert done.returncode == 1 and "needs Python 3.11; install one" in done.stderr


def test_on_the_processor(tmp_path, python):
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12), "--cpu", "--dry-run", "--venv",
                   tmp_path / "venv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cuda-bindings" not in done.stdout and "--system-site-packages" not in done.stdout
    assert "doctor --engine ort" in done.stdout and not (tmp_path / "venv").exists()


@pytest.mark.parametrize("board", [orin_nano, thor])
def test_jetpack_7(tmp_path, python, board):
    done = install("--root", board(tmp_path / "root"), "--python", python(12, "10.16.2.10"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "TensorRT 10.16.2.10" in done.stdout
    assert re.search(r"-m venv --system-site-packages", done.stdout)
    assert r"cuda-bindings\>=13\,\<14" in done.stdout
    assert "-m export.build_engines BUNDLE --engine tensorrt\n" in done.stdout


def test_without_jetpacks_packages(tmp_path, python):
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12), "--dry-run")
    assert done.returncode == 1 and "sudo apt install nvidia-jetpack" in done.stderr


def test_without_a_network(tmp_path, python):
    args = ("--root", orin_nano(tmp_path / "root"), "--python", python(12, "10.16"), "--dry-run", "--wheels")
    (tmp_path / "wheels").mkdir()
    done = install(*args, tmp_path / "wheels")
    assert done.returncode == 1 and "no gog_edge-*-any.whl" in done.stderr
    (tmp_path / "wheels/gog_edge-0.1.0-py3-none-linux_x86_64.whl").touch()
    assert install(*args, tmp_path / "wheels").returncode == 1
    (tmp_path / "wheels/gog_edge-0.1.0-py3-none-any.whl").touch()
    done = install(*args, tmp_path / "wheels")
    assert done.returncode == 0 and f"--no-index --find-links {tmp_path / 'wheels'}" in done.stdout


def test_the_wheel_that_a_pc_makes_for_a_jetson_has_nothing_of_the_pc():
    """Native operators would tie it to the PC's processor."""
    text = (ROOT / "jetson" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall("^ .* pip wheel .*$", text, re.MULTILINE)
    assert command.split()[0] == "GOG_EDGE_NATIVE=off"


def test_an_environment_that_is_there_is_kept(tmp_path, python):
    lay(tmp_path, {"venv/bin/python": ""})
    (tmp_path / "venv/bin/python").chmod(0o755)
    done = install("--root", orin_nano(tmp_path / "root"), "--python", python(12, "10.16"), "--dry-run", "--venv",
                   tmp_path / "venv")  # fmt: skip
    assert done.returncode == 0 and "-m venv" not in done.stdout and "pip install" in done.stdout


@pytest.mark.parametrize("args", [("--gpu",), ("--venv",), ("--wheels",)])
def test_options_there_are_not(args):
    done = install(*args)
    assert done.returncode == 2 and "--help" in done.stderr
    assert install("--help").stdout.startswith("usage: ")


# --- budgets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budgets():
    return reckon_all(parsed([]))


def test_halves_take_two_bytes_of_every_weight():
    for name in SHAPES:
        shape = shape_of(name)
        tensors = shape.tensors()
        table = next(tensor.numel() for key, tensor in tensors.items() if "embed_tokens" in key)
        weights = sum(tensor.numel() for tensor in tensors.values())
        weights -= 0 if shape.config.tie_word_embeddings else table
        engines = engine_bytes(name, "fp16")
        assert engines.decoder + engines.vision == pytest.approx(2 * weights, rel=0.001)
        assert engine_bytes(name, "int4").decoder < 0.5 * engines.decoder


def test_what_fits_which_board(budgets):
    fits = {(one.model, one.precision, one.context): set(one.tokens_s) for one in budgets}
    assert "Orin Nano" in fits["qwen3-vl-2b", "int4", 4096] and "Orin Nano" not in fits["qwen3-vl-8b", "int4", 4096]
    assert "Orin NX" in fits["qwen2.5-vl-7b", "int4", 8192] and "Orin NX" not in fits["qwen2.5-vl-7b", "fp16", 4096]
    assert all({"AGX Orin", "Thor"} <= boards for boards in fits.values())
    for one in budgets:
        assert all((left >= 0) == (board in one.tokens_s) for board, left in one.left.items())


def test_a_longer_conversation_takes_its_cache(budgets):
    short, long = (next(one for one in budgets if (one.model, one.precision, one.context) == ("qwen3-vl-8b", "int4", n))
                   for n in (4096, 8192))  # fmt: skip
    cache = 2 * 36 * 8 * 128 * 2  # keys and values, layers, heads, head_dim, bytes
    assert long.total - short.total == 2 * 4096 * cache
    assert long.tokens_s["Thor"] < short.tokens_s["Thor"]


def test_the_readme_says_what_the_command_says(budgets):
    text = (ROOT / "jetson" / "README.md").read_text(encoding="utf-8")
    rows = [f"| {' | '.join(row)} |" for row in as_rows(budgets)]
    missing = [row for row in rows if row not in text]
    assert not missing, "python -m benchmarks.jetson_budget says otherwise now:\n" + "\n".join(rows)
    assert "Not run on a Jetson" in text
