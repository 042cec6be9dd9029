"""Decoders on TensorRT, run on a GPU in the host's memory (`host_gpu`) against ONNX Runtime's."""

from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
from host_gpu import HostCache
from trt_world import CONTEXT

from gog_edge.engines.manifest import DECODER, IN_PLACE, NEW_ROWS
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.errors import ArtifactError, BackendError, DeviceLost, OutOfDeviceMemory

STEPS = ((20, 1), (1, 1), (7, 4), (1, 1), (1, 1), (2, 1), (1, 1))  # tokens, and rows of logits that are wanted


@pytest.fixture(params=[IN_PLACE, NEW_ROWS])
def cache(request):
    return request.param


def step_feeds(spec, count, seed=0):
    random = np.random.default_rng(seed)
    angles = random.normal(size=(count, spec.head_dim // 2))
    feeds = [random.normal(size=(count, spec.hidden)), np.cos(angles), np.sin(angles)]
    deeper = random.normal(size=(spec.deepstack, count, spec.hidden)).astype(np.float32) if spec.deepstack else None
    return [array.astype(np.float32) for array in feeds], deeper


def said(decoder, spec, steps=STEPS, cache=None, past=0):
    """The logits of every step."""
    cache, all_ = cache or decoder.new_cache(), []
    for number, (count, keep) in enumerate(steps):
        feeds, deeper = step_feeds(spec, count, seed=past + number)
        all_.append(decoder.step(cache, *feeds, past, deepstack=deeper, keep=keep).copy())
        past += count
    return all_


def assert_close(got, expected, share=0.01):
    assert [logits.shape for logits in got] == [logits.shape for logits in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == np.float32 and np.abs(one - other).max() < share * np.abs(other).max()


@pytest.mark.parametrize("name", ["tied", "untied", "qwen3"])
def test_it_says_what_onnx_runtime_says(world, name, cache):
    here = world(name, cache)
    reference = OrtDecoder(here.policy / "decoder.onnx", capacity=CONTEXT, threads=1)
    assert_close(said(here.decoder(), here.spec), said(reference, here.spec))


def test_a_decode_step_is_one_launch_from_the_second_on(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    held, calls = decoder.new_cache(), here.runtime.calls
    said(decoder, here.spec, [(9, 1), (1, 1)], held)
    assert calls["cudaGraphLaunch"] == 0 and calls["cudaGraphInstantiate"] == 1
    before = calls.copy()
    said(decoder, here.spec, [(1, 1)] * 3, held, past=10)
    more = calls - before
    rows = 0 if cache == IN_PLACE else 3 * 2 * here.spec.layers  # their place changes with every token
    assert more["cudaGraphLaunch"] == 3 and more["cudaMemcpyAsync"] == 0 and more["cudaMemcpy2DAsync"] == rows
    assert more["cudaMalloc"] == more["cudaHostAlloc"] == 0


def test_the_captured_step_survives_other_caches_and_longer_steps(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    alone = said(here.decoder(), here.spec, [(5, 1), *[(1, 1)] * 4, (30, 2), (1, 1), (1, 1)])
    first, second, got = decoder.new_cache(), decoder.new_cache(), []
    past = 0
    for number, (count, keep) in enumerate([(5, 1), *[(1, 1)] * 4, (30, 2), (1, 1), (1, 1)]):
        feeds, _ = step_feeds(here.spec, count, seed=past + number)
        got.append(decoder.step(first, *feeds, past, keep=keep).copy())
        said(decoder, here.spec, [(count, keep), (1, 1)], second, past=min(past, 20))
        past += count
    assert_close(got, alone, share=1e-6)


def test_a_step_back_is_a_smaller_past(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    held = decoder.new_cache()
    said(decoder, here.spec, [(9, 1)], held)
    expected = said(decoder, here.spec, [(1, 1)], held, past=9)
    said(decoder, here.spec, [(20, 1), (1, 1)], held, past=12)
    assert_close(said(decoder, here.spec, [(1, 1)], held, past=9), expected, share=1e-6)


def test_a_copied_and_a_restored_cache_go_on_alone(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    first, copied, restored = (decoder.new_cache() for _ in range(3))
    said(decoder, here.spec, [(20, 1)], first)
    kept = first.snapshot(17)
    assert kept.states.shape == (2 * here.spec.layers, here.spec.kv_heads, 17, here.spec.head_dim)
    assert kept.states.dtype == np.float32 and np.isfinite(kept.states).all() and np.abs(kept.states).max() > 0.1
    copied.copy_from(first, 17)
    restored.restore(kept)
    assert np.array_equal(restored.snapshot(17).cos, first.cos[:17])
    said(decoder, here.spec, [(20, 1)], first, past=1)  # other tokens
    tail = [(3, 1), (1, 1), (1, 1)]
    whole = decoder.new_cache()
    said(decoder, here.spec, [(20, 1)], whole)
    expected = said(decoder, here.spec, tail, whole, past=17)
    for other in (copied, restored):
        assert_close(said(decoder, here.spec, tail, other, past=17), expected, share=1e-6)


def test_several_threads_step_several_caches(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    expected, got = said(decoder, here.spec), {}
    threads = [Thread(target=lambda n=n: got.update({n: said(decoder, here.spec)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 3
    for logits in got.values():
        assert_close(logits, expected, share=1e-6)


def test_warming_leaves_a_step_compiled_and_nothing_on_the_device(world):
    here = world()
    decoder = here.decoder()
    held = here.runtime.held
    decoder.warm()
    assert here.runtime.calls["cudaGraphLaunch"] == 1 and here.runtime.held == held
    assert (here.folder / "cache" / "decoder.kernels").read_bytes().startswith(b"kernel")


def test_all_memory_is_given_back(world, cache):
    here = world(cache=cache)
    decoder = here.decoder()
    logits = said(decoder, here.spec)
    held = decoder.new_cache()
    view = decoder.step(held, *step_feeds(here.spec, 1)[0], 0)
    del decoder, held
    here.trt.contexts.clear()
    assert here.runtime.held == 0 and np.isfinite(view).all() and logits
    del view
    assert not here.runtime.pinned and not here.runtime.streams


def test_without_capturing_it_says_the_same(world, caplog):
    here, other = world(capturable=False), world()
    assert_close(said(here.decoder(), here.spec), said(other.decoder(), other.spec), share=1e-6)
    assert here.runtime.calls["cudaGraphInstantiate"] == 0
    assert caplog.text.count("runs without CUDA graphs") == 1


def test_a_capture_that_failed_says_nothing_of_the_next(world, caplog):
    here = world()
    decoder = here.decoder()
    here.runtime.fails["cudaStreamBeginCapture"] = [900]
    expected = said(world().decoder(), here.spec)
    assert_close(said(decoder, here.spec), expected, share=1e-6)
    assert "goes on without a CUDA graph" in caplog.text and here.runtime.calls["cudaGraphLaunch"] == 0
    assert_close(said(decoder, here.spec), expected, share=1e-6)
    assert here.runtime.calls["cudaGraphLaunch"] > 0


def test_kernels_are_serialised_only_where_some_may_be_new(world, monkeypatch):
    calls, serialise = [], HostCache.serialize
    monkeypatch.setattr(HostCache, "serialize", lambda self: calls.append(self) or serialise(self))
    here = world()
    decoder = here.decoder()
    said(decoder, here.spec)
    before = len(calls)
    assert before > 1
    said(decoder, here.spec)
    assert len(calls) == before


def test_more_than_fits_is_an_error(world):
    here = world()
    decoder = here.decoder()
    held = decoder.new_cache()
    feeds, _ = step_feeds(here.spec, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64"):
        decoder.step(held, *feeds, 60)
    with pytest.raises(BackendError, match=r"no profile of the engine takes .*rows \(5,\)"):
        decoder.step(held, *feeds, 0, keep=5)
    feeds, _ = step_feeds(here.spec, 33)
    with pytest.raises(BackendError, match="no profile of the engine takes"):
        decoder.step(held, *feeds, 0)


def test_caches_of_others_are_refused(world):
    here, other = world(), world("untied")
    decoder, cache = here.decoder(), other.decoder().new_cache()
    with pytest.raises(BackendError, match="same decoder"):
        decoder.new_cache().copy_from(cache, 1)
    with pytest.raises(BackendError, match="another engine"):
        decoder.step(object(), *step_feeds(here.spec, 1)[0], 0)
    with pytest.raises(BackendError, match="remove those files"):
        decoder.new_cache().restore(cache.snapshot(3))


def test_no_room_for_a_cache_is_said_and_costs_nothing(world):
    here = world()
    decoder = here.decoder()
    first = decoder.new_cache()
    said(decoder, here.spec, [(5, 1), (1, 1)], first)
    held, here.runtime.total = here.runtime.held, here.runtime.held + 1000
    with pytest.raises(OutOfDeviceMemory, match=r"memory is taken \(1,000 of .* bytes are free\)"):
        decoder.new_cache()
    assert here.runtime.held == held
    assert np.isfinite(said(decoder, here.spec, [(1, 1)], first, past=6)[0]).all()


def test_a_lost_device_is_said_at_every_step(world):
    here = world()
    decoder = here.decoder()
    held = decoder.new_cache()
    said(decoder, here.spec, [(5, 1)], held)
    here.runtime.lost = True
    for _ in range(2):
        with pytest.raises(DeviceLost, match="GPU 0 is lost to this process: cudaErrorLaunchFailure"):
            said(decoder, here.spec, [(1, 1)], held, past=5)


@pytest.mark.parametrize("change, names", [
    ({"hidden": 32}, "inputs_embeds"), ({"kv_heads": 3}, "past_key_0"), ({"vocab": 5}, "logits"),
    ({"layers": 9}, "past_value_8"), ({"deepstack": 2}, "deepstack"), ({"head_dim": 64}, "cos"),
])  # fmt: skip
def test_an_engine_of_another_decoder_is_refused(world, change, names):
    here = world()
    spec = replace(here.spec, **change)
    with pytest.raises(ArtifactError, match=f"not of this policy's decoder.*{names}.*build_engines"):
        here.built.graph(DECODER)
        type(here.decoder())(here.plan(DECODER), here.built.graph(DECODER), here.built, spec)


def test_an_engine_of_another_context_is_refused(world):
    here = world()
    here.built = replace(here.built, context=128)
    with pytest.raises(ArtifactError, match="decoder with 128 tokens"):
        here.decoder()


def test_an_engine_that_copies_its_cache_is_refused(world):
    with pytest.raises(ArtifactError, match="does not update 'key_0' in its place"):
        world(aliases=False).decoder()
