"""What the command line chooses, and the built engines that it leads to."""

import shlex
from dataclasses import replace

import pytest
from built_engines import build, toy  # noqa: F401
from little_fixtures import little_pack_folder, tiny_encoder, tiny_encoder_folder  # noqa: F401
from onnxruntime import get_available_providers

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
    BuiltEngines,
)
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import BackendError, InputError
from gog_edge.files import read_json, write_json
from gog_edge.policy.model import PolicyModel


def test_the_bundles_own_graphs_are_the_default(tmp_path):
    assert EngineChoice() == EngineChoice(ORT) and not EngineChoice().built
    assert EngineChoice().read(tmp_path) is None


@pytest.mark.parametrize("name", ["", "ORT", "cuda", "tensorrt_rtx"])
def test_an_engine_that_there_is_not_is_refused_with_those_that_there_are(name):
    with pytest.raises(InputError, match=f"no engine '{name}'") as caught:
        EngineChoice(name)
    assert all(known in str(caught.value) for known in ENGINES)


def test_a_folder_of_engines_needs_to_be_told_what_they_are_for(tmp_path):
    with pytest.raises(InputError, match="name the engine"):
        EngineChoice(ORT, tmp_path)


def test_engines_lie_in_the_bundle_or_where_one_says(toy, tmp_path):  # noqa: F811
    out = build(toy)
    assert EngineChoice(ORT_CUDA).read(toy.root).folder == out
    elsewhere = out.rename(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match=f"{toy.root} --engine ort-cuda"):
        EngineChoice(ORT_CUDA).read(toy.root)
    found = EngineChoice(ORT_CUDA, elsewhere).read(toy.root)
    assert found.folder == elsewhere and found.built.engine == ORT_CUDA
    with pytest.raises(BackendError, match=f"are for 'ort-cuda', asked for is 'tensorrt'.*--engine {TENSORRT}"):
        EngineChoice(TENSORRT, elsewhere).read(toy.root)


@pytest.mark.parametrize("spoil", ["truncated", "missing", "other graph", "other schema"])
def test_spoilt_engines_are_not_to_be_had_and_the_command_is_said(toy, spoil):  # noqa: F811
    out = build(toy, context=256)
    if spoil == "truncated":
        (out / "image.onnx").write_bytes((out / "image.onnx").read_bytes()[:100])
    elif spoil == "missing":
        (out / "image.onnx").unlink()
    elif spoil == "other graph":  # the bundle got another encoder since
        manifest = toy.encoder / "manifest.json"
        digest = next(e.sha256 for e in EngineChoice(ORT_CUDA).read(toy.root).built.files if e.path == "text.onnx")
        sources = EngineChoice(ORT_CUDA).read(toy.root).built.graph(IMAGE).sources
        manifest.write_text(manifest.read_text().replace(sources["encoder/image.onnx"], digest))
    else:
        (out / "engines.json").write_text('{"schema": 99, "kind": "engines"}')
    with pytest.raises(BackendError) as caught:
        EngineChoice(ORT_CUDA).read(toy.root)
    command = f"python -m export.build_engines {toy.root} --engine ort-cuda"
    known = spoil != "other schema"  # what else they were built with
    assert str(caught.value).endswith(f"{command} --context 256" if known else command)
    assert str(caught.value).count("export.build_engines") == 1


def test_the_command_said_builds_the_same_engines_in_the_same_place(toy, tmp_path, capsys):  # noqa: F811
    """It is run as it is said, in a folder whose name has to be quoted."""
    out = build(toy, context=256).rename(tmp_path / "else where")
    before = EngineChoice(ORT_CUDA, out).read(toy.root).built
    (out / "image.onnx").write_bytes(b"torn")
    with pytest.raises(BackendError) as caught:
        EngineChoice(ORT_CUDA, out).read(toy.root)
    _, _, *words = shlex.split(str(caught.value).partition("build them again: ")[2])
    assert words[0] == "export.build_engines"
    assert build_engines.main([*words[1:], "--no-parity"]) == 0, capsys.readouterr().err
    after = EngineChoice(ORT_CUDA, out).read(toy.root).built
    assert (after.context, after.folder, after.bundle) == (256, out, toy.root) and after.graphs == before.graphs


def test_the_command_names_the_gpus_of_tensorrt_for_rtx_alone(tmp_path):
    place = tmp_path / "engines" / TENSORRT_RTX
    built = BuiltEngines(TENSORRT_RTX, "1.7", (86, 89), 0, (), {}, (), tmp_path, place)
    assert built.rebuild() == f"python -m export.build_engines {tmp_path} --engine tensorrt-rtx --sm 86,89"
    assert built.rebuild([120]).endswith("--sm 120")
    assert replace(built, engine=TENSORRT).rebuild([87]).endswith(f"--engine tensorrt --out {place}")
    assert not {"bundle", "folder"} & built.to_json().keys()


def test_engines_are_as_large_as_their_files(toy):  # noqa: F811
    out = build(toy)
    engines = EngineChoice(ORT_CUDA).read(toy.root)
    assert engines.bytes((IMAGE, TEXT)) == sum((out / f"{name}.onnx").stat().st_size for name in (IMAGE, TEXT))
    assert engines.bytes((DECODER, VISION)) > engines.bytes((DECODER,)) > 0


@pytest.mark.skipif("CUDAExecutionProvider" in get_available_providers(), reason="this box has it")
def test_a_runtime_that_this_box_has_not_is_said(toy):  # noqa: F811
    build(toy)
    engines = EngineChoice(ORT_CUDA).read(toy.root)
    with pytest.raises(BackendError, match="CUDA"):
        engines.open_graph(IMAGE)


def test_what_is_kept_belongs_to_the_very_engines(toy):  # noqa: F811
    build(toy)
    own = PolicyModel.open(toy.policy, threads=1).cache
    first = EngineChoice(ORT_CUDA).read(toy.root).cache()
    assert first.is_dir() and first == EngineChoice(ORT_CUDA).read(toy.root).cache() != own
    engines = EngineChoice(ORT_CUDA).read(toy.root)
    others = tuple(replace(entry, sha256="0" * 64) for entry in engines.built.files)
    rebuilt = replace(engines, built=replace(engines.built, files=others))
    elsewhere = replace(engines, built=replace(engines.built, engine=TENSORRT_RTX))
    assert len({each.cache() for each in (engines, rebuilt, elsewhere)}) == 3


def test_a_folder_that_cannot_be_written_keeps_nothing(toy):  # noqa: F811
    out = build(toy)
    (out / "cache").write_text("in the way")
    assert not EngineChoice(ORT_CUDA).read(toy.root).cache().is_dir()


def test_engines_that_this_version_does_not_run_are_told_with_the_command(toy):  # noqa: F811
    """Written by earlier versions: for another runtime, or with a graph that searches."""
    out = build(toy)
    command = f"python -m export.build_engines {toy.root} --engine {ORT_CUDA}"
    written = read_json(out / MANIFEST, what="engines")
    write_json(out / MANIFEST, written | {"engine": "ort-rtx"})
    with pytest.raises(BackendError, match=f"for 'ort-rtx', which this version does not run; build them: {command}"):
        EngineChoice(ORT_CUDA).read(toy.root)
    search = {**written["graphs"][0], "name": "search", "sources": {}}
    write_json(out / MANIFEST, written | {"graphs": [*written["graphs"], search]})
    with pytest.raises(BackendError, match=f"a graph 'search', which this version .*; build them again: {command}"):
        EngineChoice(ORT_CUDA).read(toy.root)
