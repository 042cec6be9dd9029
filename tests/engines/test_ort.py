import numpy as np
import pytest

from gog_edge.engines.ort import OrtDecoder, OrtGraph, open_session, physical_cores
from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.checkpoint import Checkpoint
from gog_edge.exporting.decoder_graph import write_decoder


@pytest.fixture(scope="module")
def decoder(policies):
    return OrtDecoder(policies[True] / "decoder.onnx", capacity=64, threads=1)


def tokens(decoder, count, seed=0):
    random = np.random.default_rng(seed)
    angles = np.outer(np.arange(count), 1e4 ** (-np.arange(decoder.rotary) / decoder.rotary))
    embeds = random.normal(0, 0.5, (count, decoder.hidden))
    return [array.astype(np.float32) for array in (embeds, np.cos(angles), np.sin(angles))]


def test_a_provider_that_is_not_there_is_an_error(policies):
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        OrtGraph(policies[True] / "vision.onnx", providers=("CUDAExecutionProvider",))


def test_a_graph_that_cannot_be_loaded_is_an_error(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        open_session(tmp_path / "bad.onnx")


def test_a_graph_that_is_no_decoder_is_an_error(policies):
    with pytest.raises(BackendError, match="not a decoder"):
        OrtDecoder(policies[True] / "vision.onnx", capacity=8)


def test_appending_step_by_step_equals_one_step(decoder):
    embeds, cos, sin = tokens(decoder, 20)
    whole, steps = decoder.new_cache(), decoder.new_cache()
    expected = decoder.step(whole, embeds, cos, sin, 0).copy()
    past = 0
    for count in (9, 1, 1, 5, 1, 3):
        rows = slice(past, past + count)
        logits = decoder.step(steps, embeds[rows], cos[rows], sin[rows], past)
        past += count
    assert np.abs(logits - expected).max() < 1e-4


def test_a_smaller_past_rewinds(decoder):
    embeds, cos, sin = tokens(decoder, 12)
    cache = decoder.new_cache()
    decoder.step(cache, embeds[:8], cos[:8], sin[:8], 0)
    expected = decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8).copy()
    decoder.step(cache, embeds[9:], cos[9:], sin[9:], 9)
    assert np.array_equal(decoder.step(cache, embeds[8:9], cos[8:9], sin[8:9], 8), expected)


def test_a_copied_cache_goes_on_alone(decoder):
    embeds, cos, sin = tokens(decoder, 10)
    first, second = decoder.new_cache(), decoder.new_cache()
    decoder.step(first, embeds[:9], cos[:9], sin[:9], 0)
    second.copy_from(first, 9)
    decoder.step(first, -embeds[:9], cos[:9], sin[:9], 0)
    expected = decoder.step(decoder.new_cache(), embeds, cos, sin, 0)
    assert np.abs(decoder.step(second, embeds[9:], cos[9:], sin[9:], 9) - expected).max() < 1e-4


def test_more_than_fits_is_an_error(decoder):
    embeds, cos, sin = tokens(decoder, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64"):
        decoder.step(decoder.new_cache(), embeds, cos, sin, 60)


def test_the_cache_of_another_engine_is_refused(decoder, policies):
    other = OrtDecoder(policies[False] / "decoder.onnx", capacity=64, threads=1)
    with pytest.raises(BackendError, match="same decoder"):
        decoder.new_cache().copy_from(other.new_cache(), 1)


def test_the_portable_form_says_the_same(decoder, checkpoints, tmp_path):
    checkpoint = Checkpoint.open(checkpoints[True])
    write_decoder(tmp_path / "standard.onnx", checkpoint.text, checkpoint.decoder_weights(), "standard")
    graph, spec = OrtGraph(tmp_path / "standard.onnx", threads=1), checkpoint.text
    embeds, cos, sin = tokens(decoder, 15)
    names = [f"{kind}_{layer}" for layer in range(spec.layers) for kind in ("key", "value")]
    states = {name: np.zeros((1, spec.kv_heads, 64, spec.head_dim), np.float32) for name in names}
    cache = decoder.new_cache()
    past = 0
    for count in (10, 1, 4):
        rows = slice(past, past + count)
        feeds = {"inputs_embeds": embeds[None, rows], "cos": cos[None, rows], "sin": sin[None, rows]}
        feeds |= {"past": np.array([past]), "keep": np.ones(1, np.int64)}
        feeds |= {f"past_{name}": state for name, state in states.items()}
        outputs = graph.run(feeds)
        states = {name: outputs[f"present_{name}"] for name in names}
        expected = decoder.step(cache, embeds[rows], cos[rows], sin[rows], past)
        assert np.abs(outputs["logits"][0] - expected).max() < 1e-4
        past += count


def test_heads_that_the_kernel_cannot_take_are_refused_at_export(checkpoints, tmp_path):
    import dataclasses

    spec = dataclasses.replace(Checkpoint.open(checkpoints[True]).text, head_dim=24)
    with pytest.raises(CheckpointError, match="24 wide"):
        write_decoder(tmp_path / "x.onnx", spec, Checkpoint.open(checkpoints[True]).decoder_weights())


def test_there_is_at_least_one_core():
    assert physical_cores() >= 1


def test_logits_of_the_last_positions_are_those_of_single_steps(decoder):
    embeds, cos, sin = tokens(decoder, 12)
    cache, single = decoder.new_cache(), decoder.new_cache()
    decoder.step(cache, embeds[:6], cos[:6], sin[:6], 0)
    kept = decoder.step(cache, embeds[6:], cos[6:], sin[6:], 6, keep=4)
    assert kept.shape == (4, decoder.vocab)
    decoder.step(single, embeds[:8], cos[:8], sin[:8], 0)
    for row, at in enumerate(range(8, 12)):
        alone = decoder.step(single, embeds[at : at + 1], cos[at : at + 1], sin[at : at + 1], at)
        assert np.abs(kept[row] - alone[0]).max() < 1e-4
