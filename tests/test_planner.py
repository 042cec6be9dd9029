from dataclasses import replace

import pytest
from built_engines import build, toy  # noqa: F401
from little_fixtures import little_pack_folder, tiny_encoder, tiny_encoder_folder  # noqa: F401
from tiny_policy import native_policies  # noqa: F401

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import RemoteConfig
from gog_edge.engines.manifest import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.onnx import native
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import InputError, NotEnoughMemory
from gog_edge.files import write_json
from gog_edge.planner import ENGINE_PARTS, MemoryPlan, as_size, free_memory, kv_bytes, parse_size, plan_memory
from gog_edge.policy.manifest import read_manifest
from gog_edge.retrieval.manifest import Counts, Fingerprint, IndexEntry, Manifest, SearchTarget, Shard, Snapshot, Space

PACK = Manifest(
    name="p", generation=1, parent=None, snapshot=Snapshot("s", "2026-01-01", "", "", "CC0"),
    encoder=Fingerprint("e", "ab", "cd", 8), segments=(), images=Space(), captions=Space(), tombstones=None,
    counts=Counts(0, 0, 0), target=SearchTarget(None, 0.95), duplicate_cosine=0.995, golden=None, report=None, files=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def atlas():
    return open_bundle(DEFAULT_BUNDLE)


def test_the_plan_counts_what_lies_there(atlas):
    plan = plan_memory(atlas)
    graphs = sum((atlas.policy / name).stat().st_size for name in ("decoder.onnx", "vision.onnx"))
    assert plan.weights == graphs
    spec = read_manifest(atlas.policy).text
    assert kv_bytes(spec) == 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    assert plan.total == sum((plan.weights, plan.conversations, plan.pictures, plan.prefill, plan.index, plan.switch,
                              plan.program))


@pytest.mark.skipif(native.library() is None, reason=f"no library: {native.why_none()}")
def test_native_graphs_take_their_own_weights_and_halves(atlas, native_policies):  # noqa: F811
    folder = native_policies[True]
    plan = plan_memory(replace(atlas, policy=folder))
    assert plan.weights == sum((folder / name).stat().st_size for name in ("native_decoder.onnx", "native_vision.onnx"))
    manifest = read_manifest(folder)
    tokens = (1 + atlas.limits.concurrent) * manifest.max_context
    assert plan.conversations == tokens * kv_bytes(manifest.text) / 2


def test_where_no_library_is_there_the_plain_graphs_are_counted(atlas, native_policies, tmp_path, monkeypatch):  # noqa: F811
    folder = native_policies[True]
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    plan = plan_memory(replace(atlas, policy=folder))
    native.library.cache_clear()
    assert plan.weights == sum((folder / name).stat().st_size for name in ("decoder.onnx", "vision.onnx"))
    manifest = read_manifest(folder)
    assert plan.conversations == (1 + atlas.limits.concurrent) * manifest.max_context * kv_bytes(manifest.text)


def test_more_questions_at_a_time_take_more(atlas):
    busy = replace(atlas, limits=replace(atlas.limits, concurrent=4))
    assert plan_memory(busy).conversations == plan_memory(atlas).conversations / 2 * 5


def test_a_policy_elsewhere_takes_nothing_here(atlas):
    remote = replace(atlas, policy=RemoteConfig(url="http://127.0.0.1:9/v1", model="m", dialect="gog"))
    assert plan_memory(remote).weights == 0 and plan_memory(remote).index == plan_memory(atlas).index


@pytest.mark.parametrize("big, advice", [("weights", "--precision int4"), ("conversations", "--context"),
                                         ("pictures", "max_pixels"), ("index", "leave out a pack")])
def test_what_does_not_fit_is_refused_with_advice(big, advice):
    parts = dict.fromkeys(("weights", "conversations", "pictures", "prefill", "index"), 2**28) | {big: 9 * 2**30}
    plan = MemoryPlan(**parts)
    with pytest.raises(NotEnoughMemory, match=f"{big} 9.0 GiB.*4.0 GiB are free.*{advice}"):
        plan.check(4 * 2**30)
    assert plan.check(32 * 2**30) is plan and plan.check(None) is plan


def test_what_no_single_part_explains_wants_a_smaller_model():
    with pytest.raises(NotEnoughMemory, match="smaller model"):
        MemoryPlan(2**32, 2**32, 2**32, 0, 2**32).check(2**30)


def test_engines_take_a_gpus_memory_and_the_rest_the_hosts(toy):  # noqa: F811
    build(toy, context=1024)
    engines = EngineChoice("ort-cuda").read(toy.root)
    plan, own = plan_memory(toy, engines), plan_memory(toy)
    assert plan.weights == engines.bytes((DECODER, VISION, IMAGE, TEXT))
    spec = read_manifest(toy.policy).text
    assert plan.conversations == 2 * 1024 * 2 * spec.layers * spec.kv_heads * spec.head_dim * 2  # halves, as they are
    encoder = sum(path.stat().st_size for path in toy.encoder.iterdir())
    assert plan.index == own.index - encoder and plan.switch == own.switch
    assert plan.device == plan.weights + plan.conversations + plan.pictures + plan.prefill
    assert plan.total - plan.device == plan.index + plan.switch + plan.program
    assert str(plan).endswith(f"; {as_size(plan.device)} of it on the GPU") and own.device == 0
    assert "GPU" not in str(own)


def test_a_gpu_that_shares_the_hosts_memory_has_none_of_its_own(toy):  # noqa: F811
    build(toy)
    engines = EngineChoice("ort-cuda").read(toy.root)
    plan, apart = plan_memory(toy, engines, integrated=True), plan_memory(toy, engines)
    assert plan.total == apart.total and plan.device == 0 and str(plan) == str(apart).partition(";")[0]
    with pytest.raises(NotEnoughMemory, match="1 MiB are free: "):
        plan.check(2**20)
    assert plan.check(plan.total, device_free=0) is plan


def test_of_a_policy_elsewhere_only_the_encoders_engines_are_here(toy):  # noqa: F811
    build(toy)
    engines = EngineChoice("ort-cuda").read(toy.root)
    remote = replace(toy, policy=RemoteConfig(url="http://127.0.0.1:9/v1", model="m", dialect="gog"))
    plan = plan_memory(remote, engines)
    assert plan.device == plan.weights == engines.bytes((IMAGE, TEXT)) and plan.conversations == 0


@pytest.mark.parametrize("free, device_free, says", [
    (2**40, 2**30, "1.0 GiB are free on the GPU: .*--precision int4"),
    (2**30, 2**40, "1.0 GiB are free: leave out a pack"),
])
def test_what_does_not_fit_the_gpu_or_the_host_beside_it_is_refused(free, device_free, says):
    plan = MemoryPlan(4 * 2**30, 2**28, 2**28, 2**28, index=3 * 2**30, on_device=ENGINE_PARTS)
    with pytest.raises(NotEnoughMemory, match=says):
        plan.check(free, device_free)
    assert plan.check(4 * 2**30, 5 * 2**30) is plan and plan.check(None, None) is plan


def test_the_free_memory_of_this_machine_is_known():
    free = free_memory()
    assert free is None or 0 < free < 2**50


def test_vectors_beside_an_index_and_ids_are_counted_and_a_switch_takes_the_largest_pack_again(tmp_path, atlas):
    sizes = {}
    for name, (rows, indexed) in {"one": (1_000, 900), "two": (50, 0)}.items():
        folder = tmp_path / name
        (folder / "index").mkdir(parents=True)
        (folder / "index/a.faiss").write_bytes(b"x" * 5_000)
        entry = IndexEntry("index/a.faiss", "SQfp16", {}, 0, indexed, 10, 1.0, 0.1, 0.2, 64, True)
        space = Space((Shard("v.npy", "i.npy", rows),), entry if indexed else None)
        manifest = replace(PACK, images=space)
        write_json(folder / "MANIFEST.json", manifest.to_json())
        sizes[name] = (5_000 if indexed else 0) + (rows - indexed) * 8 * 2 + rows * 24
    bundle = replace(atlas, packs=(tmp_path / "one", tmp_path / "two"))
    plan = plan_memory(bundle)
    encoder = sum(path.stat().st_size for path in atlas.encoder.rglob("*") if path.is_file())
    assert plan.index == encoder + sizes["one"] + sizes["two"] and plan.switch == sizes["one"]
    assert f"switch {plan.switch // 2**20} MiB" in str(plan)


@pytest.mark.parametrize("text, size", [("512M", 2**29), ("2G", 2**31), ("1.5 GiB", 3 * 2**29), ("100", 100),
                                        ("3kb", 3072), ("1t", 2**40)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "2X", "1e9", "0", "nan", "1,5G"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="no size"):
        parse_size(text)


def test_sizes_for_people():
    assert [as_size(size) for size in (2**20, 3 * 2**29)] == ["1 MiB", "1.5 GiB"]
