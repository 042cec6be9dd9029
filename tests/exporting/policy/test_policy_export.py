import json
import resource
import shutil
import signal
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from export import check_parity
from export import export_policy as export_command
from gog_edge.engines.onnx import native
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.policy.chat_template import extract_chat_format
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy, weight_forms
from gog_edge.exporting.policy.native_graph import fits_native
from gog_edge.exporting.policy.parity import GATES, ParityEpisode, check_passed, measure_parity
from gog_edge.files import describe_files, write_json
from gog_edge.policy import session
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    VISION_GRAPH,
    read_manifest,
)
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

OWN_GRAPHS, NATIVE_GRAPHS = {DECODER_GRAPH, VISION_GRAPH}, {NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH}
needs_library = pytest.mark.skipif(native.library() is None, reason=f"no library: {native.why_none()}")


def altered(checkpoint, folder, name="config.json", **changes):
    """A copy of a checkpoint with keys of one JSON file changed."""
    shutil.copytree(checkpoint, folder)
    path = folder / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_says_what_transformers_says(policies, tied):
    manifest = read_manifest(policies[tied], full=True)
    parity = manifest.parity
    assert parity["passed"] and parity["graphs"]["greedy_differ"] == 0
    assert parity["graphs"]["logits_max_abs"] < 1e-4 and parity["graphs"]["vision_max_abs"] < 1e-4
    assert parity["greedy_tokens"] > 50 and parity["pictures"] >= 6
    assert manifest.text.tied is tied
    assert manifest.vision.full_attention == (1,) and manifest.vision.depth == 3


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_says_what_transformers_says(qwen3_checkpoints, tmp_path, tied):
    manifest = export_policy(qwen3_checkpoints[tied], tmp_path / "out", context=512)
    assert manifest.parity["passed"] and manifest.parity["pictures"] >= 6
    assert manifest.parity["graphs"]["logits_max_abs"] < 1e-4 and manifest.parity["graphs"]["vision_max_abs"] < 1e-4
    assert manifest.text.deepstack == 2 and manifest.text.qk_norm and manifest.text.mrope_interleaved
    assert manifest.box_frame == "rel1000"


def test_features_left_out_of_the_first_layers_fail_the_gate(qwen3_checkpoints, tmp_path):
    shutil.copytree(qwen3_checkpoints[False], tmp_path / "without")
    path = tmp_path / "without" / "model.safetensors"
    tensors = load_file(path)
    last = [name for name in tensors if "deepstack_merger_list" in name and "linear_fc2" in name]
    assert len(last) == 4
    save_file(tensors | {name: np.zeros_like(tensors[name]) for name in last}, path)
    export_policy(tmp_path / "without", tmp_path / "out", context=512, parity=False)
    report = measure_parity(tmp_path / "out", Checkpoint.open(qwen3_checkpoints[False]))
    assert not report.passed and report.graphs.logits_max_abs > 1e-2


@pytest.mark.parametrize("precision, bytes_a_weight", [("fp16", 2.1), ("int4", 1.2)])
@pytest.mark.parametrize("qwen3", [False, True])
def test_rounded_weights_say_what_transformers_says_with_them(checkpoints, qwen3_checkpoints, tmp_path, precision,
                                                              bytes_a_weight, qwen3):
    source = (qwen3_checkpoints if qwen3 else checkpoints)[True]
    second = "prefill" if precision == "int4" else None
    manifest = export_policy(source, tmp_path / "out", precision=precision, block=32, context=512, second=second)
    graphs, rounding = manifest.parity["graphs"], manifest.parity["rounding"]
    assert manifest.parity["passed"] and manifest.precision == precision
    assert graphs["logits_min_cosine"] > rounding["logits_min_cosine"]
    assert graphs["logits_max_abs"] < (1e-4 if precision == "fp16" else 1.0)
    assert PolicyModel.open(tmp_path / "out").manifest.weights == weight_forms(precision, 32)
    assert (tmp_path / "out" / "prefill.onnx").exists() == (precision == "int4")
    assert manifest.parity["prefill_min_cosine"] == 1 if precision == "fp16" else 0.95 < manifest.parity[
        "prefill_min_cosine"] < 1
    stored = sum((tmp_path / "out" / name).stat().st_size for name in ("decoder.onnx", "vision.onnx"))
    assert stored < 60_000 + bytes_a_weight * Checkpoint.open(source).parameters


