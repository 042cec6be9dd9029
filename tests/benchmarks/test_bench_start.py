import json

import pytest

from benchmarks.bench_start import LAYOUTS, STAGES, main
from gog_edge.engines.onnx import native
from gog_edge.exporting.policy.export import export_policy

needs_native = pytest.mark.skipif(native.library() is None, reason=f"not available: {native.unavailable_reason()}")


@needs_native
def test_both_layouts_start_and_generate_a_token(wide_checkpoints, tmp_path, capsys):
    policy = tmp_path / "policy"
    export_policy(wide_checkpoints[True], policy, precision="int4", block=32, context=1024, parity=False)
    assert main(["--policy", str(policy), "--sides", "56", "--repeats", "1", "--out", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    for layout in LAYOUTS:
        part = line["forms"][layout]["56"]
        assert 0 < part["imported_s"] < part["opened_s"] < part["first_token_s"] and part["peak_mib"] > 50
    assert line["first_token_over_onnxruntime"] > 0 and {*STAGES, "tokens"} <= line.keys()
    assert json.loads((tmp_path / "start-qwen2.5-vl-3b.json").read_text()) == line


@needs_native
def test_a_policy_without_native_graphs_is_refused(policies, tmp_path, capsys):
    assert main(["--policy", str(policies[True]), "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "has no graphs for the native operators" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_policy_that_cannot_be_opened_is_reported(tmp_path, capsys):
    assert main(["--policy", str(tmp_path), "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "a start with own operators failed" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--start", "ours"), ("--sides", "a"), ("--sides", "0"), ("--sides", "224,900000"),
                                   ("--repeats", "0")])  # fmt: skip
def test_invalid_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert f"argument {wrong[0]}: " in capsys.readouterr().err
