"""Graphs without state on TensorRT, executed on `fake_gpu`."""

from threading import Thread

import numpy as np
import pytest
from fake_gpu import FakeCuda

from gog_edge.engines.cuda import Cuda
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.engines.tensorrt.execution import BufferPool
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory
from gog_edge.policy.manifest import read_manifest
from gog_edge.policy.vision import Grid, grid_feeds

WIDE, THIN = Grid(4, 12), Grid(2, 24)  # the same number of patches, in different numbers of windows
TALL = Grid(12, 4)  # the same shapes as WIDE: other inputs for the same run
LARGE = Grid(16, 14)


def tower_feeds(machine, grid, seed=0):
    spec = read_manifest(machine.policy).vision
    patches = np.random.default_rng(seed).normal(size=(grid.rows * grid.columns, spec.patch_dim))
    return {"patches": patches.astype(np.float32), **grid_feeds(grid, spec)}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert array.dtype == np.float32 and array.shape == expected[name].shape
        assert np.abs(array - expected[name]).max() < 0.02 * np.abs(expected[name]).max()


@pytest.mark.parametrize("name", ["tied", "qwen3"])
def test_outputs_equal_onnx_runtimes(fake_machine, name):
    machine = fake_machine(name)
    tower, reference = machine.vision(), OrtGraph(machine.policy / "vision.onnx", threads=1)
    inputs = [tower_feeds(machine, grid) for grid in (WIDE, LARGE, TALL, WIDE)]
    results = [(tower.run(feeds), feeds) for feeds in inputs]
    for got, feeds in results:  # later runs must not overwrite earlier results
        assert_close(got, reference.run(feeds))


def test_repeated_shapes_are_captured(fake_machine):
    machine = fake_machine()
    tower, reference = machine.vision(), OrtGraph(machine.policy / "vision.onnx", threads=1)
    tower.run(tower_feeds(machine, LARGE))  # the buffers do not grow any more
    launches = []
    for seed in range(4):
        for grid in (WIDE, THIN):
            feeds = tower_feeds(machine, grid, seed)
            assert_close(tower.run(feeds), reference.run(feeds))
        launches.append(machine.cuda.calls["cudaGraphLaunch"])
    assert launches == [0, 0, 2, 4] and machine.cuda.calls["cudaGraphInstantiate"] == 2
    feeds = tower_feeds(machine, TALL)
    assert_close(tower.run(feeds), reference.run(feeds))
    assert machine.cuda.calls["cudaGraphLaunch"] == 5


def test_growing_buffers_discards_captured_runs(fake_machine):
    machine = fake_machine()
    tower = machine.vision()
    small, large = tower_feeds(machine, WIDE), tower_feeds(machine, LARGE)
    first = tower.run(small)
    for _ in range(2):
        tower.run(small)
    assert machine.cuda.calls["cudaGraphLaunch"] == 1
    tower.run(large)
    again = tower.run(small)  # captured again
    assert machine.cuda.calls["cudaGraphLaunch"] == 1 and np.array_equal(again["tokens"], first["tokens"])
    assert np.array_equal(tower.run(small)["tokens"], first["tokens"])
    assert machine.cuda.calls["cudaGraphLaunch"] == 2


def test_a_growing_buffer_frees_the_old_one_first():
    cuda = FakeCuda(2**20)
    pool, kind = BufferPool(Cuda(cuda)), np.dtype(np.uint8)
    first = pool.get("x", (500_000,), kind)
    assert pool.get("x", (1000,), kind).address == first.address and pool.reallocations == 1
    assert pool.get("x", (700_000,), kind).nbytes == 700_000 and pool.reallocations == 2
    with pytest.raises(OutOfDeviceMemory):
        pool.get("x", (2**20,), kind)
    assert pool.get("x", (100,), kind).host.shape == (100,) and cuda.allocated < 10_000


def test_only_the_most_recent_captured_runs_are_kept(fake_machine):
    machine = fake_machine()
    tower = machine.vision(captured=1)
    tower.run(tower_feeds(machine, LARGE))
    for _ in range(2):
        for grid in (WIDE, THIN):
            tower.run(tower_feeds(machine, grid))
    assert machine.cuda.calls["cudaGraphInstantiate"] == 2 and machine.cuda.calls["cudaGraphExecDestroy"] == 1
    none = fake_machine().vision(captured=0)
    for _ in range(3):
        none.run(tower_feeds(machine, WIDE))


def test_running_out_of_memory_leaves_no_invalid_address(fake_machine):
    machine = fake_machine()
    tower = machine.vision()
    small = tower_feeds(machine, WIDE)
    for _ in range(3):
        expected = tower.run(small)
    total, machine.cuda.total = machine.cuda.total, machine.cuda.allocated + 60_000
    with pytest.raises(OutOfDeviceMemory, match="the GPU is out of memory"):
        tower.run(tower_feeds(machine, LARGE))
    machine.cuda.total = total
    assert np.array_equal(tower.run(small)["tokens"], expected["tokens"]) and not machine.cuda.lost


def test_invalid_inputs(fake_machine):
    machine = fake_machine()
    tower, feeds = machine.vision(), tower_feeds(machine, WIDE)
    with pytest.raises(BackendError, match="expects the inputs .*patches.*, got patches"):
        tower.run({"patches": feeds["patches"]})
    with pytest.raises(BackendError, match=r"expects 'cos' as float32 .*, got float64"):
        tower.run({**feeds, "cos": feeds["cos"].astype(np.float64)})
    with pytest.raises(BackendError, match=r"expects 'patches' as float32 \(-1, \d+\), got float32 \(48, 7\)"):
        tower.run({**feeds, "patches": feeds["patches"][:, :7]})
    with pytest.raises(BackendError, match="no profile of the engine accepts"):
        tower.run(tower_feeds(machine, Grid(200, 200)))


def test_a_lost_device(fake_machine):
    machine = fake_machine()
    tower = machine.vision()
    machine.cuda.lost = True
    with pytest.raises(DeviceLost, match="can no longer use GPU 0.*restart it"):
        tower.run(tower_feeds(machine, WIDE))


def test_concurrent_runs(fake_machine):
    machine = fake_machine()
    tower, got = machine.vision(), {}
    expected = {seed: tower.run(tower_feeds(machine, WIDE, seed))["tokens"] for seed in range(4)}
    threads = [Thread(target=lambda n=n: got.update({n: tower.run(tower_feeds(machine, WIDE, n))["tokens"]}))
               for n in range(4)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(got[seed], expected[seed]) for seed in range(4))
