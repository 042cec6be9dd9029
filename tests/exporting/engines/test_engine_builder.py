"""Whole builds with TensorRT for RTX, of the atlas and of tiny policies: no GPU is needed."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from gog_edge.config import Limits, RemoteConfig
from gog_edge.engines.manifest import IN_PLACE, MANIFEST, read_engine_manifest
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.engines.builder import build_engines
from gog_edge.exporting.policy.export import export_policy
from gog_edge.policy.manifest import read_manifest

SMS = (86, 89, 120)
ENCODER = DEFAULT_BUNDLE / "encoder"


def bundle_of(root: Path, policy) -> Bundle:
    """Return a bundle of a policy and the atlas's encoder; builds need no packs."""
    shutil.copytree(ENCODER, root / "encoder")
    return Bundle(root, "tiny", policy, root / "encoder", (), Limits(), ())


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """The atlas's folder of engines and the report of the build."""
    out = tmp_path_factory.mktemp("engines") / "tensorrt-rtx"
    return out, build_engines(open_bundle(DEFAULT_BUNDLE), out, engine="tensorrt-rtx", sms=SMS)


def test_built_engines_can_be_read(atlas):
    out, report = atlas
    built = read_engine_manifest(out, DEFAULT_BUNDLE, "tensorrt-rtx")
    assert built == report.engines
    assert {graph.name: graph.cache for graph in built.graphs} == {
        "decoder": IN_PLACE, "vision": "", "image": "", "text": ""}
    assert (built.sms, built.context, built.version[:2]) == (SMS, 2048, "1.")
    assert sorted(path.name for path in out.iterdir()) == sorted([*(entry.path for entry in built.files), MANIFEST])
    assert {entry.path for entry in built.files} == {f"{graph.name}.engine" for graph in built.graphs}


def test_the_converted_graphs_were_compared_with_the_bundles(atlas):
    assert atlas[1].engines.parity


def test_cache_updates_and_attention_are_fused_layers(atlas):
    layers = {graph.name: graph.layers for graph in atlas[1].engines.graphs}
    spec = read_manifest(DEFAULT_BUNDLE / "policy")
    assert layers["decoder"]["kv_cache_update"] == 2 * spec.text.layers
    assert layers["decoder"]["attention"] == spec.text.layers and layers["vision"]["attention"] == spec.vision.depth


def test_every_graph_and_gpu_is_reported(atlas):
    out, report = atlas
    entries = report.graphs()
    assert [(entry["name"], entry["sm"]) for entry in entries] == [
        (name, sm) for name in ("decoder", "vision", "image", "text") for sm in SMS]  # fmt: skip
    for entry in entries:
        assert entry["bytes"] == (out / entry["file"]).stat().st_size and 0 < entry["seconds"] < 120
        assert bool(entry["kv_cache_update"]) == (entry["name"] == "decoder")


def test_engines_of_a_changed_graph_are_refused(atlas, tmp_path):
    """As after a new export of the policy."""
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "policy" / "manifest.json"
    value = json.loads(manifest.read_text())
    next(entry for entry in value["files"] if entry["path"] == "decoder.onnx")["sha256"] = "0" * 64
    manifest.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="was built from a version of 'policy/decoder.onnx'.*--sm 86,89,120"):
        read_engine_manifest(atlas[0], tmp_path / "bundle", "tensorrt-rtx")


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2.5", "qwen3"])
def test_policies_build_in_every_precision(checkpoints, qwen3_checkpoints, tmp_path, precision, qwen3):
    source = (qwen3_checkpoints if qwen3 else checkpoints)[True]
    manifest = export_policy(source, tmp_path / "policy", precision=precision, block=32, context=512, cpu_layout="none",
                             parity=False)
    report = build_engines(bundle_of(tmp_path, tmp_path / "policy"), tmp_path / "out", engine="tensorrt-rtx", sms=SMS,
                           parity=False)
    layers = {graph.name: graph.layers for graph in report.engines.graphs}
    assert layers["decoder"]["kv_cache_update"] == 2 * manifest.text.layers
    assert layers["decoder"]["attention"] == manifest.text.layers
    assert (layers["decoder"].get("dequantize", 0) >= 2 * manifest.text.layers) == (precision == "int4")
    inputs = report.engines.graph("decoder").profiles[0]
    assert ("deepstack" in inputs) == qwen3 and report.engines.context == 512
    assert not report.engines.parity and len(report.engines.graph("vision").profiles) == 2


