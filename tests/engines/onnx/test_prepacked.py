"""Prepacked weights and the cached prompt: written at the first start, mapped at later ones, ignored if damaged."""

import shutil

import numpy as np
import pytest

from gog_edge.engines.onnx.decoder import from_bfloat16, to_bfloat16
from gog_edge.engines.onnx.native import library, unavailable_reason
from gog_edge.engines.onnx.prepacked import cache_key, prepacked_graph
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.errors import BackendError
from gog_edge.exporting.graph import FLOAT, GraphBuilder
from gog_edge.exporting.policy.export import export_policy
from gog_edge.files import FileEntry
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import WeightQuantization, read_manifest
from gog_edge.policy.session import Session

SIZE = 2**20  # bytes of weights, as passed to `prepacked_graph`


@pytest.fixture(scope="module")
def int4(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "policy"
    export_policy(checkpoints[True], out, precision="int4", block=32, context=512, parity=False)
    return out


@pytest.fixture
def large(int4, tmp_path, monkeypatch):
    """A policy folder that is treated as large."""
    monkeypatch.setattr("gog_edge.policy.model.MIN_CACHED_BYTES", 0)
    return shutil.copytree(int4, tmp_path / "policy")


def cached_files(folder):
    return sorted(str(path.relative_to(folder / "cache")) for path in (folder / "cache").rglob("*") if path.is_file())


def generate(folder):
    session = Session(LocalPolicy.open(folder, threads=1).model.decoder)
    session.append_text("Which flag?")
    return session.generate(max_tokens=8).tokens


@pytest.mark.parametrize("bits, rows, columns", [(4, 2048, 2304), (8, 1501, 1024), (4, 64, 128)])
def test_prepacked_weights_give_the_same_results(tmp_path, bits, rows, columns):
    graph = GraphBuilder("two", tmp_path / "two.onnx", WeightQuantization(bits, 128))
    value = graph.input("x", FLOAT, ["n", columns])
    random = np.random.default_rng(0)
    for shape in ((rows, columns), (columns, rows)):
        value = graph.linear(value, random.normal(0, 0.05, shape).astype(np.float32))
    graph.output(value, "y", FLOAT, ["n", columns])
    graph.save()
    prepacked = prepacked_graph(tmp_path / "two.onnx", tmp_path / "cache" / "key", SIZE)
    assert prepacked.parent == tmp_path / "cache" / "key"
    assert prepacked.with_name("two.onnx.data").is_file() == (rows > 1000)
    x = random.normal(size=(3, columns)).astype(np.float32)
    paths = (tmp_path / "two.onnx", prepacked)
    results = [OrtGraph(path, optimized=path == prepacked).run({"x": x})["y"] for path in paths]
    assert np.isfinite(results[0]).all() and np.array_equal(*results)
    assert prepacked_graph(tmp_path / "two.onnx", prepacked.parent, SIZE) == prepacked


def test_misaligned_weights_are_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gog_edge.engines.onnx.prepacked.MIN_EXTERNAL_BYTES", 4096)  # then tensors are not aligned
    graph = GraphBuilder("two", tmp_path / "two.onnx", WeightQuantization(4, 32))
    value = graph.input("x", FLOAT, ["n", 128])
    for seed in range(3):
        value = graph.linear(value, np.random.default_rng(seed).normal(size=(128, 128)).astype(np.float32))
    graph.output(value, "y", FLOAT, ["n", 128])
    graph.save()
    assert prepacked_graph(tmp_path / "two.onnx", tmp_path / "cache" / "key", SIZE) == tmp_path / "two.onnx"
    assert "not multiples of 64 bytes" in caplog.text and list((tmp_path / "cache").iterdir()) == []


def test_a_large_policy_caches_its_weights_and_its_prompt(large):
    first = generate(large)
    files = cached_files(large)
    key = cache_key(read_manifest(large).files)
    assert {f"{key}/{name}.onnx" for name in ("decoder", "prefill", "vision")} <= set(files)
    assert sum("prompt-" in name for name in files) == 3 and not any(".part" in name for name in files)
    policy = LocalPolicy.open(large, threads=1)
    assert policy.model.cache_dir == large / "cache" / key and policy._prefix.num_processed == 0
    assert generate(large) == first and cached_files(large) == files


@pytest.mark.skipif(library() is None, reason=f"no library: {unavailable_reason()}")
@pytest.mark.parametrize("qwen3", [False, True])
def test_a_large_native_policy_caches_only_its_prompt(native_policies, tmp_path, monkeypatch, qwen3):
    """Its weights are stored prepacked."""
    monkeypatch.setattr("gog_edge.policy.model.MIN_CACHED_BYTES", 0)
    folder = shutil.copytree(native_policies[qwen3], tmp_path / "policy")
    first, key = generate(folder), cache_key(read_manifest(folder).files)
    files = cached_files(folder)
    assert sum(name.startswith(f"{key}/prompt-") for name in files) == 3
    assert not any(name.endswith(".onnx") for name in files)
    states = np.load(next((folder / "cache").rglob("states.npy")))
    assert states.dtype == np.float32 and np.array_equal(from_bfloat16(to_bfloat16(states)), states) and states.any()
    computed = LocalPolicy.open(shutil.copytree(native_policies[qwen3], tmp_path / "other"), threads=1)._prefix
    mapped = LocalPolicy.open(folder, threads=1)._prefix
    assert mapped.num_processed == 0 < computed.num_processed
    assert generate(folder) == first and cached_files(folder) == files
    logits = []
    for session in (mapped, computed):
        session.append_text("And now?")
        logits.append(session.prefill().copy())
    assert np.array_equal(*logits)


def test_a_native_policy_in_a_read_only_folder(native_policies, tmp_path, monkeypatch):
    monkeypatch.setattr("gog_edge.policy.model.MIN_CACHED_BYTES", 0)
    folder = shutil.copytree(native_policies[True], tmp_path / "policy")
    expected = generate(folder)
    shutil.rmtree(folder / "cache")
    (folder / "cache").write_text("in the way")
    assert generate(folder) == expected


def test_a_cached_prompt_continues_like_a_computed_one(large):
    computed, mapped = (LocalPolicy.open(large, threads=1) for _ in range(2))
    results = []
    for policy in (computed, mapped):
        session = policy._acquire()
        session.append_text("And now?")
        results.append((session.prefill().copy(), session.num_processed))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert mapped._prefix.num_processed == 0 < computed._prefix.num_processed


def test_a_damaged_cached_prompt_is_computed_again(large, caplog):
    expected = generate(large)
    states = next((large / "cache").rglob("states.npy"))
    states.write_bytes(states.read_bytes()[:200])
    assert generate(large) == expected and "computed again" in caplog.text
    assert states.stat().st_size > 200


def test_damaged_prepacked_weights_are_an_error_with_the_folder_to_remove(large):
    generate(large)
    graph = next((large / "cache").rglob("decoder.onnx"))
    graph.write_bytes(graph.read_bytes()[:200])
    with pytest.raises(BackendError, match=f"remove the folder '{graph.parent}'"):
        generate(large)


def test_caches_of_another_processor_are_removed(large):
    stale = large / "cache" / "0123456789abcdef"
    stale.mkdir(parents=True)
    (stale / "decoder.onnx").write_bytes(b"old")
    generate(large)
    assert not stale.exists() and cached_files(large)


def test_a_read_only_folder_is_a_warning(large, caplog):
    expected = generate(large)
    shutil.rmtree(large / "cache")
    (large / "cache").write_text("in the way")
    assert generate(large) == expected
    assert "every start takes longer" in caplog.text


def test_the_cache_key_depends_on_the_files():
    entries = [FileEntry("decoder.onnx", 1, "a"), FileEntry("vision.onnx", 1, "b")]
    assert cache_key(entries) == cache_key(list(entries)) != cache_key(entries[:1])