def test_the_graph_for_many_tokens_leaves_the_same_cache(qwen3_checkpoints, tmp_path):
    export_policy(qwen3_checkpoints[True], tmp_path / "out", precision="int4", block=32, context=512, second="prefill",
                  parity=False)  # fmt: skip
    with_graph, without = (PolicyModel.open(tmp_path / "out", threads=1, second=use) for use in (True, False))
    pixels = np.random.default_rng(5).integers(0, 256, (160, 192, 3), np.uint8)
    states, logits = [], []
    for model in (with_graph, without):
        session = Session(model.decoder)
        session.append_text("Look at this: ")
        session.append_image(model.vision.encode(pixels))
        session.append_text(" and tell what it is, in a few words, please, and then some more.")
        logits.append(session.prefill().copy())
        states.append(session.snapshot().states.copy())
    assert states[0].shape == states[1].shape and states[0].shape[2] > 60
    assert not np.array_equal(*states)  # the graphs round differently
    cosine = (states[0] * states[1]).sum() / np.linalg.norm(states[0]) / np.linalg.norm(states[1])
    assert cosine > 0.97 and np.corrcoef(*logits)[0, 1] > 0.8
    few = [Session(model.decoder) for model in (with_graph, without)]
    for session in few:
        session.append_text("Short.")
    assert np.array_equal(few[0].prefill(), few[1].prefill())  # few tokens go the same way


def test_a_wrong_graph_for_many_tokens_fails_the_gate(checkpoints, tmp_path):
    shutil.copytree(checkpoints[True], tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.o_proj.weight"))
    save_file(tensors | {name: -tensors[name]}, path)
    for source in ("other", "right"):
        folder = tmp_path / "other" if source == "other" else checkpoints[True]
        export_policy(folder, tmp_path / source / "policy", precision="int4", block=32, context=512, parity=False)
    assert measure_parity(tmp_path / "right" / "policy", Checkpoint.open(checkpoints[True])).passed
    shutil.copy(tmp_path / "other" / "policy" / "prefill.onnx", tmp_path / "right" / "policy" / "prefill.onnx")
    manifest = json.loads((tmp_path / "right" / "policy" / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "prefill.onnx"]
    (tmp_path / "right" / "policy" / "manifest.json").write_text(json.dumps(manifest))
    assert not measure_parity(tmp_path / "right" / "policy", Checkpoint.open(checkpoints[True])).passed


def test_weights_rounded_otherwise_than_the_manifest_says_fail_the_gate(checkpoints, tmp_path):
    export_policy(checkpoints[True], tmp_path / "out", precision="int4", block=32, context=512, parity=False)
    path = tmp_path / "out" / "manifest.json"
    value = json.loads(path.read_text())
    value["weights"]["decoder"] = {"bits": 4, "size": 64}
    path.write_text(json.dumps(value))
    assert not measure_parity(tmp_path / "out", Checkpoint.open(checkpoints[True])).passed


def test_given_episodes_are_held(policies, checkpoints):
    pixels = np.random.default_rng(3).integers(0, 256, (150, 260, 3), np.uint8)
    episode = ParityEpisode("You look.", ((pixels, "Which flag is it?"), ("Found: ", pixels[20:90, 30:99], "Peru.")), 5)
    report = measure_parity(policies[True], Checkpoint.open(checkpoints[True]), [episode], threads=1)
    assert report.passed and report.episodes == 1 and report.pictures == 2


def test_wrong_positions_are_noticed(policies, checkpoints, monkeypatch):
    def transposed(start, rows, columns):
        return session.text_positions(start, rows * columns) * 0 + start

    monkeypatch.setattr(session, "image_positions", transposed)
    report = measure_parity(policies[True], Checkpoint.open(checkpoints[True]), threads=1)
    assert not report.passed and report.graphs.logits_max_abs > 1e-2


def test_an_export_that_misses_the_limit_writes_nothing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "image_positions",
                        lambda start, rows, columns: session.text_positions(start, rows * columns))
    with pytest.raises(CheckpointError, match="differ from transformers"):
        export_policy(checkpoints[True], tmp_path / "out", context=512)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_read_like_one_file(checkpoints, tmp_path):
    shutil.copytree(checkpoints[False], tmp_path / "sharded")
    whole = tmp_path / "sharded" / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / "sharded" / f"model-{number}.safetensors")
    whole.unlink()
    first, second = Checkpoint.open(checkpoints[False]), Checkpoint.open(tmp_path / "sharded")
    for weights in (Checkpoint.decoder_weights, Checkpoint.vision_weights):
        name = "norm.weight" if weights is Checkpoint.decoder_weights else "merger.ln_q.weight"
        assert np.array_equal(weights(first)(name), weights(second)(name))
    assert first.sha256 != second.sha256


