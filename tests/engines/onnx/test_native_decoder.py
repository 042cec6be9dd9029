"""The decoder on native operators agrees with the one on ONNX Runtime's operators, within bfloat16 precision."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import OrtDecoder, TiledTensor, TokenCache
from gog_edge.engines.onnx.native import DOMAIN, library
from gog_edge.errors import BackendError
from gog_edge.exporting.recording import min_cosine_similarity
from gog_edge.policy.manifest import DECODER_GRAPH, NATIVE_DECODER_GRAPH
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

CAPACITY = 200  # not a multiple of the kernel's step of 64 tokens
FULL = (0, CAPACITY - 8, 2), (CAPACITY - 8, 7, 7), (CAPACITY - 1, 1, 1)  # steps that fill the cache

needs_library = pytest.mark.skipif(library() is None, reason=f"no library: {native.unavailable_reason()}")


def open_native(folder, **more):
    defaults = {"capacity": CAPACITY, "threads": 1, "operators": library()}
    return OrtDecoder(folder / NATIVE_DECODER_GRAPH, **defaults | more)


@pytest.fixture(scope="module", params=[False, True], ids=["groups of 3, biases", "groups of 2, norms, deepstack"])
def folder(request, native_policies):
    return native_policies[request.param]


@pytest.fixture(scope="module")
def decoders(folder):
    """The same decoder on ONNX Runtime's operators and on native ones."""
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


def run_steps(decoder, steps):
    """Run steps (past, tokens, rows of logits); return their logits and a snapshot of the cache at the end."""
    cache = decoder.new_cache()
    logits = [step(decoder, cache, count, past, keep) for past, count, keep in steps]
    return logits, cache.snapshot(steps[-1][0] + steps[-1][1])


def flatten(snapshot):
    return snapshot.states.reshape(len(snapshot.states), -1)


@needs_library
@pytest.mark.parametrize(
    "steps",
    [
        [(0, 5, 1), (5, 1, 1), (6, 4, 4), (10, 1, 1)],
        [(0, 20, 3), (7, 6, 6), (13, 1, 1)],  # the second step overwrites tokens of the first
        [(past, 1, 1) for past in range(70)],
        FULL,  # up to the last place
    ],
    ids=["few", "rewind", "one by one", "full"],
)
def test_logits_agree_within_bfloat16_precision(decoders, steps):
    (expected, plain), (logits, native_snapshot) = (run_steps(decoder, steps) for decoder in decoders)
    for actual, other in zip(logits, expected, strict=True):
        assert actual.shape == other.shape and np.abs(other).max() > 1
        assert min_cosine_similarity(other, actual) > 0.995 and not np.array_equal(actual, other)
    assert min_cosine_similarity(flatten(plain), flatten(native_snapshot)) > 0.9995
    assert np.array_equal(native_snapshot.cos, plain.cos) and np.array_equal(native_snapshot.sin, plain.sin)


@needs_library
def test_a_smaller_past_rewinds(decoders):
    _, decoder = decoders
    cache = decoder.new_cache()
    step(decoder, cache, 8, 0)
    expected = step(decoder, cache, 1, 8)
    step(decoder, cache, 90, 9)
    assert np.array_equal(step(decoder, cache, 1, 8), expected)


@needs_library
def test_rows_of_logits_equal_those_of_single_steps(decoders):
    _, decoder = decoders
    rows, features = tokens(decoder, 9, 60)
    cache, single = decoder.new_cache(), decoder.new_cache()
    for each in (cache, single):
        step(decoder, each, 60, 0)
    logits = decoder.step(cache, *rows, 60, deepstack=features, keep=7)
    for row in range(9):
        one, part = [array[row : row + 1] for array in rows], None if features is None else features[:, row : row + 1]
        single_logits = decoder.step(single, *one, 60 + row, deepstack=part)
        if row >= 2:
            np.testing.assert_allclose(logits[row - 2], single_logits[0], atol=1e-3)


