"""The memory plan: against sizes worked out by hand, against measured memory, and what is refused with which advice."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_files import flat_png
from PIL import Image
from toy_bundle import build

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import RemoteConfig
from gog_edge.engines.manifest import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import InputError, NotEnoughMemory
from gog_edge.files import write_json
from gog_edge.planner import (
    ENGINE_PARTS,
    MemoryPlan,
    available_memory,
    format_size,
    kv_bytes,
    parse_size,
    plan_memory,
    prefill_bytes,
    vision_bytes,
)
from gog_edge.policy.manifest import read_manifest
from gog_edge.retrieval.manifest import Counts, Fingerprint, IndexEntry, IndexTarget, Manifest, Shard, Snapshot, Space

PACK = Manifest(
    name="p", generation=1, parent=None, snapshot=Snapshot("s", "2026-01-01", "", "", "CC0"),
    encoder=Fingerprint("e", "ab", "cd", 8), segments=(), images=Space(), captions=Space(), tombstones=None,
    counts=Counts(0, 0, 0), target=IndexTarget(None, 0.95), duplicate_cosine=0.995, golden=None, report=None, files=(),
)  # fmt: skip
ATLAS_KV_BYTES = 3072  # of a token in float32: 2 * 6 layers * 2 heads * 32 * 4 bytes
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="requires Linux")


@pytest.fixture(scope="module")
def atlas():
    return open_bundle(DEFAULT_BUNDLE)


def listed_bytes(policy, *names):
    """The sizes of files as the policy's manifest lists them."""
    files = json.loads((policy / "manifest.json").read_text())["files"]
    return sum(entry["size"] for entry in files if entry["path"] in names)


# --- sizes worked out by hand ---------------------------------------------------------------------


def test_plan_of_the_atlas(atlas):
    plan = plan_memory(atlas)
    assert plan.weights == listed_bytes(atlas.policy, "decoder.onnx", "vision.onnx")
    assert plan.conversations == 2 * 2048 * ATLAS_KV_BYTES == 12_582_912  # the prompt's cache and one conversation's
    assert plan.program == 160 * 2**20 and plan.device == plan.vectors == 0
    # The largest file, a band of rows, and the results of this and of another picture of a search.
    assert plan.decoding == 5.5 * 64_000_000 + 16 * 2**20 + 2 * 3 * 4096**2
    parts = (plan.weights, plan.conversations, plan.pictures, plan.prefill, plan.index, plan.switch, plan.decoding,
             plan.program)
    assert plan.total == sum(parts) and "GPU" not in str(plan)


def test_released_models(atlas):
    """Qwen2.5-VL-7B and Qwen3-VL-8B, from the published configurations."""
    manifest = read_manifest(atlas.policy)
    qwen25 = replace(manifest.text, layers=28, kv_heads=4, head_dim=128, hidden=3584, intermediate=18_944)
    qwen3 = replace(manifest.text, layers=36, kv_heads=8, head_dim=128)
    assert kv_bytes(qwen25, 2) == 56 * 1024 and kv_bytes(qwen3, 2) == 144 * 1024
    # 512 tokens, 5 * 18944 + 12 * 3584 = 137728 floats each
    assert prefill_bytes(qwen25) == 282_066_944
    tower = replace(manifest.vision, max_pixels=1_003_520, patch=14, intermediate=3420, hidden=1280)
    # 5120 patches, 4 * 3420 + 10 * 1280 = 26480 floats each
    assert vision_bytes(tower) == 542_310_400


@pytest.mark.skipif(native.library() is None, reason=f"no library: {native.unavailable_reason()}")
def test_native_graphs_have_their_own_weights_and_bfloat16_caches(atlas, native_policies):
    """The tiny policy: 2 * 3 layers * 2 heads * 64 * 2 bytes a token, and a context of 512."""
    folder = native_policies[True]
    plan = plan_memory(replace(atlas, policy=folder))
    assert plan.weights == listed_bytes(folder, "native_decoder.onnx", "native_vision.onnx")
    assert plan.conversations == 2 * 512 * 1536


def test_without_a_library_the_graphs_of_onnx_runtime_are_counted(atlas, native_policies, tmp_path, monkeypatch):
    folder = native_policies[True]
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    plan = plan_memory(replace(atlas, policy=folder))
    native.library.cache_clear()
    assert plan.weights == listed_bytes(folder, "decoder.onnx", "vision.onnx")
    assert plan.conversations == 2 * 512 * 3072  # float32


