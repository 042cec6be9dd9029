import pytest
from hypothesis import given
from hypothesis import strategies as st

from gog_edge.errors import InputError
from gog_edge.policy.decoding import RUN, DraftConfig, Drafter, Memory

STOP = 0
SAID = st.lists(st.integers(0, 4), max_size=40)  # few ids: much is said again


def remember(said, barriers=(STOP,)):
    memory = Memory(barriers)
    memory.read(said)
    return memory


def looked_up(said, most, look_back):
    """The same by looking through all that was said, newest first."""
    for run in range(min(RUN, len(said)), 0, -1):
        tail = said[-run:]
        for place in range(len(said) - 1, run - 1, -1):
            if STOP not in tail and said[place - run : place] == tail and said[place] != STOP:
                matching = run
                while matching < min(look_back, place) and said[place - 1 - matching] == said[-1 - matching]:
                    matching += 1
                ids = said[place : place + most]
                return matching, ids[: ids.index(STOP)] if STOP in ids else ids
    return 0, []


@given(SAID, st.integers(1, 9), st.integers(1, 9))
def test_what_followed_the_longest_match_is_found(said, most, look_back):
    assert remember(said).following(most, look_back) == looked_up(said, most, look_back)


@given(SAID, SAID, SAID, st.integers(0, 40))
def test_what_is_forgotten_leaves_no_trace(said, gone, again, length):
    memory = remember(said + gone)
    memory.forget(min(length, len(said)))
    now = said[: min(length, len(said))] + again
    memory.read(now)
    assert memory.following(8, 8) == looked_up(now, 8, 8)


def test_nothing_is_found_where_nothing_was_said_before():
    assert remember([]).following(4, 4) == (0, [])
    assert remember([1, 2, 3]).following(4, 4) == (0, [])


def test_the_newest_place_counts():
    assert remember([1, 2, 7, 1, 2, 8, 1, 2]).following(2, 6) == (2, [8, 1])


def test_no_draft_goes_across_a_barrier():
    assert remember([1, 2, 3, STOP, 4, 1, 2]).following(9, 6) == (2, [3])
    assert remember([1, STOP, 2, 1, STOP]).following(9, 6) == (0, [])


def test_a_draft_is_as_long_as_pays():
    config = DraftConfig(setup=0.0, cost=0.2, most=16)
    assert config.length(0.0) == config.length(0.2) == 0  # 1.2 tokens for the time of 1.2
    lengths = [config.length(chance) for chance in (0.25, 0.5, 0.8, 0.95, 0.99999)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] == 16
    dear = DraftConfig(setup=0.5, cost=0.2, most=16)
    assert dear.length(0.4) == 0 < config.length(0.4) and dear.length(0.9) >= config.length(0.9)
    assert DraftConfig(setup=0.0, cost=0.0).length(0.5) == 8  # guesses that cost nothing are always worth a try
    assert DraftConfig(cost=5.0).length(0.99) == 0


@pytest.mark.parametrize("wrong", [
    {"matches": ()}, {"matches": ((2, 0.5), (1, 0.5))}, {"matches": ((0, 0.5),)}, {"matches": ((1, 1.0),)},
    {"matches": ((1, -0.1),)}, {"cost": -1.0}, {"setup": -0.1}, {"most": 0}, {"weight": 0.0},
])  # fmt: skip
def test_impossible_drafts_are_refused(wrong):
    with pytest.raises(InputError, match="makes no drafts"):
        DraftConfig(**wrong)


def drafter(said, **config):
    return Drafter(DraftConfig(**config), remember(said))


def test_guesses_that_come_true_make_longer_drafts_and_misses_make_none():
    said = [*range(1, 60), 1, 2, 3]
    good, bad = drafter(said), drafter(said)
    first = good.propose(said, 99)
    assert first == bad.propose(said, 99) and first == list(range(4, 4 + len(first)))
    for _ in range(20):
        good.learn(len(good.propose(said, 99)), len(good.propose(said, 99)))
        bad.learn(len(bad.propose(said, 99)), 0)
    assert len(first) < len(good.propose(said, 99)) == DraftConfig().most
    assert bad.propose(said, 99) == []


def test_a_longer_match_is_trusted_more():
    said = [*range(1, 40), 1, 2, 3, 4, 5, 6, 7]
    long, short = drafter(said), drafter([*range(1, 40), 2])
    assert len(long.propose(said, 99)) > len(short.propose([*range(1, 40), 2], 99))


def test_no_more_is_proposed_than_asked_for():
    said = [*range(1, 40), 1, 2, 3, 4, 5, 6, 7]
    assert drafter(said).propose(said, 1) == [8]
    assert drafter(said).propose(said, 0) == []


def test_what_was_tried_is_counted():
    said = [1, 2, 3, 1, 2, 3, 1, 2]
    counting = drafter(said)
    counting.propose(said, 9)
    counting.learn(4, 2)
    counting.propose(said, 9)
    counting.learn(3, 3)
    assert (counting.drafted, counting.accepted) == (7, 5)
