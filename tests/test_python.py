"""The package runs on Python 3.10, the only one that JetPack 6 builds its TensorRT for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILE = "import sys; [compile(open(path, 'rb').read(), path, 'exec') for path in sys.stdin.read().split('\\n')]"
LIBRARIES = "import faiss, fastapi, llguidance, numpy, onnx, onnxruntime, PIL, rich, tokenizers, tomli, typer, uvicorn"
# What a Jetson serves, and what it builds its engines with.
IMPORT = ("import gog_edge.cli, gog_edge.serve.app, gog_edge.policy.local, gog_edge.doctor.examine, "
          "gog_edge.engines.trt, gog_edge.retrieval.gpu_search, export.build_engines")


def run(line, **options):
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.fixture(scope="module")
def python():
    found = shutil.which("python3.10")
    if found is None or run([found, "-c", ""]).returncode:  # a version manager's stand-in is none
        pytest.skip("there is no python3.10")
    return found


def test_it_is_the_oldest_that_is_said_to_do():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text and 'target-version = "py310"' in text  # ruff refuses newer syntax


def test_nothing_is_used_that_it_lacks():
    """numpy's stubs are for later ones, and tell mypy less here: an Any that comes of it is no fault."""
    line = [sys.executable, "-m", "mypy", "--python-version", "3.10", "--disable-error-code", "no-any-return"]
    done = run(line)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_compiles_every_file(python):
    paths = [str(path) for folder in ("gog_edge", "export", "index") for path in (ROOT / folder).rglob("*.py")]
    done = run([python, "-W", "error", "-c", COMPILE], input="\n".join(paths))
    assert done.returncode == 0, done.stderr


def test_it_imports_what_a_jetson_runs(python):
    if run([python, "-c", LIBRARIES]).returncode:
        pytest.skip("its libraries are not installed")
    done = run([python, "-W", "error", "-c", IMPORT])
    assert done.returncode == 0, done.stderr
