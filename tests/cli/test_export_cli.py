"""`gog-edge export`, and the modules of the checkout that run the same functions."""

import inspect
import json
import shutil
import subprocess
import sys
import time

import onnxruntime
import psutil
import pytest
from PIL import Image
from tiny_clip import write_tiny_clip
from typer.testing import CliRunner

from export import (
    build_engines,
    check_conversion,
    check_parity,
    export_clip,
    export_policy,
    export_text,
)
from export import random_checkpoint as random_checkpoint_module
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.cli import export as commands
from gog_edge.engines.manifest import read_engine_manifest

PLAIN_GRAPHS = {"decoder.onnx", "vision.onnx"}


def run(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def last_line(output):
    return json.loads(output.splitlines()[-1])


def graphs_in(folder):
    return {path.name for path in folder.glob("*.onnx")}


# --- policy --------------------------------------------------------------------------------------


def test_a_policy_is_exported_checked_and_exported_again(checkpoints, tmp_path):
    out = tmp_path / "policy"
    exported = run("policy", checkpoints[True], out, "--context", "512")
    assert exported.exit_code == 0, exported.output
    assert last_line(exported.stdout)["parity"]["passed"] is True and "decoder.onnx" in exported.stdout
    checked = run("check", out, "--checkpoint", checkpoints[True], "--episodes", "1")
    assert checked.exit_code == 0 and last_line(checked.stdout)["graphs"]["greedy_differ"] == 0
    other = run("check", out, "--checkpoint", checkpoints[False])
    assert other.exit_code == 1 and other.stderr.startswith("gog-edge: ") and "was not exported from" in other.stderr
    again = run("policy", checkpoints[True], out, "--engine", "tensorrt-rtx", "--no-parity")
    assert again.exit_code == 0 and last_line(again.stdout)["parity"] == {}
    assert "build its engines: gog-edge export engines BUNDLE --engine tensorrt-rtx\n" in again.stdout


@pytest.mark.parametrize("options, graphs", [
    ([], {"native_decoder.onnx", "native_vision.onnx"}),
    (["--cpu-layout", "prefill"], {"prefill.onnx"}),
    (["--engine", "tensorrt-rtx"], set()),
    (["--engine", "ort-cuda", "--cpu-layout", "none"], set()),
])  # fmt: skip
def test_the_engine_decides_the_default_cpu_layout(wide_checkpoints, tmp_path, options, graphs):
    done = run("policy", wide_checkpoints[True], tmp_path / "out", "--precision", "int4", "--block", "32",
               "--no-parity", *options)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert graphs_in(tmp_path / "out") == PLAIN_GRAPHS | graphs


@pytest.mark.parametrize("options, code, message", [
    (["--engine", "openvino"], 2, "--engine must be one of ort, ort-cuda, tensorrt, tensorrt-rtx, got 'openvino'"),
    (["--precision", "int2"], 2, "--precision must be one of fp32, fp16, int4, got 'int2'"),
    (["--cpu-layout", "grouped"], 2, "--cpu-layout must be one of native, prefill, none, got 'grouped'"),
    (["--precision", "int4", "--engine", "ort-cuda", "--cpu-layout", "native"], 1, "omit --cpu-layout native"),
    (["--precision", "int4", "--block", "48"], 1, "'block' must be one of 32, 64, 128, 256, got 48"),
])  # fmt: skip
def test_invalid_policy_options_are_refused(checkpoints, tmp_path, capsys, options, code, message):
    assert export_policy.main([str(checkpoints[True]), str(tmp_path / "out"), *options]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_default_options_are_those_of_the_exporter():
    from gog_edge.exporting.policy.export import DEFAULT_BLOCK, DEFAULT_CONTEXT
    from gog_edge.exporting.policy.random_checkpoint import SHAPES

    defaults = {name: value.default for name, value in inspect.signature(commands.policy).parameters.items()}
    assert (defaults["block"], defaults["context"]) == (DEFAULT_BLOCK, None)
    assert f"default: {DEFAULT_CONTEXT}, or what" in " ".join(run("policy", "--help").output.replace("│", " ").split())
    shapes = run("random-checkpoint", "--help").output
    assert all(name.rpartition("-")[2] in shapes for name in SHAPES)


# --- clip ----------------------------------------------------------------------------------------


def test_an_encoder_is_exported_in_a_precision_and_compared_on_pictures(tmp_path):
    write_tiny_clip(tmp_path / "model")
    (tmp_path / "own").mkdir()
    words = ["clip", tmp_path / "model", tmp_path / "out", "--precision", "int8", "--pictures", tmp_path / "own"]
    done = run(*words)
    assert done.exit_code == 1 and "has no pictures" in done.stderr and "--pictures" in done.stderr
    Image.new("RGB", (40, 30), "red").save(tmp_path / "own" / "one.PNG")
    done = run(*words)
    assert done.exit_code == 0, done.output
    line = last_line(done.stdout)
    assert line["precision"] == "int8" and line["parity"]["image"]["tried"] == 16 and "image.onnx" in done.stdout


def test_an_unknown_model_is_refused(tmp_path, capsys):
    assert export_clip.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "neither a folder" in message and message.count("\n") == 1


# --- engines -------------------------------------------------------------------------------------


def test_engines_are_built_in_the_bundle(tmp_path):
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "atlas")
    done = run("engines", tmp_path / "atlas", "--engine", "ort-cuda", "--context", "512")
    assert done.exit_code == 0, done.output
    line, out = last_line(done.stdout), tmp_path / "atlas" / "engines" / "ort-cuda"
    assert line["out"] == str(out) and line["engine"] == "ort-cuda" and line["context"] == 512
    assert read_engine_manifest(out, tmp_path / "atlas", "ort-cuda").parity == line["parity"] != {}
    assert line["parity"]["decoder"]["logits_cosine"] > 0.999
    assert [entry["sm"] for entry in line["graphs"]] == [None] * 4 and line["peak_mib"] > 50


def test_the_last_line_lists_each_graph_for_each_gpu(tmp_path):
    """In a process of its own, with the build processes that it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "export.build_engines", str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm",
         "120,86", "--out", str(tmp_path / "out"), "--no-parity"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = last_line(done.stdout)
    assert line["parity"] == {} and line["version"].startswith("1.7")
    assert [(entry["name"], entry["sm"]) for entry in line["graphs"]][:3] == [
        ("decoder", 86), ("decoder", 120), ("vision", 86)]  # fmt: skip
    for entry in line["graphs"]:
        assert entry["bytes"] == (tmp_path / "out" / entry["file"]).stat().st_size
        assert entry["weights"] < entry["bytes"] < 1.25 * entry["weights"] + (32 << 20)
        assert entry["seconds"] > 0 and entry["layers"] > 5 and entry["peak_mib"] > 50
    decoder = line["graphs"][0]
    assert decoder["kv_cache_update"] == 2 * decoder["attention"] == 12


def test_a_killed_build_keeps_the_previous_engines(tmp_path):
    """The build process that it started ends too."""
    out = tmp_path / "out"
    words = [str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm", "86", "--out", str(out), "--no-parity"]
    assert build_engines.main([*words, "--context", "256"]) == 0
    killed = subprocess.Popen([sys.executable, "-m", "export.build_engines", *words])
    while not (tmp_path / "out.part" / "decoder.engine").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    assert children and not psutil.wait_procs(children, timeout=60)[1]
    assert read_engine_manifest(out, DEFAULT_BUNDLE, "tensorrt-rtx").context == 256
    assert build_engines.main(words) == 0
    assert read_engine_manifest(out, DEFAULT_BUNDLE, "tensorrt-rtx").context == 2048
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options, message", [
    (["--engine", "tensorrt-rtx", "--sm", "90"], "cannot build engines for SM 90"),
    (["--engine", "tensorrt-rtx", "--context", "64"], "give --context at least 128"),
    (["--engine", "tensorrt"], "'tensorrt'"),
    (["--engine", "ort"], "cannot build engines for 'ort'"),
])  # fmt: skip
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert build_engines.main([str(DEFAULT_BUNDLE), "--out", str(tmp_path / "out"), *options]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_bundle_is_refused(tmp_path, capsys):
    assert build_engines.main([str(tmp_path), "--engine", "ort-cuda"]) == 1
    assert "bundle.toml' does not exist; is this the right folder?" in capsys.readouterr().err


def test_compute_capabilities_must_be_integers(capsys):
    assert build_engines.main([str(DEFAULT_BUNDLE), "--engine", "tensorrt-rtx", "--sm", "8.6,ada"]) == 2
    assert "must be a list of compute capabilities such as 86,89,120, got '8.6,ada'" in capsys.readouterr().err


def test_an_old_onnx_runtime_refuses_to_skip_the_parity_check(tmp_path, monkeypatch, capsys):
    """Nothing is skipped unless requested."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    words = [str(DEFAULT_BUNDLE), "--engine", "ort-cuda", "--context", "512", "--out", str(tmp_path / "out")]
    assert build_engines.main(words) == 1
    message = capsys.readouterr().err
    assert "build with --no-parity" in message and "gog-edge export check BUNDLE --engine-graphs fp16" in message
    assert not (tmp_path / "out").exists()
    assert build_engines.main([*words, "--no-parity"]) == 0
    assert last_line(capsys.readouterr().out)["parity"] == {}


def test_converted_graphs_are_compared_without_a_build():
    done = run("check", DEFAULT_BUNDLE, "--engine-graphs", "decomposed", "--context", "512")
    assert done.exit_code == 0, done.output
    report = last_line(done.stdout)
    assert report["kind"] == "decomposed" and report.keys() >= {"decoder", "vision", "image", "text"}


@pytest.mark.parametrize("module", [check_conversion])
def test_the_conversion_check_has_two_module_names(module, capsys):
    assert module.main([str(DEFAULT_BUNDLE), "--kind", "decomposed", "--context", "1000000"]) == 1
    assert capsys.readouterr().err.startswith("error: a context of 1000000 tokens exceeds the policy's limit")
    assert module.main([str(DEFAULT_BUNDLE), "--kind", "whole"]) == 2
    assert "must be one of standard, decomposed, fp16, got 'whole'" in capsys.readouterr().err


def test_the_conversion_fp16_keeps_its_former_name(capsys):
    assert check_conversion.main([str(DEFAULT_BUNDLE), "--kind", "half", "--context", "1000000"]) == 1
    assert "a context of 1000000 tokens exceeds the policy's limit" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--checkpoint", "c", "--engine-graphs", "fp16"]])
def test_a_check_needs_exactly_one_reference(options):
    done = run("check", DEFAULT_BUNDLE, *options)
    assert done.exit_code == 2 and "either --checkpoint or --engine-graphs" in " ".join(done.output.split())


# --- random checkpoints, and the modules of the checkout -----------------------------------------


def test_random_checkpoints_refuse_unknown_shapes_and_existing_folders(tmp_path, capsys):
    assert random_checkpoint_module.main(["--like", "qwen9", str(tmp_path / "out")]) == 1
    assert random_checkpoint_module.main(["--like", "qwen3-vl-2b", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "unknown shape 'qwen9'; available: qwen2.5-vl-3b" in first and "already exists" in second


@pytest.mark.parametrize("module", [export_policy, export_clip, export_text, build_engines, check_parity,
                                    check_conversion, random_checkpoint_module],
                         ids=lambda module: module.__name__)  # fmt: skip
def test_modules_name_themselves_in_their_help(module, capsys):
    assert module.main(["--help"]) == 0
    assert f"Usage: python -m {module.__name__} " in capsys.readouterr().out


@pytest.mark.parametrize("command, missing, extra", [
    (["policy", "checkpoint", "out"], "onnx", "export"), (["clip", "model", "out"], "torch", "export"),
    (["check", "policy", "--checkpoint", "c"], "torch", "export"),
    (["random-checkpoint", "--like", "x", "out"], "torch", "export"),
    (["engines", str(DEFAULT_BUNDLE), "--engine", "ort-cuda"], "onnx", "export"),
    (["text", "model", "out"], "optimum", "text"),
])  # fmt: skip
def test_a_missing_extra_is_named_in_one_line(command, missing, extra):
    """In a process of its own, without the extra's modules."""
    modules = ("torch", "transformers", "onnx", "safetensors", "open_clip", "optimum")
    code = (f"import sys; sys.modules.update(dict.fromkeys({modules})); sys.argv = ['gog-edge', 'export', *{command}]; "
            "import gog_edge.cli; gog_edge.cli.main()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"gog-edge: {missing} is not installed; pip install 'gog_edge[{extra}]'\n"


