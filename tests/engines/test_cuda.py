"""CUDA's error codes become this package's errors, and resources are released. Runs on `fake_gpu` and without a GPU."""

import gc
import subprocess
import sys

import numpy as np
import pytest
from fake_gpu import FakeCuda

from gog_edge.engines.cuda import (
    Cuda,
    DeviceBuffer,
    DeviceMemory,
    DeviceProperties,
    Stream,
    device_memory,
    pinned_array,
)
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory

NO_DRIVER = """
from cuda.bindings import runtime
raise SystemExit(0 if runtime.cudaDriverGetVersion()[1] else 3)
"""


@pytest.fixture
def runtime():
    return FakeCuda(2**20)


@pytest.fixture
def cuda(runtime):
    return Cuda(runtime)


def test_without_a_driver():
    if not subprocess.run([sys.executable, "-c", NO_DRIVER], timeout=60, check=False).returncode:
        pytest.skip("a driver is installed")
    with pytest.raises(BackendError, match="no CUDA driver is installed; install NVIDIA's driver, or use"):
        device_memory()


def test_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match="bindings are not installed .*pip install 'cuda-bindings>=13,<14'"):
        Cuda.open()


def test_a_driver_that_is_too_old():
    runtime = FakeCuda(driver=12040)
    runtime.fails["cudaSetDevice"] = [35]
    with pytest.raises(BackendError, match=r"the installed driver supports CUDA 12\.4, but 13\.0 is required; install"):
        Cuda(runtime)


def test_a_device_that_does_not_exist(runtime):
    with pytest.raises(BackendError, match="GPU 3 does not exist"):
        Cuda(runtime, 3)


@pytest.mark.parametrize("number, error, message", [
    (2, OutOfDeviceMemory, r"1,048,576 of 1,048,576 bytes are free.*--context"),
    (700, DeviceLost, "can no longer use GPU 0: cudaErrorIllegalAddress, an illegal memory access.* in cudaMalloc"),
    (719, DeviceLost, "cudaErrorLaunchFailure"),
    (214, DeviceLost, "cudaErrorECCUncorrectable"),
    (1, BackendError, "cudaMalloc failed: cudaErrorInvalidValue, invalid argument"),
    (100, BackendError, "GPU 0 does not exist"),
])  # fmt: skip
def test_error_codes(runtime, cuda, number, error, message):
    runtime.fails["cudaMalloc"] = [number]
    with pytest.raises(error, match=message) as caught:
        DeviceBuffer(cuda, 100)
    assert type(caught.value) is error
    assert DeviceBuffer(cuda, 100).nbytes == 100


def test_device_properties(cuda):
    assert cuda.properties() == DeviceProperties("Fake GPU", 89, 2**20, False)
    buffer = DeviceBuffer(cuda, 1000)
    assert cuda.memory() == DeviceMemory(2**20 - 1000, 2**20) and buffer.nbytes == 1000


def test_buffers_are_freed_with_their_owners(runtime, cuda):
    first, second = DeviceBuffer(cuda, 1000), DeviceBuffer(cuda, 500)
    first.close()
    first.close()
    assert runtime.allocated == 500 and runtime.calls["cudaFree"] == 1
    del second
    assert runtime.allocated == 0
    with pytest.raises(OutOfDeviceMemory):
        DeviceBuffer(cuda, 2**21)
    assert runtime.allocated == 0


def test_ranges_outside_of_a_buffer(cuda):
    buffer = DeviceBuffer(cuda, 100)
    assert buffer.at(40, 60) == buffer.address + 40
    for offset, count in ((41, 60), (-1, 4)):
        with pytest.raises(BackendError, match="outside of a buffer of 100"):
            buffer.at(offset, count)


def test_pinned_memory_is_freed_with_its_last_view(runtime, cuda):
    array = pinned_array(cuda, (3, 4), np.float16)
    assert array.shape == (3, 4) and array.dtype == np.float16
    view = array[1:, :2].T
    del array
    gc.collect()
    assert len(runtime.pinned) == 1
    view[...] = 1
    del view
    assert not runtime.pinned


def test_copy_2d_respects_the_pitch(cuda):
    stream, device = Stream(cuda), DeviceBuffer(cuda, 4 * 10)
    given, got = pinned_array(cuda, (4, 3), np.uint8), pinned_array(cuda, (4, 10), np.uint8)
    given[...] = np.arange(12).reshape(4, 3)
    stream.zero(device.address, device.nbytes)
    stream.copy_2d(device.at(2, 3), 10, given.ctypes.data, 3, 3, 4)
    stream.copy(got.ctypes.data, device.address, 40)
    stream.synchronize()
    expected = np.zeros((4, 10), np.uint8)
    expected[:, 2:5] = given
    assert np.array_equal(got, expected)


def test_a_captured_graph_can_be_launched_repeatedly(cuda):
    stream, device = Stream(cuda), DeviceBuffer(cuda, 4)
    given, got = pinned_array(cuda, (1,), np.int32), pinned_array(cuda, (1,), np.int32)

    def work():
        stream.copy(device.address, given.ctypes.data, 4)
        stream.copy(got.ctypes.data, device.address, 4)

    graph = stream.capture(work)
    stream.synchronize()
    assert got[0] == 0  # recorded, not executed
    for value in (5, 6):
        given[0] = value
        stream.launch(graph)
        stream.synchronize()
        assert got[0] == value


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_collected_during_a_capture(cuda, before):
    """Finalizers would free device memory, which breaks the capture."""
    stream, seen = Stream(cuda), []
    (gc.enable if before else gc.disable)()
    try:
        stream.capture(lambda: seen.append(gc.isenabled()))
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: 1 / 0)
        assert seen == [False] and gc.isenabled() == before
    finally:
        gc.enable()


def test_a_failed_capture_is_ended(runtime, cuda):
    stream = Stream(cuda)
    runtime.fails["cudaMemcpyAsync"] = [900]
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureUnsupported"):
        stream.capture(lambda: stream.copy(0, 0, 4))
    assert not runtime.capturing


def test_errors_while_freeing_are_logged_unless_the_device_is_lost(runtime, cuda, caplog):
    buffer = DeviceBuffer(cuda, 10)
    runtime.fails["cudaFree"] = [1]
    buffer.close()
    assert "cudaFree failed: cudaErrorInvalidValue" in caplog.text
    caplog.clear()
    buffer = DeviceBuffer(cuda, 10)
    runtime.lost = True
    del buffer
    assert not caplog.text


def test_no_gpu_library_is_imported_for_the_cpu():
    code = "import sys, gog_edge.engines.onnx.session, gog_edge.engines.cuda; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {"cuda", "tensorrt_rtx_bindings", "tensorrt"} & {name.split(".")[0] for name in done.stdout.split()}
