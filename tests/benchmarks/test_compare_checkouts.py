import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare_checkouts
from benchmarks.compare_checkouts import Checkout, compare, main, measure

ROOT = Path(compare_checkouts.__file__).parents[1]


def test_two_equal_checkouts_give_equal_answers(tmp_path, capsys):
    arguments = ["--other", sys.executable, "--checkout", str(ROOT), "--rounds", "1", "--repeats", "1",
                 "--threads", "1", "--out", str(tmp_path / "comparison.json")]  # fmt: skip
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "comparison.json").read_text()) == line
    assert line["questions"] == 14 and line["different_answers"] == 0 and not line["enough_rounds"]
    assert 0.2 < line["first_answer_s"]["this"] < 60 and 1 < line["question_ms"]["other"] < 10_000


def test_ratios_are_taken_within_rounds():
    assert compare([2.0, 6.0, 1.0], [1.0, 2.0, 2.0]) == {
        "this": 2.0, "other": 2.0, "ratio": 2.0, "ratio_min": 0.5, "ratio_max": 3.0
    }  # fmt: skip


def test_the_order_alternates_and_the_first_round_does_not_count(monkeypatch):
    order = []

    def run(checkout, threads, repeats):
        order.append(checkout.name)
        return len(order)

    monkeypatch.setattr(compare_checkouts, "run", run)
    found = measure([Checkout("this", ROOT, ROOT), Checkout("other", ROOT, ROOT)], rounds=2, threads=1, repeats=1)
    assert order == ["other", "this", "this", "other", "other", "this"]
    assert found == {"this": [3, 6], "other": [4, 5]}


@pytest.mark.parametrize("other", ["bin/python", "nowhere/.venv/bin/python"])
def test_a_folder_without_the_package_is_refused(other, tmp_path, capsys):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert main(["--other", str(tmp_path / other)]) == 2
    assert "must contain gog_edge" in capsys.readouterr().err


def test_a_checkout_that_fails_is_reported_with_its_output(tmp_path, capsys):
    (tmp_path / "gog_edge").mkdir()
    (tmp_path / "gog_edge" / "bundle.py").write_text("raise RuntimeError('damaged checkout')")
    (tmp_path / "gog_edge" / "__init__.py").touch()
    assert main(["--other", sys.executable, "--checkout", str(tmp_path), "--rounds", "1"]) == 1
    assert "damaged checkout" in capsys.readouterr().err
