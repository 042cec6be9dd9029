import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.exporting.graph import FLOAT, GraphBuilder
from gog_edge.exporting.quantization import dequantise, quantise
from gog_edge.policy.manifest import Blocks


@pytest.mark.parametrize("bits, most", [(4, 0.12), (8, 0.009)])
@pytest.mark.parametrize("size, columns", [(32, 96), (64, 100), (128, 48)])
def test_numbers_come_back_nearly(bits, most, size, columns):
    weight = np.random.default_rng(0).normal(0, 0.02, (700, columns)).astype(np.float32)
    packed, scales = quantise(weight, Blocks(bits, size))
    blocks = -(-columns // size)
    assert packed.shape == (700, blocks, size * bits // 8) and scales.shape == (700, blocks)
    error = np.abs(dequantise(packed, scales, Blocks(bits, size), columns) - weight)
    assert np.sqrt(np.square(error).mean()) < most * 0.02


def test_products_of_whole_rows_are_near_and_alike_for_every_row(tmp_path):
    random = np.random.default_rng(2)
    weight, bias = random.normal(0, 0.02, (96, 300)).astype(np.float32), random.normal(size=96).astype(np.float32)
    blocks = Blocks(7, None)
    packed, scales = quantise(weight, blocks)
    assert packed.shape == (96, 1, 300) and scales.shape == (96, 1) and packed.max() < 128
    graph = GraphBuilder("rows", tmp_path / "rows.onnx", blocks)
    graph.output(graph.linear(graph.input("x", FLOAT, [1, "n", 300]), weight, bias), "y", FLOAT, [1, "n", 96])
    graph.save()
    session = onnxruntime.InferenceSession(tmp_path / "rows.onnx", providers=["CPUExecutionProvider"])
    x = random.normal(size=(1, 50, 300)).astype(np.float32) * np.logspace(-6, 3, 50, dtype=np.float32)[:, None]
    x[0, 7] = 0
    said = session.run(None, {"x": x})[0][0] - bias
    expected = x[0] @ dequantise(packed, scales, blocks, 300).T
    lengths = np.linalg.norm(expected, axis=1)
    error = np.linalg.norm(said - expected, axis=1)[lengths > 1e-4]  # smaller ones drown in the bias' own rounding
    assert (error < 0.02 * lengths[lengths > 1e-4]).all() and np.abs(said[7]).max() < 1e-6
    alone = session.run(None, {"x": x[:, 20:21]})[0][0, 0] - bias
    assert np.allclose(alone, said[20], rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70), st.sampled_from([4, 8]))
def test_no_number_is_further_off_than_the_coarsest_step(values, bits):
    weight = np.array([values], np.float32)
    back = dequantise(*quantise(weight, Blocks(bits, 32)), Blocks(bits, 32), len(values))
    error = np.square(back - weight)
    plain = np.abs(weight).max() / 2 ** (bits - 1)
    assert np.isfinite(back).all()
    assert error.sum() <= len(values) * plain**2 * 1.01 + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_the_engine_reads_what_is_written(tmp_path, bits):
    random = np.random.default_rng(1)
    weight, bias = random.normal(size=(40, 70)).astype(np.float32), random.normal(size=40).astype(np.float32)
    blocks = Blocks(bits, 32)
    graph = GraphBuilder("one", tmp_path / "one.onnx", blocks)
    value = graph.linear(graph.input("x", FLOAT, ["n", 70]), weight, bias)
    graph.output(value, "y", FLOAT, ["n", 40])
    graph.save()
    onnx.checker.check_model(onnx.load(tmp_path / "one.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    x = random.normal(size=(5, 70)).astype(np.float32)
    expected = x @ dequantise(*quantise(weight, blocks), blocks, 70).T + bias
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < 0.02 * np.abs(expected).max()
