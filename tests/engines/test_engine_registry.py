"""The engine chosen on the command line, and reading the built engines it leads to."""

import json
import shlex
from dataclasses import replace

import pytest
from onnxruntime import get_available_providers
from toy_bundle import build

from export import build_engines
from gog_edge.engines.manifest import (
    DECODER,
    ENGINES,
    IMAGE,
    MANIFEST,
    ORT,
    ORT_CUDA,
    TENSORRT,
    TENSORRT_RTX,
    TEXT,
    VISION,
    EngineManifest,
)
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import BackendError, InputError
from gog_edge.files import read_json, write_json
from gog_edge.policy.model import PolicyModel


def test_the_default_runs_the_bundles_own_graphs(tmp_path):
    assert EngineChoice() == EngineChoice(ORT) and not EngineChoice().built
    assert EngineChoice().read_engines(tmp_path) is None


@pytest.mark.parametrize("name", ["", "ORT", "cuda", "tensorrt_rtx"])
def test_unknown_engine(name):
    with pytest.raises(InputError, match=f"unknown engine '{name}'") as caught:
        EngineChoice(name)
    assert all(known in str(caught.value) for known in ENGINES)


def test_a_folder_of_engines_without_the_engine(tmp_path):
    with pytest.raises(InputError, match="name the engine"):
        EngineChoice(ORT, tmp_path)


def test_engines_in_the_bundle_or_in_another_folder(toy, tmp_path):
    out = build(toy)
    assert EngineChoice(ORT_CUDA).read_engines(toy.root).folder == out
    elsewhere = out.rename(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match=f"{toy.root} --engine ort-cuda"):
        EngineChoice(ORT_CUDA).read_engines(toy.root)
    found = EngineChoice(ORT_CUDA, elsewhere).read_engines(toy.root)
    assert found.folder == elsewhere and found.built.engine == ORT_CUDA
    with pytest.raises(BackendError, match=f"are for 'ort-cuda', but 'tensorrt' was requested.*--engine {TENSORRT}"):
        EngineChoice(TENSORRT, elsewhere).read_engines(toy.root)


@pytest.mark.parametrize("damage", ["truncated", "missing", "other graph", "other schema"])
def test_damaged_engines_are_refused_with_the_build_command(toy, damage):
    out = build(toy, context=256)
    if damage == "truncated":
        (out / "image.onnx").write_bytes((out / "image.onnx").read_bytes()[:100])
    elif damage == "missing":
        (out / "image.onnx").unlink()
    elif damage == "other graph":  # the bundle contains another encoder now
        manifest = toy.encoder / "manifest.json"
        built = EngineChoice(ORT_CUDA).read_engines(toy.root).built
        digest = next(entry.sha256 for entry in built.files if entry.path == "text.onnx")
        sources = built.graph(IMAGE).sources
        manifest.write_text(manifest.read_text().replace(sources["encoder/image.onnx"], digest))
    else:
        (out / "engines.json").write_text('{"schema": 99, "kind": "engines"}')
    with pytest.raises(BackendError) as caught:
        EngineChoice(ORT_CUDA).read_engines(toy.root)
    command = f"gog-edge export engines {toy.root} --engine ort-cuda"
    known = damage != "other schema"  # then the context they were built with is known
    assert str(caught.value).endswith(f"{command} --context 256" if known else command)
    assert str(caught.value).count("gog-edge export engines") == 1


def test_the_build_command_restores_the_engines_in_the_same_folder(toy, tmp_path, capsys):
    """The folder's name must be quoted in the shell."""
    out = build(toy, context=256).rename(tmp_path / "other folder")
    before = EngineChoice(ORT_CUDA, out).read_engines(toy.root).built
    (out / "image.onnx").write_bytes(b"damaged")
    with pytest.raises(BackendError) as caught:
        EngineChoice(ORT_CUDA, out).read_engines(toy.root)
    words = shlex.split(str(caught.value).partition("build them again: ")[2])
    assert words[:3] == ["gog-edge", "export", "engines"]
    assert build_engines.main([*words[3:], "--no-parity"]) == 0, capsys.readouterr().err
    after = EngineChoice(ORT_CUDA, out).read_engines(toy.root).built
    assert (after.context, after.folder, after.bundle) == (256, out, toy.root) and after.graphs == before.graphs


def test_the_build_command_names_gpus_only_for_tensorrt_rtx(tmp_path):
    folder = tmp_path / "engines" / TENSORRT_RTX
    built = EngineManifest(TENSORRT_RTX, "1.7", (86, 89), 0, (), {}, (), tmp_path, folder)
    assert built.rebuild_command() == f"gog-edge export engines {tmp_path} --engine tensorrt-rtx --sm 86,89"
    assert built.rebuild_command([120]).endswith("--sm 120")
    assert replace(built, engine=TENSORRT).rebuild_command([87]).endswith(f"--engine tensorrt --out {folder}")
    assert not {"bundle", "folder"} & built.to_json().keys()


