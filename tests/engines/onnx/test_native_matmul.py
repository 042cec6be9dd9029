"""The native matrix multiplication against float64 references, in every variant that this processor supports."""

from functools import cache

import numpy as np
import pytest
from native_sessions import each_variant, operator_session, requires_library, run_concurrently
from onnx import TensorProto

from gog_edge.engines.onnx.native import PANEL
from gog_edge.engines.onnx.session import RUN_ERRORS
from gog_edge.exporting.policy.native_graph import interleave_panels, pack_panels, pack_scales, pad_to_panels
from gog_edge.exporting.quantization import dequantize, quantize
from gog_edge.policy.manifest import WeightQuantization

pytestmark = [requires_library, each_variant]

ROWS, COLUMNS = 512, 3 * PANEL
# Rows of the left side: they cover all kernels, with nibbles or unpacked bytes, and one or several blocks of rows.
COUNTS = (1, 2, 3, 4, 5, 6, 7, 13, 19, 40, 97, 200)
EXTREMES = (-127, 0, 127)


def matmul(variant, rows=ROWS, columns=COLUMNS, bits=4, block_size=32, *, bias=False, gated=0, left=("n",), threads=2,
            **more):  # fmt: skip
    inputs = {"left": (TensorProto.FLOAT, [*left, "rows"]), "weights": (TensorProto.UINT8, ["bytes"]),
              "scales": (TensorProto.FLOAT, ["blocks"])}  # fmt: skip
    if bias:
        inputs["bias"] = (TensorProto.FLOAT, ["columns"])
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block_size, "gated": gated} | more
    attributes = {name: value for name, value in attributes.items() if value is not None}
    outputs = {"out": (TensorProto.FLOAT, [*left, columns])}
    return operator_session(variant, "BlockProduct", inputs, outputs, threads=threads, **attributes)


def multiply(session, left, weights, bias=None):
    feeds = {"left": left} | weights
    return session.run(None, feeds | ({} if bias is None else {"bias": pad_to_panels(bias)}))[0]


def stored(packed, scales, bits):
    """Convert the result of `quantize` to the operator's layout."""
    return {"weights": pack_panels(packed, bits).reshape(-1), "scales": pack_scales(scales).reshape(-1)}


def stored_integers(integers, scales, blocks):
    """The same for unsigned integers [columns, rows]."""
    packed = integers.astype(np.uint8).reshape(len(integers), -1, blocks.size)
    if blocks.bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    return stored(packed, scales, blocks.bits)


@cache
def weights_of(bits, size, rows=ROWS, columns=COLUMNS):
    """Return random weights in the operator's layout, and as float64 [columns, rows]."""
    weight = np.random.default_rng([bits, size]).normal(0, 0.05, (columns, rows)).astype(np.float32)
    packed, scales = quantize(weight, WeightQuantization(bits, size))
    weight = dequantize(packed, scales, WeightQuantization(bits, size), rows)
    return stored(packed, scales, bits), weight.astype(np.float64)


