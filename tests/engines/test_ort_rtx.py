"""ONNX Runtime with NVIDIA's RTX provider: what can be shown without its GPU.

TensorRT for RTX, of the release that the plugin bundles, compiles the very graphs; ONNX Runtime's processor runs them,
through the code that runs them on a GPU.
"""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from built_engines import build, rtx_on_processor, toy  # noqa: F401
from little_fixtures import little_pack_folder, tiny_encoder, tiny_encoder_folder  # noqa: F401

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines import ort_rtx
from gog_edge.engines.built import DECODER, IMAGE, IN_PLACE, ORT_RTX, RTX_PLUGIN, TENSORRT_RTX, VISION, BuiltGraph
from gog_edge.engines.choice import EngineChoice
from gog_edge.engines.ort_rtx import provider_options, rtx_devices
from gog_edge.engines.trt_shapes import spanning
from gog_edge.errors import BackendError
from gog_edge.exporting.engine_plan import ATTENTION, KV_CACHE_UPDATE, PlanRequest, build_plan
from gog_edge.picture import decode_picture
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import read_manifest
from gog_edge.retrieval.encoder import Encoder

CONTEXT = 768
installed = importlib.util.find_spec(RTX_PLUGIN) is not None


@pytest.fixture
def engines(toy):  # noqa: F811
    build(toy, ORT_RTX, context=CONTEXT)
    return EngineChoice(ORT_RTX).read(toy.root)


def plugin(monkeypatch, library):
    """NVIDIA's package, which only names itself and its library."""
    module = SimpleNamespace(get_ep_name=lambda: "RTX", get_library_path=lambda: str(library))
    monkeypatch.setitem(sys.modules, RTX_PLUGIN, module)


@pytest.mark.skipif(installed, reason="the plugin is here")
def test_without_the_plugin_the_message_names_the_extra(engines):
    for opened in (rtx_devices, lambda: engines.open_graph(IMAGE), lambda: engines.open_decoder(None, CONTEXT)):
        with pytest.raises(BackendError, match=rf"No module named '{RTX_PLUGIN}'.*pip install 'gog_edge\[ort-rtx\]'"):
            opened()


@pytest.mark.parametrize(("missing", "remedy"), [
    ("libcuda.so.1", "NVIDIA's driver"), ("libonnxruntime_providers_nv_tensorrt_rtx.so", "both anew: pip install")
])  # fmt: skip
def test_a_library_that_cannot_be_loaded_is_an_error_each_time(monkeypatch, tmp_path, missing, remedy):
    """As without a driver, which the true one is linked with."""
    plugin(monkeypatch, tmp_path / missing)
    for _ in range(2):
        with pytest.raises(BackendError, match=rf"cannot be loaded \(.*No such file or directory\); install {remedy}"):
            rtx_devices()


def test_a_provider_without_a_gpu_is_an_error(monkeypatch, tmp_path):
    plugin(monkeypatch, tmp_path)
    monkeypatch.setattr(ort_rtx, "_registered", {"RTX"})
    with pytest.raises(BackendError, match=r"sees no GPU that it runs on \(SM 8\.6, .*ask for --engine ort-cuda"):
        rtx_devices()


def test_the_provider_is_told_all_shapes_as_one_profile(tmp_path):
    profiles = ({"x": ((1, 4), (1, 4), (8, 4)), "y": ((2,), (3,), (9,))},
                {"x": ((2, 2), (4, 8), (6, 16)), "y": ((1,), (5,), (7,))})  # fmt: skip
    told = provider_options(tmp_path / "a.onnx", BuiltGraph(VISION, "a.onnx", {}, profiles=profiles), tmp_path / "none")
    assert told == {"nv_profile_min_shapes": "x:1x2,y:1", "nv_profile_opt_shapes": "x:1x4,y:3",
                    "nv_profile_max_shapes": "x:8x16,y:9"}  # fmt: skip
    (tmp_path / "a.onnx.data").write_bytes(b"weights")
    assert provider_options(tmp_path / "a.onnx", BuiltGraph(IMAGE, "a.onnx", {}), tmp_path) == {
        "nv_use_external_data_initializer": "1", "nv_runtime_cache_path": str(tmp_path)}  # fmt: skip


def test_the_builder_leaves_graphs_and_the_shapes_to_compile_them_for(toy, engines):  # noqa: F811
    built = engines.built
    assert (built.engine, built.version, built.sms, built.context) == (ORT_RTX, "", (), CONTEXT)
    assert [graph.file for graph in built.graphs] == ["decoder.onnx", "vision.onnx", "image.onnx", "text.onnx"]
    assert built.graph(DECODER).cache == IN_PLACE and all(graph.profiles for graph in built.graphs)
    assert built.rebuild() == f"python -m export.build_engines {toy.root} --engine ort-rtx --context {CONTEXT}"


def test_tensorrt_for_rtx_compiles_the_graphs_in_one_profile(toy, engines, tmp_path):  # noqa: F811
    """Keys and values updated in place, attention fused, weights once: or building fails."""
    pytest.importorskip("tensorrt_rtx_bindings")
    layers = read_manifest(toy.policy).text.layers
    fused = {DECODER: {KV_CACHE_UPDATE: 2 * layers, ATTENTION: layers}}
    for graph in engines.built.graphs:
        request = PlanRequest(
            TENSORRT_RTX, engines.folder / graph.file, tmp_path / graph.name, (spanning(graph.profiles),), (86,),
            fused.get(graph.name, {}),
        )  # fmt: skip
        assert build_plan(request, lambda done, of: None).size > 0


@pytest.mark.usefixtures("rtx_on_processor")
def test_a_policy_says_what_its_own_graphs_say(toy, engines):  # noqa: F811
    picture = decode_picture((DEFAULT_BUNDLE / "samples/row.jpg").read_bytes())
    said = []
    for built in (None, engines):
        policy = LocalPolicy.open(toy.policy, 1, engines=built)
        conversation = policy.begin(picture, "How many flags are there?")
        said.append(conversation.generate(max_tokens=64, deadline=None).text)
        conversation.close()
    assert said[0] == said[1] != ""


@pytest.mark.usefixtures("rtx_on_processor")
def test_an_encoder_points_where_its_own_graphs_do(toy, engines):  # noqa: F811
    own, built = Encoder.open(toy.encoder, threads=1), Encoder.open(toy.encoder, engines=engines)
    for texts in (["red"], ["blue white", "green"]):
        assert (own.embed_texts(texts) * built.embed_texts(texts)).sum(axis=1).min() > 0.999
