import json

import pytest

from benchmarks.bench_start import FORMS, STAGES, main
from gog_edge.exporting.policy_export import export_policy


def test_both_forms_start_and_say_a_token(wide_checkpoints, tmp_path, capsys):
    policy = tmp_path / "policy"
    export_policy(wide_checkpoints[True], policy, precision="int4", block=32, context=1024, parity=False)
    assert main(["--policy", str(policy), "--sides", "56", "--repeats", "1", "--out", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    for form in FORMS:
        part = line["forms"][form]["56"]
        assert 0 < part["imported_s"] < part["opened_s"] < part["first_token_s"] and part["peak_mib"] > 50
    assert line["first_token_over_onnxruntime"] > 0 and {*STAGES, "tokens"} <= line.keys()
    assert json.loads((tmp_path / "start-qwen2.5-vl-3b.json").read_text()) == line


def test_a_policy_that_cannot_be_opened_is_an_error(tmp_path, capsys):
    assert main(["--policy", str(tmp_path), "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "a start with own operators failed" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["ours", ""])
def test_there_are_two_forms(form):
    with pytest.raises(SystemExit):
        main(["--start", form])
