"""The package runs on Python 3.10, the only one that JetPack 6 builds its TensorRT for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RUNTIME = ("gog_edge.cli", "gog_edge.serve.app", "gog_edge.doctor.examine", "gog_edge.policy.local",
           "gog_edge.policy.remote", "gog_edge.engines.trt", "gog_edge.retrieval.gpu_search")
BUILDER = ("export.build_engines",)


def test_the_oldest_python_stands_everywhere():
    assert 'requires-python = ">=3.10"' in PYPROJECT and 'target-version = "py310"' in PYPROJECT
    assert "onnxruntime==1.23.2; python_version < '3.11'" in PYPROJECT


def test_nothing_is_used_that_python_3_10_lacks():
    """What numpy's stubs, which are for later ones, do not tell there is no fault of ours."""
    done = subprocess.run([sys.executable, "-m", "mypy", "--python-version", "3.10", "--disable-error-code",
                           "no-any-return"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("python3.10"), reason="there is no python3.10")
def test_python_3_10_compiles_every_file():
    code = "import pathlib, sys; [compile(p.read_bytes(), p, 'exec') for a in sys.argv[1:] for p in pathlib.Path(a).rglob('*.py')]"
    folders = ("gog_edge", "export", "index")
    done = subprocess.run([shutil.which("python3.10"), "-W", "error", "-c", code, *folders], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    if "command not found" in done.stderr:  # a version manager's stand-in
        pytest.skip("there is no python3.10")
    assert done.returncode == 0, done.stderr
