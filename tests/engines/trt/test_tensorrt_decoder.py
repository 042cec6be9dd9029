"""Decoders on TensorRT, executed on `fake_gpu`, against those on ONNX Runtime."""

from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
from fake_gpu import FakeRuntimeCache
from tensorrt_fixtures import CONTEXT

from gog_edge.engines.manifest import DECODER, IN_PLACE, NEW_ROWS
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.errors import ArtifactError, BackendError, DeviceLost, OutOfDeviceMemory

STEPS = ((20, 1), (1, 1), (7, 4), (1, 1), (1, 1), (2, 1), (1, 1))  # tokens, rows of logits


@pytest.fixture(params=[IN_PLACE, NEW_ROWS])
def cache(request):
    return request.param


def step_feeds(spec, count, seed=0):
    random = np.random.default_rng(seed)
    angles = random.normal(size=(count, spec.head_dim // 2))
    feeds = [random.normal(size=(count, spec.hidden)), np.cos(angles), np.sin(angles)]
    features = random.normal(size=(spec.deepstack, count, spec.hidden)).astype(np.float32) if spec.deepstack else None
    return [array.astype(np.float32) for array in feeds], features


def run_steps(decoder, spec, steps=STEPS, cache=None, past=0):
    """Return the logits of every step."""
    cache, results = cache or decoder.new_cache(), []
    for number, (count, keep) in enumerate(steps):
        feeds, features = step_feeds(spec, count, seed=past + number)
        results.append(decoder.step(cache, *feeds, past, deepstack=features, keep=keep).copy())
        past += count
    return results


def assert_close(got, expected, share=0.01):
    assert [logits.shape for logits in got] == [logits.shape for logits in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == np.float32 and np.abs(one - other).max() < share * np.abs(other).max()


@pytest.mark.parametrize("name", ["tied", "untied", "qwen3"])
def test_logits_equal_onnx_cudas(fake_machine, name, cache):
    machine = fake_machine(name, cache)
    reference = OrtDecoder(machine.policy / "decoder.onnx", capacity=CONTEXT, threads=1)
    assert_close(run_steps(machine.decoder(), machine.spec), run_steps(reference, machine.spec))


def test_decode_steps_are_launched_as_a_graph_from_the_second_on(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    held, calls = decoder.new_cache(), machine.cuda.calls
    run_steps(decoder, machine.spec, [(9, 1), (1, 1)], held)
    assert calls["cudaGraphLaunch"] == 0 and calls["cudaGraphInstantiate"] == 1
    before = calls.copy()
    run_steps(decoder, machine.spec, [(1, 1)] * 3, held, past=10)
    more = calls - before
    rows = 0 if cache == IN_PLACE else 3 * 2 * machine.spec.layers  # their target changes with every token
    assert more["cudaGraphLaunch"] == 3 and more["cudaMemcpyAsync"] == 0 and more["cudaMemcpy2DAsync"] == rows
    assert more["cudaMalloc"] == more["cudaHostAlloc"] == 0


def test_a_captured_step_is_unaffected_by_other_caches_and_longer_steps(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    alone = run_steps(machine.decoder(), machine.spec, [(5, 1), *[(1, 1)] * 4, (30, 2), (1, 1), (1, 1)])
    first, second, got = decoder.new_cache(), decoder.new_cache(), []
    past = 0
    for number, (count, keep) in enumerate([(5, 1), *[(1, 1)] * 4, (30, 2), (1, 1), (1, 1)]):
        feeds, _ = step_feeds(machine.spec, count, seed=past + number)
        got.append(decoder.step(first, *feeds, past, keep=keep).copy())
        run_steps(decoder, machine.spec, [(count, keep), (1, 1)], second, past=min(past, 20))
        past += count
    assert_close(got, alone, share=1e-6)


def test_a_smaller_past_rewinds(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    held = decoder.new_cache()
    run_steps(decoder, machine.spec, [(9, 1)], held)
    expected = run_steps(decoder, machine.spec, [(1, 1)], held, past=9)
    run_steps(decoder, machine.spec, [(20, 1), (1, 1)], held, past=12)
    assert_close(run_steps(decoder, machine.spec, [(1, 1)], held, past=9), expected, share=1e-6)


def test_copied_and_restored_caches_are_independent(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    first, copied, restored = (decoder.new_cache() for _ in range(3))
    run_steps(decoder, machine.spec, [(20, 1)], first)
    snapshot = first.snapshot(17)
    assert snapshot.states.shape == (2 * machine.spec.layers, machine.spec.kv_heads, 17, machine.spec.head_dim)
    assert snapshot.states.dtype == np.float32
    assert np.isfinite(snapshot.states).all() and np.abs(snapshot.states).max() > 0.1
    copied.copy_from(first, 17)
    restored.restore(snapshot)
    assert np.array_equal(restored.snapshot(17).cos, first.cos[:17])
    run_steps(decoder, machine.spec, [(20, 1)], first, past=1)  # other tokens
    tail = [(3, 1), (1, 1), (1, 1)]
    whole = decoder.new_cache()
    run_steps(decoder, machine.spec, [(20, 1)], whole)
    expected = run_steps(decoder, machine.spec, tail, whole, past=17)
    for other in (copied, restored):
        assert_close(run_steps(decoder, machine.spec, tail, other, past=17), expected, share=1e-6)


def test_caches_stepped_concurrently(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    expected, got = run_steps(decoder, machine.spec), {}
    threads = [Thread(target=lambda n=n: got.update({n: run_steps(decoder, machine.spec)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 3
    for logits in got.values():
        assert_close(logits, expected, share=1e-6)


def test_warming_up_compiles_kernels_and_leaves_no_device_memory(fake_machine):
    machine = fake_machine()
    decoder = machine.decoder()
    held = machine.cuda.allocated
    decoder.warm_up()
    assert machine.cuda.calls["cudaGraphLaunch"] == 1 and machine.cuda.allocated == held
    assert (machine.folder / "cache" / "decoder.kernels").read_bytes().startswith(b"kernel")


def test_all_memory_is_released(fake_machine, cache):
    machine = fake_machine(cache=cache)
    decoder = machine.decoder()
    logits = run_steps(decoder, machine.spec)
    held = decoder.new_cache()
    view = decoder.step(held, *step_feeds(machine.spec, 1)[0], 0)
    del decoder, held
    machine.trt.contexts.clear()
    assert machine.cuda.allocated == 0 and np.isfinite(view).all() and logits
    del view
    assert not machine.cuda.pinned and not machine.cuda.streams


def test_an_engine_that_cannot_be_captured_gives_the_same_logits(fake_machine, caplog):
    machine, other = fake_machine(capturable=False), fake_machine()
    assert_close(run_steps(machine.decoder(), machine.spec), run_steps(other.decoder(), other.spec), share=1e-6)
    assert machine.cuda.calls["cudaGraphInstantiate"] == 0
    assert caplog.text.count("runs without CUDA graphs") == 1


def test_a_failed_capture_does_not_prevent_later_ones(fake_machine, caplog):
    machine = fake_machine()
    decoder = machine.decoder()
    machine.cuda.fails["cudaStreamBeginCapture"] = [900]
    expected = run_steps(fake_machine().decoder(), machine.spec)
    assert_close(run_steps(decoder, machine.spec), expected, share=1e-6)
    assert "continues without a CUDA graph" in caplog.text and machine.cuda.calls["cudaGraphLaunch"] == 0
    assert_close(run_steps(decoder, machine.spec), expected, share=1e-6)
    assert machine.cuda.calls["cudaGraphLaunch"] > 0


def test_kernels_are_serialized_only_when_new_ones_are_possible(fake_machine, monkeypatch):
    calls, serialize = [], FakeRuntimeCache.serialize
    monkeypatch.setattr(FakeRuntimeCache, "serialize", lambda self: calls.append(self) or serialize(self))
    machine = fake_machine()
    decoder = machine.decoder()
    run_steps(decoder, machine.spec)
    before = len(calls)
    assert before > 1
    run_steps(decoder, machine.spec)
    assert len(calls) == before


def test_more_tokens_than_fit(fake_machine):
    machine = fake_machine()
    decoder = machine.decoder()
    held = decoder.new_cache()
    feeds, _ = step_feeds(machine.spec, 10)
    with pytest.raises(BackendError, match="60 \\+ 10 tokens do not fit a cache of 64"):
        decoder.step(held, *feeds, 60)
    with pytest.raises(BackendError, match=r"no profile of the engine accepts .*rows \(5,\)"):
        decoder.step(held, *feeds, 0, keep=5)
    feeds, _ = step_feeds(machine.spec, 33)
    with pytest.raises(BackendError, match="no profile of the engine accepts"):
        decoder.step(held, *feeds, 0)


def test_caches_of_another_engine(fake_machine):
    machine, other = fake_machine(), fake_machine("untied")
    decoder, cache = machine.decoder(), other.decoder().new_cache()
    with pytest.raises(BackendError, match="a cache of the same decoder"):
        decoder.new_cache().copy_from(cache, 1)
    with pytest.raises(BackendError, match="another engine"):
        decoder.step(object(), *step_feeds(machine.spec, 1)[0], 0)
    with pytest.raises(BackendError, match="remove the snapshot's files"):
        decoder.new_cache().restore(cache.snapshot(3))


def test_running_out_of_memory_for_a_cache_leaks_nothing(fake_machine):
    machine = fake_machine()
    decoder = machine.decoder()
    first = decoder.new_cache()
    run_steps(decoder, machine.spec, [(5, 1), (1, 1)], first)
    held, machine.cuda.total = machine.cuda.allocated, machine.cuda.allocated + 1000
    with pytest.raises(OutOfDeviceMemory, match=r"out of memory \(1,000 of .* bytes are free\)"):
        decoder.new_cache()
    assert machine.cuda.allocated == held
    assert np.isfinite(run_steps(decoder, machine.spec, [(1, 1)], first, past=6)[0]).all()


def test_a_lost_device_is_reported_at_every_step(fake_machine):
    machine = fake_machine()
    decoder = machine.decoder()
    held = decoder.new_cache()
    run_steps(decoder, machine.spec, [(5, 1)], held)
    machine.cuda.lost = True
    for _ in range(2):
        with pytest.raises(DeviceLost, match="can no longer use GPU 0: cudaErrorLaunchFailure"):
            run_steps(decoder, machine.spec, [(1, 1)], held, past=5)


@pytest.mark.parametrize("change, names", [
    ({"hidden": 32}, "inputs_embeds"), ({"kv_heads": 3}, "past_key_0"), ({"vocab": 5}, "logits"),
    ({"layers": 9}, "past_value_8"), ({"deepstack": 2}, "deepstack"), ({"head_dim": 64}, "cos"),
])  # fmt: skip
def test_an_engine_of_another_decoder(fake_machine, change, names):
    machine = fake_machine()
    spec = replace(machine.spec, **change)
    with pytest.raises(ArtifactError, match=f"not built from this policy's decoder.*{names}.*export engines"):
        machine.built.graph(DECODER)
        type(machine.decoder())(machine.plan(DECODER), machine.built.graph(DECODER), machine.built, spec)


def test_an_engine_of_another_context(fake_machine):
    machine = fake_machine()
    machine.built = replace(machine.built, context=128)
    with pytest.raises(ArtifactError, match="with a context of 128 tokens"):
        machine.decoder()


def test_an_engine_that_does_not_update_its_cache_in_place(fake_machine):
    with pytest.raises(ArtifactError, match="does not update 'key_0' in place"):
        fake_machine(aliases=False).decoder()
