"""Real builds of small graphs with TensorRT for RTX, which needs no GPU."""

import os
import resource
import signal
from multiprocessing import active_children

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as real_trt
from onnx import TensorProto, helper, numpy_helper

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.tensorrt.plan import import_tensorrt, supported_sms
from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.convert import convert_graph
from gog_edge.exporting.engines.builder import build_in_subprocess
from gog_edge.exporting.engines.plan import (
    PlanRequest,
    build_plan,
    graph_weights_bytes,
    load_timing_cache,
    save_timing_cache,
)
from gog_edge.exporting.engines.profiles import decoder_profiles, image_profiles, text_profiles, vision_profiles
from gog_edge.policy.manifest import read_manifest

HALF, FLOAT, INT64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64


def write(path, nodes, inputs, outputs, weights=None, opset=24):
    """Write a graph; inputs and outputs are name -> (dtype, shape)."""
    infos = [[helper.make_tensor_value_info(name, *about) for name, about in values.items()]
             for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph([helper.make_node(kind, list(given), list(made), **rest)
                               for kind, given, made, rest in nodes], "graph", *infos, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), path)
    return path


def ignore(done, total):
    pass


def request(graph, *profiles, sms=(86,), layers=None, timing_cache=None):
    plan = graph.with_suffix(".engine")
    return PlanRequest("tensorrt-rtx", graph, plan, profiles, sms, layers or {}, timing_cache)


def matmul(folder, rows=256, columns=256, dtype=np.float16, name="matmul.onnx"):
    """Write the graph x [n, rows] @ w."""
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)
    return write(folder / name, [("MatMul", ("x", "w"), ("y",), {})], {"x": (HALF, ["n", rows])},
                 {"y": (HALF, ["n", columns])}, {"w": weight})


def batches(columns, *counts):
    return {"x": tuple((n, columns) for n in counts)}


def test_a_plan_is_built_and_described(tmp_path):
    seen = []
    plan = build_plan(request(matmul(tmp_path), batches(256, 1, 4, 16), sms=(75, 89, 121)),
                      lambda done, total: seen.append((done, total)))
    assert plan.size == (tmp_path / "matmul.engine").stat().st_size > 256 * 256 * 2
    assert plan.layers["matrix_multiply"] == 1 and 0 < plan.seconds < 60
    assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_a_plan_is_built_in_another_process(tmp_path):
    seen = []
    plan = build_in_subprocess(request(matmul(tmp_path), batches(256, 1, 4, 16)),
                               lambda done, total: seen.append((done, total)))  # fmt: skip
    assert plan.size == (tmp_path / "matmul.engine").stat().st_size and seen[-1][0] == seen[-1][1]
    assert not active_children()


@pytest.mark.parametrize("nodes", [
    [("Relu", ("x",), ("y",), {})],  # no node reads the other input
    [("Relu", ("x",), ("y",), {}), ("Relu", ("other",), ("unused",), {})],  # a node reads it, but no output
], ids=["unread", "dead end"])  # fmt: skip
def test_an_unused_input_is_refused(tmp_path, nodes):
    inputs = {"x": (HALF, [1, 8]), "other": (HALF, [1, 8])}
    graph = write(tmp_path / "dangling.onnx", nodes, inputs, {"y": (HALF, [1, 8])})
    with pytest.raises(CheckpointError, match="'dangling.onnx' does not use the inputs other"):
        build_plan(request(graph), ignore)