def test_another_architecture_is_refused_by_name(checkpoints, tmp_path):
    other = altered(checkpoints[True], tmp_path / "other", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(CheckpointError, match="LlavaForConditionalGeneration"):
        export_policy(other, tmp_path / "out")


def test_a_missing_tensor_is_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints[True], tmp_path / "less")
    path = tmp_path / "less" / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: array for name, array in tensors.items() if name != gone}, path)
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        export_policy(tmp_path / "less", tmp_path / "out")


def test_an_incomplete_copy_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints[True], tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    index = {"weight_map": {"lm_head.extra": "model-00002.safetensors"}}
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"incomplete.*model-00002\.safetensors"):
        export_policy(tmp_path / "copy", tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="copy it again"):
        export_policy(tmp_path / "copy", tmp_path / "out")


def test_weights_that_are_no_floats_are_refused(checkpoints, tmp_path):
    quantised = altered(checkpoints[True], tmp_path / "awq", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="awq"):
        export_policy(quantised, tmp_path / "out")
    shutil.copytree(checkpoints[True], tmp_path / "bytes")
    path = tmp_path / "bytes" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    with pytest.raises(CheckpointError, match="is I8, not one of F32, F16, BF16"):
        export_policy(tmp_path / "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("name, message", [("tokenizer.json", "no tokenizer.json"),
                                           ("chat_template.jinja", "no chat_template.jinja")])