@needs_library
def test_a_copied_cache_is_independent(decoders):
    """The copy ends within a tile, whose other tokens are copied, too."""
    _, decoder = decoders
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
def test_snapshots_of_either_decoder_restore_both(decoders):
    plain, decoder = decoders
    caches = [each.new_cache() for each in decoders]
    for each, cache in zip(decoders, caches, strict=True):
        step(each, cache, 21, 0)
    of_plain, of_native = (cache.snapshot(21) for cache in caches)
    assert of_native.states.dtype == np.float32 and of_native.states.shape == of_plain.states.shape
    expected = [step(each, cache, 3, 21, keep=3) for each, cache in zip(decoders, caches, strict=True)]
    restored = {}
    for name, snapshot in (("plain", of_plain), ("native", of_native)):
        for each in decoders:
            cache = each.new_cache()
            cache.restore(snapshot)
            restored[name, each] = step(each, cache, 3, 21, keep=3)
    assert np.array_equal(restored["plain", plain], expected[0])
    assert np.array_equal(restored["native", decoder], expected[1])  # bfloat16 values survive the round trip
    assert min_cosine_similarity(restored["native", plain], expected[0]) > 0.995
    assert min_cosine_similarity(restored["plain", decoder], expected[1]) > 0.995
    with pytest.raises(BackendError, match="remove the snapshot's files"):
        decoder.new_cache().restore(type(of_plain)(of_plain.states[1:], of_plain.cos, of_plain.sin))


@needs_library
def test_more_tokens_than_fit(decoders):
    _, decoder = decoders
    assert decoder.capacity == CAPACITY and decoder.new_cache().capacity == CAPACITY
    with pytest.raises(BackendError, match="195 \\+ 10 tokens do not fit a cache of 200; open a larger one"):
        step(decoder, decoder.new_cache(), 10, 195)


@needs_library
def test_caches_of_the_other_decoder_are_refused(decoders):
    plain, decoder = decoders
    for own, other in (decoders, decoders[::-1]):
        with pytest.raises(BackendError, match="open both on one engine"):
            own.new_cache().copy_from(other.new_cache(), 1)
        cache = own.new_cache()
        with pytest.raises(BackendError, match="another engine; use a cache from the decoder's own"):
            step(other, TokenCache(cache.cos, cache.sin, cache.states, CAPACITY), 3, 0)


@needs_library
@pytest.mark.parametrize("capacity", [1, 63, 64, 130])
def test_any_capacity_can_be_filled_completely(folder, capacity):
    decoder, wide = open_native(folder, capacity=capacity), open_native(folder)
    cache, other = decoder.new_cache(), wide.new_cache()
    assert all(isinstance(state, TiledTensor) and state.shape[2] % 64 == 0 for state in cache.states)
    assert np.array_equal(step(decoder, cache, capacity, 0), step(wide, other, capacity, 0))
    with pytest.raises(BackendError, match=f"{capacity} \\+ 1 tokens do not fit"):
        step(decoder, cache, 1, capacity)
    assert np.array_equal(step(decoder, cache, 1, capacity - 1), step(wide, other, 1, capacity - 1))


@needs_library
def test_conversations_stepped_concurrently(decoders):
    _, decoder = decoders
    conversations = [[(0, 10 + count, 1), *[(past, 1, 1) for past in range(10 + count, 40)], (40, 30, 5)]
                     for count in range(6)]  # fmt: skip
    expected = [run_steps(decoder, steps) for steps in conversations]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda steps: run_steps(decoder, steps), conversations))
    for (logits, snapshot), (other, reference) in zip(found, expected, strict=True):
        assert all(map(np.array_equal, logits, other)) and np.array_equal(snapshot.states, reference.states)


@needs_library
def test_results_do_not_depend_on_the_number_of_threads(folder, decoders):
    logits, snapshot = run_steps(decoders[1], FULL)
    others, other = run_steps(open_native(folder, threads=2), FULL)
    assert all(map(np.array_equal, logits, others)) and np.array_equal(snapshot.states, other.states)


