import tracemalloc

import numpy as np
import onnxruntime as ort
import pytest

from gog_edge.exporting import graph as graph_module
from gog_edge.exporting.graph import FLOAT, GraphBuilder
from gog_edge.exporting.policy.export import export_policy


def chain(path, layers, width):
    """Write a product of `layers` matrices, each the identity times 1.01; return what each output should be."""
    graph = GraphBuilder("chain", path)
    value = graph.input("x", FLOAT, [1, width])
    for _ in range(layers):
        value = graph.linear(value, np.eye(width, dtype=np.float32) * np.float32(1.01))
    graph.output(value, "y", FLOAT, [1, width])
    graph.save()
    return 1.01**layers


def run(path, width):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((1, width), np.float32)})[0]


def test_small_graphs_are_one_file(tmp_path):
    grown = chain(tmp_path / "chain.onnx", 3, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["chain.onnx"]
    assert run(tmp_path / "chain.onnx", 64) == pytest.approx(grown)


def test_large_weights_are_external_and_never_all_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "EMBEDDED_BYTES", 1 << 20)
    (tmp_path / "chain.onnx.data").write_bytes(b"of an earlier export")
    tracemalloc.start()
    grown = chain(tmp_path / "chain.onnx", 24, 512)  # 1 MiB each
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
    assert (tmp_path / "chain.onnx").stat().st_size < 1 << 16
    assert (tmp_path / "chain.onnx.data").stat().st_size == 24 << 20
    assert run(tmp_path / "chain.onnx", 512) == pytest.approx(grown, rel=1e-4)


def test_a_policy_with_external_weights_passes_parity(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "EMBEDDED_BYTES", 1000)
    manifest = export_policy(checkpoints[True], tmp_path / "policy", context=1024)
    listed = {entry.path for entry in manifest.files}
    assert {"decoder.onnx.data", "vision.onnx.data"} <= listed and manifest.parity["passed"]
