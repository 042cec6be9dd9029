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

from gog_edge.engines.onnx import native
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.policy.chat_template import extract_chat_format
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy, weight_formats
from gog_edge.exporting.policy.native_graph import supports_native
from gog_edge.exporting.policy.parity import LIMITS, ParityEpisode, check_passed, measure_parity
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

PLAIN_GRAPHS, NATIVE_GRAPHS = {DECODER_GRAPH, VISION_GRAPH}, {NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH}
needs_library = pytest.mark.skipif(native.library() is None, reason=f"no library: {native.unavailable_reason()}")


def graphs_in(folder):
    return {path.name for path in folder.glob("*.onnx")}


def modified_copy(checkpoint, folder, name="config.json", **changes):
    """Copy a checkpoint and change keys of one of its JSON files."""
    shutil.copytree(checkpoint, folder)
    path = folder / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_exported_graphs_agree_with_transformers(policies, tied):
    manifest = read_manifest(policies[tied], full=True)
    parity = manifest.parity
    assert parity["passed"] and parity["graphs"]["greedy_differ"] == 0
    assert parity["graphs"]["logits_max_abs"] < 1e-4 and parity["graphs"]["vision_max_abs"] < 1e-4
    assert parity["greedy_tokens"] > 50 and parity["pictures"] >= 6
    assert manifest.text.tied is tied
    assert manifest.vision.full_attention == (1,) and manifest.vision.depth == 3


@pytest.mark.parametrize("tied", [True, False])
def test_exported_qwen3_graphs_agree_with_transformers(qwen3_checkpoints, tmp_path, tied):
    manifest = export_policy(qwen3_checkpoints[tied], tmp_path / "out", context=512)
    assert manifest.parity["passed"] and manifest.parity["pictures"] >= 6
    assert manifest.parity["graphs"]["logits_max_abs"] < 1e-4 and manifest.parity["graphs"]["vision_max_abs"] < 1e-4
    assert manifest.text.deepstack == 2 and manifest.text.qk_norm and manifest.text.mrope_interleaved
    assert manifest.box_frame == "rel1000"


def test_missing_deepstack_features_exceed_the_limits(qwen3_checkpoints, tmp_path):
    shutil.copytree(qwen3_checkpoints[False], tmp_path / "without")
    path = tmp_path / "without" / "model.safetensors"
    tensors = load_file(path)
    outputs = [name for name in tensors if "deepstack_merger_list" in name and "linear_fc2" in name]
    assert len(outputs) == 4
    save_file(tensors | {name: np.zeros_like(tensors[name]) for name in outputs}, path)
    export_policy(tmp_path / "without", tmp_path / "out", context=512, parity=False)
    report = measure_parity(tmp_path / "out", Checkpoint.open(qwen3_checkpoints[False]))
    assert not report.passed and report.graphs.logits_max_abs > 1e-2


@pytest.mark.parametrize("precision, bytes_per_weight", [("fp16", 2.1), ("int4", 1.2)])
@pytest.mark.parametrize("qwen3", [False, True])
def test_graphs_agree_with_transformers_on_rounded_weights(checkpoints, qwen3_checkpoints, tmp_path, precision,
                                                            bytes_per_weight, qwen3):
    source = (qwen3_checkpoints if qwen3 else checkpoints)[True]
    layout = "prefill" if precision == "int4" else None
    manifest = export_policy(source, tmp_path / "out", precision=precision, block=32, context=512, cpu_layout=layout)
    graphs, rounding = manifest.parity["graphs"], manifest.parity["rounding"]
    assert manifest.parity["passed"] and manifest.precision == precision
    assert graphs["logits_min_cosine"] > rounding["logits_min_cosine"]
    assert graphs["logits_max_abs"] < (1e-4 if precision == "fp16" else 1.0)
    assert PolicyModel.open(tmp_path / "out").manifest.weights == weight_formats(precision, 32)
    assert (tmp_path / "out" / "prefill.onnx").exists() == (precision == "int4")
    assert manifest.parity["prefill_min_cosine"] == 1 if precision == "fp16" else 0.95 < manifest.parity[
        "prefill_min_cosine"] < 1
    stored = sum((tmp_path / "out" / name).stat().st_size for name in ("decoder.onnx", "vision.onnx"))
    assert stored < 60_000 + bytes_per_weight * Checkpoint.open(source).parameters


