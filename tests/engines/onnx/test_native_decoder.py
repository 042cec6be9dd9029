"""The decoder on operators of our own says what the plain one says, as nearly as a cache of halves allows."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import OrtDecoder, TiledTensor, TokenCache
from gog_edge.engines.onnx.native import DOMAIN, library
from gog_edge.errors import BackendError
from gog_edge.exporting.recording import least_cosine
from gog_edge.policy.manifest import DECODER_GRAPH, NATIVE_DECODER_GRAPH
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

CAPACITY = 200  # no multiple of what is attended at a time
FULL = (0, CAPACITY - 8, 2), (CAPACITY - 8, 7, 7), (CAPACITY - 1, 1, 1)

needs_library = pytest.mark.skipif(library() is None, reason=f"no library: {native.why_none()}")


def open_native(folder, **more):
    usual = {"capacity": CAPACITY, "threads": 1, "operators": library()}
    return OrtDecoder(folder / NATIVE_DECODER_GRAPH, **usual | more)


@pytest.fixture(scope="module", params=[False, True], ids=["groups of three, biases", "norms, features, groups of two"])
def folder(request, native_policies):
    return native_policies[request.param]


@pytest.fixture(scope="module")
def twins(folder):
    """The same decoder, plain and native."""
    return OrtDecoder(folder / DECODER_GRAPH, capacity=CAPACITY, threads=1), open_native(folder)


def tokens(decoder, count, past):
    random = np.random.default_rng([count, past])
    angles = np.outer(past + np.arange(count), 1e4 ** (-np.arange(decoder.rotary) / decoder.rotary))
    embeds = random.normal(0, 0.5, (count, decoder.hidden))
    features = random.normal(0, 0.5, (decoder.deepstack, count, decoder.hidden)).astype(np.float32)
    rows = [array.astype(np.float32) for array in (embeds, np.cos(angles), np.sin(angles))]
    return rows, features if decoder.deepstack else None


def step(decoder, cache, count, past, keep=1):
    rows, features = tokens(decoder, count, past)
    return decoder.step(cache, *rows, past, deepstack=features, keep=keep).copy()


def talk(decoder, steps):
    """Logits of steps (tokens before it, tokens, rows of logits), and what the cache holds at the end."""
    cache = decoder.new_cache()
    said = [step(decoder, cache, count, past, keep) for past, count, keep in steps]
    return said, cache.snapshot(steps[-1][0] + steps[-1][1])


def flat(kept):
    return kept.states.reshape(len(kept.states), -1)


@needs_library
@pytest.mark.parametrize(
    "steps",
    [
        [(0, 5, 1), (5, 1, 1), (6, 4, 4), (10, 1, 1)],
        [(0, 20, 3), (7, 6, 6), (13, 1, 1)],  # the second step takes back what the first one said
        [(past, 1, 1) for past in range(70)],
        FULL,  # many tokens, to the last place
    ],
    ids=["few", "taken back", "one by one", "full"],
)
def test_native_operators_say_nearly_the_same(twins, steps):
    (expected, held), (said, kept) = (talk(decoder, steps) for decoder in twins)
    for mine, theirs in zip(said, expected, strict=True):
        assert mine.shape == theirs.shape and np.abs(theirs).max() > 1
        assert least_cosine(theirs, mine) > 0.995 and not np.array_equal(mine, theirs)
    assert least_cosine(flat(held), flat(kept)) > 0.9995
    assert np.array_equal(kept.cos, held.cos) and np.array_equal(kept.sin, held.sin)


@needs_library
def test_a_smaller_past_rewinds(twins):
    _, decoder = twins
    cache = decoder.new_cache()
    step(decoder, cache, 8, 0)
    expected = step(decoder, cache, 1, 8)
    step(decoder, cache, 90, 9)
    assert np.array_equal(step(decoder, cache, 1, 8), expected)


@needs_library
def test_rows_of_one_step_are_those_of_single_steps(twins):
    _, decoder = twins
    rows, features = tokens(decoder, 9, 60)
    cache, single = decoder.new_cache(), decoder.new_cache()
    for each in (cache, single):
        step(decoder, each, 60, 0)
    kept = decoder.step(cache, *rows, 60, deepstack=features, keep=7)
    for row in range(9):
        one, part = [array[row : row + 1] for array in rows], None if features is None else features[:, row : row + 1]
        alone = decoder.step(single, *one, 60 + row, deepstack=part)
        if row >= 2:
            np.testing.assert_allclose(kept[row - 2], alone[0], atol=1e-3)


@needs_library
def test_a_copied_cache_goes_on_alone(twins):
    """In the middle of a tile, whose other tokens come along."""
    _, decoder = twins
    first, second = decoder.new_cache(), decoder.new_cache()
    step(decoder, first, 30, 0)
    second.copy_from(first, 21)
    expected = step(decoder, first, 5, 21, keep=5)
    step(decoder, first, 40, 0)
    assert np.array_equal(step(decoder, second, 5, 21, keep=5), expected)
    longer = decoder.new_cache()
    longer.copy_from(second, 26)
    assert np.array_equal(step(decoder, longer, 1, 26), step(decoder, second, 1, 26))


@needs_library
def test_kept_tokens_begin_a_cache_of_either_kind(twins):
    plain, decoder = twins
    caches = [each.new_cache() for each in twins]
    for each, cache in zip(twins, caches, strict=True):
        step(each, cache, 21, 0)
    of_plain, of_native = (cache.snapshot(21) for cache in caches)
    assert of_native.states.dtype == np.float32 and of_native.states.shape == of_plain.states.shape
    expected = [step(each, cache, 3, 21, keep=3) for each, cache in zip(twins, caches, strict=True)]
    restored = {}
    for name, kept in (("plain", of_plain), ("native", of_native)):
        for each in twins:
            cache = each.new_cache()
            cache.restore(kept)
            restored[name, each] = step(each, cache, 3, 21, keep=3)
    assert np.array_equal(restored["plain", plain], expected[0])
    assert np.array_equal(restored["native", decoder], expected[1])  # halves are kept as they are
    assert least_cosine(restored["native", plain], expected[0]) > 0.995
    assert least_cosine(restored["plain", decoder], expected[1]) > 0.995
    with pytest.raises(BackendError, match="remove those files"):
        decoder.new_cache().restore(type(of_plain)(of_plain.states[1:], of_plain.cos, of_plain.sin))


@needs_library
def test_what_does_not_fit_is_refused(twins):
    _, decoder = twins
    assert decoder.capacity == CAPACITY and decoder.new_cache().capacity == CAPACITY
    with pytest.raises(BackendError, match="195 \\+ 10 tokens do not fit a cache of 200; open a larger one"):
        step(decoder, decoder.new_cache(), 10, 195)


@needs_library
def test_caches_of_another_kind_are_refused(twins):
    plain, decoder = twins
    for mine, other in (twins, twins[::-1]):
        with pytest.raises(BackendError, match="open both on one engine"):
            mine.new_cache().copy_from(other.new_cache(), 1)
        cache = mine.new_cache()
        with pytest.raises(BackendError, match="another engine; use the decoder's own"):
            step(other, TokenCache(cache.cos, cache.sin, cache.states, CAPACITY), 3, 0)


@needs_library
@pytest.mark.parametrize("capacity", [1, 63, 64, 130])
def test_a_cache_of_any_capacity_is_filled_to_its_last_place(folder, capacity):
    decoder, wide = open_native(folder, capacity=capacity), open_native(folder)
    cache, other = decoder.new_cache(), wide.new_cache()
    assert all(isinstance(state, TiledTensor) and state.shape[2] % 64 == 0 for state in cache.states)
    assert np.array_equal(step(decoder, cache, capacity, 0), step(wide, other, capacity, 0))
    with pytest.raises(BackendError, match=f"{capacity} \\+ 1 tokens do not fit"):
        step(decoder, cache, 1, capacity)
    assert np.array_equal(step(decoder, cache, 1, capacity - 1), step(wide, other, 1, capacity - 1))


@needs_library
def test_several_conversations_are_stepped_from_several_threads(twins):
    _, decoder = twins
    talks = [[(0, 10 + count, 1), *[(past, 1, 1) for past in range(10 + count, 40)], (40, 30, 5)] for count in range(6)]
    expected = [talk(decoder, steps) for steps in talks]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda steps: talk(decoder, steps), talks))
    for (said, kept), (theirs, held) in zip(found, expected, strict=True):
        assert all(map(np.array_equal, said, theirs)) and np.array_equal(kept.states, held.states)


@needs_library
def test_threads_change_nothing(folder, twins):
    both, (said, kept) = open_native(folder, threads=2), talk(twins[1], FULL)
    again, held = talk(both, FULL)
    assert all(map(np.array_equal, said, again)) and np.array_equal(kept.states, held.states)


@needs_library
def test_pictures_features_reach_the_first_layers(native_policies):
    decoder = open_native(native_policies[True])
    rows, features = tokens(decoder, 8, 0)
    cache = decoder.new_cache()
    without = decoder.step(cache, *rows, 0).copy()
    assert np.abs(decoder.step(cache, *rows, 0, deepstack=features) - without).max() > 0.1
    assert np.array_equal(decoder.step(cache, *rows, 0, deepstack=np.zeros_like(features)), without)


@needs_library
def test_a_graph_without_its_operators_cannot_be_loaded(native_policies, tmp_path):
    with pytest.raises(BackendError, match=f"cannot load .*{DOMAIN}"):
        open_native(native_policies[True], operators=None)
    (tmp_path / "operators.so").write_bytes(b"no library")
    with pytest.raises(BackendError, match=r"cannot load '.*operators\.so'.*; remove it and install gog_edge again"):
        open_native(native_policies[True], operators=tmp_path / "operators.so")


# --- a whole policy ------------------------------------------------------------------------------------


def say(model, pixels):
    """Logits of a prompt with a picture, and the tokens of an answer."""
    session = Session(model.decoder)
    session.append_text("Look at this: ")
    session.append_image(model.vision.encode(pixels))
    session.append_text(" and tell what it is.")
    logits = session.prefill().copy()
    session.append_text(" Well?")
    return logits, session.generate(max_tokens=8).tokens


@pytest.fixture
def pixels():
    return np.random.default_rng(5).integers(0, 256, (160, 192, 3), np.uint8)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No library was compiled."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(native, "FOLDER", tmp_path / "nothing")
    library.cache_clear()
    yield
    library.cache_clear()


@needs_library
def test_a_policy_runs_on_our_operators_unless_told_otherwise(folder, pixels, caplog):
    model, plain = PolicyModel.open(folder, threads=1), PolicyModel.open(folder, threads=1, second=False)
    assert model.manifest.native_here and model.runs_on == f"1 threads, {library().stem}"
    assert plain.runs_on == "1 threads, ort" and model.form != plain.form
    kinds = [isinstance(each.decoder.engine.new_cache().states[0], TiledTensor) for each in (model, plain)]
    assert kinds == [True, False] and not caplog.records
    said, theirs = say(model, pixels)[0], say(plain, pixels)[0]
    assert not np.array_equal(said, theirs) and least_cosine(said[None], theirs[None]) > 0.98
    towers = [each.vision.encode(pixels) for each in (model, plain)]
    parts = [[image.embeds, *(() if image.deepstack is None else image.deepstack)] for image in towers]
    for mine, other in zip(*parts, strict=True):
        assert mine.shape == other.shape and not np.array_equal(mine, other) and least_cosine(mine, other) > 0.995


@needs_library
def test_a_conversation_is_taken_back_and_forked(folder, pixels):
    model = PolicyModel.open(folder, threads=1)
    expected, _ = say(model, pixels)
    session, fork = Session(model.decoder), Session(model.decoder)
    session.append_text("Look at this: ")
    mark = session.mark()
    session.append_text("No, look at that, and at all that is beside it.")
    session.generate(max_tokens=20)
    session.rollback(mark)
    fork.fork_from(session)
    session.generate(max_tokens=30)  # goes on alone
    fork.append_image(model.vision.encode(pixels))
    fork.append_text(" and tell what it is.")
    np.testing.assert_allclose(fork.prefill(), expected, atol=1e-3)


def test_without_a_library_the_remedy_is_logged_and_onnx_runtimes_operators_answer(folder, pixels, nowhere, caplog):
    plain = PolicyModel.open(folder, threads=1, second=False)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = PolicyModel.open(folder, threads=1)
    (record,) = caplog.records
    assert native.why_none() in record.getMessage() and str(folder) in record.getMessage()
    assert model.manifest.native and not model.manifest.native_here and model.runs_on == "1 threads, ort"
    (said, tokens_said), (theirs, tokens_theirs) = (say(each, pixels) for each in (model, plain))
    assert np.array_equal(said, theirs) and tokens_said == tokens_theirs


def test_a_policy_without_a_native_decoder_needs_no_library(policies, nowhere, caplog):
    model = PolicyModel.open(policies[True], threads=1)
    assert not model.manifest.native and not caplog.records and model.runs_on == "1 threads, ort"
