import io
import json

import pytest
from atlas_world import countries, flags
from rich.console import Console

from atlas.questions import KINDS
from atlas.testset import QuestionGenerator, Score, items_hash
from benchmarks import bench_atlas
from gog_edge.errors import ArtifactError, InputError

PER_KIND = 2


@pytest.fixture(scope="module")
def items():
    return QuestionGenerator(countries(), flags(), 11).generate(PER_KIND)


@pytest.fixture
def sets(tmp_path, monkeypatch, items):
    path = tmp_path / "testsets.json"
    fixed = {"seed": 11, "per_kind": PER_KIND, "sha256": items_hash(items)}
    path.write_text(json.dumps({"small": fixed, "altered": fixed | {"sha256": "ab" * 32}}))
    monkeypatch.setattr(bench_atlas, "TEST_SETS", path)


def result(correct=True, refused=False, cited=True, actions=("gaze_search", "answer"), ms=10.0):
    return Score(correct, refused, (0.75,), (0.75,), cited, actions, ms)


def test_a_fixed_set_is_generated_again(sets, items):
    assert bench_atlas.load_test_set("small", countries(), flags()) == items


def test_a_set_with_another_hash_or_name_is_refused(sets):
    with pytest.raises(ArtifactError, match=r"'altered' must have the hash abab\w+, got \w+"):
        bench_atlas.load_test_set("altered", countries(), flags())
    with pytest.raises(InputError, match="must be one of small, altered, got 'large'"):
        bench_atlas.load_test_set("large", countries(), flags())


def test_a_set_generated_from_other_flags_is_refused(sets):
    swapped = dict(zip(flags(), reversed(flags().values()), strict=True))
    with pytest.raises(ArtifactError, match="must have the hash"):
        bench_atlas.load_test_set("small", countries(), swapped)


def test_the_figures_of_a_workflow(items):
    scores = [result(correct=item.question.kind != "reflect", ms=float(n)) for n, item in enumerate(items)]
    scores[0] = result(correct=False, actions=("malformed", "answer"), ms=0.0)
    figures = bench_atlas.summary(items, scores)
    assert figures["kinds"] == dict.fromkeys(KINDS, 1.0) | {"glance": 0.5, "reflect": 0.0}
    assert figures["accuracy"] == round(11 / 14, 4) and figures["cited"] == 1.0
    assert figures["gazed"] == round(13 / 14, 4) and figures["malformed"] == round(1 / 14, 4)
    assert figures["median_ms"] == 6.5 and figures["actions_mean"] == 2.0


def test_only_answers_from_the_pack_need_a_citation(items):
    scores = [result(cited=item.question.kind not in ("glance", "invented")) for item in items]
    assert bench_atlas.summary(items, scores)["cited"] == 1.0
    assert bench_atlas.summary(items, [result(correct=False)] * len(items))["cited"] == 0.0


def test_a_kind_without_questions_counts_as_zero(items):
    figures = bench_atlas.summary(items[:3], [result()] * 3)
    assert figures["kinds"]["gaze"] == 1.0 and figures["kinds"]["invented"] == 0.0


def test_the_table_has_a_row_for_each_kind_and_figure(items):
    out = io.StringIO()
    console = Console(width=120, file=out)
    figures = bench_atlas.summary(items, [result()] * len(items))
    table = bench_atlas.as_table({"gog": figures, "direct": figures | {"median_ms": 77.5}})
    console.print(table)
    assert table.row_count == len(KINDS) + len(figures) - 1
    (row,) = [line for line in out.getvalue().splitlines() if "median ms per question" in line]
    assert "10.0" in row and "77.5" in row


def test_the_command_measures_the_shipped_bundle(tmp_path, capsys):
    assert bench_atlas.main(["--limit", "7", "--workflows", "gog,direct", "--out", str(tmp_path / "atlas.json")]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "atlas.json").read_text()) == line
    assert line["questions"] == 7 and (line["seed"], line["sha256"][:8]) == (1, "4f9a4618")
    assert list(line["workflows"]) == ["gog", "direct"] and line["workflows"]["direct"]["gazed"] == 0
    assert line["first_answer_s"] > 0.2 and line["peak_memory_mb"] > 50 and line["gazes"] >= 2
    assert bench_atlas.main(["--set", "nothing"]) == 2
    assert capsys.readouterr().err == "error: the test set must be one of dev, held-out, got 'nothing'\n"
