from dataclasses import replace

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import RemoteConfig
from gog_edge.errors import NotEnoughMemory
from gog_edge.planner import MemoryPlan, free_memory, kv_bytes, plan_memory
from gog_edge.policy.manifest import read_manifest


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
