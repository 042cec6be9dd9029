"""The native operators do what they say, in every form that this processor runs."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.decoder import bfloat16, new_states, widened
from gog_edge.engines.onnx.native import DOMAIN, FLAVOURS, PANEL
from gog_edge.engines.onnx.native.flavours import processor_flags, runnable
from gog_edge.engines.onnx.session import RUN_ERRORS as REFUSED
from gog_edge.exporting.policy.native_graph import filled, in_turns, panels, panels_of_scales
from gog_edge.exporting.quantization import dequantise, quantise
from gog_edge.policy.manifest import Blocks

HERE = [flavour for flavour in runnable(processor_flags()) if (native.FOLDER / flavour.file).is_file()]

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no library: {native.why_none()}")


def session_of(flavour, kind, inputs, outputs, *, threads=2, **attributes):
    """One operator in a graph of its own; inputs and outputs by name are (type, shape), in the operator's order."""
    node = helper.make_node(kind, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    declared = [[helper.make_tensor_value_info(name, *form) for name, form in some.items()]
                for some in (inputs, outputs)]  # fmt: skip
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_model(helper.make_graph([node], kind, *declared), opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.FOLDER / flavour.file))
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def at_once(works):
    """Results of functions that run in four threads."""
    with ThreadPoolExecutor(4) as threads:
        return [done.result() for done in [threads.submit(work) for work in works]]


@pytest.fixture(scope="module", params=HERE or FLAVOURS[:1], ids=lambda flavour: flavour.name)
def flavour(request):
    return request.param


# --- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    width: int
    norms: bool

    @property
    def all(self):
        return self.heads + 2 * self.kv_heads

    def __str__(self):
        return f"{self.heads} over {self.kv_heads}, {self.width} wide{', norms' * self.norms}"


SHAPES = (Heads(16, 8, 128, True), Heads(28, 4, 128, False), Heads(16, 2, 128, False), Heads(4, 2, 64, True),
          Heads(8, 1, 256, False), Heads(6, 2, 32, False), Heads(2, 1, 96, True))  # fmt: skip
TALK = (37, 1, 1, 300, 5, 17, 129, 2)  # tokens of steps: across tiles, blocks of rows and splits of the cache
CAPACITY = 576
EPSILON = 0.05  # large enough to be seen in what is attended