def test_the_prefill_graph_fills_the_cache_equally(qwen3_checkpoints, tmp_path):
    export_policy(qwen3_checkpoints[True], tmp_path / "out", precision="int4", block=32, context=512,
                  cpu_layout="prefill", parity=False)  # fmt: skip
    with_graph, without = (PolicyModel.open(tmp_path / "out", threads=1, cpu_layout=use) for use in (True, False))
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
    assert not np.array_equal(*states)  # the weights are rounded differently
    cosine = (states[0] * states[1]).sum() / np.linalg.norm(states[0]) / np.linalg.norm(states[1])
    assert cosine > 0.97 and np.corrcoef(*logits)[0, 1] > 0.8
    few = [Session(model.decoder) for model in (with_graph, without)]
    for session in few:
        session.append_text("Short.")
    assert np.array_equal(few[0].prefill(), few[1].prefill())  # short prompts do not use the prefill graph


def test_a_wrong_prefill_graph_exceeds_the_limits(checkpoints, tmp_path):
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


def test_weights_rounded_differently_from_the_manifest_exceed_the_limits(checkpoints, tmp_path):
    export_policy(checkpoints[True], tmp_path / "out", precision="int4", block=32, context=512, parity=False)
    path = tmp_path / "out" / "manifest.json"
    value = json.loads(path.read_text())
    value["weights"]["decoder"] = {"bits": 4, "size": 64}
    path.write_text(json.dumps(value))
    assert not measure_parity(tmp_path / "out", Checkpoint.open(checkpoints[True])).passed


def test_given_episodes_are_used(policies, checkpoints):
    pixels = np.random.default_rng(3).integers(0, 256, (150, 260, 3), np.uint8)
    episode = ParityEpisode("You look.", ((pixels, "Which flag is it?"), ("Found: ", pixels[20:90, 30:99], "Peru.")), 5)
    report = measure_parity(policies[True], Checkpoint.open(checkpoints[True]), [episode], threads=1)
    assert report.passed and report.episodes == 1 and report.pictures == 2


def test_wrong_positions_exceed_the_limits(policies, checkpoints, monkeypatch):
    def transposed(start, rows, columns):
        return session.text_positions(start, rows * columns) * 0 + start

    monkeypatch.setattr(session, "image_positions", transposed)
    report = measure_parity(policies[True], Checkpoint.open(checkpoints[True]), threads=1)
    assert not report.passed and report.graphs.logits_max_abs > 1e-2


def test_an_export_beyond_the_limits_writes_nothing(checkpoints, tmp_path, monkeypatch):
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
    other = modified_copy(checkpoints[True], tmp_path / "other", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(CheckpointError, match="LlavaForConditionalGeneration"):
        export_policy(other, tmp_path / "out")


def test_a_missing_tensor_is_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints[True], tmp_path / "less")
    path = tmp_path / "less" / "model.safetensors"
    tensors = load_file(path)
    missing = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: array for name, array in tensors.items() if name != missing}, path)
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        export_policy(tmp_path / "less", tmp_path / "out")


def test_weights_that_are_not_floating_point_are_refused(checkpoints, tmp_path):
    quantized = modified_copy(checkpoints[True], tmp_path / "awq", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="awq"):
        export_policy(quantized, tmp_path / "out")
    shutil.copytree(checkpoints[True], tmp_path / "bytes")
    path = tmp_path / "bytes" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    with pytest.raises(CheckpointError, match="must be one of F64, F32, F16, BF16, got I8"):
        export_policy(tmp_path / "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("name, message", [("tokenizer.json", "no tokenizer.json"),
                                           ("chat_template.jinja", "no chat_template.jinja")])