def test_size_of_engines(toy):
    out = build(toy)
    engines = EngineChoice(ORT_CUDA).read_engines(toy.root)
    assert engines.bytes((IMAGE, TEXT)) == sum((out / f"{name}.onnx").stat().st_size for name in (IMAGE, TEXT))
    assert engines.bytes((DECODER, VISION)) > engines.bytes((DECODER,)) > 0


@pytest.mark.skipif("CUDAExecutionProvider" in get_available_providers(), reason="this build has CUDA")
def test_a_runtime_that_is_not_installed(toy):
    build(toy)
    engines = EngineChoice(ORT_CUDA).read_engines(toy.root)
    with pytest.raises(BackendError, match="CUDA"):
        engines.open_graph(IMAGE)


def test_the_cache_folder_is_specific_to_the_engines(toy):
    build(toy)
    own = PolicyModel.open(toy.policy, threads=1).cache_dir
    first = EngineChoice(ORT_CUDA).read_engines(toy.root).cache()
    assert first.is_dir() and first == EngineChoice(ORT_CUDA).read_engines(toy.root).cache() != own
    engines = EngineChoice(ORT_CUDA).read_engines(toy.root)
    others = tuple(replace(entry, sha256="0" * 64) for entry in engines.built.files)
    rebuilt = replace(engines, built=replace(engines.built, files=others))
    elsewhere = replace(engines, built=replace(engines.built, engine=TENSORRT_RTX))
    assert len({each.cache() for each in (engines, rebuilt, elsewhere)}) == 3


def test_a_cache_folder_that_cannot_be_created(toy):
    out = build(toy)
    (out / "cache").write_text("in the way")
    assert not EngineChoice(ORT_CUDA).read_engines(toy.root).cache().is_dir()


def test_engines_of_earlier_versions_that_are_no_longer_supported(toy):
    """For a removed runtime, or with a graph that searched."""
    out = build(toy)
    command = f"gog-edge export engines {toy.root} --engine {ORT_CUDA}"
    written = read_json(out / MANIFEST, what="engines")
    write_json(out / MANIFEST, written | {"engine": "ort-rtx"})
    with pytest.raises(BackendError, match=f"for 'ort-rtx', which this version does not run; build them: {command}"):
        EngineChoice(ORT_CUDA).read_engines(toy.root)
    search = {**written["graphs"][0], "name": "search", "sources": {}}
    write_json(out / MANIFEST, written | {"graphs": [*written["graphs"], search]})
    with pytest.raises(BackendError, match=f"the graph 'search', which this version .*; build them again: {command}"):
        EngineChoice(ORT_CUDA).read_engines(toy.root)


@pytest.mark.parametrize(("max_context", "expected"), [(4096, "--context 256"), (256, "--context 256"), (128, "")])
def test_the_build_command_leaves_out_a_context_that_the_policy_no_longer_allows(toy, max_context, expected):
    """Engines have a context of 256; the policy was exported again with another maximum."""
    build(toy, context=256)
    built = EngineChoice(ORT_CUDA).read_engines(toy.root).built
    manifest = toy.policy / "manifest.json"
    write_json(manifest, read_json(manifest, what="policy") | {"max_context": max_context})
    command = f"gog-edge export engines {toy.root} --engine ort-cuda {expected}".strip()
    assert built.rebuild_command() == command
    assert replace(built, bundle=None, folder=None).rebuild_command().endswith("--engine ort-cuda --context 256")


def test_a_manifest_of_the_first_version_is_read():
    """The keys of engines.json, as version 0.1.0 wrote them."""
    value = {
        "schema": 1, "kind": "engines", "engine": "tensorrt-rtx", "version": "1.7.1.116", "sms": [86, 89],
        "context": 2048, "parity": {"cosine": 0.999},
        "graphs": [{"name": "decoder", "file": "decoder.engine", "sources": {"policy/decoder.onnx": "ab"},
                    "cache": "in-place", "profiles": [{"rows": [[1], [1], [4]]}], "layers": {"attention": 3}}],
        "files": [{"path": "decoder.engine", "size": 7, "sha256": "cd"}],
    }  # fmt: skip
    built = EngineManifest.from_json(value)
    graph = built.graph(DECODER)
    assert (built.engine, built.version, built.sms, built.context) == ("tensorrt-rtx", "1.7.1.116", (86, 89), 2048)
    assert graph.profiles == ({"rows": ((1,), (1,), (4,))},) and graph.cache == "in-place"
    assert json.loads(json.dumps(built.to_json())) == value
