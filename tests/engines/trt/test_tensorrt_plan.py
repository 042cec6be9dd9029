"""Plans: real ones of TensorRT for RTX, which fail without a driver, and those of `fake_gpu`; profiles; buffers."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import tensorrt_rtx_bindings as trt
from cuda.bindings import runtime as cuda_runtime
from fake_gpu import FakeContext, FakeCuda, FakeEngine, FakeRuntimeCache, FakeRuntimeConfig, FakeTensorRT, write_plan

from gog_edge.engines.cuda import Cuda, DeviceProperties
from gog_edge.engines.manifest import IMAGE, TENSORRT, TENSORRT_RTX, BuiltGraph, EngineManifest
from gog_edge.engines.tensorrt.decoder import open_decoder
from gog_edge.engines.tensorrt.execution import grown_size
from gog_edge.engines.tensorrt.graph import LruCache, TrtGraph, open_graph
from gog_edge.engines.tensorrt.plan import (
    ErrorLog,
    Plan,
    check_device,
    check_version,
    choose_profile,
    deserialize_engine,
    import_tensorrt,
    tensorrt_error,
)
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
    """A real plan of that graph."""
    errors = ErrorLog(trt)
    builder = trt.Builder(errors.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, errors.logger)
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
    return EngineManifest(TENSORRT_RTX, trt.__version__, (86, 89), 0, (image,), {}, ())


def load(path):
    errors = ErrorLog(trt)
    return deserialize_engine(trt.Runtime(errors.logger), errors, path)


def test_a_real_plan_requires_a_driver(plan, tmp_path):
    (tmp_path / "image.engine").write_bytes(plan)
    with pytest.raises(BackendError, match=r"image\.engine' cannot be loaded: .*cudaError 35.*gog-edge doctor"):
        load(tmp_path / "image.engine")


@pytest.mark.parametrize("damage", [
    lambda plan: plan[: len(plan) // 2], lambda plan: plan[:70], lambda plan: plan + b"more", lambda plan: b"x" * 5000,
    lambda plan: b"ftrt" + plan[4:], lambda plan: b"no",
], ids=["half", "header", "longer", "foreign", "tensorrt", "tiny"])  # fmt: skip
def test_a_damaged_plan(plan, tmp_path, damage):
    (tmp_path / "image.engine").write_bytes(damage(plan))
    message = r"image\.engine' is truncated or was not written by this release .*build it again"
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "image.engine")


def test_an_empty_or_missing_plan(tmp_path):
    (tmp_path / "image.engine").write_bytes(b"")
    for name in ("image.engine", "other.engine"):
        with pytest.raises(ArtifactError, match=rf"{name}' cannot be read"):
            load(tmp_path / name)


def test_engines_of_another_release(built):
    check_version(trt.__version__, built)
    with pytest.raises(BackendError, match=rf"with tensorrt-rtx 1\.5\.0, but {trt.__version__} is .*--sm 86,89"):
        check_version(trt.__version__, replace(built, version="1.5.0"))


def test_engines_for_other_gpus(built):
    check_device(DeviceProperties("RTX 4090", 89, 2**34, False), built)
    with pytest.raises(BackendError, match=r"for SM 86, 89, but 'RTX 5090' has SM 120; .*export engines.* --sm 120"):
        check_device(DeviceProperties("RTX 5090", 120, 2**34, False), built)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_is_not_installed():
    with pytest.raises(BackendError, match=r"'tensorrt' cannot be imported .*'gog_edge\[tensorrt\]'.*JetPack"):
        import_tensorrt(TENSORRT)


def test_open_graph_reports_the_first_problem(built, plan, tmp_path):
    (tmp_path / "image.engine").write_bytes(plan)
    with pytest.raises(BackendError, match="is installed; build them again"):
        open_graph(tmp_path, replace(built, version="1.0"), IMAGE)
    with pytest.raises(ArtifactError, match="no engine was built for 'decoder'"):
        open_decoder(tmp_path, built, None)
    try:
        Cuda.open()
    except BackendError as exc:
        with pytest.raises(BackendError, match=str(exc)[:20]):
            open_graph(tmp_path, built, IMAGE)


def test_the_error_log_keeps_the_last_errors_and_prints_nothing(capfd):
    errors = ErrorLog(trt)
    for number in range(20):
        errors.logger.log(trt.ILogger.Severity.ERROR, f"error {number} ")
        errors.logger.log(trt.ILogger.Severity.WARNING, "a warning")
    assert errors.drain() == "; ".join(f"error {number}" for number in range(14, 20))
    assert errors.drain() == "TensorRT gave no reason" and capfd.readouterr() == ("", "")


def test_out_of_memory_errors_of_tensorrt():
    text = "[defaultAllocator.cpp::allocateAsync::48] Error Code 1: Cuda Runtime (out of memory)"
    assert type(tensorrt_error("x", text)) is OutOfDeviceMemory
    assert type(tensorrt_error("x", "Error Code 2: OutOfMemory (Requested size was 5 bytes.)")) is OutOfDeviceMemory
    assert type(tensorrt_error("x", "Error Code 3: API Usage Error")) is BackendError


def open_plan_on_fake_gpu(graph, built, folder, profiles=({"x": ROWS},), **options):
    cuda = FakeCuda()
    write_plan(folder / "image.engine", graph, profiles)
    return Plan(FakeTensorRT(cuda, **options), Cuda(cuda), folder, built, built.graph(IMAGE))


def test_a_plan_whose_profiles_are_not_those_of_the_manifest(graph, built, tmp_path):
    open_plan_on_fake_gpu(graph, built, tmp_path)
    other = ({"x": ((1, 8), (4, 8), (32, 8))},)
    for profiles in (other, ({"x": ROWS},) * 2):
        with pytest.raises(ArtifactError, match=r"profiles of 'image\.engine' are not those in the manifest"):
            open_plan_on_fake_gpu(graph, built, tmp_path, profiles)


def test_inputs_in_host_memory_are_not_supported(graph, built, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "get_tensor_location", lambda self, name: trt.TensorLocation.HOST)
    with pytest.raises(ArtifactError, match="has 'x' as FLOAT in HOST memory"):
        open_plan_on_fake_gpu(graph, built, tmp_path)


def test_compiled_kernels_are_stored_next_to_the_engine(graph, built, tmp_path, monkeypatch):
    plan = open_plan_on_fake_gpu(graph, built, tmp_path)
    tower = TrtGraph(plan)
    stored = tmp_path / "cache" / "image.kernels"
    first = stored.read_bytes()
    x = np.ones((3, 8), np.float32)
    assert np.array_equal(tower.run({"x": x})["y"][0], [28, 92, 156, 220])
    before = stored.stat().st_mtime_ns
    TrtGraph(open_plan_on_fake_gpu(graph, built, tmp_path))
    assert stored.stat().st_mtime_ns == before and stored.read_bytes() == first
    stored.write_bytes(first.swapcase().replace(b"KERNEL", b"kernel"))  # of the same length, from another driver
    monkeypatch.setattr(FakeRuntimeCache, "deserialize", lambda self, blob: True)  # accepted, but compiled again
    TrtGraph(open_plan_on_fake_gpu(graph, built, tmp_path))
    assert stored.read_bytes() == first
    monkeypatch.undo()
    stored.write_bytes(b"of another GPU")
    TrtGraph(open_plan_on_fake_gpu(graph, built, tmp_path))
    assert stored.read_bytes() == first


def test_a_read_only_folder_is_a_warning(graph, built, tmp_path, caplog):
    (tmp_path / "cache").write_text("in the way")
    tower = TrtGraph(open_plan_on_fake_gpu(graph, built, tmp_path))
    assert "every start compiles them" in caplog.text
    assert tower.run({"x": np.ones((1, 8), np.float32)})["y"].shape == (1, 4)


def test_tensorrt_stores_no_kernels(graph, built, tmp_path):
    tower = TrtGraph(open_plan_on_fake_gpu(graph, replace(built, engine=TENSORRT), tmp_path))
    assert tower.run({"x": np.ones((1, 8), np.float32)})["y"].shape == (1, 4)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fake, real", [
    (FakeEngine, trt.ICudaEngine), (FakeContext, trt.IExecutionContext), (FakeRuntimeConfig, trt.IRuntimeConfig),
    (FakeRuntimeCache, trt.IRuntimeCache), (FakeCuda, cuda_runtime),
])  # fmt: skip
def test_the_fakes_have_only_attributes_of_the_real_modules(fake, real):
    names = {name for name in vars(fake) if not name.startswith("_")} - fake.OWN
    assert names and all(hasattr(real, name) for name in names)


# --- profiles and buffers -------------------------------------------------------------------------

STEPS = tuple({"x": ((1, a, 8), (1, b, 8), (1, c, 8)), "rows": ((1,), (1,), (128,))}
              for a, b, c in ((1, 1, 128), (1, 64, 512), (1, 512, 512)))  # fmt: skip


@pytest.mark.parametrize("tokens, profile", [(1, 0), (7, 0), (9, 1), (64, 1), (128, 1), (200, 2), (512, 2)])
def test_the_nearest_profile_is_chosen(tokens, profile):
    assert choose_profile(STEPS, {"x": (1, tokens, 8), "rows": (1,)}) == profile


@pytest.mark.parametrize("shapes", [{"x": (1, 513, 8), "rows": (1,)}, {"x": (1, 4, 8), "rows": (129,)},
                                    {"x": (4, 8), "rows": (1,)}])  # fmt: skip
def test_shapes_that_no_profile_accepts(shapes):
    with pytest.raises(BackendError, match=r"accepts x \(.*\), rows \(.*maximum shapes are x \(1, 128, 8\)"):
        choose_profile(STEPS, shapes)


def test_an_engine_of_fixed_shapes_has_one_profile():
    assert choose_profile(({},), {"x": (1, 2)}) == 0


def test_buffers_grow_with_headroom():
    """By a quarter of what is needed, in whole pages of 4096 bytes."""
    sizes = {(0, 1): 4096, (4096, 4096): 4096, (4096, 10): 4096, (4096, 4097): 8192, (0, 409_600): 512_000}
    assert {given: grown_size(*given) for given in sizes} == sizes


def test_lru_cache():
    recent = LruCache(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert recent.get("b") is None and recent.get("a") == 1 and len(recent) == 2
    recent.clear()
    assert recent.get("a") is None
