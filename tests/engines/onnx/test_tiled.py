import numpy as np
import pytest

from gog_edge.engines.onnx.decoder import HostTensor, TiledTensor, bfloat16, new_states, widened
from gog_edge.engines.onnx.native import KEYS
from gog_edge.errors import BackendError

SHAPE = (1, 3, 128, 64)  # heads, tokens, width


def keys(shape=SHAPE):
    return TiledTensor(shape, tile=16, pair=2)


def values(shape=SHAPE):
    return TiledTensor(shape, tile=2, pair=1)


def numbers(tokens, seed=0):
    """What bfloat16 holds exactly."""
    rows = np.random.default_rng([seed, tokens]).normal(size=(1, SHAPE[1], tokens, SHAPE[3]))
    return widened(bfloat16(rows))


@pytest.mark.parametrize("kind", [keys, values])
def test_what_is_written_anywhere_is_read(kind):
    tensor, expected, at = kind(), np.zeros(SHAPE, np.float32), 0
    for count in (3, 1, 1, 16, 30, 2, 60, 15):  # 128 in all
        rows = numbers(count, seed=at)
        tensor.write(at, rows)
        expected[:, :, at : at + count] = rows
        at += count
        for length in (0, 1, at - 1, at, 128):
            read = tensor.read(length)
            assert read.dtype == np.float32 and np.array_equal(read, expected[:, :, :length])
    tensor.write(17, numbers(33))  # again, over what is there
    expected[:, :, 17:50] = numbers(33)
    assert at == 128 and np.array_equal(tensor.read(128), expected)
    tensor.write(5, numbers(1)[0].astype(np.float64))  # without the leading one, of another type
    expected[:, :, 5:6] = numbers(1)
    assert np.array_equal(tensor.read(128), expected)


def test_numbers_stand_as_the_kernels_read_them():
    """attention.h: keys [kv_heads, capacity / 16, width / 2, 16, 2], values [kv_heads, capacity / 2, width, 2]."""
    rows = numbers(128)
    for kind, shape in ((keys, (3, 8, 16, 32, 2)), (values, (3, 64, 2, 64, 1))):
        tensor = kind()
        tensor.write(0, rows)
        heads, tiles, tile, groups, pair = shape
        expected = rows[0].reshape(heads, tiles, tile, groups, pair).transpose(0, 1, 3, 2, 4)
        assert tensor.value.shape() == list(SHAPE) and tensor.value.data_type() == "tensor(uint16)"
        assert np.array_equal(widened(tensor.value.numpy()).reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", [keys, values])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 128])
def test_a_copy_goes_on_alone(kind, length):
    first, second = kind(), kind((1, 3, 192, 64))
    first.write(0, numbers(128))
    second.copy_from(first, length)
    assert np.array_equal(second.read(length), numbers(128)[:, :, :length])
    tail = numbers(20, seed=9)
    second.write(length, tail)  # over what came along with the last tile
    assert np.array_equal(second.read(length + 20)[:, :, length:], tail)
    assert np.array_equal(second.read(length), numbers(128)[:, :, :length])
    assert np.array_equal(first.read(128), numbers(128))


def test_nothing_is_copied_from_another_kind():
    plain = HostTensor(SHAPE, np.dtype(np.float32))
    with pytest.raises(BackendError, match="one of the same kind"):
        keys().copy_from(plain, 1)
    with pytest.raises(BackendError, match="open both on one engine"):
        plain.copy_from(keys(), 1)


@pytest.mark.parametrize("tokens, room", [(1, 64), (64, 64), (65, 128), (100, 128), (1000, 1024)])
def test_a_cache_has_room_in_whole_blocks_of_keys(tokens, room):
    states = new_states(["key_0", "value_0", "key_1", "value_1"], 2, tokens, 64)
    assert room % KEYS == 0 and [state.shape for state in states] == [(1, 2, room, 64)] * 4
    assert not any(state.read(room).any() for state in states)
    layouts = [state._array.shape for state in states]
    assert layouts == [(2, room // 16, 32, 16, 2), (2, room // 2, 64, 2, 1)] * 2


def test_numbers_are_rounded_to_the_nearest_and_halves_to_even():
    step = 2.0**-7  # of numbers from one to two
    given = [1, 1 + step / 2, 1 + 1.5 * step, 1 + step * 0.49, 1 + step * 0.51, 2 - step / 4, 0, -0.0, 1e30, 3e38]
    expected = [1, 1, 1 + 2 * step, 1, 1 + step, 2, 0, -0.0, 1e30, 3e38]
    for sign in (1, -1):
        back = widened(bfloat16(sign * np.array(given)))
        assert back.dtype == np.float32 and np.array_equal(np.signbit(back), np.signbit(sign * np.array(given)))
        assert np.array_equal(back[:8], sign * np.array(expected[:8], np.float32))
        assert (np.abs(back[8:] / (sign * np.array(expected[8:])) - 1) <= 2.0**-8).all()
    assert np.isinf(widened(bfloat16(np.array([np.inf, -np.inf, 3.4e38])))).all()


def test_rounding_takes_no_more_than_half_a_step():
    some = np.random.default_rng(1).normal(size=10_000).astype(np.float32) * np.logspace(-30, 30, 10_000)
    some = some.astype(np.float32)
    back = widened(bfloat16(some))
    assert (np.abs(back - some) <= np.abs(some) * 2.0**-8).all()
    assert np.array_equal(widened(bfloat16(back)), back) and bfloat16(some.reshape(10, -1)).shape == (10, 1000)
