import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.exporting.graph import FLOAT, GraphBuilder
from gog_edge.exporting.quantization import dequantize, quantize
from gog_edge.policy.manifest import WeightQuantization


@pytest.mark.parametrize("bits, max_error", [(4, 0.12), (8, 0.009)])  # relative to the standard deviation
@pytest.mark.parametrize("size, columns", [(32, 96), (64, 100), (128, 48)])
def test_quantization_error_is_small(bits, max_error, size, columns):
    weight = np.random.default_rng(0).normal(0, 0.02, (700, columns)).astype(np.float32)
    packed, scales = quantize(weight, WeightQuantization(bits, size))
    blocks = -(-columns // size)
    assert packed.shape == (700, blocks, size * bits // 8) and scales.shape == (700, blocks)
    error = np.abs(dequantize(packed, scales, WeightQuantization(bits, size), columns) - weight)
    assert np.sqrt(np.square(error).mean()) < max_error * 0.02


def test_row_quantized_matmul_is_accurate_and_independent_of_other_rows(tmp_path):
    random = np.random.default_rng(2)
    weight, bias = random.normal(0, 0.02, (96, 300)).astype(np.float32), random.normal(size=96).astype(np.float32)
    blocks = WeightQuantization(7, None)
    packed, scales = quantize(weight, blocks)
    assert packed.shape == (96, 1, 300) and scales.shape == (96, 1) and packed.max() < 128
    graph = GraphBuilder("rows", tmp_path / "rows.onnx", blocks)
    graph.output(graph.linear(graph.input("x", FLOAT, [1, "n", 300]), weight, bias), "y", FLOAT, [1, "n", 96])
    graph.save()
    session = onnxruntime.InferenceSession(tmp_path / "rows.onnx", providers=["CPUExecutionProvider"])
    x = random.normal(size=(1, 50, 300)).astype(np.float32) * np.logspace(-6, 3, 50, dtype=np.float32)[:, None]
    x[0, 7] = 0
    result = session.run(None, {"x": x})[0][0] - bias
    expected = x[0] @ dequantize(packed, scales, blocks, 300).T
    norms = np.linalg.norm(expected, axis=1)
    error = np.linalg.norm(result - expected, axis=1)[norms > 1e-4]  # smaller rows are below the bias's rounding error
    assert (error < 0.02 * norms[norms > 1e-4]).all() and np.abs(result[7]).max() < 1e-6
    alone = session.run(None, {"x": x[:, 20:21]})[0][0, 0] - bias
    assert np.allclose(alone, result[20], rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70), st.sampled_from([4, 8]))
def test_no_value_is_off_by_more_than_the_coarsest_step(values, bits):
    weight = np.array([values], np.float32)
    back = dequantize(*quantize(weight, WeightQuantization(bits, 32)), WeightQuantization(bits, 32), len(values))
    error = np.square(back - weight)
    step = np.abs(weight).max() / 2 ** (bits - 1)
    assert np.isfinite(back).all()
    assert error.sum() <= len(values) * step**2 * 1.01 + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_reads_the_layout(tmp_path, bits):
    random = np.random.default_rng(1)
    weight, bias = random.normal(size=(40, 70)).astype(np.float32), random.normal(size=40).astype(np.float32)
    blocks = WeightQuantization(bits, 32)
    graph = GraphBuilder("one", tmp_path / "one.onnx", blocks)
    value = graph.linear(graph.input("x", FLOAT, ["n", 70]), weight, bias)
    graph.output(value, "y", FLOAT, ["n", 40])
    graph.save()
    onnx.checker.check_model(onnx.load(tmp_path / "one.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    x = random.normal(size=(5, 70)).astype(np.float32)
    expected = x @ dequantize(*quantize(weight, blocks), blocks, 70).T + bias
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < 0.02 * np.abs(expected).max()
