"""Engines of TensorRT for RTX, truly built here and refused as far as that goes without a driver; and shapes."""

from dataclasses import replace

import numpy as np
import pytest
import tensorrt_rtx_bindings as trt
from cuda.bindings import runtime as cuda_runtime
from host_gpu import HostCache, HostConfig, HostContext, HostEngine, HostRuntime, HostTensorRT, write_plan

from gog_edge.engines.cuda import Cuda, DeviceProperties
from gog_edge.engines.manifest import IMAGE, TENSORRT, TENSORRT_RTX, BuiltEngines, BuiltGraph
from gog_edge.engines.tensorrt import open_decoder, open_graph
from gog_edge.engines.tensorrt.graph import TrtGraph
from gog_edge.engines.tensorrt.plan import (
    Messages,
    Plan,
    check_device,
    check_version,
    deserialise,
    failure,
    trt_module,
)
from gog_edge.engines.tensorrt.shapes import PAGE, Recent, choose_profile, grown
from gog_edge.errors import ArtifactError, BackendError, OutOfDeviceMemory
from gog_edge.exporting.graph import FLOAT, GraphBuilder

ROWS = ((1, 8), (4, 8), (16, 8))


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """x [n, 8] -> y [n, 4]."""
    path = tmp_path_factory.mktemp("graph") / "image.onnx"
    builder = GraphBuilder("image", path)
    value = builder.linear(builder.input("x", FLOAT, ["n", 8]), np.arange(32, dtype=np.float32).reshape(4, 8))
    builder.output(value, "y", FLOAT, ["n", 4])
    builder.save()
    return path


@pytest.fixture(scope="module")
def plan(graph):
    """A true plan of that graph."""
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    assert parser.parse_from_file(str(graph))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 2
    for number, name in enumerate(("SM86", "SM89")):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    profile.set_shape("x", *ROWS)
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.fixture
def built():
    image = BuiltGraph(IMAGE, "image.engine", {}, profiles=({"x": ROWS},))
    return BuiltEngines(TENSORRT_RTX, trt.__version__, (86, 89), 0, (image,), {}, ())


def load(path):
    messages = Messages(trt)
    return deserialise(trt.Runtime(messages.logger), messages, path)


def test_a_true_plan_wants_a_driver(plan, tmp_path):
    (tmp_path / "image.engine").write_bytes(plan)
    with pytest.raises(BackendError, match=r"image\.engine' cannot be loaded: .*cudaError 35.*gog-edge doctor"):
        load(tmp_path / "image.engine")


