import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.device_decoder import ConvertedDecoder
from gog_edge.engines.onnx.session import open_session
from gog_edge.errors import BackendError, BudgetExceeded, CheckpointError
from gog_edge.exporting.conversion.convert import KINDS, convert_graph
from gog_edge.exporting.conversion.parity import ANSWER_TOKENS, DRAFT_TOKENS, check_converted, measure_converted
from gog_edge.exporting.policy.export import export_policy

CONTEXT = 1024


@pytest.fixture(scope="module")
def atlas():
    return open_bundle(DEFAULT_BUNDLE)


@pytest.fixture(scope="module")
def int4(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "policy"
    export_policy(checkpoints[True], out, precision="int4", block=32, context=CONTEXT, parity=False)
    return out


def convert_all(folders, out, kind, context=CONTEXT):
    """Convert graphs given as name -> folder; return name -> path."""
    for name, folder in folders.items():
        convert_graph(folder / f"{name}.onnx", out / f"{name}.onnx", kind, context=context if name == "decoder" else 0)
    return {name: out / f"{name}.onnx" for name in folders}


def modify(path, change):
    """Apply a change to a graph file."""
    model = onnx.load(path)
    change(model.graph)
    onnx.save_model(model, path)


@pytest.mark.parametrize("kind", KINDS)
def test_converted_atlas_graphs_are_within_the_limits(atlas, tmp_path, kind):
    folders = dict.fromkeys(("decoder", "vision"), atlas.policy) | dict.fromkeys(("image", "text"), atlas.encoder)
    report = measure_converted(atlas, convert_all(folders, tmp_path, kind), kind, context=CONTEXT)
    check_converted(report)
    assert json.loads(json.dumps(report)) == report and report["kind"] == kind
    decoder = report["decoder"]
    assert decoder["tokens"] == 4 * ANSWER_TOKENS and decoder["positions"] == 4 * ANSWER_TOKENS + 2 + DRAFT_TOKENS
    assert 0 < decoder["divergence"] < 2e-5 and decoder["logits_cosine"] > 0.9999 and decoder["range"] > 20
    assert decoder["same_likeliest"] == 1 and decoder["regret"] == 0
    assert report["vision"]["rows"] > 300
    assert min(report[name]["cosine"] for name in ("vision", "image", "text")) > 0.99999


@pytest.mark.parametrize("kind", KINDS)
def test_deepstack_features_are_compared(atlas, qwen3_policy, tmp_path, kind):
    bundle = replace(atlas, policy=qwen3_policy)
    report = measure_converted(
        bundle, convert_all(dict.fromkeys(("decoder", "vision"), qwen3_policy), tmp_path, kind), kind, context=CONTEXT
    )
    check_converted(report)
    assert report["decoder"]["divergence"] < 1e-5 and report["vision"]["cosine"] > 0.9999 and "image" not in report


@pytest.mark.parametrize("kind", KINDS)
def test_int4_graphs_differ_by_the_quantization_of_activations(atlas, int4, tmp_path, kind):
    bundle = replace(atlas, policy=int4)
    report = measure_converted(bundle, convert_all({"decoder": int4}, tmp_path, kind), kind, context=CONTEXT)
    check_converted(report)
    assert report["limits"]["divergence"] > 1e-2 > report["decoder"]["divergence"] > 1e-5
    assert "vision" not in report


def hide_own_token(graph):
    for node in graph.node:
        if node.op_type == "LessOrEqual":
            node.op_type = "Less"


def change_attention_scale(graph):
    node = next(node for node in graph.node if node.op_type == "Attention")
    next(each for each in node.attribute if each.name == "scale").f *= 1.5


def swap_cos_and_sin(graph):
    node = next(node for node in graph.node if node.op_type == "RotaryEmbedding")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def overwrite_weights(graph):
    tensor = max(graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    values = numpy_helper.to_array(tensor).copy()
    values[: len(values) // 2] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("defect", [hide_own_token, change_attention_scale, swap_cos_and_sin, overwrite_weights])
def test_a_decoder_with_a_defect_is_refused(atlas, tmp_path, defect):
    converted = convert_all({"decoder": atlas.policy}, tmp_path, "standard")
    modify(converted["decoder"], defect)
    report = measure_converted(atlas, converted, "standard", context=CONTEXT)
    with pytest.raises(CheckpointError, match="the decoder converted as 'standard' differs .* expected at "):
        check_converted(report)


def test_towers_with_a_defect_are_refused(atlas, tmp_path):
    sources = {"vision": atlas.policy, "image": atlas.encoder, "text": atlas.encoder}
    for name, folder in sources.items():
        converted = convert_all({name: folder}, tmp_path, "decomposed")
        modify(converted[name], overwrite_weights)
        with pytest.raises(CheckpointError, match=f"the {name} converted as 'decomposed' .* cosine is"):
            check_converted(measure_converted(atlas, converted, "decomposed", context=CONTEXT))


def test_a_context_too_small_for_the_conversation_is_an_error(atlas, tmp_path):
    converted = convert_all({"decoder": atlas.policy}, tmp_path, "standard", context=64)
    with pytest.raises(BudgetExceeded, match="exceed its capacity of 64"):
        measure_converted(atlas, converted, "standard", context=64)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_converted_decoders_can_be_saved_and_restored(policies, tmp_path, kind):
    convert_graph(policies[True] / "decoder.onnx", tmp_path / "decoder.onnx", kind, context=64)
    own = OrtDecoder(policies[True] / "decoder.onnx", capacity=64, threads=1)
    decoder = ConvertedDecoder(open_session(tmp_path / "decoder.onnx", threads=1), tmp_path / "decoder.onnx")
    random = np.random.default_rng(0)
    embeds = random.normal(0, 0.5, (12, own.hidden)).astype(np.float32)
    angles = np.outer(np.arange(12), np.arange(1, own.rotary + 1) / own.rotary).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    cache, theirs = decoder.new_cache(), own.new_cache()
    for one, engine in ((cache, decoder), (theirs, own)):
        engine.step(one, embeds[:10], cos[:10], sin[:10], 0)
    saved, expected = cache.snapshot(10), theirs.snapshot(10)
    assert np.abs(saved.states - expected.states).max() < 0.02 and np.abs(saved.cos - expected.cos).max() < 1e-3
    second = decoder.new_cache()
    second.restore(expected)
    logits = [engine.step(one, embeds[10:], cos[10:], sin[10:], 10, keep=2)
            for one, engine in ((second, decoder), (theirs, own))]  # fmt: skip
    assert np.abs(logits[0] - logits[1]).max() < 0.02
    with pytest.raises(BackendError, match="60 \\+ 12 tokens do not fit a cache of 64"):
        decoder.step(cache, embeds, cos, sin, 60)