def test_each_concurrent_question_needs_a_cache(atlas):
    busy = replace(atlas, limits=replace(atlas.limits, concurrent=4))
    assert plan_memory(busy).conversations == 5 * 2048 * ATLAS_KV_BYTES


def test_a_remote_policy_needs_no_memory_here(atlas):
    remote = replace(atlas, policy=RemoteConfig(url="http://127.0.0.1:9/v1", model="m", dialect="gog"))
    assert plan_memory(remote).weights == 0 and plan_memory(remote).index == plan_memory(atlas).index


def test_indexes_and_the_switch_to_a_new_generation(tmp_path, atlas):
    """Vectors of 8 fp16 numbers. Pack one: index of 5000 bytes, 100 vectors outside of it; pack two: no index."""
    for name, (rows, indexed) in {"one": (1_000, 900), "two": (50, 0)}.items():
        folder = tmp_path / name
        (folder / "index").mkdir(parents=True)
        (folder / "index/a.faiss").write_bytes(b"x" * 5_000)
        entry = IndexEntry("index/a.faiss", "SQfp16", {}, 0, indexed, 10, 1.0, 0.1, 0.2, 64, True)
        space = Space((Shard("v.npy", "i.npy", rows),), entry if indexed else None)
        write_json(folder / "MANIFEST.json", replace(PACK, images=space).to_json())
    plan = plan_memory(replace(atlas, packs=(tmp_path / "one", tmp_path / "two")))
    encoder = sum(path.stat().st_size for path in atlas.encoder.rglob("*") if path.is_file())
    one, two = 5_000 + 1_600 + 24_000, 800 + 1_200  # the index, vectors, 24 bytes for each id
    assert plan.index == encoder + one + two and plan.switch == one
    assert "switch 0 MiB" in str(plan)


# --- measured memory ------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

before = status("VmHWM")
"""
ANSWER = """
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.runtime import open_runtime

plans = []
runtime = open_runtime(DEFAULT_BUNDLE, threads=2, on_plan=plans.append)
picture = Path(sys.argv[1]).read_bytes()
question = "What is the capital of the country of the second flag from the left?"
*_, last = runtime.ask(picture, question)
print(json.dumps({"used": status("VmHWM") - before, "plan": plans[0].total, "answer": last.record.answer}))
"""
FILL_CACHES = """
import numpy as np
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines.base import KvSnapshot
from gog_edge.planner import plan_memory
from gog_edge.policy.model import PolicyModel

