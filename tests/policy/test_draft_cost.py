"""The cost of drafts, measured on a simulated decoder and on one of ONNX Runtime."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gog_edge.policy.decoding import DraftConfig
from gog_edge.policy.draft_cost import (
    DRAFT_LENGTHS,
    MAX_ROUNDS,
    MIN_ROUNDS,
    PAST_TOKENS,
    TIME_LIMIT_S,
    WARMUP_ROUNDS,
    fit_costs,
    load_draft_config,
    time_steps,
)
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

SPEC = SimpleNamespace(hidden=4, head_dim=2, layers=3, kv_heads=2)
STEP_LENGTHS = (1, *(1 + length for length in DRAFT_LENGTHS))  # tokens of the steps that are timed


class SimulatedEngine:
    """A decoder whose steps take `seconds(tokens, round)` on a simulated clock."""

    def __init__(self, seconds):
        self.seconds, self.now, self.steps, self.restored = seconds, 0.0, [], []

    def new_cache(self):
        return SimpleNamespace(restore=self.restored.append)

    def step(self, cache, embeds, cos, sin, past, *, keep):
        count = len(embeds)
        (snapshot,) = self.restored  # pages that were never written would not be read
        assert snapshot.states.shape == (6, 2, past, 2) and snapshot.states.all() and snapshot.cos.shape == (past, 1)
        assert count == keep == len(cos) == len(sin) and past == PAST_TOKENS
        self.now += self.seconds(count, len(self.steps) // len(STEP_LENGTHS))
        self.steps.append(count)

    def measure(self):
        return fit_costs(time_steps(self, SPEC, PAST_TOKENS, lambda: self.now))

    @property
    def rounds(self):
        return len(self.steps) / len(STEP_LENGTHS)


def linear(setup, cost, one=1e-4):
    return lambda count, _: one * (1 + setup * (count > 1) + cost * (count - 1))


# --- the fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setup", "cost"), [(0.33, 0.24), (0.0, 0.02), (0.5, 0.0), (0.05, 1.0)])
def test_linear_costs_are_recovered(setup, cost):
    assert SimulatedEngine(linear(setup, cost)).measure() == DraftConfig(setup_cost=setup, token_cost=cost)


def test_times_that_are_not_linear_are_approximated_without_bias():
    times = {1: 1.3, 4: 1.8, 8: 2.1}
    config = fit_costs({0: 1.0} | times)
    errors = [1 + config.setup_cost + config.token_cost * count - time for count, time in times.items()]
    assert max(map(abs, errors)) < 0.11 and abs(sum(errors)) < 0.01


def test_times_that_do_not_grow_have_no_token_cost():
    config = fit_costs({0: 1.0, 1: 1.01, 4: 0.98, 8: 0.97})  # as on a GPU with other load
    assert (config.setup_cost, config.token_cost) == (0, 0) and config.draft_length(0.5) == config.max_tokens
    falling = fit_costs({0: 1.0, 1: 1.5, 4: 1.4, 8: 1.3})
    assert (falling.setup_cost, falling.token_cost) == (0.4, 0)


def test_a_negative_setup_cost_is_clipped_and_the_token_cost_fitted_again():
    config = fit_costs({0: 1.0, 1: 1.0, 4: 1.4, 8: 2.0})
    assert config.setup_cost == 0 and config.token_cost == pytest.approx((4 * 0.4 + 8 * 1.0) / (1 + 16 + 64), abs=1e-3)


def test_step_lengths_are_interleaved():
    engine = SimulatedEngine(linear(0.3, 0.2))
    engine.measure()
    assert engine.steps == list(STEP_LENGTHS) * (WARMUP_ROUNDS + MAX_ROUNDS)


def test_warmup_rounds_and_outliers_are_ignored():
    calm = linear(0.3, 0.2)
    slow_rounds = (*range(WARMUP_ROUNDS), WARMUP_ROUNDS + 1)
    disturbed = SimulatedEngine(lambda count, turn: calm(count, turn) * (50 if turn in slow_rounds else 1))
    assert disturbed.measure() == SimulatedEngine(calm).measure()


@pytest.mark.parametrize("one", [0.05, 1.0, 10.0])
def test_a_slow_decoder_is_measured_in_fewer_rounds(one):
    engine = SimulatedEngine(linear(0.3, 0.2, one))
    assert engine.measure() == DraftConfig(setup_cost=0.3, token_cost=0.2)
    seconds_per_round = sum(linear(0.3, 0.2, one)(count, 0) for count in STEP_LENGTHS)
    assert engine.rounds == max(WARMUP_ROUNDS + MIN_ROUNDS, math.ceil(TIME_LIMIT_S / seconds_per_round))


# --- a decoder of ONNX Runtime ------------------------------------------------------------------


@pytest.fixture
def large(policies, tmp_path, monkeypatch):
    """Return a policy folder that counts as large."""
    monkeypatch.setattr("gog_edge.policy.model.MIN_CACHED_BYTES", 0)
    return shutil.copytree(policies[True], tmp_path / "policy")


def cached_files(folder):
    return sorted((folder / "cache").rglob("drafts-*"))


def test_the_first_start_measures_and_later_starts_use_its_result(large):
    first = LocalPolicy.open(large, 1).drafts
    (file,) = cached_files(large)
    assert first != DraftConfig() and file.parent == PolicyModel.open(large, threads=1).cache_dir
    assert first == replace(DraftConfig(), setup_cost=first.setup_cost, token_cost=first.token_cost)
    assert [LocalPolicy.open(large, 1).drafts for _ in range(2)] == [first, first]
    file.write_text('{"setup": 0.125, "cost": 0.5}')
    assert LocalPolicy.open(large, 1).drafts == DraftConfig(setup_cost=0.125, token_cost=0.5)


def test_costs_are_measured_once_per_device_and_context(large):
    model = PolicyModel.open(large, threads=1)
    load_draft_config(model)
    load_draft_config(model)
    assert len(cached_files(large)) == 1 and model.device == "1 threads, ort"
    load_draft_config(replace(model, device="NVIDIA GeForce RTX 4070"))
    load_draft_config(PolicyModel.open(large, threads=1, context=400))
    assert len(cached_files(large)) == 3


@pytest.mark.parametrize("text", ["", '{"setup": 0.1', "[0.1, 0.2]", "{}", '{"setup": 0.1, "cost": -1}', "\0\xff",
                                  '{"setup": NaN, "cost": 0.1}', '{"setup": 0.1, "cost": Infinity}',
                                  '{"setup": null, "cost": 0.1}', '{"setup": "a", "cost": 0.1}'])  # fmt: skip
def test_a_damaged_file_is_measured_again_and_replaced(large, text, caplog):
    model = PolicyModel.open(large, threads=1)
    load_draft_config(model)
    (file,) = cached_files(large)
    file.write_text(text)
    measured = load_draft_config(model)
    assert f"'{file}' cannot be used" in caplog.text and "measured again" in caplog.text
    assert load_draft_config(model) == measured and cached_files(large) == [file]


def test_without_a_cache_folder_every_start_measures(large, caplog):
    (large / "cache").write_text("a file instead of a folder")
    drafts = LocalPolicy.open(large, 1).drafts
    assert drafts != DraftConfig() and drafts.max_tokens == DraftConfig().max_tokens
    assert (large / "cache").read_text() == "a file instead of a folder"
    assert "the draft costs cannot be cached" in caplog.text and "every start measures them" in caplog.text


def test_a_file_that_cannot_be_written_is_logged(large, caplog):
    model = PolicyModel.open(large, threads=1)
    load_draft_config(model)
    (file,) = cached_files(large)
    file.unlink()
    file.mkdir()
    assert load_draft_config(model) != DraftConfig()
    assert f"cannot be cached in '{file}'" in caplog.text and not list(file.iterdir())


def test_an_explicit_draft_config_is_not_measured(large):
    config = DraftConfig(setup_cost=0.1, token_cost=0.7, max_tokens=3)
    assert LocalPolicy.open(large, 1, drafts=config).drafts == config and cached_files(large) == []


def test_a_small_policy_uses_the_default_costs(policies):
    assert LocalPolicy.open(policies[True], 1).drafts == DraftConfig()
    assert not (policies[True] / "cache").exists()


def test_a_context_too_short_for_a_draft_is_not_measured(large):
    model = PolicyModel.open(large, threads=1, context=DRAFT_LENGTHS[-1])
    assert load_draft_config(model) == DraftConfig() and cached_files(large) == []
    assert load_draft_config(PolicyModel.open(large, threads=1, context=1 + DRAFT_LENGTHS[-1])) != DraftConfig()


def test_measuring_does_not_change_what_is_generated(large):
    default, measured = (LocalPolicy.open(large, 1, drafts=drafts) for drafts in (DraftConfig(), None))
    generated = []
    for policy in (default, measured):
        session = Session(policy.model.decoder)
        session.append_text("Which flag, which flag, which flag?")
        generated.append(session.generate(max_tokens=24, drafts=policy.drafts).tokens)
    assert generated[0] == generated[1] != ()
