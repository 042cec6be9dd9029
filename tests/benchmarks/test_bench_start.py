import json

import pytest

from benchmarks.bench_start import FORMS, STAGES, main
from gog_edge.engines.onnx import native
from gog_edge.exporting.policy.export import export_policy

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no library: {native.why_none()}")


@needs_library
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


@needs_library
def test_what_does_not_run_on_our_operators_is_not_measured_as_if_it_did(policies, tmp_path, capsys):
    assert main(["--policy", str(policies[True]), "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "has no graphs for operators of our own" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_policy_that_cannot_be_opened_is_an_error(tmp_path, capsys):
    assert main(["--policy", str(tmp_path), "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "a start with own operators failed" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--start", "ours"), ("--sides", "a"), ("--sides", "0"), ("--sides", "224,900000"),
                                   ("--repeats", "0")])  # fmt: skip
def test_what_there_is_not_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert f"argument {wrong[0]}: " in capsys.readouterr().err