bundle = open_bundle(DEFAULT_BUNDLE)
model = PolicyModel.open(bundle.policy, threads=1)
spec, engine = model.manifest.text, model.decoder.engine
states = np.ones((2 * spec.layers, spec.kv_heads, engine.capacity, spec.head_dim), np.float32)
table = np.ones((engine.capacity, spec.head_dim // 2), np.float32)
before = status("VmRSS")
caches = [engine.new_cache() for _ in range(1 + bundle.limits.concurrent)]
for cache in caches:
    cache.restore(KvSnapshot(states, table, table))
print(json.dumps({"used": status("VmRSS") - before, "plan": plan_memory(bundle).conversations}))
"""


def measure(code, *arguments):
    """Run code in a new process and return the JSON object it prints."""
    done = subprocess.run([sys.executable, "-c", MEASURE + code, *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])




def largest_picture(path, form):
    """Write a file of the most pixels that are accepted, all of one colour."""
    if form == "PNG":
        path.write_bytes(flat_png(8000, 8000, 8, 2, b"\xc8\x32\x32"))
    else:
        Image.new("RGB", (8000, 8000), (200, 50, 50)).save(path, form)
    return path


@needs_proc
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_peak_memory_of_answering_stays_within_the_plan(tmp_path, form):
    measured = measure(ANSWER, largest_picture(tmp_path / "picture", form))
    assert measured["answer"] is not None
    assert measured["used"] < measured["plan"] < 4 * measured["used"]


@needs_proc
def test_memory_of_filled_caches_is_planned():
    """Besides the rotary tables, which the plan leaves out: a tenth of the keys and values of the atlas."""
    measured = measure(FILL_CACHES)
    assert 0.9 * measured["plan"] < measured["used"] < 1.25 * measured["plan"]


def test_bytes_of_a_cache(atlas):
    cache = OrtDecoder(atlas.policy / "decoder.onnx", capacity=64, threads=1).new_cache()
    assert sum(np.asarray(state.value.numpy()).nbytes for state in cache.states) == 64 * ATLAS_KV_BYTES


# --- engines and GPUs -----------------------------------------------------------------------------


def test_engines_use_the_gpus_memory_and_the_rest_the_hosts(toy):
    build(toy, context=1024)
    engines = EngineChoice("ort-cuda").read_engines(toy.root)
    plan, own = plan_memory(toy, engines), plan_memory(toy)
    assert plan.weights == engines.bytes((DECODER, VISION, IMAGE, TEXT))
    assert plan.conversations == 2 * 1024 * ATLAS_KV_BYTES / 2  # fp16
    encoder = sum(path.stat().st_size for path in toy.encoder.iterdir())
    assert plan.index == own.index - encoder and plan.switch == own.switch
    assert plan.device == plan.weights + plan.conversations + plan.pictures + plan.prefill
    assert plan.total - plan.device == plan.index + plan.switch + plan.decoding + plan.program
    assert str(plan).endswith(f"; {format_size(plan.device)} of it on the GPU") and own.device == 0


def test_an_integrated_gpu_uses_the_hosts_memory(toy):
    build(toy)
    engines = EngineChoice("ort-cuda").read_engines(toy.root)
    plan, discrete = plan_memory(toy, engines, integrated=True), plan_memory(toy, engines)
    assert plan.total == discrete.total and plan.device == 0 and str(plan) == str(discrete).partition(";")[0]
    with pytest.raises(NotEnoughMemory, match="1 MiB are free: "):
        plan.check(2**20)
    assert plan.check(plan.total, device_free=0) is plan


def test_with_a_remote_policy_only_the_encoders_engines_are_counted(toy):
    build(toy)
    engines = EngineChoice("ort-cuda").read_engines(toy.root)
    remote = replace(toy, policy=RemoteConfig(url="http://127.0.0.1:9/v1", model="m", dialect="gog"))
    plan = plan_memory(remote, engines)
    assert plan.device == plan.weights == engines.bytes((IMAGE, TEXT)) and plan.conversations == 0


# --- advice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest, advice", [("weights", "--precision int4"), ("conversations", "--context"),
                                             ("pictures", "max_pixels"), ("index", "remove a pack")])
def test_advice_for_the_largest_part(largest, advice):
    parts = dict.fromkeys(("weights", "conversations", "pictures", "prefill", "index"), 2**28) | {largest: 9 * 2**30}
    plan = MemoryPlan(**parts)
    with pytest.raises(NotEnoughMemory, match=f"{largest} 9.0 GiB.*only 4.0 GiB are free.*{advice}"):
        plan.check(4 * 2**30)
    assert plan.check(32 * 2**30) is plan and plan.check(None) is plan


def test_advice_if_no_single_part_is_too_large():
    with pytest.raises(NotEnoughMemory, match="smaller model"):
        MemoryPlan(2**32, 2**32, 2**32, 0, 2**32).check(2**30)


@pytest.mark.parametrize("free, device_free, message", [
    (2**40, 2**30, "only 1.0 GiB are free on the GPU: .*--precision int4"),
    (2**30, 2**40, "only 1.0 GiB are free: remove a pack"),
])
def test_too_little_memory_of_the_gpu_or_the_host(free, device_free, message):
    plan = MemoryPlan(4 * 2**30, 2**28, 2**28, 2**28, index=3 * 2**30, on_device=ENGINE_PARTS)
    with pytest.raises(NotEnoughMemory, match=message):
        plan.check(free, device_free)
    assert plan.check(4 * 2**30, 5 * 2**30) is plan and plan.check(None, None) is plan


# --- free memory and sizes ------------------------------------------------------------------------


@pytest.mark.parametrize("limit, expected", [(None, 4 * 2**30), ("max", 4 * 2**30), (str(3 * 2**30), 2 * 2**30)])
def test_available_memory_respects_the_control_group(tmp_path, limit, expected):
    """4 GiB are available in all; 1 GiB of the group's limit is in use."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\n")
    if limit is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{2**30}\n")
    assert available_memory(tmp_path) == expected


def test_available_memory_is_unknown_without_proc(tmp_path):
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize("text, size", [("512M", 2**29), ("2G", 2**31), ("1.5 GiB", 3 * 2**29), ("100", 100),
                                        ("3kb", 3072), ("1t", 2**40)])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "2X", "1e9", "0", "nan", "1,5G"])
def test_parse_size_of_malformed_text(text):
    with pytest.raises(InputError, match=f"a size must be .*, got '{text}'"):
        parse_size(text)


def test_format_size():
    assert [format_size(size) for size in (2**20, 3 * 2**29)] == ["1 MiB", "1.5 GiB"]