@pytest.mark.parametrize("spoil", [
    lambda plan: plan[: len(plan) // 2], lambda plan: plan[:70], lambda plan: plan + b"more", lambda plan: b"x" * 5000,
    lambda plan: b"ftrt" + plan[4:], lambda plan: b"no",
], ids=["half", "header", "longer", "foreign", "tensorrt", "tiny"])  # fmt: skip
def test_a_spoilt_plan_is_an_error_of_the_file(plan, tmp_path, spoil):
    (tmp_path / "image.engine").write_bytes(spoil(plan))
    with pytest.raises(ArtifactError, match=r"image\.engine' is truncated or no plan of this release .*build it again"):
        load(tmp_path / "image.engine")


def test_an_empty_or_missing_plan_is_an_error_of_the_file(tmp_path):
    (tmp_path / "image.engine").write_bytes(b"")
    for name in ("image.engine", "other.engine"):
        with pytest.raises(ArtifactError, match=rf"{name}' cannot be read"):
            load(tmp_path / name)


def test_engines_of_another_release_are_refused(built):
    check_version(trt, built)
    with pytest.raises(BackendError, match=rf"by tensorrt-rtx 1\.5\.0, here is {trt.__version__}; .*--sm 86,89"):
        check_version(trt, replace(built, version="1.5.0"))


def test_engines_for_other_gpus_are_refused(built):
    check_device(DeviceProperties("RTX 4090", 89, 2**34, False), built)
    with pytest.raises(BackendError, match=r"GPUs of SM 86, 89, 'RTX 5090' is of SM 120; .*build_engines.* --sm 120"):
        check_device(DeviceProperties("RTX 5090", 120, 2**34, False), built)


def test_a_tensorrt_that_is_not_here_is_said(built):
    with pytest.raises(BackendError, match="'tensorrt' is not to be had here .*JetPack"):
        trt_module(TENSORRT)


def test_opening_says_the_first_thing_that_is_wrong(built, plan, tmp_path):
    (tmp_path / "image.engine").write_bytes(plan)
    with pytest.raises(BackendError, match="here is"):
        open_graph(tmp_path, replace(built, version="1.0"), IMAGE)
    with pytest.raises(ArtifactError, match="there is none for 'decoder'"):
        open_decoder(tmp_path, built, None)
    try:
        Cuda.open()
    except BackendError as exc:
        with pytest.raises(BackendError, match=str(exc)[:20]):
            open_graph(tmp_path, built, IMAGE)


def test_messages_keep_the_last_errors_and_print_nothing(capfd):
    messages = Messages(trt)
    for number in range(20):
        messages.logger.log(trt.ILogger.Severity.ERROR, f"error {number} ")
        messages.logger.log(trt.ILogger.Severity.WARNING, "a warning")
    assert messages.take() == "; ".join(f"error {number}" for number in range(14, 20))
    assert messages.take() == "no reason was given" and capfd.readouterr() == ("", "")


def test_memory_that_tensorrt_lacks_is_told_from_other_failures():
    said = "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (out of memory)"
    assert type(failure("x", said)) is OutOfDeviceMemory
    assert type(failure("x", "Error Code 2: OutOfMemory (Requested size was 5 bytes.)")) is OutOfDeviceMemory
    assert type(failure("x", "Error Code 3: API Usage Error")) is BackendError


def little(graph, built, folder, profiles=({"x": ROWS},), **options):
    runtime = HostRuntime()
    write_plan(folder / "image.engine", graph, profiles)
    return Plan(HostTensorRT(runtime, **options), Cuda(runtime), folder, built, built.graph(IMAGE))


def test_a_plan_of_other_shapes_than_the_manifest_says_is_refused(graph, built, tmp_path):
    little(graph, built, tmp_path)
    other = ({"x": ((1, 8), (4, 8), (32, 8))},)
    for profiles in (other, ({"x": ROWS},) * 2):
        with pytest.raises(ArtifactError, match=r"'image\.engine' takes other shapes than the manifest says"):
            little(graph, built, tmp_path, profiles)


def test_inputs_that_are_not_run_here_are_refused(graph, built, tmp_path, monkeypatch):
    monkeypatch.setattr(HostEngine, "get_tensor_location", lambda self, name: trt.TensorLocation.HOST)
    with pytest.raises(ArtifactError, match="has 'x' as FLOAT in HOST memory"):
        little(graph, built, tmp_path)


def test_compiled_kernels_are_kept_beside_the_engine(graph, built, tmp_path, monkeypatch):
    plan = little(graph, built, tmp_path)
    tower = TrtGraph(plan)
    kept = tmp_path / "cache" / "image.kernels"
    first = kept.read_bytes()
    x = np.ones((3, 8), np.float32)
    assert np.array_equal(tower.run({"x": x})["y"][0], [28, 92, 156, 220])
    before = kept.stat().st_mtime_ns
    TrtGraph(little(graph, built, tmp_path))
    assert kept.stat().st_mtime_ns == before and kept.read_bytes() == first
    kept.write_bytes(first.swapcase().replace(b"KERNEL", b"kernel"))  # as long, of another driver
    monkeypatch.setattr(HostCache, "deserialize", lambda self, blob: True)  # taken, and compiled anew
    TrtGraph(little(graph, built, tmp_path))
    assert kept.read_bytes() == first
    monkeypatch.undo()
    kept.write_bytes(b"of another GPU")
    TrtGraph(little(graph, built, tmp_path))
    assert kept.read_bytes() == first


def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(graph, built, tmp_path, caplog):
    (tmp_path / "cache").write_text("in the way")
    tower = TrtGraph(little(graph, built, tmp_path))
    assert "every start compiles them" in caplog.text
    assert tower.run({"x": np.ones((1, 8), np.float32)})["y"].shape == (1, 4)


def test_tensorrt_proper_keeps_no_kernels(graph, built, tmp_path):
    tower = TrtGraph(little(graph, replace(built, engine=TENSORRT), tmp_path))
    assert tower.run({"x": np.ones((1, 8), np.float32)})["y"].shape == (1, 4)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("host, true", [
    (HostEngine, trt.ICudaEngine), (HostContext, trt.IExecutionContext), (HostConfig, trt.IRuntimeConfig),
    (HostCache, trt.IRuntimeCache), (HostRuntime, cuda_runtime),
])  # fmt: skip
def test_what_stands_for_nvidias_has_nothing_that_nvidias_lack(host, true):
    asked = {name for name in vars(host) if not name.startswith("_")} - host.OWN
    assert asked and all(hasattr(true, name) for name in asked)


# --- shapes -------------------------------------------------------------------------------------------

STEPS = tuple({"x": ((1, a, 8), (1, b, 8), (1, c, 8)), "rows": ((1,), (1,), (128,))}
              for a, b, c in ((1, 1, 128), (1, 64, 512), (1, 512, 512)))  # fmt: skip


@pytest.mark.parametrize("tokens, profile", [(1, 0), (7, 0), (9, 1), (64, 1), (128, 1), (200, 2), (512, 2)])
def test_the_profile_is_the_one_made_for_such_sizes(tokens, profile):
    assert choose_profile(STEPS, {"x": (1, tokens, 8), "rows": (1,)}) == profile


@pytest.mark.parametrize("shapes", [{"x": (1, 513, 8), "rows": (1,)}, {"x": (1, 4, 8), "rows": (129,)},
                                    {"x": (4, 8), "rows": (1,)}])  # fmt: skip
def test_shapes_beyond_all_profiles_are_an_error(shapes):
    with pytest.raises(BackendError, match=r"takes x \(.*\), rows \(.*at the most they take x \(1, 128, 8\)"):
        choose_profile(STEPS, shapes)


def test_an_engine_of_fixed_shapes_has_one_profile():
    assert choose_profile(({},), {"x": (1, 2)}) == 0


def test_buffers_grow_by_more_than_is_missing():
    assert grown(0, 1) == PAGE and grown(PAGE, PAGE) == PAGE and grown(PAGE, 10) == PAGE
    assert grown(PAGE, PAGE + 1) == 2 * PAGE and grown(0, 100 * PAGE) == 125 * PAGE


def test_the_latest_are_held():
    recent = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert recent.get("b") is None and recent.get("a") == 1 and len(recent) == 2
    recent.clear()
    assert recent.get("a") is None
