"""Speculation by prompt lookup: the n-gram index against a linear search, and the length of drafts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gog_edge.errors import InputError
from gog_edge.policy.decoding import MAX_NGRAM, DraftConfig, NgramIndex, PromptLookupDrafter

STOP = 0
TOKENS = st.lists(st.integers(0, 4), max_size=40)  # few distinct ids: most n-grams repeat


def index_of(tokens, barriers=(STOP,)):
    index = NgramIndex(barriers)
    index.extend(tokens)
    return index


def linear_search(tokens, max_tokens, max_match):
    """Return what `NgramIndex.lookup` must return, by comparing with every earlier place, latest first."""
    for length in range(min(MAX_NGRAM, len(tokens)), 0, -1):
        ngram = tokens[-length:]
        for place in range(len(tokens) - 1, length - 1, -1):
            if STOP not in ngram and tokens[place - length : place] == ngram and tokens[place] != STOP:
                matching = length
                while matching < min(max_match, place) and tokens[place - 1 - matching] == tokens[-1 - matching]:
                    matching += 1
                ids = tokens[place : place + max_tokens]
                return matching, ids[: ids.index(STOP)] if STOP in ids else ids
    return 0, []


@given(TOKENS, st.integers(1, 9), st.integers(1, 9))
def test_lookup_finds_the_continuation_of_the_longest_match(tokens, max_tokens, max_match):
    assert index_of(tokens).lookup(max_tokens, max_match) == linear_search(tokens, max_tokens, max_match)


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 40))
def test_truncated_tokens_are_not_found(tokens, removed, added, length):
    index = index_of(tokens + removed)
    index.truncate(min(length, len(tokens)))
    context = tokens[: min(length, len(tokens))] + added
    index.extend(context)
    assert index.lookup(8, 8) == linear_search(context, 8, 8)


def test_lookup_finds_nothing_without_repetition():
    assert index_of([]).lookup(4, 4) == (0, [])
    assert index_of([1, 2, 3]).lookup(4, 4) == (0, [])


def test_lookup_returns_the_latest_place():
    assert index_of([1, 2, 7, 1, 2, 8, 1, 2]).lookup(2, 6) == (2, [8, 1])


def test_drafts_do_not_extend_across_a_barrier():
    assert index_of([1, 2, 3, STOP, 4, 1, 2]).lookup(9, 6) == (2, [3])
    assert index_of([1, STOP, 2, 1, STOP]).lookup(9, 6) == (0, [])


@given(st.floats(0, 0.99), st.floats(0, 2), st.floats(0, 2), st.integers(1, 12))
def test_the_draft_length_maximises_the_expected_speed(acceptance, setup, cost, limit):
    """The expected number of tokens is equation 1 of Leviathan et al., 2023, Fast Inference from Transformers."""
    speeds = [1.0]
    for n in range(1, limit + 1):
        speeds.append((1 - acceptance ** (n + 1)) / (1 - acceptance) / (1 + setup + cost * n))
    length = DraftConfig(setup_cost=setup, token_cost=cost, max_tokens=limit).draft_length(acceptance)
    assert speeds[length] == pytest.approx(max(speeds))


def test_drafts_are_longer_if_they_are_accepted_more_often_or_cost_less():
    config = DraftConfig(setup_cost=0.0, token_cost=0.2, max_tokens=16)
    assert config.draft_length(0.0) == config.draft_length(0.2) == 0  # 1.2 tokens in 1.2 times the time
    lengths = [config.draft_length(acceptance) for acceptance in (0.25, 0.5, 0.8, 0.95, 0.99999)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] == 16
    expensive = DraftConfig(setup_cost=0.5, token_cost=0.2, max_tokens=16)
    assert expensive.draft_length(0.4) == 0 < config.draft_length(0.4)
    assert expensive.draft_length(0.9) >= config.draft_length(0.9)
    assert DraftConfig(setup_cost=0.0, token_cost=0.0).draft_length(0.5) == 8  # drafts at no cost are always useful
    assert DraftConfig(token_cost=5.0).draft_length(0.99) == 0


@pytest.mark.parametrize("wrong", [
    {"acceptance_priors": ()}, {"acceptance_priors": ((2, 0.5), (1, 0.5))}, {"acceptance_priors": ((0, 0.5),)},
    {"acceptance_priors": ((1, 1.0),)}, {"acceptance_priors": ((1, -0.1),)}, {"token_cost": -1.0},
    {"setup_cost": -0.1}, {"max_tokens": 0}, {"prior_weight": 0.0},
])  # fmt: skip
def test_invalid_draft_configs_are_rejected(wrong):
    with pytest.raises(InputError, match="drafts need acceptance_priors"):
        DraftConfig(**wrong)


def drafter(tokens, **config):
    return PromptLookupDrafter(DraftConfig(**config), index_of(tokens))


def test_accepted_drafts_grow_longer_and_rejected_drafts_stop():
    tokens = [*range(1, 60), 1, 2, 3]
    accepted, rejected = drafter(tokens), drafter(tokens)
    first = accepted.propose(tokens, 99)
    assert first == rejected.propose(tokens, 99) and first == list(range(4, 4 + len(first)))
    for _ in range(20):
        accepted.update(len(accepted.propose(tokens, 99)), len(accepted.propose(tokens, 99)))
        rejected.update(len(rejected.propose(tokens, 99)), 0)
    assert len(first) < len(accepted.propose(tokens, 99)) == DraftConfig().max_tokens
    assert rejected.propose(tokens, 99) == []


def test_longer_matches_give_longer_drafts():
    long, short = [*range(1, 40), 1, 2, 3, 4, 5, 6, 7], [*range(1, 40), 2]
    assert len(drafter(long).propose(long, 99)) > len(drafter(short).propose(short, 99))


def test_a_draft_is_limited_to_the_requested_length():
    tokens = [*range(1, 40), 1, 2, 3, 4, 5, 6, 7]
    assert drafter(tokens).propose(tokens, 1) == [8]
    assert drafter(tokens).propose(tokens, 0) == []


def test_drafted_and_accepted_tokens_are_counted():
    tokens = [1, 2, 3, 1, 2, 3, 1, 2]
    counting = drafter(tokens)
    counting.propose(tokens, 9)
    counting.update(4, 2)
    counting.propose(tokens, 9)
    counting.update(3, 3)
    assert (counting.drafted, counting.accepted) == (7, 5)
