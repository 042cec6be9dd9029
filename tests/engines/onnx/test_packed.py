import shutil

import numpy as np
import pytest

from gog_edge.engines.onnx.decoder import bfloat16, widened
from gog_edge.engines.onnx.native import library, why_none
from gog_edge.engines.onnx.prepacked import cache_key, packed_graph
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.errors import BackendError
from gog_edge.exporting.graph import FLOAT, GraphBuilder
from gog_edge.exporting.policy.export import export_policy
from gog_edge.files import FileEntry
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import Blocks, read_manifest
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

SIZE = 2**20  # bytes of weights, as said


@pytest.fixture(scope="module")
def int4(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "policy"
    export_policy(checkpoints[True], out, precision="int4", block=32, context=512, parity=False)
    return out


@pytest.fixture
def large(int4, tmp_path, monkeypatch):
    """A policy folder that counts as large."""
    monkeypatch.setattr("gog_edge.policy.model.WORTH_BYTES", 0)
    return shutil.copytree(int4, tmp_path / "policy")


def kept(folder):
    return sorted(str(path.relative_to(folder / "cache")) for path in (folder / "cache").rglob("*") if path.is_file())


def speak(folder):
    session = Session(LocalPolicy.open(folder, threads=1).model.decoder)
    session.append_text("Which flag?")
    return session.generate(max_tokens=8).tokens


@pytest.mark.parametrize("bits, rows, columns", [(4, 2048, 2304), (8, 1501, 1024), (4, 64, 128)])
def test_packed_weights_say_the_same(tmp_path, bits, rows, columns):
    graph = GraphBuilder("two", tmp_path / "two.onnx", Blocks(bits, 128))
    value = graph.input("x", FLOAT, ["n", columns])
    random = np.random.default_rng(0)
    for shape in ((rows, columns), (columns, rows)):
        value = graph.linear(value, random.normal(0, 0.05, shape).astype(np.float32))
    graph.output(value, "y", FLOAT, ["n", columns])
    graph.save()
    packed = packed_graph(tmp_path / "two.onnx", tmp_path / "cache" / "key", SIZE)
    assert packed.parent == tmp_path / "cache" / "key"
    assert packed.with_name("two.onnx.data").is_file() == (rows > 1000)
    x = random.normal(size=(3, columns)).astype(np.float32)
    said = [OrtGraph(path, optimised=path == packed).run({"x": x})["y"] for path in (tmp_path / "two.onnx", packed)]
    assert np.isfinite(said[0]).all() and np.array_equal(*said)
    assert packed_graph(tmp_path / "two.onnx", packed.parent, SIZE) == packed


def test_weights_out_of_place_are_not_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gog_edge.engines.onnx.prepacked.ALIGNED_BYTES", 4096)  # then tensors follow each other anywhere
    graph = GraphBuilder("two", tmp_path / "two.onnx", Blocks(4, 32))
    value = graph.input("x", FLOAT, ["n", 128])
    for seed in range(3):
        value = graph.linear(value, np.random.default_rng(seed).normal(size=(128, 128)).astype(np.float32))
    graph.output(value, "y", FLOAT, ["n", 128])
    graph.save()
    assert packed_graph(tmp_path / "two.onnx", tmp_path / "cache" / "key", SIZE) == tmp_path / "two.onnx"
    assert "cannot be mapped" in caplog.text and list((tmp_path / "cache").iterdir()) == []


def test_a_large_policy_keeps_its_weights_and_its_prompt(large, monkeypatch):
    first = speak(large)
    files = kept(large)
    key = cache_key(read_manifest(large).files)
    assert {f"{key}/{name}.onnx" for name in ("decoder", "prefill", "vision")} <= set(files)
    assert sum("prompt-" in name for name in files) == 3 and not any(".part" in name for name in files)
    model = PolicyModel.open(large, threads=1)
    steps = []
    monkeypatch.setattr(model.decoder.engine, "step", lambda *args, **more: steps.append(args))
    assert LocalPolicy.open(large, threads=1).model.cache == model.cache
    assert speak(large) == first and kept(large) == files


@pytest.mark.skipif(library() is None, reason=f"no library: {why_none()}")
@pytest.mark.parametrize("qwen3", [False, True])
def test_a_large_native_policy_keeps_its_prompt_alone(native_policies, tmp_path, monkeypatch, qwen3):
    """Its weights are mapped as they are."""
    monkeypatch.setattr("gog_edge.policy.model.WORTH_BYTES", 0)
    folder = shutil.copytree(native_policies[qwen3], tmp_path / "policy")
    first, key = speak(folder), cache_key(read_manifest(folder).files)
    files = kept(folder)
    assert sum(name.startswith(f"{key}/prompt-") for name in files) == 3
    assert not any(name.endswith(".onnx") for name in files)
    states = np.load(next((folder / "cache").rglob("states.npy")))
    assert states.dtype == np.float32 and np.array_equal(widened(bfloat16(states)), states) and states.any()
    computed = LocalPolicy.open(shutil.copytree(native_policies[qwen3], tmp_path / "other"), threads=1)._prefix
    mapped = LocalPolicy.open(folder, threads=1)._prefix
    assert mapped.prefilled == 0 < computed.prefilled and speak(folder) == first and kept(folder) == files
    said = []
    for session in (mapped, computed):
        session.append_text("And now?")
        said.append(session.prefill().copy())
    assert np.array_equal(*said)


def test_a_native_policy_in_a_folder_that_cannot_be_written_answers(native_policies, tmp_path, monkeypatch):
    monkeypatch.setattr("gog_edge.policy.model.WORTH_BYTES", 0)
    folder = shutil.copytree(native_policies[True], tmp_path / "policy")
    expected = speak(folder)
    shutil.rmtree(folder / "cache")
    (folder / "cache").write_text("in the way")
    assert speak(folder) == expected


def test_a_kept_prompt_goes_on_as_a_computed_one(large):
    computed, mapped = (LocalPolicy.open(large, threads=1) for _ in range(2))
    said = []
    for policy in (computed, mapped):
        session = policy._take()
        session.append_text("And now?")
        said.append((session.prefill().copy(), session.prefilled))
    assert np.array_equal(said[0][0], said[1][0]) and said[0][1] == said[1][1]
    assert mapped._prefix.prefilled == 0 < computed._prefix.prefilled


def test_a_broken_kept_prompt_is_computed_again(large, caplog):
    expected = speak(large)
    states = next((large / "cache").rglob("states.npy"))
    states.write_bytes(states.read_bytes()[:200])
    assert speak(large) == expected and "computed again" in caplog.text
    assert states.stat().st_size > 200


def test_broken_kept_weights_are_an_error_that_says_what_to_remove(large):
    speak(large)
    graph = next((large / "cache").rglob("decoder.onnx"))
    graph.write_bytes(graph.read_bytes()[:200])
    with pytest.raises(BackendError, match=f"remove the folder '{graph.parent}'"):
        speak(large)


def test_what_was_kept_for_another_processor_is_forgotten(large):
    stale = large / "cache" / "0123456789abcdef"
    stale.mkdir(parents=True)
    (stale / "decoder.onnx").write_bytes(b"old")
    speak(large)
    assert not stale.exists() and kept(large)


def test_a_folder_that_cannot_be_written_is_said_and_does_not_stop_anything(large, caplog):
    expected = speak(large)
    shutil.rmtree(large / "cache")
    (large / "cache").write_text("in the way")
    assert speak(large) == expected
    assert "every start takes longer" in caplog.text


def test_the_key_changes_with_the_files():
    entries = [FileEntry("decoder.onnx", 1, "a"), FileEntry("vision.onnx", 1, "b")]
    assert cache_key(entries) == cache_key(list(entries)) != cache_key(entries[:1])
