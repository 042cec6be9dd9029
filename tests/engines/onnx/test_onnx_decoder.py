"""Decoders on ONNX Runtime's CPU provider and the tensors of their caches, in host and device memory.

The device is the CPU, through ONNX Runtime's own memory, which is accessed like a GPU's.
"""

import dataclasses
import gc

import numpy as np
import onnxruntime
import pytest

from gog_edge.engines.onnx.decoder import (
    Device,
    DeviceTensor,
    HostTensor,
    OrtDecoder,
    TiledTensor,
    from_bfloat16,
    new_tiled_tensors,
    tensor_view,
    to_bfloat16,
)
from gog_edge.engines.onnx.native import CAPACITY_MULTIPLE
from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.decoder_graph import write_decoder

SHAPE = (1, 3, 128, 64)  # of tiled tensors: 3 heads, 128 tokens, width 64


@pytest.fixture(scope="module")
def decoder(policies):
    return OrtDecoder(policies[True] / "decoder.onnx", capacity=64, threads=1)


def tokens(decoder, count, seed=0):
    """Random embeddings, and rotary tables, of `count` tokens."""
    random = np.random.default_rng(seed)
    angles = np.outer(np.arange(count), 1e4 ** (-np.arange(decoder.rotary) / decoder.rotary))
    embeds = random.normal(0, 0.5, (count, decoder.hidden))
    return [array.astype(np.float32) for array in (embeds, np.cos(angles), np.sin(angles))]


# --- decoder --------------------------------------------------------------------------------------


def test_a_graph_that_is_not_a_decoder(policies):
    with pytest.raises(BackendError, match="not a decoder"):
        OrtDecoder(policies[True] / "vision.onnx", capacity=8)


def test_several_steps_equal_one_step(decoder):
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


def test_a_copied_cache_is_independent(decoder):
    embeds, cos, sin = tokens(decoder, 10)
    first, second = decoder.new_cache(), decoder.new_cache()
    decoder.step(first, embeds[:9], cos[:9], sin[:9], 0)
    second.copy_from(first, 9)
    decoder.step(first, -embeds[:9], cos[:9], sin[:9], 0)
    expected = decoder.step(decoder.new_cache(), embeds, cos, sin, 0)
    assert np.abs(decoder.step(second, embeds[9:], cos[9:], sin[9:], 9) - expected).max() < 1e-4


