"""Rewritten decoders on ONNX Runtime say what the bundle's own says, wherever their caches lie.

The device is the processor here: memory that is written and read by ONNX Runtime alone, as a GPU's is.
"""

import numpy as np
import pytest
from test_ort import tokens

from gog_edge.engines.onnx.decoder import Device, DeviceTensor, OrtDecoder
from gog_edge.engines.onnx.device_decoder import LiftedDecoder
from gog_edge.engines.onnx.session import open_session
from gog_edge.errors import ArtifactError, BackendError
from gog_edge.exporting.conversion.convert import KINDS, lift_graph

CONTEXT = 64
STEPS = ((9, 1), (1, 1), (6, 3), (1, 1), (4, 4))  # tokens, and rows of logits that are wanted


@pytest.fixture(scope="module")
def own(policies):
    return OrtDecoder(policies[True] / "decoder.onnx", capacity=CONTEXT, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def rewritten(policies, tmp_path_factory, request):
    path = tmp_path_factory.mktemp(request.param) / "decoder.onnx"
    lift_graph(policies[True] / "decoder.onnx", path, request.param, context=CONTEXT)
    return path


def opened(path, device=None):
    return LiftedDecoder(open_session(path, threads=1), path, device=device)


@pytest.fixture(scope="module", params=[None, Device("cpu")])
def decoder(rewritten, request):
    return opened(rewritten, request.param)


def test_half_precision_says_nearly_the_same_wherever_caches_lie(own, decoder):
    embeds, cos, sin = tokens(own, 21)
    single, cache = own.new_cache(), decoder.new_cache()
    assert {state.value.data_type() for state in cache.states} == {"tensor(float16)"}
    assert {isinstance(state, DeviceTensor) for state in cache.states} == {decoder.device is not None}
    past = 0
    for count, keep in STEPS:
        rows = slice(past, past + count)
        expected = own.step(single, embeds[rows], cos[rows], sin[rows], past, keep=keep)
        logits = decoder.step(cache, embeds[rows], cos[rows], sin[rows], past, keep=keep)
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        assert 0 < np.abs(logits - expected).max() < 0.02
        past += count


def test_pictures_features_reach_the_first_layers(qwen3_policy, tmp_path):
    own = OrtDecoder(qwen3_policy / "decoder.onnx", capacity=CONTEXT, threads=1)
    embeds, cos, sin = tokens(own, 8)
    deeper = np.random.default_rng(1).normal(0, 0.5, (own.deepstack, 8, own.hidden)).astype(np.float32)
    expected = own.step(own.new_cache(), embeds, cos, sin, 0, deepstack=deeper).copy()
    for kind in KINDS:
        lift_graph(qwen3_policy / "decoder.onnx", tmp_path / f"{kind}.onnx", kind, context=CONTEXT)
        decoder = opened(tmp_path / f"{kind}.onnx", Device("cpu"))
        cache = decoder.new_cache()
        without = decoder.step(cache, embeds, cos, sin, 0).copy()
        assert np.abs(decoder.step(cache, embeds, cos, sin, 0, deepstack=deeper) - expected).max() < 0.02
        assert np.abs(without - expected).max() > 0.1


def test_caches_move_between_devices_and_go_on(own, decoder):
    embeds, cos, sin = tokens(own, 10)
    cache, copied, restored = (decoder.new_cache() for _ in range(3))
    decoder.step(cache, embeds[:9], cos[:9], sin[:9], 0)
    copied.copy_from(cache, 9)
    kept = cache.snapshot(9)
    assert kept.states.dtype == np.float32 and kept.states.shape == (6, 2, 9, 16) and np.abs(kept.states).max() > 1
    restored.restore(kept)
    decoder.step(cache, -embeds[:9], cos[:9], sin[:9], 0)
    said = [decoder.step(one, embeds[9:], cos[9:], sin[9:], 9).copy() for one in (copied, restored)]
    assert np.array_equal(*said)
    single = own.new_cache()
    single.restore(kept)  # of another precision and place
    assert np.abs(own.step(single, embeds[9:], cos[9:], sin[9:], 9) - said[0]).max() < 0.02
    with pytest.raises(BackendError, match="remove those files"):
        copied.restore(type(kept)(kept.states[:, :, :5], kept.cos, kept.sin))


def test_a_smaller_past_rewinds(own, decoder):
    embeds, cos, sin = tokens(own, 12)
    cache = decoder.new_cache()
    decoder.step(cache, embeds[:8], cos[:8], sin[:8], 0)
    expected = decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8).copy()
    decoder.step(cache, embeds[9:], cos[9:], sin[9:], 9)
    assert np.array_equal(decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8), expected)


def test_what_does_not_fit_is_refused(own, decoder):
    embeds, cos, sin = tokens(own, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64; build a larger one"):
        decoder.step(decoder.new_cache(), embeds, cos, sin, 60)
    with pytest.raises(BackendError, match="this cache is of another engine"):
        decoder.step(own.new_cache(), embeds, cos, sin, 0)


def test_caches_of_two_places_are_not_copied(rewritten):
    caches = [opened(rewritten, device).new_cache() for device in (None, Device("cpu"))]
    for mine, other in (caches, caches[::-1]):
        with pytest.raises(BackendError, match="on the same device"):
            mine.copy_from(other, 1)


def test_a_graph_that_is_no_rewritten_decoder_is_refused(policies):
    for name in ("decoder", "vision"):
        with pytest.raises(ArtifactError, match="no decoder as this version rewrites them: .*; build them again"):
            opened(policies[True] / f"{name}.onnx")