def test_a_missing_text_file_is_named_and_nothing_is_written(checkpoints, tmp_path, name, message):
    shutil.copytree(checkpoints[True], tmp_path / "less")
    (tmp_path / "less" / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        export_policy(tmp_path / "less", tmp_path / "out", parity=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less"]


def test_a_full_disk_keeps_the_previous_policy(checkpoints, policies, tmp_path):
    shutil.copytree(policies[True], tmp_path / "policy")
    before = (tmp_path / "policy" / "manifest.json").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # like a full disk
    try:
        with pytest.raises(CheckpointError, match="cannot write .*policy.part"):
            export_policy(checkpoints[True], tmp_path / "policy", parity=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "policy" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("layout, graphs", [(None, NATIVE_GRAPHS), ("native", NATIVE_GRAPHS),
                                            ("prefill", {PREFILL_GRAPH}), ("none", set())])
@pytest.mark.parametrize("qwen3", [False, True])
def test_a_policy_has_the_requested_cpu_layout(wide_checkpoints, tmp_path, layout, graphs, qwen3):
    manifest = export_policy(wide_checkpoints[qwen3], tmp_path / "out", precision="int4", block=32, cpu_layout=layout,
                             parity=False)  # fmt: skip
    assert graphs_in(tmp_path / "out") == PLAIN_GRAPHS | graphs
    assert manifest.has_native == (graphs == NATIVE_GRAPHS)
    assert manifest.weights == weight_formats("int4", 32, prefill=graphs == {PREFILL_GRAPH})
    assert read_manifest(tmp_path / "out", full=True) == manifest
    assert PolicyModel.open(tmp_path / "out", threads=1).decoder.engine.capacity == 1024


def test_models_without_native_kernels_get_the_prefill_layout(checkpoints, tmp_path):
    export_policy(checkpoints[True], tmp_path / "auto", precision="int4", block=32, parity=False)
    assert graphs_in(tmp_path / "auto") == PLAIN_GRAPHS | {PREFILL_GRAPH}
    with pytest.raises(CheckpointError, match="width of 16 .* at most 256 in both; export with --cpu-layout prefill"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int4", cpu_layout="native", parity=False)
    assert not (tmp_path / "out").exists()


def test_heads_of_a_tower_may_have_any_width_up_to_the_maximum(wide_checkpoints):
    checkpoint = Checkpoint.open(wide_checkpoints[True])
    for width, supported in ((16, True), (72, True), (256, True), (260, False)):
        vision = replace(checkpoint.vision, hidden=width * checkpoint.vision.heads)
        assert vision.head_dim == width and supports_native(checkpoint.text, vision) == supported


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_int4_policies_have_a_cpu_layout(wide_checkpoints, tmp_path, precision):
    with pytest.raises(BackendError, match=f"int4 and engine 'ort', not for {precision} .*; omit --cpu-layout native"):
        export_policy(wide_checkpoints[True], tmp_path / "out", precision=precision, cpu_layout="native", parity=False)
    export_policy(wide_checkpoints[True], tmp_path / "out", precision=precision, parity=False)
    assert graphs_in(tmp_path / "out") == PLAIN_GRAPHS


@needs_library
@pytest.mark.parametrize("qwen3", [False, True])
def test_native_graphs_agree_with_transformers(native_policies, qwen3):
    parity = read_manifest(native_policies[qwen3], full=True).parity
    graphs, native_graphs, rounding = (parity[key] for key in ("graphs", "native", "rounding"))
    assert parity["passed"] and parity["prefill_min_cosine"] == 1 and native_graphs != graphs
    assert min(native_graphs["logits_min_cosine"], graphs["logits_min_cosine"]) > 0.99 > rounding["logits_min_cosine"]
    assert min(native_graphs["vision_min_cosine"], graphs["vision_min_cosine"]) > 0.999
    assert native_graphs["greedy_differ"] < 0.2 * parity["greedy_tokens"]


@needs_library
@pytest.mark.parametrize("name", [NATIVE_DECODER_GRAPH, NATIVE_VISION_GRAPH])
def test_native_graphs_with_wrong_scales_exceed_the_limits(native_policies, wide_checkpoints, tmp_path, name):
    folder = shutil.copytree(native_policies[True], tmp_path / "policy")
    graph = onnx.load(folder / name)
    scales = next(item for item in graph.graph.initializer if "_scales_" in item.name)
    scales.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scales), scales.name))
    onnx.save(graph, folder / name)
    value = json.loads((folder / "manifest.json").read_text())
    value["files"] = [asdict(entry) for entry in describe_files(folder, [entry["path"] for entry in value["files"]])]
    write_json(folder / "manifest.json", value)
    report = measure_parity(folder, Checkpoint.open(wide_checkpoints[True]), threads=1)
    assert not report.passed and LIMITS["int4"].accept(report.graphs)
    assert not LIMITS["int4"].accept(report.native)
    with pytest.raises(CheckpointError, match="differ from transformers"):
        check_passed(report)


def test_native_graphs_are_not_the_default_where_parity_cannot_be_measured(wide_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    options = {"precision": "int4", "block": 32, "context": 512}
    try:
        manifest = export_policy(wide_checkpoints[True], tmp_path / "prefill", **options)
        assert not manifest.has_native and manifest.parity["passed"] and manifest.weights.prefill
        with pytest.raises(CheckpointError, match=r"cannot be compared .*install a C\+\+ compiler.*--no-parity"):
            export_policy(wide_checkpoints[True], tmp_path / "out", cpu_layout="native", **options)
        assert not (tmp_path / "out").exists()
        assert export_policy(wide_checkpoints[True], tmp_path / "out", parity=False, **options).has_native
        report = measure_parity(tmp_path / "out", Checkpoint.open(wide_checkpoints[True]), threads=1)
        assert report.passed and report.native is None
    finally:
        native.library.cache_clear()


def test_unknown_options_are_refused(checkpoints, tmp_path):
    with pytest.raises(BackendError, match="unknown precision 'int2' of a policy; available: fp32, fp16, int4"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int2")
    with pytest.raises(BackendError, match="unknown CPU layout 'grouped'; available: native, prefill, none"):
        export_policy(checkpoints[True], tmp_path / "out", cpu_layout="grouped")
    with pytest.raises(CheckpointError, match="'block' must be one of 32, 64, 128, 256, got 48"):
        export_policy(checkpoints[True], tmp_path / "out", precision="int4", block=48)
    with pytest.raises(CheckpointError, match="'context' must be at least 1 token, got 0"):
        export_policy(checkpoints[True], tmp_path / "out", context=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_not_replaced(checkpoints, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not a folder of kind .policy"):
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


def test_a_template_that_rewrites_messages_is_refused(checkpoints):
    template = (checkpoints[True] / "chat_template.jinja").read_text()
    stripping = template.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    with pytest.raises(CheckpointError, match="a live session cannot"):
        extract_chat_format(stripping, image_token="<|image_pad|>", eos="<|im_end|>")
    with pytest.raises(CheckpointError, match="cannot render the chat template"):
        extract_chat_format("{% nonsense %}", image_token="<|image_pad|>", eos="<|im_end|>")
    with pytest.raises(CheckpointError, match="without '<img>'"):
        extract_chat_format(template, image_token="<img>", eos="<|im_end|>")


def test_a_thinking_template_opens_a_thought_in_the_new_turn(checkpoints):
    template = (checkpoints[True] / "chat_template.jinja").read_text()
    assert template.count("<|im_start|>assistant\\n' }}") == 1
    thinking = template.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    thinking = thinking.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1].lstrip('\\n') }}")
    chat = extract_chat_format(thinking, image_token="<|image_pad|>", eos="<|im_end|>")
    plain = extract_chat_format(template, image_token="<|image_pad|>", eos="<|im_end|>")
    assert chat.assistant_open == "<|im_start|>assistant\n<think>\n"
    assert replace(chat, assistant_open=plain.assistant_open) == plain
    other = thinking.replace("'<|im_start|>assistant\\n<think>", "'<|im_start|>model\\n<think>")
    with pytest.raises(CheckpointError, match="but renders earlier ones with"):
        extract_chat_format(other, image_token="<|image_pad|>", eos="<|im_end|>")
