"""Sessions: providers are used as requested or refused, and errors of ONNX Runtime become this package's."""

import re

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from gog_edge.engines.manifest import DECODER, ORT_CUDA, VISION, BuiltGraph, EngineManifest
from gog_edge.engines.onnx import unsupported_reason
from gog_edge.engines.onnx.device_decoder import CUDA_PROVIDERS, open_cuda_decoder, open_cuda_graph
from gog_edge.engines.onnx.session import (
    CPU_PROVIDERS,
    OrtGraph,
    _load_error,
    device_error,
    device_errors,
    open_session,
    physical_cores,
)
from gog_edge.errors import ArtifactError, BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.exporting.graph import FLOAT, INT64, GraphBuilder

AZURE = "AzureExecutionProvider"  # a provider besides the CPU's that most builds include; it runs no standard operator
with_azure = pytest.mark.skipif(AZURE not in onnxruntime.get_available_providers(), reason=f"this build has no {AZURE}")


@pytest.mark.skipif(CUDA_PROVIDERS[0] in onnxruntime.get_available_providers(), reason="this build has CUDA")
def test_unavailable_provider(policies):
    graphs = tuple(BuiltGraph(name, f"{name}.onnx", {}) for name in (DECODER, VISION))
    built = EngineManifest(ORT_CUDA, "", (), 64, graphs, {}, ())
    for open_it in (
        lambda: OrtGraph(policies[True] / "vision.onnx", providers=CUDA_PROVIDERS),
        lambda: open_cuda_graph(policies[True], built, VISION),
        lambda: open_cuda_decoder(policies[True], built),
    ):
        with pytest.raises(BackendError, match=r"does not include CUDAExecutionProvider.*'gog_edge\[gpu\]'"):
            open_it()


@with_azure
def test_only_shape_computations_may_run_on_the_cpu(tmp_path):
    shapes, matmul = GraphBuilder("shapes", tmp_path / "shapes.onnx"), GraphBuilder("two", tmp_path / "two.onnx")
    shapes.output(shapes.op("Shape", shapes.input("x", FLOAT, ["n", 2])), "y", INT64, [2])
    value = matmul.input("x", FLOAT, [2, 2])
    matmul.output(matmul.op("Relu", matmul.op("MatMul", value, value)), "y", FLOAT, [2, 2])
    for graph in (shapes, matmul):
        graph.save()
    assert OrtGraph(tmp_path / "shapes.onnx", providers=(AZURE,)).run({"x": np.ones((3, 2), np.float32)})["y"][0] == 3
    with pytest.raises(BackendError, match=r"requested on Azure.* but MatMul, Relu would run on the CPU"):
        OrtGraph(tmp_path / "two.onnx", providers=(AZURE,))


def test_damaged_graph(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        open_session(tmp_path / "bad.onnx")


def test_at_least_one_core():
    assert physical_cores() >= 1


def test_allocation_failure_is_out_of_device_memory(tmp_path):
    graph = GraphBuilder("wide", tmp_path / "wide.onnx")
    value, shape = graph.input("x", FLOAT, [1]), graph.input("shape", INT64, [1])
    graph.output(graph.op("Expand", value, shape), "y", FLOAT, ["n"])
    graph.save()
    wide = OrtGraph(tmp_path / "wide.onnx", threads=1)
    assert len(wide.run({"x": np.ones(1, np.float32), "shape": np.array([5])})["y"]) == 5
    with pytest.raises(OutOfDeviceMemory, match="wide.onnx' cannot be run: the device is out of memory"):
        wide.run({"x": np.ones(1, np.float32), "shape": np.array([2**50])})


def test_errors_of_a_gpu():
    # The messages of ONNX Runtime 1.31 (core/providers/cuda/cuda_call.cc).
    message = "Non-zero status code while running MatMul node. CUDA failure {}; GPU=0 ; hostname=box ; expr=f(x);"
    full = device_error(Fail(message.format("2: out of memory ")), "12 tokens cannot be computed")
    assert isinstance(full, OutOfDeviceMemory) and "12 tokens cannot be computed" in str(full)
    assert "CUDA failure 2: out of memory)" in str(full) and "box" not in str(full)
    for failure in ("719: unspecified launch failure ", "700: an illegal memory access was encountered "):
        assert isinstance(device_error(RuntimeError(message.format(failure)), "x"), DeviceLost)
    assert device_error(Fail("Invalid rank for input: pixels"), "x") is None
    with pytest.raises(KeyError), device_errors("x"):
        raise KeyError("not a device error")
    with pytest.raises(DeviceLost) as caught, device_errors("x"):
        raise Fail(message.format("999: unknown error "))
    assert isinstance(caught.value.__cause__, Fail)


@pytest.mark.parametrize("failure", ["CUDA failure 209: no kernel image is available for execution on the device ",
                                     "CUDA failure 46: CUDA-capable device(s) is/are busy or unavailable ",
                                     "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED "])
def test_other_device_errors_are_backend_errors(failure, tmp_path):
    error = Fail(f"Non-zero status code. {failure}; GPU=0 ; hostname=box ; expr=f(x);")
    with pytest.raises(BackendError, match="x: .* failure [0-9]+: [^;]*; run `gog-edge doctor`") as caught, \
            device_errors("x", on_device=True):  # fmt: skip
        raise error
    assert type(caught.value) is BackendError and caught.value.__cause__ is error and "box" not in str(caught.value)
    at_load = _load_error(error, tmp_path / "text.onnx", CUDA_PROVIDERS, False)
    assert "cannot start: " + failure.strip() in str(at_load)


@with_azure
def test_run_errors_are_backend_errors_and_on_the_cpu_those_of_the_graph(tmp_path):
    graph = GraphBuilder("same", tmp_path / "same.onnx")
    graph.output(graph.op("Identity", graph.input("x", FLOAT, [1])), "y", FLOAT, [1])
    graph.save()
    wrong = {"x": np.ones((2, 2), np.float32)}
    elsewhere = OrtGraph(tmp_path / "same.onnx", threads=1, providers=(AZURE, *CPU_PROVIDERS))
    with pytest.raises(BackendError, match="same.onnx' cannot be run: "):
        elsewhere.run(wrong)
    here = OrtGraph(tmp_path / "same.onnx", threads=1)
    with pytest.raises(ArtifactError, match="same.onnx' cannot be run .*Invalid rank.*; export the model again"):
        here.run(wrong)
    with pytest.raises(ArtifactError, match="must have the inputs z, got x; export the model again"):
        here.run({"z": np.ones(1, np.float32)})
    with pytest.raises(ArtifactError, match="must have the output 'z', got y; export the model again"):
        _ = here.run({"x": np.ones(1, np.float32)})["z"]


def test_a_graph_for_a_later_release(monkeypatch, tmp_path):
    """The error is that of ONNX Runtime 1.23."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    error = Fail("Opset 24 is under development. Current official support for domain ai.onnx is till opset 23.")
    message = str(_load_error(error, tmp_path / "decoder.onnx", CPU_PROVIDERS, False))
    assert re.match(r"'.*decoder.onnx' cannot be loaded: ONNX Runtime 1.23.2 is too old", message)
    assert message.endswith("; pip install 'gog_edge[cpu]'")
    other = str(_load_error(Fail("damaged"), tmp_path / "decoder.onnx", CPU_PROVIDERS, False))
    assert "damaged" in other and "too old" not in other


@pytest.mark.parametrize(("version", "old"), [("1.23.2", True), ("1.24.0", False), ("1.31.1", False), ("2.0", False)])
def test_supported_releases(version, old):
    assert bool(unsupported_reason(version)) == old
