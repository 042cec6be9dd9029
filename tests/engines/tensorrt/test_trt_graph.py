"""Graphs without state on TensorRT, run on a GPU in the host's memory (`host_gpu`)."""

from threading import Thread

import numpy as np
import pytest
from host_gpu import HostRuntime

from gog_edge.engines.cuda import Cuda
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.engines.tensorrt.execution import Staging
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.policy.manifest import read_manifest
from gog_edge.policy.vision import Grid, grid_feeds

WIDE, THIN = Grid(4, 12), Grid(2, 24)  # as many patches, in more windows
TALL = Grid(12, 4)  # in as many windows: other feeds for the same run
LARGE = Grid(16, 14)


def tower_feeds(here, grid, seed=0):
    spec = read_manifest(here.policy).vision
    patches = np.random.default_rng(seed).normal(size=(grid.rows * grid.columns, spec.patch_dim))
    return {"patches": patches.astype(np.float32), **grid_feeds(grid, spec)}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert array.dtype == np.float32 and array.shape == expected[name].shape
        assert np.abs(array - expected[name]).max() < 0.02 * np.abs(expected[name]).max()


@pytest.mark.parametrize("name", ["tied", "qwen3"])
def test_it_sees_what_onnx_runtime_sees(world, name):
    here = world(name)
    tower, reference = here.vision(), OrtGraph(here.policy / "vision.onnx", threads=1)
    said = [(tower.run(feeds), feeds) for feeds in (tower_feeds(here, grid) for grid in (WIDE, LARGE, TALL, WIDE))]
    for got, feeds in said:  # later runs leave what earlier ones gave
        assert_same(got, reference.run(feeds))


def test_grids_that_come_back_are_captured(world):
    here = world()
    tower, reference = here.vision(), OrtGraph(here.policy / "vision.onnx", threads=1)
    tower.run(tower_feeds(here, LARGE))  # all places are as large as they will be
    launches = []
    for seed in range(4):
        for grid in (WIDE, THIN):
            feeds = tower_feeds(here, grid, seed)
            assert_same(tower.run(feeds), reference.run(feeds))
        launches.append(here.runtime.calls["cudaGraphLaunch"])
    assert launches == [0, 0, 2, 4] and here.runtime.calls["cudaGraphInstantiate"] == 2
    feeds = tower_feeds(here, TALL)
    assert_same(tower.run(feeds), reference.run(feeds))
    assert here.runtime.calls["cudaGraphLaunch"] == 5


def test_larger_pictures_move_places_and_captured_runs_go(world):
    here = world()
    tower = here.vision()
    small, large = tower_feeds(here, WIDE), tower_feeds(here, LARGE)
    first = tower.run(small)
    for _ in range(2):
        tower.run(small)
    assert here.runtime.calls["cudaGraphLaunch"] == 1
    tower.run(large)
    again = tower.run(small)  # captured anew
    assert here.runtime.calls["cudaGraphLaunch"] == 1 and np.array_equal(again["tokens"], first["tokens"])
    assert np.array_equal(tower.run(small)["tokens"], first["tokens"])
    assert here.runtime.calls["cudaGraphLaunch"] == 2


def test_a_place_that_grows_never_takes_both_at_once():
    runtime = HostRuntime(2**20)
    staging, kind = Staging(Cuda(runtime)), np.dtype(np.uint8)
    first = staging.place("x", (500_000,), kind)
    assert staging.place("x", (1000,), kind).address == first.address and staging.moves == 1
    assert staging.place("x", (700_000,), kind).nbytes == 700_000 and staging.moves == 2
    with pytest.raises(OutOfDeviceMemory):
        staging.place("x", (2**20,), kind)
    assert staging.place("x", (100,), kind).host.shape == (100,) and runtime.held < 10_000


def test_only_the_latest_runs_are_kept(world):
    here = world()
    tower = here.vision(captured=1)
    tower.run(tower_feeds(here, LARGE))
    for _ in range(2):
        for grid in (WIDE, THIN):
            tower.run(tower_feeds(here, grid))
    assert here.runtime.calls["cudaGraphInstantiate"] == 2 and here.runtime.calls["cudaGraphExecDestroy"] == 1
    none = world().vision(captured=0)
    for _ in range(3):
        none.run(tower_feeds(here, WIDE))


def test_memory_that_ran_out_on_the_way_leaves_no_wild_address(world):
    here = world()
    tower = here.vision()
    small = tower_feeds(here, WIDE)
    for _ in range(3):
        expected = tower.run(small)
    total, here.runtime.total = here.runtime.total, here.runtime.held + 60_000
    with pytest.raises(OutOfDeviceMemory, match="the GPU's memory is taken"):
        tower.run(tower_feeds(here, LARGE))
    here.runtime.total = total
    assert np.array_equal(tower.run(small)["tokens"], expected["tokens"]) and not here.runtime.lost


def test_what_the_engine_does_not_take_is_refused(world):
    here = world()
    tower, feeds = here.vision(), tower_feeds(here, WIDE)
    with pytest.raises(BackendError, match="takes .*patches.*, given were"):
        tower.run({"patches": feeds["patches"]})
    with pytest.raises(BackendError, match=r"takes 'cos' as float32 .*, given was float64"):
        tower.run({**feeds, "cos": feeds["cos"].astype(np.float64)})
    with pytest.raises(BackendError, match=r"takes 'patches' as float32 \(-1, \d+\), given was float32 \(48, 7\)"):
        tower.run({**feeds, "patches": feeds["patches"][:, :7]})
    with pytest.raises(BackendError, match="no profile of the engine takes"):
        tower.run(tower_feeds(here, Grid(200, 200)))


def test_a_lost_device_is_said(world):
    here = world()
    tower = here.vision()
    here.runtime.lost = True
    with pytest.raises(DeviceLost, match="start it again"):
        tower.run(tower_feeds(here, WIDE))


def test_several_threads_take_turns(world):
    here = world()
    tower, got = here.vision(), {}
    expected = {seed: tower.run(tower_feeds(here, WIDE, seed))["tokens"] for seed in range(4)}
    threads = [Thread(target=lambda n=n: got.update({n: tower.run(tower_feeds(here, WIDE, n))["tokens"]}))
               for n in range(4)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(got[seed], expected[seed]) for seed in range(4))