def test_more_tokens_than_fit(decoder):
    embeds, cos, sin = tokens(decoder, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64"):
        decoder.step(decoder.new_cache(), embeds, cos, sin, 60)


def test_a_cache_of_another_decoder(decoder, policies):
    other = OrtDecoder(policies[False] / "decoder.onnx", capacity=64, threads=1)
    with pytest.raises(BackendError, match="a cache of the same decoder"):
        decoder.new_cache().copy_from(other.new_cache(), 1)


def test_head_widths_without_a_kernel_cannot_be_exported(checkpoints, tmp_path):
    spec = dataclasses.replace(Checkpoint.open(checkpoints[True]).text, head_dim=24)
    with pytest.raises(CheckpointError, match="24"):
        write_decoder(tmp_path / "x.onnx", spec, Checkpoint.open(checkpoints[True]).decoder_weights())


def test_rows_of_logits_equal_those_of_single_steps(decoder):
    embeds, cos, sin = tokens(decoder, 12)
    cache, single = decoder.new_cache(), decoder.new_cache()
    decoder.step(cache, embeds[:6], cos[:6], sin[:6], 0)
    logits = decoder.step(cache, embeds[6:], cos[6:], sin[6:], 6, keep=4)
    assert logits.shape == (4, decoder.vocab)
    decoder.step(single, embeds[:8], cos[:8], sin[:8], 0)
    for row, at in enumerate(range(8, 12)):
        expected = decoder.step(single, embeds[at : at + 1], cos[at : at + 1], sin[at : at + 1], at)
        assert np.abs(logits[row] - expected[0]).max() < 1e-4


# --- tensors in host and device memory ------------------------------------------------------------


@pytest.mark.parametrize("kind", [HostTensor, lambda shape, dtype: DeviceTensor(shape, dtype, Device("cpu"))])
@pytest.mark.parametrize("lead", [(), (1, 3)])
def test_tokens_are_written_and_read_in_place(kind, lead):
    random = np.random.default_rng(0)
    first, second = (kind((*lead, 8, 4), np.dtype(np.float16)) for _ in range(2))
    rows = random.normal(size=(*lead, 3, 4)).astype(np.float32)
    first.write(2, rows)
    assert np.array_equal(first.read(8)[..., 2:5, :], rows.astype(np.float16))
    assert not first.read(2).any() and not first.read(8)[..., 5:, :].any()
    second.copy_from(first, 4)
    assert np.array_equal(second.read(4), first.read(4)) and not second.read(8)[..., 4:, :].any()
    assert first.read(0).shape == (*lead, 0, 4)


def test_a_view_shares_the_memory_and_keeps_it_alive():
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((6, 4), np.float32, "cpu")
    value.update_inplace(np.arange(24, dtype=np.float32).reshape(6, 4))
    part = tensor_view(value, 8, (2, 4))
    part.update_inplace(np.full((2, 4), -1, np.float32))
    assert value.numpy()[:, 0].tolist() == [0, 4, -1, -1, 16, 20] and value.shape() == [6, 4]
    del value
    gc.collect()
    onnxruntime.OrtValue.ortvalue_from_shape_and_type((6, 4), np.float32, "cpu")
    assert (part.numpy() == -1).all()


# --- tiled tensors --------------------------------------------------------------------------------


def keys(shape=SHAPE):
    return TiledTensor(shape, tile=16, pair=2)


def values(shape=SHAPE):
    return TiledTensor(shape, tile=2, pair=1)


def bfloat16_rows(tokens, seed=0):
    """Rows of values that bfloat16 represents exactly."""
    rows = np.random.default_rng([seed, tokens]).normal(size=(1, SHAPE[1], tokens, SHAPE[3]))
    return from_bfloat16(to_bfloat16(rows))


@pytest.mark.parametrize("kind", [keys, values])
def test_tiled_writes_at_any_position_are_read_back(kind):
    tensor, expected, at = kind(), np.zeros(SHAPE, np.float32), 0
    for count in (3, 1, 1, 16, 30, 2, 60, 15):  # 128 in total
        rows = bfloat16_rows(count, seed=at)
        tensor.write(at, rows)
        expected[:, :, at : at + count] = rows
        at += count
        for length in (0, 1, at - 1, at, 128):
            read = tensor.read(length)
            assert read.dtype == np.float32 and np.array_equal(read, expected[:, :, :length])
    tensor.write(17, bfloat16_rows(33))  # overwrite
    expected[:, :, 17:50] = bfloat16_rows(33)
    assert at == 128 and np.array_equal(tensor.read(128), expected)
    tensor.write(5, bfloat16_rows(1)[0].astype(np.float64))  # without the leading axis, in another type
    expected[:, :, 5:6] = bfloat16_rows(1)
    assert np.array_equal(tensor.read(128), expected)


def test_tiled_layout_is_that_of_the_kernels():
    """attention.h: keys [kv_heads, capacity / 16, width / 2, 16, 2], values [kv_heads, capacity / 2, width, 2]."""
    rows = bfloat16_rows(128)
    for kind, shape in ((keys, (3, 8, 16, 32, 2)), (values, (3, 64, 2, 64, 1))):
        tensor = kind()
        tensor.write(0, rows)
        heads, tiles, tile, groups, pair = shape
        expected = rows[0].reshape(heads, tiles, tile, groups, pair).transpose(0, 1, 3, 2, 4)
        assert tensor.value.shape() == list(SHAPE) and tensor.value.data_type() == "tensor(uint16)"
        assert np.array_equal(from_bfloat16(tensor.value.numpy()).reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", [keys, values])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 128])
def test_a_tiled_copy_is_independent(kind, length):
    first, second = kind(), kind((1, 3, 192, 64))
    first.write(0, bfloat16_rows(128))
    second.copy_from(first, length)
    assert np.array_equal(second.read(length), bfloat16_rows(128)[:, :, :length])
    tail = bfloat16_rows(20, seed=9)
    second.write(length, tail)  # overwrites what was copied with the last tile
    assert np.array_equal(second.read(length + 20)[:, :, length:], tail)
    assert np.array_equal(second.read(length), bfloat16_rows(128)[:, :, :length])
    assert np.array_equal(first.read(128), bfloat16_rows(128))


def test_tensors_of_different_classes_are_not_copied():
    plain = HostTensor(SHAPE, np.dtype(np.float32))
    for target, source in ((keys(), plain), (plain, keys())):
        with pytest.raises(BackendError, match="of the same kind .*; open both on one engine"):
            target.copy_from(source, 1)


@pytest.mark.parametrize("tokens, capacity", [(1, 64), (64, 64), (65, 128), (100, 128), (1000, 1024)])
def test_tiled_capacity_is_rounded_up(tokens, capacity):
    states = new_tiled_tensors(["key_0", "value_0", "key_1", "value_1"], 2, tokens, 64)
    assert capacity % CAPACITY_MULTIPLE == 0 and [state.shape for state in states] == [(1, 2, capacity, 64)] * 4
    assert not any(state.read(capacity).any() for state in states)
    layouts = [state._array.shape for state in states]
    assert layouts == [(2, capacity // 16, 32, 16, 2), (2, capacity // 2, 64, 2, 1)] * 2


def test_bfloat16_rounds_to_nearest_with_ties_to_even():
    step = 2.0**-7  # between bfloat16 values from 1 to 2
    given = [1, 1 + step / 2, 1 + 1.5 * step, 1 + step * 0.49, 1 + step * 0.51, 2 - step / 4, 0, -0.0, 1e30, 3e38]
    expected = [1, 1, 1 + 2 * step, 1, 1 + step, 2, 0, -0.0, 1e30, 3e38]
    for sign in (1, -1):
        back = from_bfloat16(to_bfloat16(sign * np.array(given)))
        assert back.dtype == np.float32 and np.array_equal(np.signbit(back), np.signbit(sign * np.array(given)))
        assert np.array_equal(back[:8], sign * np.array(expected[:8], np.float32))
        assert (np.abs(back[8:] / (sign * np.array(expected[8:])) - 1) <= 2.0**-8).all()
    assert np.isinf(from_bfloat16(to_bfloat16(np.array([np.inf, -np.inf, 3.4e38])))).all()


def test_bfloat16_rounding_error_is_at_most_half_a_step():
    some = np.random.default_rng(1).normal(size=10_000).astype(np.float32) * np.logspace(-30, 30, 10_000)
    some = some.astype(np.float32)
    back = from_bfloat16(to_bfloat16(some))
    assert (np.abs(back - some) <= np.abs(some) * 2.0**-8).all()
    assert np.array_equal(from_bfloat16(to_bfloat16(back)), back)
    assert to_bfloat16(some.reshape(10, -1)).shape == (10, 1000)