def rounded(left, size):
    """Round float32 rows to int8 with a scale for each block, and convert them back to float64."""
    padded = np.pad(left, [(0, 0), (0, -left.shape[1] % size)])
    blocks = padded.reshape(len(left), -1, size)
    top = np.abs(blocks).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    whole = np.rint(blocks * factor) * (top.astype(np.float64) / 127)
    return whole.reshape(padded.shape)[:, : left.shape[1]]


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_of_rounded_rows_and_weights(variant, bits, size, biased):
    session = matmul(variant, bits=bits, block_size=size, bias=biased)
    stored_weights, weight = weights_of(bits, size)
    random = np.random.default_rng(5)
    bias = random.normal(size=COLUMNS).astype(np.float32) if biased else None
    for count in COUNTS:
        left = random.normal(size=(count, ROWS)).astype(np.float32)
        expected = rounded(left, size) @ weight.T + (0 if bias is None else bias)
        assert np.abs(multiply(session, left, stored_weights, bias) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns, biased", [(512, 192, False), (80, 100, True), (1, 65, True)])
def test_gated_matmul(variant, bits, rows, columns, biased):
    random, blocks = np.random.default_rng(6), WeightQuantization(bits, 64)
    gate, other = random.normal(size=(2, columns, rows)).astype(np.float32)
    packed, scales = quantize(interleave_panels(gate, other), blocks)
    halves = dequantize(packed, scales, blocks, rows).reshape(-1, 2, PANEL, rows)
    weights = [halves[:, side].reshape(-1, rows)[:columns] for side in (0, 1)]
    biases = random.normal(size=(2, columns)).astype(np.float32) if biased else np.zeros((2, columns), np.float32)
    session = matmul(variant, rows, columns, bits, 64, bias=biased, gated=1)
    for count in (1, 7, 40, 97):
        left = random.normal(size=(count, rows)).astype(np.float32)
        left[-1] *= 1e4  # saturated gates
        first, second = (rounded(left, 64) @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
        expected = first / (1 + np.exp(-np.clip(first, -700, None))) * second
        result = multiply(session, left, stored(packed, scales, bits), interleave_panels(*biases) if biased else None)
        for actual, other in ((result[:-1], expected[:-1]), (result[-1:], expected[-1:])):
            assert np.abs(actual - other).max(initial=0) <= 2e-5 * np.abs(other).max(initial=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns", [(80, 100), (544, 1), (1, 65), (31, 192)])
def test_incomplete_blocks_and_panels(variant, bits, rows, columns):
    session = matmul(variant, rows, columns, bits, 64, bias=True)
    stored_weights, weight = weights_of(bits, 64, rows, columns)
    random = np.random.default_rng(10)
    bias = random.normal(size=columns).astype(np.float32)
    for count in COUNTS:
        left = random.normal(size=(count, rows)).astype(np.float32)
        expected = rounded(left, 64) @ weight.T + bias
        assert np.abs(multiply(session, left, stored_weights, bias) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_threads_and_other_rows(variant, bits):
    stored_weights, _ = weights_of(bits, 64)
    left = np.random.default_rng(6).normal(size=(40, ROWS)).astype(np.float32)
    one, two = (matmul(variant, bits=bits, block_size=64, threads=count) for count in (1, 2))
    expected = multiply(one, left, stored_weights)
    assert np.array_equal(multiply(two, left, stored_weights), expected)
    for count in COUNTS:
        assert np.array_equal(multiply(two, left[3 : 3 + count], stored_weights), expected[3 : 3 + count])


def test_concurrent_matmuls(variant):
    session, (stored_weights, _) = matmul(variant, block_size=64), weights_of(4, 64)
    lefts = [np.random.default_rng(seed).normal(size=(count, ROWS)).astype(np.float32)
             for seed, count in enumerate(COUNTS * 6)]  # fmt: skip
    expected = [multiply(session, left, stored_weights) for left in lefts]
    results = run_concurrently([lambda left=left: multiply(session, left, stored_weights) for left in lefts])
    assert all(np.array_equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_integers_do_not_overflow(variant, bits, size):
    """With scales of one, every sum is exact."""
    random = np.random.default_rng(7)
    integers = np.full((COLUMNS, ROWS), 2**bits - 1)
    integers[1] = 0
    integers[2:] = random.choice([0, 2**bits - 1], (COLUMNS - 2, ROWS))
    scales = np.ones((COLUMNS, ROWS // size), np.float32)
    stored_weights = stored_integers(integers, scales, WeightQuantization(bits, size))
    session = matmul(variant, bits=bits, block_size=size)
    for count in (1, 3, 5, 40):
        left = random.choice(EXTREMES, (count, ROWS)).astype(np.float32)
        left[0], left[-1] = 127, -127
        left[:, ::size] = 127  # the maximum of every block, so that its scale is one
        expected = left @ (integers - 2 ** (bits - 1)).T.astype(np.float64)
        assert np.array_equal(multiply(session, left, stored_weights), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_of_one_huge_value(variant, bits):
    stored_weights, weight = weights_of(bits, 32)
    bias = np.random.default_rng(8).normal(size=COLUMNS).astype(np.float32)
    session = matmul(variant, bits=bits, bias=True)
    for count in (1, 7, 40):
        left = np.zeros((count, ROWS), np.float32)
        assert np.array_equal(multiply(session, left, stored_weights, bias), np.tile(bias, (count, 1)))
        left[:, 5] = 1e30
        left[:, 6] = 1  # rounded to zero
        left[-1, 5] = -3e-30
        left[-1, 6] = 0
        expected = left[:, 5:6] * weight[None, :, 5]
        result = multiply(session, left, stored_weights, np.zeros_like(bias))
        np.testing.assert_allclose(result[:-1], expected[:-1], rtol=1e-5)
        np.testing.assert_allclose(result[-1], expected[-1], rtol=1e-5, atol=1e-37)


def test_left_side_of_up_to_four_dimensions(variant):
    stored_weights, weight = weights_of(4, 32)
    random = np.random.default_rng(9)
    for lead in ((), (3,), (1, 3), (2, 1, 3), (0,)):
        left = random.normal(size=(*lead, ROWS)).astype(np.float32)
        result = multiply(matmul(variant, left=lead), left, stored_weights)
        assert result.shape == (*lead, COLUMNS)
        assert np.abs(result - left @ weight.T).max(initial=0) < 0.05 * np.abs(left @ weight.T).max(initial=1)
    with pytest.raises(RUN_ERRORS, match="an input has more than 4 dimensions"):
        multiply(matmul(variant, left=(1, 1, 1, 3)), np.zeros((1, 1, 1, 3, ROWS), np.float32), stored_weights)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate_within_their_row(variant, bits, wrong):
    """An invalid activation must not turn into a plausible result."""
    stored_weights, _ = weights_of(bits, 32)
    session, left = matmul(variant, bits=bits), np.random.default_rng(3).normal(size=(9, ROWS)).astype(np.float32)
    clean = multiply(session, left, stored_weights)
    for place in (0, 5, 17, ROWS - 1):
        damaged = left.copy()
        damaged[4, place] = wrong
        result = multiply(session, damaged, stored_weights)
        assert not np.isfinite(result[4]).any()
        assert np.array_equal(np.delete(result, 4, axis=0), np.delete(clean, 4, axis=0))


def test_inputs_of_other_shapes(variant):
    stored_weights, _ = weights_of(4, 32)
    session = matmul(variant, left=("n", "m"), bias=True)
    given = {"left": np.zeros((1, 2, ROWS), np.float32), "bias": np.zeros(COLUMNS, np.float32)} | stored_weights
    for name, array in given.items():
        with pytest.raises(RUN_ERRORS, match="BlockProduct: an input does not have the shape"):
            session.run(None, given | {name: array[..., 1:]})


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 5}, {"bits": 0}, {"block_size": 48}, {"block_size": 0}, {"block_size": 512}, {"K": 0}, {"N": -64}],
    ids=str,
)
def test_unsupported_weights(variant, wrong):
    with pytest.raises(RUN_ERRORS, match="bits must be 4 or 8, block_size a multiple of 32"):
        matmul(variant, **wrong)


@pytest.mark.parametrize("name", ["K", "N", "bits", "block_size", "gated"])
def test_a_missing_attribute_is_named(variant, name):
    with pytest.raises(RUN_ERRORS, match=name):
        matmul(variant, **{name: None})
