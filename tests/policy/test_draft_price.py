"""The price of drafts: measured on a real decoder of ONNX Runtime, and on one whose time is told."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gog_edge.policy.decoding import DraftConfig
from gog_edge.policy.draft_cost import FEWEST, GUESSES, MOST, PAST, SECONDS, WARM, at_price, drafts_here, time_steps
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

SPEC = SimpleNamespace(hidden=4, head_dim=2, layers=3, kv_heads=2)
KINDS = (1, *(1 + guesses for guesses in GUESSES))  # tokens of the steps that are timed


class TimedEngine:
    """Steps take the seconds that `seconds(tokens, round)` says."""

    def __init__(self, seconds):
        self.seconds, self.now, self.steps, self.held = seconds, 0.0, [], []

    def new_cache(self):
        return SimpleNamespace(restore=self.held.append)

    def step(self, cache, embeds, cos, sin, past, *, keep):
        count = len(embeds)
        (kept,) = self.held  # memory that was never written would not be read
        assert kept.states.shape == (6, 2, past, 2) and kept.states.all() and kept.cos.shape == (past, 1)
        assert count == keep == len(cos) == len(sin) and past == PAST
        self.now += self.seconds(count, len(self.steps) // len(KINDS))
        self.steps.append(count)

    def price(self):
        return at_price(time_steps(self, SPEC, PAST, lambda: self.now))

    @property
    def rounds(self):
        return len(self.steps) / len(KINDS)


def line(setup, cost, one=1e-4):
    return lambda count, _: one * (1 + setup * (count > 1) + cost * (count - 1))


# --- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("setup", "cost"), [(0.33, 0.24), (0.0, 0.02), (0.5, 0.0), (0.05, 1.0)])
def test_a_line_is_found(setup, cost):
    assert TimedEngine(line(setup, cost)).price() == DraftConfig(setup=setup, cost=cost)


def test_times_that_lie_on_no_line_are_met_halfway():
    price = at_price({0: 1.0, 1: 1.3, 4: 1.8, 8: 2.1})
    errors = [1 + price.setup + price.cost * count - time for count, time in ((1, 1.3), (4, 1.8), (8, 2.1))]
    assert max(map(abs, errors)) < 0.11 and abs(sum(errors)) < 0.01


def test_steps_that_get_no_dearer_cost_nothing_and_all_guesses_are_tried():
    price = at_price({0: 1.0, 1: 1.01, 4: 0.98, 8: 0.97})  # as on a GPU, but for what others do there
    assert (price.setup, price.cost) == (0, 0) and price.length(0.5) == price.most
    dearer = at_price({0: 1.0, 1: 1.5, 4: 1.4, 8: 1.3})
    assert (dearer.setup, dearer.cost) == (0.4, 0)


def test_a_first_guess_that_costs_less_than_later_ones_has_no_setup():
    price = at_price({0: 1.0, 1: 1.0, 4: 1.4, 8: 2.0})
    assert price.setup == 0 and price.cost == pytest.approx((4 * 0.4 + 8 * 1.0) / (1 + 16 + 64), abs=1e-3)


def test_the_kinds_of_steps_take_turns():
    engine = TimedEngine(line(0.3, 0.2))
    engine.price()
    assert engine.steps == list(KINDS) * (WARM + MOST)


def test_what_is_compiled_first_and_what_others_disturb_do_not_count():
    calm = line(0.3, 0.2)
    disturbed = TimedEngine(lambda count, turn: calm(count, turn) * (50 if turn < WARM or turn == WARM + 1 else 1))
    assert disturbed.price() == TimedEngine(calm).price()


@pytest.mark.parametrize("one", [0.05, 1.0, 10.0])
def test_a_slow_decoder_is_measured_for_as_long_as_must_be(one):
    engine = TimedEngine(line(0.3, 0.2, one))
    assert engine.price() == DraftConfig(setup=0.3, cost=0.2)
    a_round = sum(line(0.3, 0.2, one)(count, 0) for count in KINDS)
    assert engine.rounds == max(WARM + FEWEST, math.ceil(SECONDS / a_round))


# --- a decoder of ONNX Runtime ------------------------------------------------------------------


@pytest.fixture
def large(policies, tmp_path, monkeypatch):
    """A policy folder that counts as large."""
    monkeypatch.setattr("gog_edge.policy.model.WORTH_BYTES", 0)
    return shutil.copytree(policies[True], tmp_path / "policy")


def files(folder):
    return sorted((folder / "cache").rglob("drafts-*"))


def test_the_first_start_measures_and_later_ones_draft_alike(large):
    first = LocalPolicy.open(large, 1).drafts
    (file,) = files(large)
    assert first != DraftConfig() and file.parent == PolicyModel.open(large, threads=1).cache
    assert first == replace(DraftConfig(), setup=first.setup, cost=first.cost)
    assert [LocalPolicy.open(large, 1).drafts for _ in range(2)] == [first, first]
    file.write_text('{"setup": 0.125, "cost": 0.5}')
    assert LocalPolicy.open(large, 1).drafts == DraftConfig(setup=0.125, cost=0.5)


def test_it_is_measured_once_for_each_device_and_each_length_of_the_cache(large):
    model = PolicyModel.open(large, threads=1)
    drafts_here(model)
    drafts_here(model)
    assert len(files(large)) == 1 and model.runs_on == "1 threads, ort"
    drafts_here(replace(model, runs_on="NVIDIA GeForce RTX 4070"))
    drafts_here(PolicyModel.open(large, threads=1, context=400))
    assert len(files(large)) == 3


@pytest.mark.parametrize("text", ["", '{"setup": 0.1', "[0.1, 0.2]", "{}", '{"setup": 0.1, "cost": -1}', "\0\xff",
                                  '{"setup": NaN, "cost": 0.1}', '{"setup": 0.1, "cost": Infinity}',
                                  '{"setup": null, "cost": 0.1}', '{"setup": "a", "cost": 0.1}'])  # fmt: skip
def test_a_spoilt_file_is_measured_again_and_replaced(large, text, caplog):
    model = PolicyModel.open(large, threads=1)
    drafts_here(model)
    (file,) = files(large)
    file.write_text(text)
    measured = drafts_here(model)
    assert f"'{file}' cannot be used" in caplog.text and "measured again" in caplog.text
    assert drafts_here(model) == measured and files(large) == [file]


def test_where_nothing_can_be_kept_every_start_measures(large, caplog):
    (large / "cache").write_text("in the way")
    drafts = LocalPolicy.open(large, 1).drafts
    assert drafts != DraftConfig() and drafts.most == DraftConfig().most
    assert (large / "cache").read_text() == "in the way"
    assert "the price of drafts cannot be kept" in caplog.text and "every start measures it" in caplog.text


def test_a_file_that_cannot_be_written_is_said(large, caplog):
    model = PolicyModel.open(large, threads=1)
    drafts_here(model)
    (file,) = files(large)
    file.unlink()
    file.mkdir()
    assert drafts_here(model) != DraftConfig()
    assert f"cannot be kept in '{file}'" in caplog.text and not list(file.iterdir())


def test_drafts_that_are_given_win(large):
    given = DraftConfig(setup=0.1, cost=0.7, most=3)
    assert LocalPolicy.open(large, 1, drafts=given).drafts == given and files(large) == []


def test_a_small_policy_measures_and_keeps_nothing(policies):
    assert LocalPolicy.open(policies[True], 1).drafts == DraftConfig()
    assert not (policies[True] / "cache").exists()


def test_a_cache_without_room_for_a_draft_is_not_measured(large):
    model = PolicyModel.open(large, threads=1, context=GUESSES[-1])
    assert drafts_here(model) == DraftConfig() and files(large) == []
    assert drafts_here(PolicyModel.open(large, threads=1, context=1 + GUESSES[-1])) != DraftConfig()


def test_measuring_leaves_what_is_said_alone(large):
    plain, measured = (LocalPolicy.open(large, 1, drafts=drafts) for drafts in (DraftConfig(), None))
    said = []
    for policy in (plain, measured):
        session = Session(policy.model.decoder)
        session.append_text("Which flag, which flag, which flag?")
        said.append(session.generate(max_tokens=24, drafts=policy.drafts).tokens)
    assert said[0] == said[1] != ()
