"""Folders are replaced whole, or stay."""

import json
import shutil
from pathlib import Path

import pytest

from gog_edge.errors import CheckpointError
from gog_edge.exporting.output_folder import replacing


def fill(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"kind": "toy"}))
    (folder / "text").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    fill(tmp_path / "out", "old")
    return tmp_path / "out"


def test_the_new_one_stands_alone(out):
    with replacing(out, "toy") as part:
        fill(part, "new")
    assert (out / "text").read_text() == "new" and names(out.parent) == ["out"]


def test_the_old_one_stands_again_where_the_new_one_cannot(out):
    with pytest.raises(CheckpointError, match="nothing was kept$"), replacing(out, "toy") as part:
        shutil.rmtree(part)
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_what_a_crash_left_aside_is_put_back(out):
    out.rename(out.with_name(".out.old"))
    with pytest.raises(ZeroDivisionError), replacing(out, "toy"):
        1 / 0  # noqa: B018
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_what_a_crash_left_of_the_one_before_goes(out):
    fill(out.with_name(".out.old"), "older")
    with pytest.raises(ZeroDivisionError), replacing(out, "toy"):
        1 / 0  # noqa: B018
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_what_comes_back_meanwhile_costs_nothing(out, monkeypatch):
    """A server that still runs may write to its folder between both steps."""
    rename = Path.rename

    def busy(self, target):
        if self.name == "out.part":
            (out / "cache").mkdir(parents=True)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(CheckpointError, match=r"what was there is in '.*\.out\.old'$"), replacing(out, "toy") as part:
        fill(part, "new")
    monkeypatch.undo()
    shutil.rmtree(out)
    with replacing(out, "toy") as part:
        assert (out / "text").read_text() == "old"
        fill(part, "new")
    assert (out / "text").read_text() == "new" and names(out.parent) == ["out"]
