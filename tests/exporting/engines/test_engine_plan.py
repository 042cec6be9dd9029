"""Real builds of small graphs with TensorRT for RTX, which needs no GPU for them."""

import os
import resource
import signal
from multiprocessing import active_children

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as true_trt
from onnx import TensorProto, helper, numpy_helper

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.tensorrt.plan import known_sms, trt_module
from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.convert import lift_graph
from gog_edge.exporting.engines.builder import build_apart
from gog_edge.exporting.engines.plan import PlanRequest, build_plan, keep_timings, use_timings, weights_of
from gog_edge.exporting.engines.profiles import decoder_profiles, image_profiles, text_profiles, vision_profiles
from gog_edge.policy.manifest import read_manifest

HALF, FLOAT, INT64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64


def write(path, nodes, inputs, outputs, weights=None, opset=24):
    """A graph; inputs and outputs are name -> (kind, shape)."""
    infos = [[helper.make_tensor_value_info(name, *about) for name, about in values.items()]
             for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph([helper.make_node(kind, list(given), list(made), **rest)
                               for kind, given, made, rest in nodes], "graph", *infos, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), path)
    return path


def ignore(done, of):
    pass


def request(graph, *profiles, sms=(86,), layers=None, **rest):
    return PlanRequest("tensorrt-rtx", graph, graph.with_suffix(".engine"), profiles, sms, layers or {}, **rest)


def product(folder, rows=256, columns=256, dtype=np.float16, name="product.onnx"):
    """x [n, rows] @ w."""
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)
    return write(folder / name, [("MatMul", ("x", "w"), ("y",), {})], {"x": (HALF, ["n", rows])},
                 {"y": (HALF, ["n", columns])}, {"w": weight})


def batches(columns, *counts):
    return {"x": tuple((n, columns) for n in counts)}


def test_a_plan_is_built_and_described(tmp_path):
    seen = []
    plan = build_plan(request(product(tmp_path), batches(256, 1, 4, 16), sms=(75, 89, 121)),
                      lambda done, of: seen.append((done, of)))
    assert plan.size == (tmp_path / "product.engine").stat().st_size > 256 * 256 * 2
    assert plan.layers["matrix_multiply"] == 1 and 0 < plan.seconds < 60
    assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_the_same_comes_from_another_process(tmp_path):
    seen = []
    plan = build_apart(request(product(tmp_path), batches(256, 1, 4, 16)), lambda done, of: seen.append((done, of)))
    assert plan.size == (tmp_path / "product.engine").stat().st_size and seen[-1][0] == seen[-1][1]
    assert not active_children()


@pytest.mark.parametrize("nodes", [
    [("Relu", ("x",), ("y",), {})],  # nothing reads the other
    [("Relu", ("x",), ("y",), {}), ("Relu", ("other",), ("unused",), {})],  # what reads it is read by nothing
], ids=["unread", "dead end"])  # fmt: skip
def test_an_input_that_nothing_depends_on_is_refused(tmp_path, nodes):
    inputs = {"x": (HALF, [1, 8]), "other": (HALF, [1, 8])}
    graph = write(tmp_path / "dangling.onnx", nodes, inputs, {"y": (HALF, [1, 8])})
    with pytest.raises(CheckpointError, match="'dangling.onnx' does not use the inputs other"):
        build_plan(request(graph), ignore)