def test_a_missing_text_is_named_and_nothing_is_written(checkpoints, tmp_path, name, message):
    shutil.copytree(checkpoints[True], tmp_path / "less")
    (tmp_path / "less" / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        export_policy(tmp_path / "less", tmp_path / "out", parity=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less"]


def test_a_full_disk_leaves_the_older_policy(checkpoints, policies, tmp_path):
    shutil.copytree(policies[True], tmp_path / "policy")
    before = (tmp_path / "policy" / "manifest.json").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a disk that takes no more
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            export_policy(checkpoints[True], tmp_path / "policy", parity=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "policy" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("wide, second", [(False, {PREFILL_GRAPH}), (True, NATIVE_GRAPHS)])
def test_what_will_run_as_an_engine_has_no_graph_for_the_processor_alone(checkpoints, wide_checkpoints, tmp_path, wide,
                                                                         second):
    source, kept = (wide_checkpoints if wide else checkpoints)[True], {}
    for engine in ("ort", "tensorrt-rtx"):
        export_policy(source, tmp_path / engine, engine=engine, precision="int4", block=32, parity=False)
        kept[engine] = {path.name for path in (tmp_path / engine).iterdir()}
    assert kept["ort"] - kept["tensorrt-rtx"] == second and kept["tensorrt-rtx"] < kept["ort"]


@pytest.mark.parametrize("second, graphs", [(None, NATIVE_GRAPHS), ("native", NATIVE_GRAPHS),
                                            ("prefill", {PREFILL_GRAPH}), ("none", set())])
@pytest.mark.parametrize("qwen3", [False, True])
def test_the_decoder_has_the_second_form_that_was_asked_for(wide_checkpoints, tmp_path, second, graphs, qwen3):
    manifest = export_policy(wide_checkpoints[qwen3], tmp_path / "out", precision="int4", block=32, second=second,
                             parity=False)  # fmt: skip
    there = {path.name for path in (tmp_path / "out").glob("*.onnx")}
    assert there == OWN_GRAPHS | graphs
    assert manifest.native == (graphs == NATIVE_GRAPHS)
    assert manifest.weights == weight_forms("int4", 32, prefill=graphs == {PREFILL_GRAPH})
    assert read_manifest(tmp_path / "out", full=True) == manifest
    assert PolicyModel.open(tmp_path / "out", threads=1).decoder.engine.capacity == 1024


def test_heads_that_no_native_operator_takes_have_another_second_form(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="heads are 16 wide, .* up to 256 in both; .*--second prefill"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int4", second="native", parity=False)
    assert not (tmp_path / "out").exists()
    export_policy(checkpoints[True], tmp_path / "out", precision="int4", block=32, second="none", parity=False)
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == OWN_GRAPHS


def test_heads_of_a_tower_may_be_of_any_width_up_to_the_widest(wide_checkpoints):
    checkpoint = Checkpoint.open(wide_checkpoints[True])
    for width, fits in ((16, True), (72, True), (256, True), (260, False)):
        vision = replace(checkpoint.vision, hidden=width * checkpoint.vision.heads)
        assert vision.head_dim == width and fits_native(checkpoint.text, vision) == fits


@pytest.mark.parametrize("other", [{"precision": "fp32"}, {"precision": "fp16"},
                                   {"precision": "int4", "engine": "ort-cuda"}], ids=str)  # fmt: skip
def test_only_int4_on_the_processor_has_a_second_form(wide_checkpoints, tmp_path, other):
    with pytest.raises(BackendError, match="is for int4 and engine 'ort', not for .*; leave out --second native"):
        export_policy(wide_checkpoints[True], tmp_path / "out", second="native", parity=False, **other)
    export_policy(wide_checkpoints[True], tmp_path / "out", parity=False, **other)
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == OWN_GRAPHS


@needs_library
@pytest.mark.parametrize("qwen3", [False, True])
def test_native_graphs_say_what_transformers_says(native_policies, qwen3):
    parity = read_manifest(native_policies[qwen3], full=True).parity
    graphs, ours, rounding = (parity[side] for side in ("graphs", "native", "rounding"))
    assert parity["passed"] and parity["prefill_min_cosine"] == 1 and ours != graphs
    assert min(ours["logits_min_cosine"], graphs["logits_min_cosine"]) > 0.99 > rounding["logits_min_cosine"]
    assert min(ours["vision_min_cosine"], graphs["vision_min_cosine"]) > 0.999
    assert ours["greedy_differ"] < 0.2 * parity["greedy_tokens"]


@needs_library
@pytest.mark.parametrize("name", [NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH])
def test_native_graphs_with_other_scales_fail_the_gate(native_policies, wide_checkpoints, tmp_path, name):
    folder = shutil.copytree(native_policies[True], tmp_path / "policy")
    graph = onnx.load(folder / name)
    scales = next(item for item in graph.graph.initializer if "_scales_" in item.name)
    scales.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scales), scales.name))
    onnx.save(graph, folder / name)
    value = json.loads((folder / "manifest.json").read_text())
    value["files"] = [asdict(entry) for entry in describe_files(folder, [entry["path"] for entry in value["files"]])]
    write_json(folder / "manifest.json", value)
    report = measure_parity(folder, Checkpoint.open(wide_checkpoints[True]), threads=1)
    assert not report.passed and GATES["int4"].passes(report.graphs) and not GATES["int4"].passes(report.native)
    with pytest.raises(CheckpointError, match="differ from transformers"):
        check_passed(report)


def test_what_cannot_be_proved_here_is_not_written_unasked(wide_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    given = {"precision": "int4", "block": 32, "context": 512}
    try:
        manifest = export_policy(wide_checkpoints[True], tmp_path / "prefill", **given)
        assert not manifest.native and manifest.parity["passed"] and manifest.weights.prefill
        with pytest.raises(CheckpointError, match=r"cannot be compared .*get a C\+\+ compiler.*--no-parity"):
            export_policy(wide_checkpoints[True], tmp_path / "out", second="native", **given)
        assert not (tmp_path / "out").exists()
        assert export_policy(wide_checkpoints[True], tmp_path / "out", parity=False, **given).native
        report = measure_parity(tmp_path / "out", Checkpoint.open(wide_checkpoints[True]), threads=1)
        assert report.passed and report.native is None
    finally:
        native.library.cache_clear()


def test_an_engine_or_precision_not_to_be_had_is_refused(checkpoints, tmp_path):
    with pytest.raises(BackendError, match="engine 'openvino'; available: ort, ort-cuda, tensorrt, tens"):
        export_policy(checkpoints[True], tmp_path / "out", engine="openvino")
    with pytest.raises(BackendError, match="int2"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int2")
    with pytest.raises(BackendError, match="no second form 'grouped'; available: native, prefill, none"):
        export_policy(checkpoints[True], tmp_path / "out", second="grouped")
    with pytest.raises(CheckpointError, match="blocks of 48"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int4", block=48)


def test_a_folder_that_is_no_policy_is_not_replaced(checkpoints, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="no folder of kind .policy"):
        export_policy(checkpoints[True], tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").exists()


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "embed_tokens.npy", "dialect.toml"])
def test_an_altered_file_is_refused(policies, tmp_path, name):
    shutil.copytree(policies[True], tmp_path / "policy")
    path = tmp_path / "policy" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}' is altered"):
        PolicyModel.open(tmp_path / "policy")


def test_a_manifest_of_another_kind_is_refused(policies, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "kind": "encoder"}))
    with pytest.raises(ArtifactError, match="'encoder'"):
        PolicyModel.open(tmp_path)
    value = json.loads((policies[True] / "manifest.json").read_text())
    del value["text"]
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="export it again"):
        PolicyModel.open(tmp_path)