@cache
def tables(width):
    angles = np.outer(np.arange(CAPACITY), 1e4 ** (-np.arange(width // 2) / (width // 2)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@cache
def norms(width):
    return np.random.default_rng(width).uniform(0.5, 1.5, (2, width)).astype(np.float32)


def attention(flavour, shape, *, table=None, norm=None, **more):
    """`table`, `norm`: widths, where they are others than the heads want."""
    width, free = shape.width, [1, shape.kv_heads, "capacity", shape.width]
    inputs = {
        "qkv": (TensorProto.FLOAT, [1, "tokens", shape.all * width]),
        "past_key": (TensorProto.UINT16, free), "past_value": (TensorProto.UINT16, free),
        "total": (TensorProto.INT32, []),
        **{name: (TensorProto.FLOAT, ["places", table or width // 2]) for name in ("cos", "sin")},
    }  # fmt: skip
    if shape.norms:
        inputs |= {name: (TensorProto.FLOAT, [norm or width]) for name in ("q_norm", "k_norm")}
    outputs = {"out": (TensorProto.FLOAT, [1, "tokens", shape.heads * width]),
               "key": (TensorProto.UINT16, free), "value": (TensorProto.UINT16, free)}  # fmt: skip
    attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "scale": width**-0.5, "epsilon": EPSILON}
    return session_of(flavour, "CachedAttention", inputs, outputs, **attributes | more)


def new_cache(shape):
    return dict(zip(("key", "value"), new_states(["key_0", "value_0"], shape.kv_heads, CAPACITY, shape.width),
                    strict=True))  # fmt: skip


def attend(session, shape, states, qkv, past, rotary=None):
    """One step [tokens, all heads * width] -> [tokens, heads, width]."""
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


def steps_of(shape, talk=TALK, seed=1):
    """(tokens before it, projections) of each step."""
    rows = np.random.default_rng(seed).normal(0, 2, (sum(talk), shape.all * shape.width)).astype(np.float32)
    ends = np.cumsum(talk)
    return [(end - count, rows[end - count : end]) for end, count in zip(ends, talk, strict=True)]


def hold(session, shape, steps):
    states = new_cache(shape)
    return [attend(session, shape, states, rows, past) for past, rows in steps], states


@cache
def expected_of(shape):
    """What is attended by all tokens of the talk, and the keys and values, in double precision but for the cache's."""
    rows = np.concatenate([rows for _, rows in steps_of(shape)]).astype(np.float64)
    parts = rows.reshape(len(rows), -1, shape.width)
    query, key, value = np.split(parts, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if shape.norms:
        query, key = (part / np.sqrt(np.square(part).mean(-1, keepdims=True) + EPSILON) * norm
                      for part, norm in zip((query, key), norms(shape.width), strict=True))  # fmt: skip
    query, key = (turned(part) for part in (query, key))
    key, value = (widened(bfloat16(part)).astype(np.float64) for part in (key, value))
    group, out = shape.heads // shape.kv_heads, np.empty_like(query)
    hidden = np.triu(np.full((len(rows), len(rows)), -np.inf), 1)
    for head in range(shape.heads):
        scores = query[:, head] @ key[:, head // group].T * shape.width**-0.5 + hidden
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = weights @ value[:, head // group] / weights.sum(1, keepdims=True)
    return out, key, value


def turned(part):
    cos, sin = (table[: len(part), None].astype(np.float64) for table in tables(part.shape[-1]))
    low, high = np.split(part, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_a_cache_that_grows(flavour, shape):
    said, states = hold(attention(flavour, shape), shape, steps_of(shape))
    expected, key, value = expected_of(shape)
    assert np.array_equal(states["value"].read(sum(TALK))[0].transpose(1, 0, 2), value)
    kept = states["key"].read(sum(TALK))[0].transpose(1, 0, 2)
    assert (np.abs(kept - key) <= np.abs(key) / 128 + 1e-6).all() and (kept == key).mean() > 0.99
    most = 5e-3 if flavour.name == "avx512-bf16" else 1e-4  # it rounds queries and weights, too
    for mine, theirs in zip(said, np.split(expected, np.cumsum(TALK)[:-1]), strict=True):
        assert np.sqrt(np.square(mine - theirs).mean() / np.square(theirs).mean()) < most


@needs_library
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_attention_comes_to_the_same_bits_whatever_the_threads(flavour, shape):
    alone, both = (attention(flavour, shape, threads=count) for count in (1, 2))
    steps = steps_of(shape)
    said, states = hold(alone, shape, steps)
    again, kept = hold(both, shape, steps)
    assert all(np.array_equal(*pair) for pair in zip(said, again, strict=True))
    assert all(np.array_equal(states[name].read(CAPACITY), kept[name].read(CAPACITY)) for name in states)


@needs_library
def test_conversations_attended_at_once_are_those_attended_one_after_the_other(flavour):
    shape = SHAPES[3]
    session = attention(flavour, shape)
    talks = [steps_of(shape, TALK[seed:] + TALK[:seed], seed) for seed in range(8)]
    expected = [hold(session, shape, steps)[0] for steps in talks]
    said = at_once([lambda steps=steps: hold(session, shape, steps)[0] for steps in talks])
    assert all(np.array_equal(*pair) for mine, theirs in zip(said, expected, strict=True)
               for pair in zip(mine, theirs, strict=True))  # fmt: skip


@needs_library
def test_tokens_that_were_taken_back_are_not_attended(flavour):
    shape = SHAPES[3]
    session, steps = attention(flavour, shape), steps_of(shape)
    states = new_cache(shape)
    attend(session, shape, states, 100 * np.concatenate([rows for _, rows in steps]), 0)
    assert all(np.array_equal(attend(session, shape, states, rows, past), theirs)
               for (past, rows), theirs in zip(steps, hold(session, shape, steps)[0], strict=True))  # fmt: skip


@needs_library
@pytest.mark.parametrize("count", [1, 40])
def test_a_key_that_stands_out_gets_all_the_attention(flavour, count):
    """Each new token asks for one of the 300 before it, wherever that lies; numbers that bfloat16 holds."""
    shape, seen = Heads(4, 2, 128, False), 300
    random = np.random.default_rng(3)
    keys, values = (random.choice([-8.0, 8.0], (seen, 2, 128)), random.integers(-99, 99, (seen, 2, 128)))
    wanted = np.concatenate([[0, 15, 16, 63, 64, 255, 256, 299], random.integers(0, seen, count - 1)])[:count]
    first, then = np.zeros((seen, 8, 128), np.float32), np.zeros((count, 8, 128), np.float32)
    first[:, 4:6], first[:, 6:] = keys, values
    then[:, :4] = np.repeat(keys[wanted], 2, axis=1)
    still = (np.ones((CAPACITY, 64), np.float32), np.zeros((CAPACITY, 64), np.float32))
    session, states = attention(flavour, shape), new_cache(shape)
    mean = attend(session, shape, states, first.reshape(seen, -1), 0, still)[-1]
    assert np.abs(mean - np.repeat(values.mean(0), 2, axis=0)).max() < 0.5  # queries of zeros attend to all alike
    out = attend(session, shape, states, then.reshape(count, -1), seen, still)
    np.testing.assert_allclose(out, np.repeat(values[wanted], 2, axis=1), rtol=1e-5, atol=1e-5)


@needs_library
def test_what_is_left_in_a_cache_behind_the_tokens_is_of_no_account(flavour):
    """A conversation that went wrong may have left what is no number."""
    shape = SHAPES[3]
    session, clean, spoiled = attention(flavour, shape), new_cache(shape), new_cache(shape)
    for state in spoiled.values():
        state.write(0, np.full((1, shape.kv_heads, CAPACITY, shape.width), np.nan, np.float32))
    for past, qkv in steps_of(shape):
        mine, other = (attend(session, shape, states, qkv, past) for states in (spoiled, clean))
        assert np.array_equal(mine, other)


def refused(session, shape, *, total=3, capacity=64, places=64, half=None, norm=None, shared=True):
    """What a step of three tokens is refused with."""
    binding = session.io_binding()
    qkv = np.zeros((1, 3, shape.all * shape.width), np.float32)
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
    with pytest.raises(REFUSED) as caught:
        session.run_with_iobinding(binding)
    return str(caught.value)


@needs_library
def test_steps_that_attention_cannot_take_are_refused(flavour):
    shape = Heads(4, 2, 64, False)
    session = attention(flavour, shape)
    for wrong in ({"total": 2}, {"total": 65}, {"total": 33, "places": 32}, {"total": -1}):
        assert "the tokens do not fit the cache" in refused(session, shape, **wrong)
    assert "capacity must be a multiple of 64" in refused(session, shape, capacity=80)
    assert "bind each cache as input and as output" in refused(session, shape, shared=False)
    for width in (48, 288):
        narrow = Heads(4, 2, width, False)
        assert "a multiple of 32 wide, 256 at the most" in refused(attention(flavour, narrow), narrow)
    half = attention(flavour, shape, table="half")
    assert "the rotary tables are not half as wide as a head" in refused(half, shape, half=16)
    normed = Heads(4, 2, 64, True)
    assert "a norm is not as wide as a head" in refused(attention(flavour, normed, norm="norm"), normed, norm=32)
    other = attention(flavour, shape, num_heads=6)
    assert "the cache has other heads than the projections" in refused(other, shape)


@needs_library
def test_heads_that_do_not_divide_are_refused_at_once(flavour):
    for heads, kv_heads in ((4, 3), (0, 1), (4, 0), (4, -2)):
        with pytest.raises(REFUSED, match="heads are no multiple of kv_heads"):
            attention(flavour, Heads(4, 2, 64, False), num_heads=heads, kv_num_heads=kv_heads)


# --- patches of a picture --------------------------------------------------------------------------

PICTURES = ((1, 64), (7, 80), (64, 72), (200, 64), (333, 80), (96, 34), (130, 256))  # patches, width of a head


def patch_attention(flavour, width, *, heads=3, threads=2, windows=False, given=5, **more):
    """`given`: how many of the inputs it has."""
    inputs = {"qkv": (TensorProto.FLOAT, [1, "patches", "all"]),
              **{name: (TensorProto.FLOAT, [1, "rotary", "half"]) for name in ("cos", "sin")}}  # fmt: skip
    if windows:
        inputs |= {"window_slots": (TensorProto.INT64, ["windows", "slots"]),
                   "window_mask": (TensorProto.BOOL, ["windows", 1, "rows", "columns"])}  # fmt: skip
    inputs = dict(list(inputs.items())[:given])
    attributes = {"num_heads": heads, "scale": width**-0.5} | more
    outputs = {"out": (TensorProto.FLOAT, [1, "patches", "hidden"])}
    return session_of(flavour, "PatchAttention", inputs, outputs, threads=threads, **attributes)


def patches_of(count, width, heads=3):
    random = np.random.default_rng([count, width])
    angles = random.uniform(0, 30, (1, count, width // 2))
    feeds = {"qkv": random.normal(0, 2, (1, count, 3 * heads * width)), "cos": np.cos(angles), "sin": np.sin(angles)}
    return {name: array.astype(np.float32) for name, array in feeds.items()}


def windows_of(count, slots):
    """Patches in any order, spread over windows of any number of slots, some of which are empty."""
    random = np.random.default_rng([count, slots])
    windows = -(-count // slots) + 2
    held = np.zeros(windows * slots, bool)
    held[random.permutation(windows * slots)[:count]] = True
    places = np.zeros(windows * slots, np.int64)
    places[held] = random.permutation(count)
    mask = np.broadcast_to(held.reshape(windows, 1, 1, slots), (windows, 1, slots, slots))
    return {"window_slots": places.reshape(windows, slots), "window_mask": np.ascontiguousarray(mask)}


def seen_by_all(feeds, width, seen):
    """In double precision; `seen` [patches, patches]: by the row's patch, the column's."""
    parts = feeds["qkv"][0].astype(np.float64).reshape(len(seen), 3, -1, width)
    cos, sin = (feeds[name][0][:, None].astype(np.float64) for name in ("cos", "sin"))
    low, high = np.split(parts[:, :2], 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    query, key = np.moveaxis(np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1), 1, 0)
    scores = np.einsum("qhw,khw->hqk", query, key) * width**-0.5
    weights = np.exp(np.where(seen, scores, -np.inf) - scores.max())
    return np.einsum("hqk,khw->qhw", weights / weights.sum(-1, keepdims=True), parts[:, 2]).reshape(len(seen), -1)


def off(mine, theirs):
    return np.sqrt(np.square(mine - theirs).mean() / np.square(theirs).mean())


@needs_library
@pytest.mark.parametrize("count, width", PICTURES)
def test_every_patch_sees_every_other(flavour, count, width):
    feeds = patches_of(count, width)
    said = patch_attention(flavour, width).run(None, feeds)[0][0]
    assert off(said, seen_by_all(feeds, width, np.ones((count, count), bool))) < 1e-2
    alone = patch_attention(flavour, width, threads=1).run(None, feeds)[0][0]
    assert np.array_equal(said, alone)


@needs_library
@pytest.mark.parametrize("count, width", PICTURES)
@pytest.mark.parametrize("slots", [16, 64, 100])
def test_patches_see_their_window(flavour, count, width, slots):
    feeds, windows = patches_of(count, width), windows_of(count, slots)
    window = np.empty(count, np.int64)
    held = windows["window_mask"][:, 0, 0]
    window[windows["window_slots"][held]] = np.nonzero(held)[0]
    session = patch_attention(flavour, width, windows=True)
    said = session.run(None, feeds | windows)[0][0]
    expected = seen_by_all(feeds, width, window[:, None] == window)
    assert off(said, expected) < 1e-2
    other = expected[np.roll(np.arange(count), 1)]
    assert count == 1 or off(said, other) > 0.1
    again = at_once([lambda: session.run(None, feeds | windows)[0][0] for _ in range(8)])
    assert all(np.array_equal(said, each) for each in again)


@needs_library
def test_patches_of_towers_of_several_widths_do_not_meet(flavour):
    """A thread's scratch is that of the tower before."""
    sessions = [(patch_attention(flavour, width, threads=1), patches_of(count, width)) for count, width in PICTURES]
    expected = [session.run(None, feeds)[0] for session, feeds in sessions]
    wrong = patches_of(333, 80)
    wrong["qkv"][:] = np.nan
    for (session, feeds), theirs in zip(sessions[::-1], expected[::-1], strict=True):
        assert np.isnan(sessions[4][0].run(None, wrong)[0]).all()
        assert np.array_equal(session.run(None, feeds)[0], theirs)


@needs_library
def test_pictures_that_patch_attention_cannot_take_are_refused(flavour):
    plain, windowed = (patch_attention(flavour, 64, windows=windows) for windows in (False, True))
    feeds, windows = patches_of(20, 64), windows_of(20, 8)

    def refused(session, **wrong):
        with pytest.raises(REFUSED) as caught:
            session.run(None, wrong)
        return str(caught.value)

    for width in (63, 258):
        some = np.zeros((1, 20, 3 * 3 * width), np.float32)
        assert "an even width, 256 at the most" in refused(plain, **feeds | {"qkv": some})
    for name in ("cos", "sin"):
        assert "rotary angles half as wide" in refused(patch_attention(flavour, 64), **patches_of(20, 64) | {
            name: np.zeros((1, 20, 16), np.float32)})  # fmt: skip
    uneven = np.zeros((1, 20, 3 * 3 * 64 + 3), np.float32)
    assert "an even width, 256 at the most" in refused(plain, **feeds | {"qkv": uneven})
    for name in ("cos", "sin"):
        assert "each patch must have rotary angles" in refused(plain, **feeds | {name: feeds[name][:, :19]})
    empty = {"window_slots": np.zeros((0, 8), np.int64), "window_mask": np.zeros((0, 1, 8, 8), bool)}
    assert "a patch is in no window" in refused(windowed, **feeds | empty)
    narrow = windows["window_mask"][:, :, :4, :4]
    assert "slots, and a mask of the same" in refused(windowed, **feeds | windows | {"window_mask": narrow})
    held = windows["window_mask"][:, 0, 0]
    for patch in (-1, 20, windows["window_slots"][held][-1]):
        slots = windows["window_slots"].copy()
        slots[tuple(np.argwhere(held)[0])] = patch
        assert "a patch is in two windows, or is none" in refused(windowed, **feeds | windows | {"window_slots": slots})
    missing = windows["window_mask"].copy()
    missing[tuple(np.argwhere(held)[0])[0], :, :, np.argwhere(held)[0][1]] = False
    assert "a patch is in no window" in refused(windowed, **feeds | windows | {"window_mask": missing})
    half = patch_attention(flavour, 64, windows=True, given=4)
    assert "slots, and a mask of the same" in refused(half, **feeds, window_slots=windows["window_slots"])
    with pytest.raises(REFUSED, match="there must be a head"):
        patch_attention(flavour, 64, num_heads=0)
    with pytest.raises(REFUSED, match="an attribute is far too large"):
        patch_attention(flavour, 64, num_heads=2**32 + 3)


STARVED = """
import resource
import numpy as np
from test_native_operators import HERE, REFUSED, patch_attention

count, width = 8000, 256
session = patch_attention(HERE[0], width, heads=2, windows=True)
feeds = {"qkv": np.zeros((1, count, 6 * width), np.float32)}
feeds |= dict.fromkeys(("cos", "sin"), np.ones((1, count, width // 2), np.float32))


def windows(each):
    mask = np.ones((count // each, 1, each, each), bool)
    return {"window_slots": np.arange(count).reshape(-1, each), "window_mask": mask}


few, all = windows(80), windows(count)
session.run(None, feeds | few)  # what comes out has its memory from now on
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
try:
    session.run(None, feeds | all)
except REFUSED as exc:
    print(exc)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
session.run(None, feeds | few)
print("goes on")
"""


@needs_library
def test_a_step_without_memory_is_refused_and_the_next_one_runs():
    """Scratch is had in ONNX Runtime's threads, through which no exception may pass."""
    done = subprocess.run([sys.executable, "-c", STARVED], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    refused, then = done.stdout.splitlines()
    assert "no memory for a step's scratch" in refused and then == "goes on"


@needs_library
@pytest.mark.parametrize("part", ["query", "key"])
def test_a_patch_that_is_no_number_spoils_its_head_alone(flavour, part):
    """Not least on the way through the powers of e."""
    feeds, heads, width = patches_of(70, 64), 3, 64
    session, expected = patch_attention(flavour, width), patch_attention(flavour, width).run(None, feeds)[0]
    feeds["qkv"][0, 5, ("query", "key").index(part) * heads * width + width] = np.nan  # of the second head
    said = session.run(None, feeds)[0][0].reshape(70, heads, width)
    spoiled = np.zeros((70, heads), bool)
    spoiled[5 if part == "query" else slice(None), 1] = True
    assert np.array_equal(np.isnan(said).all(-1), spoiled) and np.array_equal(np.isnan(said).any(-1), spoiled)
    assert np.array_equal(said[~spoiled], expected[0].reshape(70, heads, width)[~spoiled])


# --- products --------------------------------------------------------------------------------------

ROWS, COLUMNS = 512, 3 * PANEL
# Rows that are multiplied: all kernels, with halves of bytes or unpacked, in one block of rows or several.
COUNTS = (1, 2, 3, 4, 5, 6, 7, 13, 19, 40, 97, 200)
EXTREMES = (-127, 0, 127)


def product(flavour, rows=ROWS, columns=COLUMNS, bits=4, block_size=32, *, bias=False, gated=0, left=("n",), threads=2,
            **more):  # fmt: skip
    inputs = {"left": (TensorProto.FLOAT, [*left, "rows"]), "weights": (TensorProto.UINT8, ["bytes"]),
              "scales": (TensorProto.FLOAT, ["blocks"])}  # fmt: skip
    if bias:
        inputs["bias"] = (TensorProto.FLOAT, ["columns"])
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block_size, "gated": gated} | more
    attributes = {name: value for name, value in attributes.items() if value is not None}
    outputs = {"out": (TensorProto.FLOAT, [*left, columns])}
    return session_of(flavour, "BlockProduct", inputs, outputs, threads=threads, **attributes)


def multiply(session, left, weights, bias=None):
    feeds = {"left": left} | weights
    return session.run(None, feeds | ({} if bias is None else {"bias": filled(bias)}))[0]


def stored(packed, scales, bits):
    """As the operator takes what `quantise` gives."""
    return {"weights": panels(packed, bits).reshape(-1), "scales": panels_of_scales(scales).reshape(-1)}


def numbers_stored(numbers, scales, blocks):
    """The same of numbers without a sign [columns, rows]."""
    packed = numbers.astype(np.uint8).reshape(len(numbers), -1, blocks.size)
    if blocks.bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    return stored(packed, scales, blocks.bits)


@cache
def weights_of(bits, size, rows=ROWS, columns=COLUMNS):
    """(as the operator takes them, float64 [columns, rows])."""
    weight = np.random.default_rng([bits, size]).normal(0, 0.05, (columns, rows)).astype(np.float32)
    packed, scales = quantise(weight, Blocks(bits, size))
    return stored(packed, scales, bits), dequantise(packed, scales, Blocks(bits, size), rows).astype(np.float64)


def rounded(left, size):
    """What is multiplied in place of float32 rows: 8 bits, a scale for each block."""
    filled = np.pad(left, [(0, 0), (0, -left.shape[1] % size)])
    blocks = filled.reshape(len(left), -1, size)
    top = np.abs(blocks).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    whole = np.rint(blocks * factor) * (top.astype(np.float64) / 127)
    return whole.reshape(filled.shape)[:, : left.shape[1]]


@needs_library
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_rounded_rows_and_weights(flavour, bits, size, biased):
    session = product(flavour, bits=bits, block_size=size, bias=biased)
    taken, weight = weights_of(bits, size)
    random = np.random.default_rng(5)
    bias = random.normal(size=COLUMNS).astype(np.float32) if biased else None
    for count in COUNTS:
        left = random.normal(size=(count, ROWS)).astype(np.float32)
        expected = rounded(left, size) @ weight.T + (0 if bias is None else bias)
        assert np.abs(multiply(session, left, taken, bias) - expected).max() < 1e-5 * np.abs(expected).max()


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns, biased", [(512, 192, False), (80, 100, True), (1, 65, True)])
def test_gated_products(flavour, bits, rows, columns, biased):
    random, blocks = np.random.default_rng(6), Blocks(bits, 64)
    gate, other = random.normal(size=(2, columns, rows)).astype(np.float32)
    packed, scales = quantise(in_turns(gate, other), blocks)
    halves = dequantise(packed, scales, blocks, rows).reshape(-1, 2, PANEL, rows)
    weights = [halves[:, side].reshape(-1, rows)[:columns] for side in (0, 1)]
    biases = random.normal(size=(2, columns)).astype(np.float32) if biased else np.zeros((2, columns), np.float32)
    session = product(flavour, rows, columns, bits, 64, bias=biased, gated=1)
    for count in (1, 7, 40, 97):
        left = random.normal(size=(count, rows)).astype(np.float32)
        left[-1] *= 1e4  # gates that are wide open, and closed
        first, second = (rounded(left, 64) @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
        expected = first / (1 + np.exp(-np.clip(first, -700, None))) * second
        said = multiply(session, left, stored(packed, scales, bits), in_turns(*biases) if biased else None)
        for mine, right in ((said[:-1], expected[:-1]), (said[-1:], expected[-1:])):
            assert np.abs(mine - right).max(initial=0) <= 2e-5 * np.abs(right).max(initial=0)


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns", [(80, 100), (544, 1), (1, 65), (31, 192)])
def test_weights_that_fill_no_block_or_panel(flavour, bits, rows, columns):
    session = product(flavour, rows, columns, bits, 64, bias=True)
    taken, weight = weights_of(bits, 64, rows, columns)
    random = np.random.default_rng(10)
    bias = random.normal(size=columns).astype(np.float32)
    for count in COUNTS:
        left = random.normal(size=(count, rows)).astype(np.float32)
        expected = rounded(left, 64) @ weight.T + bias
        assert np.abs(multiply(session, left, taken, bias) - expected).max() < 1e-5 * np.abs(expected).max()


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_comes_to_the_same_bits_whatever_the_threads_and_the_other_rows(flavour, bits):
    taken, _ = weights_of(bits, 64)
    left = np.random.default_rng(6).normal(size=(40, ROWS)).astype(np.float32)
    alone, both = (product(flavour, bits=bits, block_size=64, threads=count) for count in (1, 2))
    expected = multiply(alone, left, taken)
    assert np.array_equal(multiply(both, left, taken), expected)
    for count in COUNTS:
        assert np.array_equal(multiply(both, left[3 : 3 + count], taken), expected[3 : 3 + count])


@needs_library
def test_products_at_once_are_those_one_after_the_other(flavour):
    session, (taken, _) = product(flavour, block_size=64), weights_of(4, 64)
    lefts = [np.random.default_rng(seed).normal(size=(count, ROWS)).astype(np.float32)
             for seed, count in enumerate(COUNTS * 6)]  # fmt: skip
    expected = [multiply(session, left, taken) for left in lefts]
    said = at_once([lambda left=left: multiply(session, left, taken) for left in lefts])
    assert all(np.array_equal(*pair) for pair in zip(said, expected, strict=True))


@needs_library
@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_ends_of_both_grids_do_not_overflow(flavour, bits, size):
    """Whole numbers with scales of one: every sum is exact."""
    random = np.random.default_rng(7)
    numbers = np.full((COLUMNS, ROWS), 2**bits - 1)
    numbers[1] = 0
    numbers[2:] = random.choice([0, 2**bits - 1], (COLUMNS - 2, ROWS))
    taken = numbers_stored(numbers, np.ones((COLUMNS, ROWS // size), np.float32), Blocks(bits, size))
    session = product(flavour, bits=bits, block_size=size)
    for count in (1, 3, 5, 40):
        left = random.choice(EXTREMES, (count, ROWS)).astype(np.float32)
        left[0], left[-1] = 127, -127
        left[:, ::size] = 127  # every block's greatest, so that its scale is one
        assert np.array_equal(multiply(session, left, taken), left @ (numbers - 2 ** (bits - 1)).T.astype(np.float64))


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_of_one_huge_number(flavour, bits):
    taken, weight = weights_of(bits, 32)
    bias = np.random.default_rng(8).normal(size=COLUMNS).astype(np.float32)
    session = product(flavour, bits=bits, bias=True)
    for count in (1, 7, 40):
        left = np.zeros((count, ROWS), np.float32)
        assert np.array_equal(multiply(session, left, taken, bias), np.tile(bias, (count, 1)))
        left[:, 5] = 1e30
        left[:, 6] = 1  # lost beside it
        left[-1, 5] = -3e-30
        left[-1, 6] = 0
        expected = left[:, 5:6] * weight[None, :, 5]
        said = multiply(session, left, taken, np.zeros_like(bias))
        np.testing.assert_allclose(said[:-1], expected[:-1], rtol=1e-5)
        np.testing.assert_allclose(said[-1], expected[-1], rtol=1e-5, atol=1e-37)


@needs_library
def test_what_is_multiplied_has_any_shape_of_up_to_four_dimensions(flavour):
    taken, weight = weights_of(4, 32)
    random = np.random.default_rng(9)
    for lead in ((), (3,), (1, 3), (2, 1, 3), (0,)):
        left = random.normal(size=(*lead, ROWS)).astype(np.float32)
        said = multiply(product(flavour, left=lead), left, taken)
        assert said.shape == (*lead, COLUMNS)
        assert np.abs(said - left @ weight.T).max(initial=0) < 0.05 * np.abs(left @ weight.T).max(initial=1)
    with pytest.raises(REFUSED, match="an input has many dimensions"):
        multiply(product(flavour, left=(1, 1, 1, 3)), np.zeros((1, 1, 1, 3, ROWS), np.float32), taken)


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(flavour, bits, wrong):
    """In its own row alone: a policy that went wrong must not speak on as if nothing were."""
    taken, _ = weights_of(bits, 32)
    session, left = product(flavour, bits=bits), np.random.default_rng(3).normal(size=(9, ROWS)).astype(np.float32)
    clean = multiply(session, left, taken)
    for place in (0, 5, 17, ROWS - 1):
        spoiled = left.copy()
        spoiled[4, place] = wrong
        said = multiply(session, spoiled, taken)
        assert not np.isfinite(said[4]).any()
        assert np.array_equal(np.delete(said, 4, axis=0), np.delete(clean, 4, axis=0))


@needs_library
def test_factors_of_other_shapes_are_refused(flavour):
    taken, _ = weights_of(4, 32)
    session = product(flavour, left=("n", "m"), bias=True)
    given = {"left": np.zeros((1, 2, ROWS), np.float32), "bias": np.zeros(COLUMNS, np.float32)} | taken
    for name, array in given.items():
        with pytest.raises(REFUSED, match="BlockProduct: factors of other shapes"):
            session.run(None, given | {name: array[..., 1:]})


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [{"bits": 5}, {"bits": 0}, {"block_size": 48}, {"block_size": 0}, {"block_size": 512}, {"K": 0}, {"N": -64}],
    ids=str,
)
def test_weights_without_a_kernel_are_refused_at_once(flavour, wrong):
    with pytest.raises(REFUSED, match="these weights are not to be had"):
        product(flavour, **wrong)


@needs_library
@pytest.mark.parametrize("name", ["K", "N", "bits", "block_size", "gated"])
def test_an_attribute_left_out_is_named(flavour, name):
    with pytest.raises(REFUSED, match=name):
        product(flavour, **{name: None})


# --- which library -----------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where libraries lie, empty."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.parametrize("best", range(len(FLAVOURS)))
def test_the_best_library_that_is_there_and_runs_is_taken(folder, monkeypatch, best):
    monkeypatch.setattr(native, "processor_flags", lambda: FLAVOURS[best].needs | FLAVOURS[-1].needs)
    for flavour in FLAVOURS[: best + 1]:
        (folder / flavour.file).write_bytes(b"")
    assert native.library() == folder / FLAVOURS[best].file
    native.library.cache_clear()
    (folder / FLAVOURS[best].file).unlink()
    assert native.library() is None
    (folder / FLAVOURS[-1].file).write_bytes(b"")
    native.library.cache_clear()
    assert native.library() == folder / FLAVOURS[-1].file


def test_why_there_is_none_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(native, "processor_flags", lambda: FLAVOURS[-1].needs)
    assert native.library() is None and "(apt install g++)" in native.why_none()
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset({"neon"}))
    assert "for Linux on x86-64 with abm avx2" in native.why_none()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "for Linux on x86-64" in native.why_none()