def test_an_input_that_the_parser_drops_in_silence_is_refused(tmp_path):
    """It takes Attention's lengths of keys and does nothing with them."""
    states = {name: (HALF, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    node = ("Attention", ("q", "k", "v", "", "", "", "lengths"), ("y",), {})
    graph = write(tmp_path / "lengths.onnx", [node], states | {"lengths": (INT64, [1])}, {"y": (HALF, [1, 2, 16, 32])})
    with pytest.raises(CheckpointError, match="does not use the inputs lengths"):
        build_plan(request(graph), ignore)


def test_what_the_parser_refuses_is_named(tmp_path):
    node = ("Attention", ("q", "k", "v", "", "q", "q"), ("y", "a", "b"), {"name": "twin"})
    states = {name: (HALF, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    graph = write(tmp_path / "twin.onnx", [node], states, {name: (HALF, None) for name in ("y", "a", "b")})
    with pytest.raises(CheckpointError, match="cannot read 'twin.onnx': Attention 'twin': .*one output"):
        build_plan(request(graph), ignore)
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(CheckpointError, match="cannot read 'text.onnx'"):
        build_plan(request(tmp_path / "text.onnx"), ignore)


def test_layers_that_were_not_recognised_are_missed(tmp_path):
    with pytest.raises(CheckpointError, match="has 0 layers of attention, expected 2: its graph was not recognised"):
        build_plan(request(product(tmp_path), batches(256, 1, 4, 16), layers={"attention": 2}), ignore)


def test_an_engine_that_cannot_be_built_says_why(tmp_path):
    """Attention in single precision under a mask has no kernel."""
    states = {name: (FLOAT, [1, 2, 16, 32]) for name in ("q", "k", "v")}
    graph = write(tmp_path / "wide.onnx", [("Attention", ("q", "k", "v", "mask"), ("y",), {})],
                  states | {"mask": (TensorProto.BOOL, [16, 16])}, {"y": (FLOAT, [1, 2, 16, 32])})
    with pytest.raises(CheckpointError, match="1.7.* built no engine of 'wide.onnx': .*kernel"):
        build_plan(request(graph), ignore)


@pytest.mark.parametrize("names", [(), ("other",), ("x", "other")])
def test_bounds_are_of_the_inputs_of_free_shape(tmp_path, names):
    profile = dict.fromkeys(names, ((1, 256), (1, 256), (2, 256)))
    with pytest.raises(CheckpointError, match="'product.onnx' has the inputs x of free shape, bounds are there for"):
        build_plan(request(product(tmp_path), profile), ignore)


def test_weights_written_twice_are_found_out(tmp_path):
    """A profile of one row alone keeps them in a layout of its own."""
    graph = product(tmp_path, 4096, 8192)
    assert build_plan(request(graph, batches(4096, 1, 1, 128), batches(4096, 1, 64, 512)), ignore).size < 100e6
    with pytest.raises(CheckpointError, match="'product.onnx' has 1..,...,... bytes, its graph 67,...,...: more than"):
        build_plan(request(graph, batches(4096, 1, 1, 1), batches(4096, 1, 64, 512)), ignore)


@pytest.mark.parametrize("part, name, context", [("policy", "decoder", 512), ("policy", "vision", 0),
                                                 ("encoder", "image", 0), ("encoder", "text", 0)])  # fmt: skip
def test_graphs_for_older_releases_are_taken_too(tmp_path, part, name, context):
    """Nothing in them needs a cache updated in place or one layer for attention."""
    manifest = read_manifest(DEFAULT_BUNDLE / "policy")
    profiles = {"decoder": decoder_profiles(manifest.text, 512), "vision": vision_profiles(manifest.vision),
                "image": image_profiles(96, 96), "text": text_profiles(32)}  # fmt: skip
    graph = tmp_path / f"{name}.onnx"
    lift_graph(DEFAULT_BUNDLE / part / graph.name, graph, "decomposed", context=context)
    plan = build_plan(request(graph, profiles[name][0]), ignore)
    assert not {"kv_cache_update", "attention", "rotary_embedding"} & plan.layers.keys()
    assert plan.size > plan.weights


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX")
def test_kernels_times_are_kept_beside(tmp_path):
    """Only TensorRT on the device has any; this one has the calls."""
    kept = tmp_path / "timings.cache"
    for _ in range(2):
        build_plan(request(product(tmp_path), batches(256, 1, 4, 16), timings=kept), ignore)
        assert kept.stat().st_size > 0


class HostTimings:
    """Stands for a builder's config of TensorRT on the device: it takes times of its own GPU, whole or none."""

    OWN = ("OWN", "cache")

    def __init__(self):
        self.cache = None

    def create_timing_cache(self, kept):
        return None if kept.startswith(b"damaged") else HostTimes(bytes(kept))

    def set_timing_cache(self, cache, ignore_mismatch):
        if not isinstance(cache, HostTimes):
            raise TypeError("incompatible function arguments")
        if cache.kept.startswith(b"another GPU") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class HostTimes:
    OWN = ("OWN",)

    def __init__(self, kept):
        self.kept = kept

    def serialize(self):
        return self.kept + b"mine"


@pytest.mark.parametrize("kept, then", [(b"", b"mine"), (b"mine", b"minemine"), (b"damaged", b"mine"),
                                        (b"another GPU's", b"mine")])
def test_kernels_times_that_are_of_no_use_are_begun_anew(tmp_path, kept, then):
    path, config = tmp_path / "timings.cache", HostTimings()
    path.write_bytes(kept)
    use_timings(config, path)
    keep_timings(config, path)
    assert path.read_bytes() == then


def test_a_plan_is_not_lost_for_its_kernels_times(tmp_path):
    keep_timings(HostTimings(), tmp_path / "timings.cache")
    assert not list(tmp_path.iterdir())
    config = HostTimings()
    use_timings(config, tmp_path / "none.cache")
    keep_timings(config, tmp_path)  # a folder is in the way


@pytest.mark.parametrize("host, true", [(HostTimings, true_trt.IBuilderConfig), (HostTimes, true_trt.ITimingCache)])
def test_what_stands_for_tensorrts_times_has_nothing_that_they_lack(host, true):
    asked = {name for name in vars(host) if not name.startswith("_")} - set(host.OWN)
    assert asked and all(hasattr(true, name) for name in asked)


def test_weights_that_the_graph_has_no_more_are_not_counted(tmp_path):
    model = onnx.load(product(tmp_path))
    path = tmp_path / "beside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="beside.onnx.data", size_threshold=0)
    with (tmp_path / "beside.onnx.data").open("ab") as file:
        file.write(bytes(10**6))
    assert weights_of(path) == path.stat().st_size + 256 * 256 * 2


def test_a_killed_process_is_an_error(tmp_path):
    def kill(done, of):
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(CheckpointError, match="building 'product.onnx' was killed, as it is where memory runs out"):
        build_apart(request(product(tmp_path), batches(256, 1, 4, 16)), kill)
    assert not active_children()


def test_errors_come_from_the_other_process_as_they_are(tmp_path):
    with pytest.raises(CheckpointError, match="layers of attention"):
        build_apart(request(product(tmp_path), batches(256, 1, 4, 16), layers={"attention": 2}), ignore)
    with pytest.raises(OSError, match="nowhere"):
        build_apart(PlanRequest("tensorrt-rtx", product(tmp_path), tmp_path / "nowhere" / "a.engine",
                                (batches(256, 1, 4, 16),), (86,), {}), ignore)


def test_a_caller_that_stops_ends_the_build(tmp_path):
    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_apart(request(product(tmp_path), batches(256, 1, 4, 16)), stop)
    assert not active_children()


@pytest.mark.parametrize("builds", [build_plan, build_apart])
def test_a_full_disk_is_an_error(tmp_path, builds):
    graph = product(tmp_path, 2048, 2048)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            builds(request(graph, batches(2048, 1, 4, 16)), ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_gpus_are_named_by_number():
    assert set(known_sms(trt_module("tensorrt-rtx"))) >= {75, 80, 86, 89, 120, 121}
