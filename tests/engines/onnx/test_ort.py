import gc
import re

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from gog_edge.engines.manifest import DECODER, ORT_CUDA, VISION, BuiltEngines, BuiltGraph
from gog_edge.engines.onnx.decoder import Device, DeviceTensor, HostTensor, OrtDecoder, window
from gog_edge.engines.onnx.device_decoder import CUDA, open_cuda_decoder, open_cuda_graph
from gog_edge.engines.onnx.session import (
    CPU,
    OrtGraph,
    _load_error,
    device_error,
    device_errors,
    open_session,
    physical_cores,
    too_old,
)
from gog_edge.errors import BackendError, CheckpointError, DeviceLost, OutOfDeviceMemory
from gog_edge.exporting.graph import FLOAT, INT64, GraphBuilder
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.decoder_graph import write_decoder


@pytest.fixture(scope="module")
def decoder(policies):
    return OrtDecoder(policies[True] / "decoder.onnx", capacity=64, threads=1)


def tokens(decoder, count, seed=0):
    random = np.random.default_rng(seed)
    angles = np.outer(np.arange(count), 1e4 ** (-np.arange(decoder.rotary) / decoder.rotary))
    embeds = random.normal(0, 0.5, (count, decoder.hidden))
    return [array.astype(np.float32) for array in (embeds, np.cos(angles), np.sin(angles))]


def test_a_provider_that_is_not_there_is_an_error(policies):
    graphs = tuple(BuiltGraph(name, f"{name}.onnx", {}) for name in (DECODER, VISION))
    built = BuiltEngines(ORT_CUDA, "", (), 64, graphs, {}, ())
    for opened in (
        lambda: OrtGraph(policies[True] / "vision.onnx", providers=CUDA),
        lambda: open_cuda_graph(policies[True], built, VISION),
        lambda: open_cuda_decoder(policies[True], built),
    ):
        with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider.*pip install 'gog_edge\[gpu\]'"):
            opened()


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="not in this build")
def test_what_a_provider_leaves_to_the_processor_is_refused_by_name(tmp_path):
    """This one takes no operator at all: what reckons with shapes may stay there."""
    shapes, products = GraphBuilder("shapes", tmp_path / "shapes.onnx"), GraphBuilder("two", tmp_path / "two.onnx")
    shapes.output(shapes.op("Shape", shapes.input("x", FLOAT, ["n", 2])), "y", INT64, [2])
    value = products.input("x", FLOAT, [2, 2])
    products.output(products.op("Relu", products.op("MatMul", value, value)), "y", FLOAT, [2, 2])
    for graph in (shapes, products):
        graph.save()
    elsewhere = ("AzureExecutionProvider",)
    assert OrtGraph(tmp_path / "shapes.onnx", providers=elsewhere).run({"x": np.ones((3, 2), np.float32)})["y"][0] == 3
    with pytest.raises(BackendError, match=r"asked for Azure.*which leaves MatMul, Relu to the processor"):
        OrtGraph(tmp_path / "two.onnx", providers=elsewhere)


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


def test_a_window_shares_memory_and_keeps_it():
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((6, 4), np.float32, "cpu")
    value.update_inplace(np.arange(24, dtype=np.float32).reshape(6, 4))
    part = window(value, 8, (2, 4))
    part.update_inplace(np.full((2, 4), -1, np.float32))
    assert value.numpy()[:, 0].tolist() == [0, 4, -1, -1, 16, 20] and value.shape() == [6, 4]
    del value
    gc.collect()
    onnxruntime.OrtValue.ortvalue_from_shape_and_type((6, 4), np.float32, "cpu")
    assert (part.numpy() == -1).all()


def test_memory_that_is_not_to_be_had_is_an_error_of_ours(tmp_path):
    graph = GraphBuilder("wide", tmp_path / "wide.onnx")
    value, shape = graph.input("x", FLOAT, [1]), graph.input("shape", INT64, [1])
    graph.output(graph.op("Expand", value, shape), "y", FLOAT, ["n"])
    graph.save()
    wide = OrtGraph(tmp_path / "wide.onnx", threads=1)
    assert len(wide.run({"x": np.ones(1, np.float32), "shape": np.array([5])})["y"]) == 5
    with pytest.raises(OutOfDeviceMemory, match="a graph cannot be run: the device has not the memory"):
        wide.run({"x": np.ones(1, np.float32), "shape": np.array([2**50])})