def test_a_template_that_rewrites_what_was_said_is_refused(checkpoints):
    template = (checkpoints[True] / "chat_template.jinja").read_text()
    stripping = template.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    with pytest.raises(CheckpointError, match="a live session cannot"):
        extract_chat_format(stripping, image_token="<|image_pad|>", eos="<|im_end|>")
    with pytest.raises(CheckpointError, match="cannot be rendered"):
        extract_chat_format("{% nonsense %}", image_token="<|image_pad|>", eos="<|im_end|>")
    with pytest.raises(CheckpointError, match="without '<img>'"):
        extract_chat_format(template, image_token="<img>", eos="<|im_end|>")


def test_a_thinking_template_opens_the_thought(checkpoints):
    template = (checkpoints[True] / "chat_template.jinja").read_text()
    assert template.count("<|im_start|>assistant\\n' }}") == 1
    thinking = template.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    thinking = thinking.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1].lstrip('\\n') }}")
    chat = extract_chat_format(thinking, image_token="<|image_pad|>", eos="<|im_end|>")
    plain = extract_chat_format(template, image_token="<|image_pad|>", eos="<|im_end|>")
    assert chat.assistant_open == "<|im_start|>assistant\n<think>\n"
    assert replace(chat, assistant_open=plain.assistant_open) == plain
    other = thinking.replace("'<|im_start|>assistant\\n<think>", "'<|im_start|>model\\n<think>")
    with pytest.raises(CheckpointError, match="tells it later"):
        extract_chat_format(other, image_token="<|image_pad|>", eos="<|im_end|>")


def test_the_commands_end_with_a_line_of_json(checkpoints, tmp_path, capsys):
    out = tmp_path / "policy"
    assert export_command.main([str(checkpoints[True]), str(out), "--context", "512"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parity"]["passed"] is True
    assert check_parity.main([str(out), "--checkpoint", str(checkpoints[True]), "--episodes", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["graphs"]["greedy_differ"] == 0
    assert check_parity.main([str(out), "--checkpoint", str(checkpoints[False])]) == 1
    assert "was not exported from" in capsys.readouterr().err
    assert export_command.main([str(checkpoints[True]), str(out), "--engine", "tensorrt-rtx"]) == 0
    assert "export.build_engines BUNDLE --engine tensorrt-rtx" in capsys.readouterr().out
