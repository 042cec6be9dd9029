"""Runs test_text_export.py with the packages of the extra `text`, whose transformers is not the one of `dev`.

A complete environment takes over a gigabyte. Here pip installs only the packages that differ from this environment, and
all others that the extra needs, such as torch, are linked from it. GOG_EDGE_TEXT_PYTHON names the Python of a complete
environment with `gog_edge[text]` and pytest, to be used instead. GOG_EDGE_OFFLINE=1 skips the test where pip
cannot reach a package index.
"""

import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).with_name("test_text_export.py")
PYTHON, OFFLINE = "GOG_EDGE_TEXT_PYTHON", "GOG_EDGE_OFFLINE"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRA = [Requirement(text) for text in PROJECT["optional-dependencies"]["text"]]
TRANSITIVE = [
    "huggingface_hub==0.36.2",  # transformers 4 needs a version below 1
    "tokenizers==0.22.2",  # transformers 4.57 needs 0.22 to 0.23.0
]


def by_name(paths):
    """The distributions in some folders of packages, by canonical name; those of earlier folders take precedence."""
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=[str(path) for path in paths]):
        found.setdefault(canonicalize_name(distribution.name), distribution)
    return found


def differing(installed):
    """The pins that the distributions of this environment do not satisfy."""
    pins = [*EXTRA, *map(Requirement, TRANSITIVE)]
    versions = {name: distribution.version for name, distribution in installed.items()}
    return [str(pin) for pin in pins if not pin.specifier.contains(versions.get(canonicalize_name(pin.name), "0"))]


def closure(requirements, available):
    """The distributions that satisfy requirements, and theirs in turn. Fails if a version does not fit."""
    pending, needed = list(requirements), {}
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        version = available[name].version if name in available else "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            pytest.fail(f"the extra 'text' needs {requirement}, but {version} is available; adapt pyproject.toml or "
                        "TRANSITIVE", pytrace=False)  # fmt: skip
        extras = needed.setdefault(name, set())
        for extra in {"", *requirement.extras} - extras:
            extras.add(extra)
            own = map(Requirement, available[name].requires or ())
            pending += [one for one in own if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [available[name] for name in needed]


def link(distribution, site):
    """Link the modules and metadata of a distribution into another folder of packages."""
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    for top in sorted(tops):
        if not (site / top).exists():
            (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())


def install(python, packages):
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=30", *packages]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.fail(
            f"pip cannot install {', '.join(packages)}; make a package index available, set {PYTHON} to the Python of "
            f"an environment with gog_edge[text], or set {OFFLINE}=1 to skip this test:\n{done.stderr}",
            pytrace=False,
        )


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with the packages of the extra `text`, pytest, and those of the runtime."""
    if os.environ.get(PYTHON):
        return os.environ[PYTHON]
    if os.environ.get(OFFLINE) == "1":
        pytest.skip(f"{OFFLINE} is 1: pip cannot install the packages of the extra 'text'")
    folder = tmp_path_factory.mktemp("text")
    venv.create(folder, symlinks=True)
    created = folder / "bin" / "python"
    here = by_name(sys.path)
    install(created, differing(here))
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    own = by_name([site])
    runtime = [*PROJECT["dependencies"], "pytest"]
    for distribution in closure([*EXTRA, *map(Requirement, runtime)], here | own):
        if canonicalize_name(distribution.name) not in own:
            link(distribution, site)
    return str(created)


@pytest.mark.skipif(find_spec("optimum") is not None, reason="the extra 'text' is installed here: the tests run anyway")
def test_sentence_encoders_are_exported_with_the_packages_of_the_extra(python):
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [python, "-m", "pytest", "--noconftest", str(TESTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": search})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout
