"""What is installed is the package and nothing beside it."""

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


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_only_the_package_is_installed(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gog_edge"}
    assert not [name for name in names if name.endswith((".pyc", ".part"))]


@pytest.mark.parametrize("name", NEEDED)
def test_data_files_are_in_it(names, name):
    assert name in names


def test_the_whole_default_bundle_is_in_it(names):
    atlas = ROOT / "gog_edge" / "data" / "atlas"
    files = [path.relative_to(ROOT).as_posix() for path in atlas.rglob("*") if path.is_file()]
    assert set(files) <= set(names)


def test_the_licence_goes_with_it(names):
    assert any(name.endswith("licenses/LICENSE") for name in names)
