"""Converted decoders on ONNX Runtime compute what the bundle's own decoder computes, with caches in any memory.

The device is the CPU, through ONNX Runtime's own memory, which is accessed like a GPU's.
"""

import numpy as np
import pytest
from test_onnx_decoder import tokens

from gog_edge.engines.onnx.decoder import Device, DeviceTensor, OrtDecoder
from gog_edge.engines.onnx.device_decoder import ConvertedDecoder
from gog_edge.engines.onnx.session import open_session
from gog_edge.errors import ArtifactError, BackendError
from gog_edge.exporting.conversion.convert import KINDS, convert_graph

CONTEXT = 64
STEPS = ((9, 1), (1, 1), (6, 3), (1, 1), (4, 4))  # tokens, rows of logits


@pytest.fixture(scope="module")
def own(policies):
    return OrtDecoder(policies[True] / "decoder.onnx", capacity=CONTEXT, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def converted_graph(policies, tmp_path_factory, request):
    path = tmp_path_factory.mktemp(request.param) / "decoder.onnx"
    convert_graph(policies[True] / "decoder.onnx", path, request.param, context=CONTEXT)
    return path


def open_decoder(path, device=None):
    return ConvertedDecoder(open_session(path, threads=1), path, device=device)


@pytest.fixture(scope="module", params=[None, Device("cpu")])
def decoder(converted_graph, request):
    return open_decoder(converted_graph, request.param)


def test_logits_agree_within_fp16_precision(own, decoder):
    embeds, cos, sin = tokens(own, 21)
    own_cache, cache = own.new_cache(), decoder.new_cache()
    assert {state.value.data_type() for state in cache.states} == {"tensor(float16)"}
    assert {isinstance(state, DeviceTensor) for state in cache.states} == {decoder.device is not None}
    past = 0
    for count, keep in STEPS:
        rows = slice(past, past + count)
        expected = own.step(own_cache, embeds[rows], cos[rows], sin[rows], past, keep=keep)
        logits = decoder.step(cache, embeds[rows], cos[rows], sin[rows], past, keep=keep)
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        assert 0 < np.abs(logits - expected).max() < 0.02
        past += count


def test_deepstack_features_are_added_to_the_first_layers(qwen3_policy, tmp_path):
    own = OrtDecoder(qwen3_policy / "decoder.onnx", capacity=CONTEXT, threads=1)
    embeds, cos, sin = tokens(own, 8)
    features = np.random.default_rng(1).normal(0, 0.5, (own.deepstack, 8, own.hidden)).astype(np.float32)
    expected = own.step(own.new_cache(), embeds, cos, sin, 0, deepstack=features).copy()
    for kind in KINDS:
        convert_graph(qwen3_policy / "decoder.onnx", tmp_path / f"{kind}.onnx", kind, context=CONTEXT)
        decoder = open_decoder(tmp_path / f"{kind}.onnx", Device("cpu"))
        cache = decoder.new_cache()
        without = decoder.step(cache, embeds, cos, sin, 0).copy()
        assert np.abs(decoder.step(cache, embeds, cos, sin, 0, deepstack=features) - expected).max() < 0.02
        assert np.abs(without - expected).max() > 0.1


def test_copied_and_restored_caches_continue(own, decoder):
    embeds, cos, sin = tokens(own, 10)
    cache, copied, restored = (decoder.new_cache() for _ in range(3))
    decoder.step(cache, embeds[:9], cos[:9], sin[:9], 0)
    copied.copy_from(cache, 9)
    snapshot = cache.snapshot(9)
    assert snapshot.states.dtype == np.float32 and snapshot.states.shape == (6, 2, 9, 16)
    assert np.abs(snapshot.states).max() > 1
    restored.restore(snapshot)
    decoder.step(cache, -embeds[:9], cos[:9], sin[:9], 0)
    logits = [decoder.step(one, embeds[9:], cos[9:], sin[9:], 9).copy() for one in (copied, restored)]
    assert np.array_equal(*logits)
    own_cache = own.new_cache()
    own_cache.restore(snapshot)  # of another precision and memory
    assert np.abs(own.step(own_cache, embeds[9:], cos[9:], sin[9:], 9) - logits[0]).max() < 0.02
    with pytest.raises(BackendError, match="remove the snapshot's files"):
        copied.restore(type(snapshot)(snapshot.states[:, :, :5], snapshot.cos, snapshot.sin))


def test_a_smaller_past_rewinds(own, decoder):
    embeds, cos, sin = tokens(own, 12)
    cache = decoder.new_cache()
    decoder.step(cache, embeds[:8], cos[:8], sin[:8], 0)
    expected = decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8).copy()
    decoder.step(cache, embeds[9:], cos[9:], sin[9:], 9)
    assert np.array_equal(decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8), expected)


def test_invalid_steps(own, decoder):
    embeds, cos, sin = tokens(own, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64; build engines with a larger"):
        decoder.step(decoder.new_cache(), embeds, cos, sin, 60)
    with pytest.raises(BackendError, match="this cache belongs to another engine"):
        decoder.step(own.new_cache(), embeds, cos, sin, 0)


def test_caches_in_different_memory_are_not_copied(converted_graph):
    caches = [open_decoder(converted_graph, device).new_cache() for device in (None, Device("cpu"))]
    for target, source in (caches, caches[::-1]):
        with pytest.raises(BackendError, match="on the same device"):
            target.copy_from(source, 1)


def test_a_graph_that_is_not_a_converted_decoder(policies):
    for name in ("decoder", "vision"):
        with pytest.raises(ArtifactError, match="not a decoder converted by this version: .*; build them again"):
            open_decoder(policies[True] / f"{name}.onnx")