def test_an_input_that_the_parser_ignores_is_refused(tmp_path):
    """It accepts the key lengths of Attention without using them."""
    states = {name: (HALF, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    node = ("Attention", ("q", "k", "v", "", "", "", "lengths"), ("y",), {})
    graph = write(tmp_path / "lengths.onnx", [node], states | {"lengths": (INT64, [1])}, {"y": (HALF, [1, 2, 16, 32])})
    with pytest.raises(CheckpointError, match="does not use the inputs lengths"):
        build_plan(request(graph), ignore)


def test_the_operator_that_the_parser_refuses_is_named(tmp_path):
    node = ("Attention", ("q", "k", "v", "", "q", "q"), ("y", "a", "b"), {"name": "twin"})
    states = {name: (HALF, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    graph = write(tmp_path / "twin.onnx", [node], states, {name: (HALF, None) for name in ("y", "a", "b")})
    with pytest.raises(CheckpointError, match="cannot read 'twin.onnx': Attention 'twin': .*one output"):
        build_plan(request(graph), ignore)
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(CheckpointError, match="cannot read 'text.onnx'"):
        build_plan(request(tmp_path / "text.onnx"), ignore)


def test_missing_fused_layers_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="has 0 layers of kind attention, expected 2: the parser did not"):
        build_plan(request(matmul(tmp_path), batches(256, 1, 4, 16), layers={"attention": 2}), ignore)


def test_a_failed_build_reports_tensorrts_error(tmp_path):
    """There is no kernel for masked attention in fp32."""
    states = {name: (FLOAT, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    graph = write(tmp_path / "wide.onnx", [("Attention", ("q", "k", "v", "mask"), ("y",), {})],
                  states | {"mask": (TensorProto.BOOL, [16, 16])}, {"y": (FLOAT, [1, 2, 16, 32])})
    with pytest.raises(CheckpointError, match="1.7.* could not build an engine of 'wide.onnx': .*kernel"):
        build_plan(request(graph), ignore)


@pytest.mark.parametrize("names", [(), ("other",), ("x", "other")])
def test_a_profile_must_have_bounds_for_the_dynamic_inputs(tmp_path, names):
    profile = dict.fromkeys(names, ((1, 256), (1, 256), (2, 256)))
    with pytest.raises(CheckpointError, match="'matmul.onnx' has the dynamic inputs x, but the profile has bounds for"):
        build_plan(request(matmul(tmp_path), profile), ignore)


def test_weights_stored_twice_are_an_error(tmp_path):
    """A profile for exactly one row stores them in a second layout."""
    graph = matmul(tmp_path, 4096, 8192)
    assert build_plan(request(graph, batches(4096, 1, 1, 128), batches(4096, 1, 64, 512)), ignore).size < 100e6
    with pytest.raises(CheckpointError, match="'matmul.onnx' has 1..,...,... bytes, its graph 67,...,...: more than"):
        build_plan(request(graph, batches(4096, 1, 1, 1), batches(4096, 1, 64, 512)), ignore)


@pytest.mark.parametrize("part, name, context", [("policy", "decoder", 512), ("policy", "vision", 0),
                                                 ("encoder", "image", 0), ("encoder", "text", 0)])  # fmt: skip
def test_decomposed_graphs_build_without_fused_layers(tmp_path, part, name, context):
    """They are for TensorRT releases that have neither in-place cache updates nor an attention layer."""
    manifest = read_manifest(DEFAULT_BUNDLE / "policy")
    profiles = {"decoder": decoder_profiles(manifest.text, 512), "vision": vision_profiles(manifest.vision),
                "image": image_profiles(96, 96), "text": text_profiles(32)}  # fmt: skip
    graph = tmp_path / f"{name}.onnx"
    convert_graph(DEFAULT_BUNDLE / part / graph.name, graph, "decomposed", context=context)
    plan = build_plan(request(graph, profiles[name][0]), ignore)
    assert not {"kv_cache_update", "attention", "rotary_embedding"} & plan.layers.keys()
    assert plan.size > plan.weights


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX")
def test_a_timing_cache_is_written(tmp_path):
    """TensorRT for RTX has the functions, but no timings."""
    cache = tmp_path / "timings.cache"
    for _ in range(2):
        build_plan(request(matmul(tmp_path), batches(256, 1, 4, 16), timing_cache=cache), ignore)
        assert cache.stat().st_size > 0


class FakeConfig:
    """A fake builder configuration of TensorRT on the device, which accepts timing caches of its own GPU only."""

    OWN = ("OWN", "cache")  # attributes that TensorRT's class does not have

    def __init__(self):
        self.cache = None

    def create_timing_cache(self, data):
        return None if data.startswith(b"damaged") else FakeTimingCache(bytes(data))

    def set_timing_cache(self, cache, ignore_mismatch):
        if not isinstance(cache, FakeTimingCache):
            raise TypeError("incompatible function arguments")
        if cache.data.startswith(b"another GPU") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class FakeTimingCache:
    OWN = ("OWN",)

    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"mine"


@pytest.mark.parametrize("stored, expected", [(b"", b"mine"), (b"mine", b"minemine"), (b"damaged", b"mine"),
                                              (b"another GPU's", b"mine")])
def test_unusable_timing_caches_are_replaced(tmp_path, stored, expected):
    path, config = tmp_path / "timings.cache", FakeConfig()
    path.write_bytes(stored)
    load_timing_cache(config, path)
    save_timing_cache(config, path)
    assert path.read_bytes() == expected


def test_a_timing_cache_that_cannot_be_written_is_ignored(tmp_path):
    save_timing_cache(FakeConfig(), tmp_path / "timings.cache")
    assert not list(tmp_path.iterdir())
    config = FakeConfig()
    load_timing_cache(config, tmp_path / "none.cache")
    save_timing_cache(config, tmp_path)  # a folder has this name


@pytest.mark.parametrize("fake, real", [(FakeConfig, real_trt.IBuilderConfig),
                                        (FakeTimingCache, real_trt.ITimingCache)])
def test_the_fakes_have_only_attributes_of_tensorrts_classes(fake, real):
    names = {name for name in vars(fake) if not name.startswith("_")} - set(fake.OWN)
    assert names and all(hasattr(real, name) for name in names)


def test_unreferenced_external_data_is_not_counted(tmp_path):
    model = onnx.load(matmul(tmp_path))
    path = tmp_path / "beside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="beside.onnx.data", size_threshold=0)
    with (tmp_path / "beside.onnx.data").open("ab") as file:
        file.write(bytes(10**6))
    assert graph_weights_bytes(path) == path.stat().st_size + 256 * 256 * 2


def test_a_killed_process_is_an_error(tmp_path):
    def kill(done, total):
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(CheckpointError, match="building 'matmul.onnx' was killed, probably because memory ran out"):
        build_in_subprocess(request(matmul(tmp_path), batches(256, 1, 4, 16)), kill)
    assert not active_children()


def test_errors_of_the_build_process_are_raised_unchanged(tmp_path):
    with pytest.raises(CheckpointError, match="layers of kind attention"):
        build_in_subprocess(request(matmul(tmp_path), batches(256, 1, 4, 16), layers={"attention": 2}), ignore)
    with pytest.raises(OSError, match="nowhere"):
        build_in_subprocess(PlanRequest("tensorrt-rtx", matmul(tmp_path), tmp_path / "nowhere" / "a.engine",
                                (batches(256, 1, 4, 16),), (86,), {}), ignore)


def test_an_interrupted_caller_ends_the_build(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_in_subprocess(request(matmul(tmp_path), batches(256, 1, 4, 16)), stop)
    assert not active_children()


@pytest.mark.parametrize("builds", [build_plan, build_in_subprocess])
def test_a_full_disk_is_an_error(tmp_path, builds):
    graph = matmul(tmp_path, 2048, 2048)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            builds(request(graph, batches(2048, 1, 4, 16)), ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_gpus_are_named_by_number():
    assert set(supported_sms(import_tensorrt("tensorrt-rtx"))) >= {75, 80, 86, 89, 120, 121}
