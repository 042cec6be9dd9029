from dataclasses import replace

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import RemoteConfig
from gog_edge.errors import InputError, NotEnoughMemory
from gog_edge.files import write_json
from gog_edge.planner import MemoryPlan, as_size, free_memory, kv_bytes, parse_size, plan_memory
from gog_edge.policy.manifest import read_manifest
from gog_edge.retrieval.encoder import Fingerprint
from gog_edge.retrieval.index import IndexEntry
from gog_edge.retrieval.manifest import Counts, Manifest, SearchTarget, Shard, Snapshot, Space

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
