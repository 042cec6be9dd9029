import io
import json

import pytest
from atlas_world import countries, flags
from rich.console import Console

from atlas.questions import KINDS
from atlas.scoring import Score
from atlas.testset import SetMaker, items_hash
from benchmarks import bench_atlas
from gog_edge.errors import ArtifactError

PER_KIND = 2


@pytest.fixture(scope="module")
def items():
    return SetMaker(countries(), flags(), 11).make(PER_KIND)


@pytest.fixture
def sets(tmp_path, monkeypatch, items):
    path = tmp_path / "testsets.json"
    fixed = {"seed": 11, "per_kind": PER_KIND, "sha256": items_hash(items)}
    path.write_text(json.dumps({"small": fixed, "altered": fixed | {"sha256": "ab" * 32}}))
    monkeypatch.setattr(bench_atlas, "TEST_SETS", path)


def result(right=True, refused=False, cited=True, actions=("gaze_search", "answer"), ms=10.0):
    return Score(right, refused, (0.75,), (0.75,), cited, actions, ms)


def test_a_fixed_set_is_drawn_anew(sets, items):
    assert bench_atlas.load_test_set("small", countries(), flags()) == items


def test_a_set_of_another_hash_or_name_is_refused(sets):
    with pytest.raises(ArtifactError, match="fixed was abab"):
        bench_atlas.load_test_set("altered", countries(), flags())
    with pytest.raises(ArtifactError, match="no test set 'large'; there are small, altered"):
        bench_atlas.load_test_set("large", countries(), flags())


def test_other_flags_are_noticed(sets):
    swapped = dict(zip(flags(), reversed(flags().values()), strict=True))
    with pytest.raises(ArtifactError, match="has the hash"):
        bench_atlas.load_test_set("small", countries(), swapped)


def test_the_summary_of_a_workflow(items):
    scores = [result(right=item.question.kind != "reflect", ms=float(n)) for n, item in enumerate(items)]
    scores[0] = result(right=False, actions=("malformed", "answer"), ms=0.0)
    figures = bench_atlas.summary(items, scores)
    assert figures["kinds"] == dict.fromkeys(KINDS, 1.0) | {"glance": 0.5, "reflect": 0.0}
    assert figures["accuracy"] == round(11 / 14, 4) and figures["cited"] == 1.0
    assert figures["gazed"] == round(13 / 14, 4) and figures["malformed"] == round(1 / 14, 4)
    assert figures["median_ms"] == 6.5 and figures["actions_mean"] == 2.0


def test_only_answers_from_the_snapshot_need_a_source(items):
    scores = [result(cited=item.question.kind not in ("glance", "invented")) for item in items]
    assert bench_atlas.summary(items, scores)["cited"] == 1.0
    assert bench_atlas.summary(items, [result(right=False)] * len(items))["cited"] == 0.0


def test_a_first_part_can_be_summed_up(items):
    figures = bench_atlas.summary(items[:3], [result()] * 3)
    assert figures["kinds"]["gaze"] == 1.0 and figures["kinds"]["invented"] == 0.0


def test_the_table_has_a_row_for_each_kind(items):
    out = io.StringIO()
    console = Console(width=120, file=out)
    figures = bench_atlas.summary(items, [result()] * len(items))
    console.print(bench_atlas.as_table({"gog": figures, "direct": figures}))
    text = out.getvalue()
    assert all(kind in text for kind in (*KINDS, "accuracy", "gog", "direct", "median_ms"))
    assert bench_atlas.share([]) == 0.0 and bench_atlas.share([True, False]) == 0.5
