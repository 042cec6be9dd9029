"""The native attention operators against float64 references, in every variant that this processor supports."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from native_sessions import COMPILED, each_variant, operator_session, relative_error, requires_library, run_concurrently
from onnx import TensorProto

from gog_edge.engines.onnx.decoder import from_bfloat16, new_tiled_tensors, to_bfloat16
from gog_edge.engines.onnx.session import RUN_ERRORS

pytestmark = [requires_library, each_variant]

# --- CachedAttention ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    width: int
    norms: bool

    @property
    def projections(self):
        return self.heads + 2 * self.kv_heads

    def __str__(self):
        return f"{self.heads} over {self.kv_heads}, {self.width} wide{', norms' * self.norms}"


SHAPES = (Heads(16, 8, 128, True), Heads(28, 4, 128, False), Heads(16, 2, 128, False), Heads(4, 2, 64, True),
          Heads(8, 1, 256, False), Heads(6, 2, 32, False), Heads(2, 1, 96, True))  # fmt: skip
STEP_LENGTHS = (37, 1, 1, 300, 5, 17, 129, 2)  # tokens: across tiles, blocks of rows and splits of the cache
CAPACITY = 576
EPSILON = 0.05  # large enough to affect the results


@cache
def tables(width):
    angles = np.outer(np.arange(CAPACITY), 1e4 ** (-np.arange(width // 2) / (width // 2)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@cache
def norms(width):
    return np.random.default_rng(width).uniform(0.5, 1.5, (2, width)).astype(np.float32)


def attention(variant, shape, *, table=None, norm=None, **more):
    """`table`, `norm`: widths other than those that fit the heads."""
    width, free = shape.width, [1, shape.kv_heads, "capacity", shape.width]
    inputs = {
        "qkv": (TensorProto.FLOAT, [1, "tokens", shape.projections * width]),
        "past_key": (TensorProto.UINT16, free), "past_value": (TensorProto.UINT16, free),
        "total": (TensorProto.INT32, []),
        **{name: (TensorProto.FLOAT, ["places", table or width // 2]) for name in ("cos", "sin")},
    }  # fmt: skip
    if shape.norms:
        inputs |= {name: (TensorProto.FLOAT, [norm or width]) for name in ("q_norm", "k_norm")}
    outputs = {"out": (TensorProto.FLOAT, [1, "tokens", shape.heads * width]),
               "key": (TensorProto.UINT16, free), "value": (TensorProto.UINT16, free)}  # fmt: skip
    attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "scale": width**-0.5, "epsilon": EPSILON}
    return operator_session(variant, "CachedAttention", inputs, outputs, **attributes | more)


def new_cache(shape):
    return dict(zip(("key", "value"), new_tiled_tensors(["key_0", "value_0"], shape.kv_heads, CAPACITY, shape.width),
                    strict=True))  # fmt: skip


def attend(session, shape, states, qkv, past, rotary=None):
    """Run one step: qkv [tokens, projections * width] -> [tokens, heads, width]."""
    cos, sin = rotary or tables(shape.width)
    binding = session.io_binding()
    feeds = {"qkv": qkv[None], "total": np.array(past + len(qkv), np.int32), "cos": cos, "sin": sin}
    if shape.norms:
        feeds |= dict(zip(("q_norm", "k_norm"), norms(shape.width), strict=True))
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name, state in states.items():
        binding.bind_ortvalue_input(f"past_{name}", state.value)
        binding.bind_ortvalue_output(name, state.value)
    binding.bind_output("out")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy()[0].reshape(len(qkv), shape.heads, shape.width)


def steps_of(shape, lengths=STEP_LENGTHS, seed=1):
    """Return (past, qkv) of each step."""
    rows = np.random.default_rng(seed).normal(0, 2, (sum(lengths), shape.projections * shape.width)).astype(np.float32)
    ends = np.cumsum(lengths)
    return [(end - count, rows[end - count : end]) for end, count in zip(ends, lengths, strict=True)]


def run_steps(session, shape, steps):
    """Return the results of steps on an empty cache, and the cache."""
    states = new_cache(shape)
    return [attend(session, shape, states, rows, past) for past, rows in steps], states


@cache
def expected_of(shape):
    """Return attention of all tokens at once, keys and values, in float64 with the cache rounded to bfloat16."""
    rows = np.concatenate([rows for _, rows in steps_of(shape)]).astype(np.float64)
    parts = rows.reshape(len(rows), -1, shape.width)
    query, key, value = np.split(parts, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if shape.norms:
        query, key = (part / np.sqrt(np.square(part).mean(-1, keepdims=True) + EPSILON) * norm
                      for part, norm in zip((query, key), norms(shape.width), strict=True))  # fmt: skip
    query, key = (rotate(part) for part in (query, key))
    key, value = (from_bfloat16(to_bfloat16(part)).astype(np.float64) for part in (key, value))
    group, out = shape.heads // shape.kv_heads, np.empty_like(query)
    hidden = np.triu(np.full((len(rows), len(rows)), -np.inf), 1)
    for head in range(shape.heads):
        scores = query[:, head] @ key[:, head // group].T * shape.width**-0.5 + hidden
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = weights @ value[:, head // group] / weights.sum(1, keepdims=True)
    return out, key, value


def rotate(part):
    cos, sin = (table[: len(part), None].astype(np.float64) for table in tables(part.shape[-1]))
    low, high = np.split(part, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_a_growing_cache(variant, shape):
    results, states = run_steps(attention(variant, shape), shape, steps_of(shape))
    expected, key, value = expected_of(shape)
    assert np.array_equal(states["value"].read(sum(STEP_LENGTHS))[0].transpose(1, 0, 2), value)
    cached = states["key"].read(sum(STEP_LENGTHS))[0].transpose(1, 0, 2)
    assert (np.abs(cached - key) <= np.abs(key) / 128 + 1e-6).all() and (cached == key).mean() > 0.99
    limit = 5e-3 if variant.name == "avx512-bf16" else 1e-4  # it also rounds queries and weights to bfloat16
    for result, other in zip(results, np.split(expected, np.cumsum(STEP_LENGTHS)[:-1]), strict=True):
        assert relative_error(result, other) < limit


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(variant, shape):
    one, two = (attention(variant, shape, threads=count) for count in (1, 2))
    steps = steps_of(shape)
    results, states = run_steps(one, shape, steps)
    others, other_states = run_steps(two, shape, steps)
    assert all(np.array_equal(*pair) for pair in zip(results, others, strict=True))
    assert all(np.array_equal(states[name].read(CAPACITY), other_states[name].read(CAPACITY)) for name in states)


def test_concurrent_conversations(variant):
    shape = SHAPES[3]
    session = attention(variant, shape)
    conversations = [steps_of(shape, STEP_LENGTHS[seed:] + STEP_LENGTHS[:seed], seed) for seed in range(8)]
    expected = [run_steps(session, shape, steps)[0] for steps in conversations]
    results = run_concurrently([lambda steps=steps: run_steps(session, shape, steps)[0] for steps in conversations])
    assert all(np.array_equal(*pair) for result, other in zip(results, expected, strict=True)
               for pair in zip(result, other, strict=True))  # fmt: skip


def test_overwritten_tokens_have_no_effect(variant):
    shape = SHAPES[3]
    session, steps = attention(variant, shape), steps_of(shape)
    states = new_cache(shape)
    attend(session, shape, states, 100 * np.concatenate([rows for _, rows in steps]), 0)
    assert all(np.array_equal(attend(session, shape, states, rows, past), expected)
               for (past, rows), expected in zip(steps, run_steps(session, shape, steps)[0], strict=True))  # fmt: skip


@pytest.mark.parametrize("count", [1, 40])
def test_a_dominant_key_receives_all_attention(variant, count):
    """Each new token's query matches one of 300 cached keys at various positions. All values are exact in bfloat16."""
    shape, past = Heads(4, 2, 128, False), 300
    random = np.random.default_rng(3)
    keys, values = (random.choice([-8.0, 8.0], (past, 2, 128)), random.integers(-99, 99, (past, 2, 128)))
    wanted = np.concatenate([[0, 15, 16, 63, 64, 255, 256, 299], random.integers(0, past, count - 1)])[:count]
    first, then = np.zeros((past, 8, 128), np.float32), np.zeros((count, 8, 128), np.float32)
    first[:, 4:6], first[:, 6:] = keys, values
    then[:, :4] = np.repeat(keys[wanted], 2, axis=1)
    still = (np.ones((CAPACITY, 64), np.float32), np.zeros((CAPACITY, 64), np.float32))
    session, states = attention(variant, shape), new_cache(shape)
    mean = attend(session, shape, states, first.reshape(past, -1), 0, still)[-1]
    # queries of zeros attend equally to all keys
    assert np.abs(mean - np.repeat(values.mean(0), 2, axis=0)).max() < 0.5
    out = attend(session, shape, states, then.reshape(count, -1), past, still)
    np.testing.assert_allclose(out, np.repeat(values[wanted], 2, axis=1), rtol=1e-5, atol=1e-5)