def test_only_the_encoder_is_built_if_another_server_runs_the_policy(tmp_path):
    bundle = bundle_of(tmp_path, RemoteConfig(url="http://127.0.0.1:1/v1", model="m", dialect="gog"))
    report = build_engines(bundle, tmp_path / "out", engine="tensorrt-rtx", sms=(89,), parity=False)
    assert [graph.name for graph in report.engines.graphs] == ["image", "text"]
    assert report.engines.context == 0
    assert read_engine_manifest(tmp_path / "out", tmp_path, "tensorrt-rtx") == report.engines


def test_the_engines_of_onnx_runtime_are_the_converted_graphs(tmp_path):
    report = build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "out", engine="ort-cuda", context=256, parity=False)
    assert [graph.file for graph in report.engines.graphs] == [
        "decoder.onnx", "vision.onnx", "image.onnx", "text.onnx"]  # fmt: skip
    assert (report.engines.sms, report.engines.version, report.engines.context) == ((), "", 256)
    assert [entry["sm"] for entry in report.graphs()] == [None] * 4
    assert read_engine_manifest(tmp_path / "out", DEFAULT_BUNDLE, "ort-cuda") == report.engines


def test_onnx_runtime_supports_small_contexts(tmp_path):
    report = build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "out", engine="ort-cuda", context=100, parity=False)
    assert report.engines.context == 100


@pytest.mark.parametrize("options, message", [
    ({"engine": "tensorrt-rtx", "sms": (86, 90)}, "cannot build engines for SM 90; it supports 75, 80, 86, 89, 120"),
    ({"engine": "tensorrt"}, "'tensorrt' cannot be imported"),
    ({"engine": "ort-cuda", "sms": (86,)}, "--sm is for tensorrt-rtx"),
    ({"engine": "openvino"}, "cannot build engines for 'openvino'; available: ort-cuda, tensorrt, tensorrt-rtx"),
])  # fmt: skip
def test_unavailable_engines_are_refused(tmp_path, options, message):
    with pytest.raises(BackendError, match=message):
        build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_int4_is_refused_for_gpus_without_it(checkpoints, tmp_path):
    export_policy(checkpoints[False], tmp_path / "policy", precision="int4", block=32, context=512, cpu_layout="none",
                  parity=False)
    with pytest.raises(BackendError, match="cannot build int4 engines for SM 75; it supports 80, 86"):
        build_engines(bundle_of(tmp_path, tmp_path / "policy"), tmp_path / "out", engine="tensorrt-rtx", sms=(75, 86))


@pytest.mark.parametrize("context, message", [(100, "too small; give --context at least 128"),
                                           (2049, "exceeds the policy's limit; give --context at most 2048")])
def test_contexts_out_of_range_are_refused(tmp_path, context, message):
    with pytest.raises(CheckpointError, match=message):
        build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "out", engine="tensorrt-rtx", context=context)


def test_folders_of_another_kind_are_not_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not a folder of kind 'engines'; choose another one"):
        build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "letters", engine="tensorrt-rtx")
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"


def test_a_full_disk_keeps_the_previous_engines(atlas, tmp_path):
    """The disk is full while the decoder's plan is written."""
    shutil.copytree(atlas[0], tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write '.*out.part' .*File too large.*; nothing was kept"):
            build_engines(open_bundle(DEFAULT_BUNDLE), tmp_path / "out", engine="tensorrt-rtx", parity=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_engine_manifest(tmp_path / "out", DEFAULT_BUNDLE, "tensorrt-rtx") == atlas[1].engines


def test_an_altered_bundle_is_refused(tmp_path):
    bundle = bundle_of(tmp_path, RemoteConfig(url="http://127.0.0.1:1/v1", model="m", dialect="gog"))
    with (tmp_path / "encoder" / "text.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="text.onnx' has .* bytes, its manifest says"):
        build_engines(bundle, tmp_path / "out", engine="ort-cuda")