def test_failures_of_a_gpu_are_told_apart():
    # The words are those of ONNX Runtime 1.31 (core/providers/cuda/cuda_call.cc).
    words = "Non-zero status code while running MatMul node. CUDA failure {}; GPU=0 ; hostname=box ; expr=f(x);"
    full = device_error(Fail(words.format("2: out of memory ")), "12 tokens cannot be computed")
    assert isinstance(full, OutOfDeviceMemory) and "12 tokens cannot be computed" in str(full)
    assert "CUDA failure 2: out of memory)" in str(full) and "box" not in str(full)
    for failure in ("719: unspecified launch failure ", "700: an illegal memory access was encountered "):
        assert isinstance(device_error(RuntimeError(words.format(failure)), "x"), DeviceLost)
    assert device_error(Fail("Invalid rank for input: pixels"), "x") is None
    with pytest.raises(KeyError), device_errors("x"):
        raise KeyError("not of a device")
    with pytest.raises(DeviceLost) as caught, device_errors("x"):
        raise Fail(words.format("999: unknown error "))
    assert isinstance(caught.value.__cause__, Fail)


@pytest.mark.parametrize("failure", ["CUDA failure 209: no kernel image is available for execution on the device ",
                                     "CUDA failure 46: CUDA-capable device(s) is/are busy or unavailable ",
                                     "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED "])
def test_whatever_else_fails_on_a_device_is_an_error_of_ours(failure, tmp_path):
    said = Fail(f"Non-zero status code. {failure}; GPU=0 ; hostname=box ; expr=f(x);")
    with pytest.raises(BackendError, match="x: .* failure [0-9]+: [^;]*; `gog-edge doctor`") as caught, \
            device_errors("x", on_device=True):  # fmt: skip
        raise said
    assert type(caught.value) is BackendError and caught.value.__cause__ is said and "box" not in str(caught.value)
    at_load = _load_error(said, tmp_path / "text.onnx", ("CUDAExecutionProvider",), False)
    assert "cannot begin here: " + failure.strip() in str(at_load)


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="not in this build")
def test_a_run_elsewhere_than_on_the_processor_raises_errors_of_ours(tmp_path):
    graph = GraphBuilder("same", tmp_path / "same.onnx")
    graph.output(graph.op("Identity", graph.input("x", FLOAT, [1])), "y", FLOAT, [1])
    graph.save()
    wrong = {"x": np.ones((2, 2), np.float32)}
    elsewhere = OrtGraph(tmp_path / "same.onnx", threads=1, providers=("AzureExecutionProvider", *CPU))
    with pytest.raises(BackendError, match="a graph cannot be run: "):
        elsewhere.run(wrong)
    with pytest.raises(InvalidArgument):
        OrtGraph(tmp_path / "same.onnx", threads=1).run(wrong)


def test_a_release_that_is_too_old_for_a_graph_is_told(monkeypatch, tmp_path):
    """ONNX Runtime 1.23 says it at such length."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    said = Fail("Opset 24 is under development. Current official support for domain ai.onnx is till opset 23.")
    error = str(_load_error(said, tmp_path / "decoder.onnx", CPU, False))
    assert re.match(r"'.*decoder.onnx' cannot be loaded: ONNX Runtime 1.23.2 is too old ", error)
    assert error.endswith("; pip install 'gog_edge[cpu]'")
    other = str(_load_error(Fail("damaged"), tmp_path / "decoder.onnx", CPU, False))
    assert "damaged" in other and "too old" not in other


@pytest.mark.parametrize(("version", "old"), [("1.23.2", True), ("1.24.0", False), ("1.31.1", False), ("2.0", False)])
def test_releases_that_load_policies(version, old):
    assert bool(too_old(version)) == old
