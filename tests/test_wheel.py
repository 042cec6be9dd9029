"""The wheel: what it contains, and that it runs without the checkout on the newest Python that is installed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = (
    "gog_edge/__init__.py",
    "gog_edge/py.typed",
    "gog_edge/policy/dialect/gog.toml",
    "gog_edge/serve/kiosk/index.html",
    "gog_edge/data/atlas/bundle.toml",
)
ROW = ROOT / "gog_edge/data/atlas/samples/row.jpg"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


def test_only_the_package_is_installed(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gog_edge"}
    assert not [name for name in names if name.endswith((".pyc", ".part"))]


@pytest.mark.parametrize("name", NEEDED)
def test_data_files_are_included(names, name):
    assert name in names


def test_the_complete_default_bundle_is_included(names):
    atlas = ROOT / "gog_edge" / "data" / "atlas"
    files = [path.relative_to(ROOT).as_posix() for path in atlas.rglob("*") if path.is_file()]
    assert set(files) <= set(names)


def test_the_licence_is_included(names):
    assert any(name.endswith("licenses/LICENSE") for name in names)


# --- the wheel in an environment of its own, with the extra `cpu` only ------------------------------


def interpreters():
    """Yield (minor version, path) of every CPython 3 that runs on this machine."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(11, 20):
        found = [shutil.which(f"python3.{minor}"), *pyenv.glob(f"3.{minor}.*/bin/python")]
        for path in filter(None, found):
            code = "import sys, venv; print(sys.version_info[1])"
            done = subprocess.run([str(path), "-c", code], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                yield int(done.stdout), str(path)
                break


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment with the newest Python here, the wheel, and the extra `cpu`."""
    minor, python = max(interpreters())
    if minor <= sys.version_info[1]:
        pytest.skip(f"no Python newer than 3.{minor} is installed here; the suite itself runs on it")
    home = tmp_path_factory.mktemp("newest") / "env"
    subprocess.run([python, "-m", "venv", str(home)], check=True, timeout=120)
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, f"{wheel}[cpu]"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"Python 3.{minor}: {done.stderr}"
    return home / "bin"


def run(installed, *words, code=0, cwd):
    done = subprocess.run([str(installed / words[0]), *map(str, words[1:])], capture_output=True, text=True,
                          timeout=300, check=False, cwd=cwd)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_wheel_answers_a_question(installed, tmp_path):
    question = "What is the capital of the country of the second flag from the left?"
    done = run(installed, "gog-edge", "ask", ROW, question, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["answer"] == "Helsinki"


def test_every_command_of_the_wheel_has_help(installed, tmp_path):
    for words in (["--help"], ["serve", "--help"], ["ask", "--help"], ["doctor", "--help"], ["probe", "--help"],
                  ["pack", "build", "--help"], ["export", "policy", "--help"], ["export", "clip", "--help"],
                  ["export", "text", "--help"], ["export", "engines", "--help"], ["export", "check", "--help"],
                  ["bundle", "init", "--help"]):  # fmt: skip
        assert "Usage" in run(installed, "gog-edge", *words, cwd=tmp_path).stdout
    assert "--bundle" in run(installed, "python", "-m", "gog_edge.serve", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("export", "policy", "checkpoint", "out"), "export"),
        (("export", "clip", "model", "out"), "export"),
        (("export", "text", "model", "out"), "text"),
        (("pack", "build", ".", "out", "--text-only"), "index"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(installed, tmp_path, words, extra):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "model").mkdir()
    done = run(installed, "gog-edge", *words, code=2, cwd=tmp_path)
    assert f"pip install 'gog_edge[{extra}]'" in done.stderr and done.stderr.count("\n") == 1, done.stderr
