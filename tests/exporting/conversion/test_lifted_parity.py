import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.device_decoder import LiftedDecoder
from gog_edge.engines.onnx.session import open_session
from gog_edge.errors import BackendError, BudgetExceeded, CheckpointError
from gog_edge.exporting.conversion.convert import KINDS, lift_graph
from gog_edge.exporting.conversion.parity import ANSWER, GUESSES, check_lifted, measure_lifted
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


def lifted_from(folders, out, kind, context=CONTEXT):
    """Graphs by name -> where they were rewritten to."""
    for name, folder in folders.items():
        lift_graph(folder / f"{name}.onnx", out / f"{name}.onnx", kind, context=context if name == "decoder" else 0)
    return {name: out / f"{name}.onnx" for name in folders}


def altered(path, alter):
    """A graph with something wrong in it."""
    model = onnx.load(path)
    alter(model.graph)
    onnx.save_model(model, path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_atlas_rewritten_says_the_same(atlas, tmp_path, kind):
    folders = dict.fromkeys(("decoder", "vision"), atlas.policy) | dict.fromkeys(("image", "text"), atlas.encoder)
    report = measure_lifted(atlas, lifted_from(folders, tmp_path, kind), kind, context=CONTEXT)
    check_lifted(report)
    assert json.loads(json.dumps(report)) == report and report["kind"] == kind
    decoder = report["decoder"]
    assert decoder["tokens"] == 4 * ANSWER and decoder["positions"] == 4 * ANSWER + 2 + GUESSES
    assert 0 < decoder["divergence"] < 2e-5 and decoder["logits_cosine"] > 0.9999 and decoder["range"] > 20
    assert decoder["same_likeliest"] == 1 and decoder["regret"] == 0
    assert report["vision"]["rows"] > 300
    assert min(report[name]["cosine"] for name in ("vision", "image", "text")) > 0.99999


@pytest.mark.parametrize("kind", KINDS)
def test_features_for_first_layers_are_measured_too(atlas, qwen3_policy, tmp_path, kind):
    bundle = replace(atlas, policy=qwen3_policy)
    report = measure_lifted(
        bundle, lifted_from(dict.fromkeys(("decoder", "vision"), qwen3_policy), tmp_path, kind), kind, context=CONTEXT
    )
    check_lifted(report)
    assert report["decoder"]["divergence"] < 1e-5 and report["vision"]["cosine"] > 0.9999 and "image" not in report


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_differ_by_what_the_bundle_rounds(atlas, int4, tmp_path, kind):
    bundle = replace(atlas, policy=int4)
    report = measure_lifted(bundle, lifted_from({"decoder": int4}, tmp_path, kind), kind, context=CONTEXT)
    check_lifted(report)
    assert report["limits"]["divergence"] > 1e-2 > report["decoder"]["divergence"] > 1e-5
    assert "vision" not in report


def one_token_off(graph):
    for node in graph.node:
        if node.op_type == "LessOrEqual":
            node.op_type = "Less"


def unscaled(graph):
    node = next(node for node in graph.node if node.op_type == "Attention")
    next(each for each in node.attribute if each.name == "scale").f *= 1.5


def twisted(graph):
    node = next(node for node in graph.node if node.op_type == "RotaryEmbedding")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def spoilt(graph):
    tensor = max(graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    values = numpy_helper.to_array(tensor).copy()
    values[: len(values) // 2] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("fault", [one_token_off, unscaled, twisted, spoilt])
def test_a_decoder_with_a_fault_is_refused(atlas, tmp_path, fault):
    lifted = lifted_from({"decoder": atlas.policy}, tmp_path, "standard")
    altered(lifted["decoder"], fault)
    report = measure_lifted(atlas, lifted, "standard", context=CONTEXT)
    with pytest.raises(CheckpointError, match="the decoder rewritten as 'standard' differs .* was expected"):
        check_lifted(report)


def test_towers_with_a_fault_are_refused(atlas, tmp_path):
    sources = {"vision": atlas.policy, "image": atlas.encoder, "text": atlas.encoder}
    for name, folder in sources.items():
        lifted = lifted_from({name: folder}, tmp_path, "decomposed")
        altered(lifted[name], spoilt)
        with pytest.raises(CheckpointError, match=f"the {name} rewritten as 'decomposed' .* cosine is"):
            check_lifted(measure_lifted(atlas, lifted, "decomposed", context=CONTEXT))


def test_a_context_too_small_for_the_conversation_is_said(atlas, tmp_path):
    lifted = lifted_from({"decoder": atlas.policy}, tmp_path, "standard", context=64)
    with pytest.raises(BudgetExceeded, match="do not fit 64"):
        measure_lifted(atlas, lifted, "standard", context=64)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_are_kept_and_refused_as_all_others(policies, tmp_path, kind):
    lift_graph(policies[True] / "decoder.onnx", tmp_path / "decoder.onnx", kind, context=64)
    own = OrtDecoder(policies[True] / "decoder.onnx", capacity=64, threads=1)
    decoder = LiftedDecoder(open_session(tmp_path / "decoder.onnx", threads=1), tmp_path / "decoder.onnx")
    random = np.random.default_rng(0)
    embeds = random.normal(0, 0.5, (12, own.hidden)).astype(np.float32)
    angles = np.outer(np.arange(12), np.arange(1, own.rotary + 1) / own.rotary).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    cache, theirs = decoder.new_cache(), own.new_cache()
    for one, engine in ((cache, decoder), (theirs, own)):
        engine.step(one, embeds[:10], cos[:10], sin[:10], 0)
    kept, expected = cache.snapshot(10), theirs.snapshot(10)
    assert np.abs(kept.states - expected.states).max() < 0.02 and np.abs(kept.cos - expected.cos).max() < 1e-3
    second = decoder.new_cache()
    second.restore(expected)
    said = [engine.step(one, embeds[10:], cos[10:], sin[10:], 10, keep=2)
            for one, engine in ((second, decoder), (theirs, own))]  # fmt: skip
    assert np.abs(said[0] - said[1]).max() < 0.02
    with pytest.raises(BackendError, match="60 \\+ 12 tokens do not fit a cache of 64"):
        decoder.step(cache, embeds, cos, sin, 60)
