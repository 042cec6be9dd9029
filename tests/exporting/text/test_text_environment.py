"""Runs test_text_export.py where the extra `text` is installed, since its transformers is not the one of `dev`.

GOG_EDGE_TEXT_PYTHON names the Python of such an environment, with pytest in it. With GOG_EDGE_TEST_TEXT=1 one is
created with pip. This is not the default: it takes a minute or more, and 1.2 GB even with a torch for the CPU only.
"""

import os
import subprocess
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).with_name("test_text_export.py")
PYTHON, CREATE = "GOG_EDGE_TEXT_PYTHON", "GOG_EDGE_TEST_TEXT"


@pytest.fixture
def python(tmp_path):
    """The Python of an environment with the extra `text`."""
    if os.environ.get(PYTHON):
        return os.environ[PYTHON]
    if os.environ.get(CREATE) != "1":
        pytest.skip(f"set {PYTHON} to the Python of an environment with gog_edge[text], or {CREATE}=1 to create one")
    venv.create(tmp_path / "text", with_pip=True)
    created = str(tmp_path / "text" / "bin" / "python")
    subprocess.run([created, "-m", "pip", "install", "--quiet", f"{ROOT}[cpu,text]", "pytest"], check=True)
    return created


@pytest.mark.skipif(find_spec("optimum") is not None, reason="the extra 'text' is installed here: the tests run anyway")
def test_sentence_encoders_are_exported_in_an_environment_of_their_own(python):
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [python, "-m", "pytest", "-q", "--noconftest", str(TESTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "PYTHONPATH": search})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