@needs_library
def test_deepstack_features_are_added_to_the_first_layers(native_policies):
    decoder = open_native(native_policies[True])
    rows, features = tokens(decoder, 8, 0)
    cache = decoder.new_cache()
    without = decoder.step(cache, *rows, 0).copy()
    assert np.abs(decoder.step(cache, *rows, 0, deepstack=features) - without).max() > 0.1
    assert np.array_equal(decoder.step(cache, *rows, 0, deepstack=np.zeros_like(features)), without)


@needs_library
def test_a_graph_without_the_operator_library(native_policies, tmp_path):
    with pytest.raises(BackendError, match=f"cannot load .*{DOMAIN}"):
        open_native(native_policies[True], operators=None)
    (tmp_path / "operators.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match=r"cannot load '.*operators\.so'.*; remove it and install gog_edge again"):
        open_native(native_policies[True], operators=tmp_path / "operators.so")


# --- a whole policy -------------------------------------------------------------------------------


def answer(model, pixels):
    """Return the logits of a prompt with a picture, and the tokens of an answer."""
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
def no_library(monkeypatch, tmp_path):
    """As if no library was compiled."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(native, "FOLDER", tmp_path / "nothing")
    library.cache_clear()
    yield
    library.cache_clear()


@needs_library
def test_a_policy_uses_native_operators_by_default(folder, pixels, caplog):
    model, plain = PolicyModel.open(folder, threads=1), PolicyModel.open(folder, threads=1, cpu_layout=False)
    assert model.manifest.runs_native and model.device == f"1 threads, {library().stem}"
    assert plain.device == "1 threads, ort" and model.kernels != plain.kernels
    kinds = [isinstance(each.decoder.engine.new_cache().states[0], TiledTensor) for each in (model, plain)]
    assert kinds == [True, False] and not caplog.records
    logits, expected = answer(model, pixels)[0], answer(plain, pixels)[0]
    assert not np.array_equal(logits, expected) and min_cosine_similarity(logits[None], expected[None]) > 0.98
    towers = [each.vision.encode(pixels) for each in (model, plain)]
    parts = [[image.embeds, *(() if image.deepstack is None else image.deepstack)] for image in towers]
    for actual, other in zip(*parts, strict=True):
        assert actual.shape == other.shape and not np.array_equal(actual, other)
        assert min_cosine_similarity(actual, other) > 0.995


@needs_library
def test_a_conversation_is_rolled_back_and_forked(folder, pixels):
    model = PolicyModel.open(folder, threads=1)
    expected, _ = answer(model, pixels)
    session, fork = Session(model.decoder), Session(model.decoder)
    session.append_text("Look at this: ")
    savepoint = session.savepoint()
    session.append_text("No, look at that, and at all that is beside it.")
    session.generate(max_tokens=20)
    session.rollback(savepoint)
    fork.fork_from(session)
    session.generate(max_tokens=30)  # must not affect the fork
    fork.append_image(model.vision.encode(pixels))
    fork.append_text(" and tell what it is.")
    np.testing.assert_allclose(fork.prefill(), expected, atol=1e-3)


def test_without_a_library_the_remedy_is_logged_and_onnx_runtimes_operators_run(folder, pixels, no_library, caplog):
    plain = PolicyModel.open(folder, threads=1, cpu_layout=False)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = PolicyModel.open(folder, threads=1)
    (record,) = caplog.records
    assert native.unavailable_reason() in record.getMessage() and str(folder) in record.getMessage()
    assert model.manifest.has_native and not model.manifest.runs_native and model.device == "1 threads, ort"
    (logits, generated), (expected, expected_tokens) = (answer(each, pixels) for each in (model, plain))
    assert np.array_equal(logits, expected) and generated == expected_tokens


def test_a_policy_without_a_native_decoder_needs_no_library(policies, no_library, caplog):
    model = PolicyModel.open(policies[True], threads=1)
    assert not model.manifest.has_native and not caplog.records and model.device == "1 threads, ort"
