"""The decoder whose heads are grouped says what the decoder says."""

import shutil

import numpy as np
import pytest

from gog_edge.engines.base import MOST_GROUPED
from gog_edge.engines.ort import OrtDecoder
from gog_edge.errors import BackendError
from gog_edge.exporting.grouped_graph import write_grouped
from gog_edge.policy.manifest import DECODER_GRAPH, GROUPED_GRAPH, read_manifest

CAPACITY = 160


@pytest.fixture(params=["groups of three, biases", "groups of two", "norms, features for first layers"])
def twins(request, policies, qwen3_policy, tmp_path):
    """The same decoder, plain and grouped."""
    kinds = {"groups of three, biases": policies[True], "groups of two": policies[False]}
    folder = kinds.get(request.param) or qwen3_policy
    spec = read_manifest(folder).text
    shutil.copy(folder / DECODER_GRAPH, tmp_path)
    write_grouped(tmp_path / DECODER_GRAPH, tmp_path / GROUPED_GRAPH, spec)
    plain = OrtDecoder(tmp_path / DECODER_GRAPH, capacity=CAPACITY, threads=1)
    return plain, OrtDecoder(tmp_path / GROUPED_GRAPH, capacity=CAPACITY, threads=1, group=spec.group)


def tokens(decoder, count, past):
    random = np.random.default_rng([count, past])
    angles = np.outer(past + np.arange(count), 1e4 ** (-np.arange(decoder.rotary) / decoder.rotary))
    embeds = random.normal(0, 0.5, (count, decoder.hidden))
    features = random.normal(0, 0.5, (decoder.deepstack, count, decoder.hidden)).astype(np.float32)
    rows = [array.astype(np.float32) for array in (embeds, np.cos(angles), np.sin(angles))]
    return rows, features if decoder.deepstack else None


def talk(decoder, steps):
    """Logits of steps (tokens before it, tokens, rows of logits), and what the cache holds at the end."""
    cache, said = decoder.new_cache(), []
    for past, count, keep in steps:
        rows, features = tokens(decoder, count, past)
        said.append(decoder.step(cache, *rows, past, deepstack=features, keep=keep).copy())
    return said, cache.snapshot(steps[-1][0] + steps[-1][1])


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 5, 1), (5, 1, 1), (6, 4, 4), (10, 1, 1)],
        [(0, 20, 3), (7, 6, 6), (13, 1, 1)],  # the second step takes back what the first one said
        [(0, CAPACITY - 8, 2), (CAPACITY - 8, 7, 7), (CAPACITY - 1, 1, 1)],  # many tokens, to the last place
        [(0, MOST_GROUPED + 3, 5), (MOST_GROUPED + 3, MOST_GROUPED, MOST_GROUPED)],
    ],
)
def test_grouped_heads_say_the_same(twins, steps):
    (expected, held), (said, kept) = (talk(decoder, steps) for decoder in twins)
    for mine, theirs in zip(said, expected, strict=True):
        assert mine.shape == theirs.shape and np.abs(theirs).max() > 1
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    np.testing.assert_allclose(kept.states, held.states, atol=2e-4)
    assert np.array_equal(kept.cos, held.cos)


def test_a_cache_goes_on_in_another_conversation(twins):
    """Copies that stand behind the tokens are not taken along."""
    _, grouped = twins
    (before,), kept = talk(grouped, [(0, 9, 1)])
    cache, copied = grouped.new_cache(), grouped.new_cache()
    cache.restore(kept)
    copied.copy_from(cache, 9)
    rows, features = tokens(grouped, 3, 9)
    again, twice = (grouped.step(each, *rows, 9, deepstack=features, keep=3).copy() for each in (cache, copied))
    (_, direct), _ = talk(grouped, [(0, 9, 1), (9, 3, 3)])
    assert before.shape == (1, grouped.vocab)
    np.testing.assert_allclose(again, direct, atol=2e-4)
    assert np.array_equal(again, twice)


def test_more_rows_than_a_step_has_are_refused(twins):
    _, grouped = twins
    rows, features = tokens(grouped, MOST_GROUPED + 1, 0)
    with pytest.raises(BackendError, match=f"{MOST_GROUPED + 1} rows of logits .* are too many"):
        grouped.step(grouped.new_cache(), *rows, 0, deepstack=features, keep=MOST_GROUPED + 1)