def test_cache_contents_beyond_the_tokens_have_no_effect(variant):
    """They may hold NaN from an earlier conversation."""
    shape = SHAPES[3]
    session, clean, dirty = attention(variant, shape), new_cache(shape), new_cache(shape)
    for state in dirty.values():
        state.write(0, np.full((1, shape.kv_heads, CAPACITY, shape.width), np.nan, np.float32))
    for past, qkv in steps_of(shape):
        result, other = (attend(session, shape, states, qkv, past) for states in (dirty, clean))
        assert np.array_equal(result, other)


def refusal(session, shape, *, total=3, capacity=64, places=64, half=None, norm=None, shared=True):
    """Return the error message of a step of three tokens."""
    binding = session.io_binding()
    qkv = np.zeros((1, 3, shape.projections * shape.width), np.float32)
    table = np.ones((places, half or shape.width // 2), np.float32)
    feeds = {"qkv": qkv, "total": np.array(total, np.int32), "cos": table, "sin": table}
    if norm:
        feeds |= dict.fromkeys(("q_norm", "k_norm"), np.ones(norm, np.float32))
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    empty = np.zeros((1, shape.kv_heads, capacity, shape.width), np.uint16)
    caches = [ort.OrtValue.ortvalue_from_numpy(empty.copy()) for _ in range(4)]
    for name, past, present in zip(("key", "value"), caches[:2], caches[:2] if shared else caches[2:], strict=True):
        binding.bind_ortvalue_input(f"past_{name}", past)
        binding.bind_ortvalue_output(name, present)
    binding.bind_output("out")
    with pytest.raises(RUN_ERRORS) as caught:
        session.run_with_iobinding(binding)
    return str(caught.value)


def test_invalid_steps(variant):
    shape = Heads(4, 2, 64, False)
    session = attention(variant, shape)
    for wrong in ({"total": 2}, {"total": 65}, {"total": 33, "places": 32}, {"total": -1}):
        assert "the tokens do not fit the cache" in refusal(session, shape, **wrong)
    assert "capacity of a cache must be a multiple of 64" in refusal(session, shape, capacity=80)
    assert "must be bound both as input and as output" in refusal(session, shape, shared=False)
    for width in (48, 288):
        narrow = Heads(4, 2, width, False)
        assert "must be a multiple of 32 up to 256" in refusal(attention(variant, narrow), narrow)
    half = attention(variant, shape, table="half")
    assert "the rotary tables must be half as wide as a head" in refusal(half, shape, half=16)
    normed = Heads(4, 2, 64, True)
    assert "a norm must be as wide as a head" in refusal(attention(variant, normed, norm="norm"), normed, norm=32)
    other = attention(variant, shape, num_heads=6)
    assert "cache and projections have different heads" in refusal(other, shape)


def test_invalid_numbers_of_heads(variant):
    for heads, kv_heads in ((4, 3), (0, 1), (4, 0), (4, -2)):
        with pytest.raises(RUN_ERRORS, match="num_heads must be a multiple of kv_num_heads"):
            attention(variant, Heads(4, 2, 64, False), num_heads=heads, kv_num_heads=kv_heads)


# --- PatchAttention -------------------------------------------------------------------------------

PICTURES = ((1, 64), (7, 80), (64, 72), (200, 64), (333, 80), (96, 34), (130, 256))  # patches, width of a head


def patch_attention(variant, width, *, heads=3, threads=2, windows=False, given=5, **more):
    """`given`: the number of inputs."""
    inputs = {"qkv": (TensorProto.FLOAT, [1, "patches", "all"]),
              **{name: (TensorProto.FLOAT, [1, "rotary", "half"]) for name in ("cos", "sin")}}  # fmt: skip
    if windows:
        inputs |= {"window_slots": (TensorProto.INT64, ["windows", "slots"]),
                   "window_mask": (TensorProto.BOOL, ["windows", 1, "rows", "columns"])}  # fmt: skip
    inputs = dict(list(inputs.items())[:given])
    attributes = {"num_heads": heads, "scale": width**-0.5} | more
    outputs = {"out": (TensorProto.FLOAT, [1, "patches", "hidden"])}
    return operator_session(variant, "PatchAttention", inputs, outputs, threads=threads, **attributes)


def patches_of(count, width, heads=3):
    random = np.random.default_rng([count, width])
    angles = random.uniform(0, 30, (1, count, width // 2))
    feeds = {"qkv": random.normal(0, 2, (1, count, 3 * heads * width)), "cos": np.cos(angles), "sin": np.sin(angles)}
    return {name: array.astype(np.float32) for name, array in feeds.items()}


def windows_of(count, slots):
    """Assign patches in random order to windows of `slots` slots, some of which are empty."""
    random = np.random.default_rng([count, slots])
    windows = -(-count // slots) + 2
    held = np.zeros(windows * slots, bool)
    held[random.permutation(windows * slots)[:count]] = True
    places = np.zeros(windows * slots, np.int64)
    places[held] = random.permutation(count)
    mask = np.broadcast_to(held.reshape(windows, 1, 1, slots), (windows, 1, slots, slots))
    return {"window_slots": places.reshape(windows, slots), "window_mask": np.ascontiguousarray(mask)}


def expected_attention(feeds, width, mask):
    """Return attention in float64; mask [patches, patches]: whether a row's patch attends to a column's."""
    parts = feeds["qkv"][0].astype(np.float64).reshape(len(mask), 3, -1, width)
    cos, sin = (feeds[name][0][:, None].astype(np.float64) for name in ("cos", "sin"))
    low, high = np.split(parts[:, :2], 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    query, key = np.moveaxis(np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1), 1, 0)
    scores = np.einsum("qhw,khw->hqk", query, key) * width**-0.5
    weights = np.exp(np.where(mask, scores, -np.inf) - scores.max())
    return np.einsum("hqk,khw->qhw", weights / weights.sum(-1, keepdims=True), parts[:, 2]).reshape(len(mask), -1)


@pytest.mark.parametrize("count, width", PICTURES)
def test_attention_without_windows(variant, count, width):
    feeds = patches_of(count, width)
    result = patch_attention(variant, width).run(None, feeds)[0][0]
    assert relative_error(result, expected_attention(feeds, width, np.ones((count, count), bool))) < 1e-2
    assert np.array_equal(result, patch_attention(variant, width, threads=1).run(None, feeds)[0][0])


@pytest.mark.parametrize("count, width", PICTURES)
@pytest.mark.parametrize("slots", [16, 64, 100])
def test_attention_within_windows(variant, count, width, slots):
    feeds, windows = patches_of(count, width), windows_of(count, slots)
    window = np.empty(count, np.int64)
    held = windows["window_mask"][:, 0, 0]
    window[windows["window_slots"][held]] = np.nonzero(held)[0]
    session = patch_attention(variant, width, windows=True)
    result = session.run(None, feeds | windows)[0][0]
    expected = expected_attention(feeds, width, window[:, None] == window)
    assert relative_error(result, expected) < 1e-2
    other = expected[np.roll(np.arange(count), 1)]
    assert count == 1 or relative_error(result, other) > 0.1
    others = run_concurrently([lambda: session.run(None, feeds | windows)[0][0] for _ in range(8)])
    assert all(np.array_equal(result, other) for other in others)


def test_towers_of_different_widths_share_scratch_memory(variant):
    """The scratch memory of a thread holds data of the previous tower."""
    sessions = [(patch_attention(variant, width, threads=1), patches_of(count, width)) for count, width in PICTURES]
    expected = [session.run(None, feeds)[0] for session, feeds in sessions]
    wrong = patches_of(333, 80)
    wrong["qkv"][:] = np.nan
    for (session, feeds), result in zip(sessions[::-1], expected[::-1], strict=True):
        assert np.isnan(sessions[4][0].run(None, wrong)[0]).all()
        assert np.array_equal(session.run(None, feeds)[0], result)


def test_invalid_inputs_of_patch_attention(variant):
    plain, windowed = (patch_attention(variant, 64, windows=windows) for windows in (False, True))
    feeds, windows = patches_of(20, 64), windows_of(20, 8)

    def refusal(session, **wrong):
        with pytest.raises(RUN_ERRORS) as caught:
            session.run(None, wrong)
        return str(caught.value)

    for width in (63, 258):
        some = np.zeros((1, 20, 3 * 3 * width), np.float32)
        assert "must be even and at most 256" in refusal(plain, **feeds | {"qkv": some})
    for name in ("cos", "sin"):
        assert "half as wide as a head" in refusal(patch_attention(variant, 64), **patches_of(20, 64) | {
            name: np.zeros((1, 20, 16), np.float32)})  # fmt: skip
    uneven = np.zeros((1, 20, 3 * 3 * 64 + 3), np.float32)
    assert "must be even and at most 256" in refusal(plain, **feeds | {"qkv": uneven})
    for name in ("cos", "sin"):
        assert "must have a row for each patch" in refusal(plain, **feeds | {name: feeds[name][:, :19]})
    empty = {"window_slots": np.zeros((0, 8), np.int64), "window_mask": np.zeros((0, 1, 8, 8), bool)}
    assert "a patch is in none of the windows" in refusal(windowed, **feeds | empty)
    narrow = windows["window_mask"][:, :, :4, :4]
    wrong = windows | {"window_mask": narrow}
    assert "must have shape [windows, 1, slots, slots]" in refusal(windowed, **feeds | wrong)
    held = windows["window_mask"][:, 0, 0]
    for patch in (-1, 20, windows["window_slots"][held][-1]):
        slots = windows["window_slots"].copy()
        slots[tuple(np.argwhere(held)[0])] = patch
        wrong = windows | {"window_slots": slots}
        assert "index out of range, or a patch is in two windows" in refusal(windowed, **feeds | wrong)
    missing = windows["window_mask"].copy()
    missing[tuple(np.argwhere(held)[0])[0], :, :, np.argwhere(held)[0][1]] = False
    assert "a patch is in none of the windows" in refusal(windowed, **feeds | windows | {"window_mask": missing})
    half = patch_attention(variant, 64, windows=True, given=4)
    assert "must have shape [windows, 1, slots, slots]" in refusal(half, **feeds, window_slots=windows["window_slots"])
    with pytest.raises(RUN_ERRORS, match="num_heads must be at least 1"):
        patch_attention(variant, 64, num_heads=0)
    with pytest.raises(RUN_ERRORS, match="an attribute exceeds 32 bits"):
        patch_attention(variant, 64, num_heads=2**32 + 3)


OUT_OF_MEMORY = """
import resource
import sys
import numpy as np
from native_sessions import COMPILED
from test_native_attention import RUN_ERRORS, patch_attention

count, width = 8000, 256
session = patch_attention(COMPILED[int(sys.argv[1])], width, heads=2, windows=True)
feeds = {"qkv": np.zeros((1, count, 6 * width), np.float32)}
feeds |= dict.fromkeys(("cos", "sin"), np.ones((1, count, width // 2), np.float32))


def windows(each):
    mask = np.ones((count // each, 1, each, each), bool)
    return {"window_slots": np.arange(count).reshape(-1, each), "window_mask": mask}


small, large = windows(80), windows(count)
session.run(None, feeds | small)  # allocates the memory of the output
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
try:
    session.run(None, feeds | large)
except RUN_ERRORS as exc:
    print(exc)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
session.run(None, feeds | small)
print("continued")
"""


def test_a_step_that_runs_out_of_memory_fails_and_the_next_one_runs(variant):
    """Scratch memory is allocated in ONNX Runtime's threads, through which no exception may propagate."""
    line = [sys.executable, "-c", OUT_OF_MEMORY, str(COMPILED.index(variant))]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=True)
    error, after = done.stdout.splitlines()
    assert "out of memory for the scratch buffers of a step" in error and after == "continued"


@pytest.mark.parametrize("part", ["query", "key"])
def test_nan_affects_only_its_own_head(variant, part):
    """It must survive the exponential function, too."""
    feeds, heads, width = patches_of(70, 64), 3, 64
    session, expected = patch_attention(variant, width), patch_attention(variant, width).run(None, feeds)[0]
    feeds["qkv"][0, 5, ("query", "key").index(part) * heads * width + width] = np.nan  # of the second head
    result = session.run(None, feeds)[0][0].reshape(70, heads, width)
    affected = np.zeros((70, heads), bool)
    affected[5 if part == "query" else slice(None), 1] = True
    assert np.array_equal(np.isnan(result).all(-1), affected) and np.array_equal(np.isnan(result).any(-1), affected)
    assert np.array_equal(result[~affected], expected[0].reshape(70, heads, width)[~affected])
