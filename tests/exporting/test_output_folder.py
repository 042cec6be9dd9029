"""Output folders are replaced as a whole, or left as they were."""

import json
import shutil
from pathlib import Path

import pytest

from gog_edge.errors import CheckpointError
from gog_edge.exporting.output_folder import atomic_output_folder, check_disk_space


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


def test_new_content_replaces_the_old(out):
    with atomic_output_folder(out, "toy") as part:
        fill(part, "new")
    assert (out / "text").read_text() == "new" and names(out.parent) == ["out"]


def test_old_content_is_restored_if_the_new_folder_disappears(out):
    with pytest.raises(CheckpointError, match="nothing was kept$"), atomic_output_folder(out, "toy") as part:
        shutil.rmtree(part)
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_a_folder_left_by_a_crash_during_the_swap_is_restored(out):
    out.rename(out.with_name(".out.old"))
    with pytest.raises(ZeroDivisionError), atomic_output_folder(out, "toy"):
        1 / 0  # noqa: B018
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_a_folder_left_by_a_crash_after_the_swap_is_deleted(out):
    fill(out.with_name(".out.old"), "older")
    with pytest.raises(ZeroDivisionError), atomic_output_folder(out, "toy"):
        1 / 0  # noqa: B018
    assert (out / "text").read_text() == "old" and names(out.parent) == ["out"]


def test_old_content_is_kept_if_another_process_creates_the_folder_during_the_swap(out, monkeypatch):
    """A running server may write to its cache folder between the two renames."""
    rename = Path.rename

    def busy(self, target):
        if self.name == "out.part":
            (out / "cache").mkdir(parents=True)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    message = r"the previous content is in '.*\.out\.old'$"
    with pytest.raises(CheckpointError, match=message), atomic_output_folder(out, "toy") as part:
        fill(part, "new")
    monkeypatch.undo()
    shutil.rmtree(out)
    with atomic_output_folder(out, "toy") as part:
        assert (out / "text").read_text() == "old"
        fill(part, "new")
    assert (out / "text").read_text() == "new" and names(out.parent) == ["out"]


@pytest.mark.parametrize("kind", ["policy", "engines"])
def test_folders_of_another_kind_are_not_replaced(out, kind):
    with pytest.raises(CheckpointError, match=f"is not a folder of kind '{kind}'"), atomic_output_folder(out, kind):
        pass
    assert (out / "text").read_text() == "old"


def test_a_full_disk_is_reported_in_advance(tmp_path):
    check_disk_space(tmp_path, 1, "a policy")
    with pytest.raises(CheckpointError, match=r"GB free, a policy takes about 1000000000\.0 GB; free some space$"):
        check_disk_space(tmp_path, 10**18, "a policy")
