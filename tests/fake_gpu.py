"""A fake GPU in host memory, for machines without one: NVIDIA's interfaces, with ONNX Runtime doing the arithmetic.

`FakeCuda` replaces the module `cuda.bindings.runtime`, `FakeTensorRT` replaces `tensorrt_rtx_bindings`; numbers, types
and enumerations are those of the real modules. The fakes are stricter than hardware where code must not rely on luck:

- work on a stream is executed when the stream is synchronized, so data overwritten too early gives wrong results;
- every address must be in memory that is still allocated; any other access loses the device permanently;
- newly allocated memory is filled with NaN;
- tensors must start at multiples of 256 bytes, shapes must be within the profile, and a capture must follow a run with
  the same shapes;
- launching a captured run whose context was changed since loses the device.

A "plan" is a small JSON file that names an .onnx file and its profiles.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import tensorrt_rtx_bindings as real_tensorrt
from cuda.bindings import runtime as real_cuda

ALIGNMENT = 256
KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}
LAUNCH_FAILURE, INVALID_VALUE, OUT_OF_MEMORY = 719, 1, 2
# Functions that return a value besides the error code.
WITH_RESULT = {"cudaGetDeviceProperties", "cudaMemGetInfo", "cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags",
               "cudaStreamEndCapture", "cudaGraphInstantiate"}  # fmt: skip


def code(number):
    return real_cuda.cudaError_t(number)


def write_plan(path: Path, graph: Path, profiles=()):
    path.write_text(json.dumps({"graph": str(graph), "profiles": list(profiles) or [{}]}))


class FakeCuda:
    """The functions of the CUDA runtime that the package calls. `fails` maps a function's name to its next codes."""

    OWN = {"OWN", "allocated", "check", "view", "enqueue", "drain", "new_handle"}  # names the real module does not have
    cudaMemcpyKind = real_cuda.cudaMemcpyKind
    cudaStreamCaptureMode = real_cuda.cudaStreamCaptureMode
    cudaStreamNonBlocking = real_cuda.cudaStreamNonBlocking
    cudaGetErrorName = staticmethod(real_cuda.cudaGetErrorName)
    cudaGetErrorString = staticmethod(real_cuda.cudaGetErrorString)

    def __init__(self, memory=2**30, sm=89, driver=13000):
        self.total, self.sm, self.driver = memory, sm, driver
        self.device, self.pinned = {}, {}  # address -> ctypes array
        self.streams, self.capturing = {}, {}  # handle -> pending operations, handle -> captured operations
        self.fails, self.calls, self.lost = {}, Counter(), False
        self._last_handle = 1

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or name in ("cudaGetErrorName", "cudaGetErrorString") or not callable(found):
            return found
        if isinstance(found, type):
            return found
        return lambda *values: self._call(name, found, values)

    def _call(self, name, function, values):
        self.calls[name] += 1
        failing = self.fails.get(name)
        number = failing.pop(0) if failing else LAUNCH_FAILURE if self.lost else 0
        if not number:
            return function(*values)
        return (code(number), None) if name in WITH_RESULT else (code(number),)

    @property
    def allocated(self):
        return sum(map(len, self.device.values()))

    def check(self, address, count):
        """Lose the device if the range is not in allocated memory."""
        for arrays in (self.device, self.pinned):
            if any(start <= address and address + count <= start + len(array) for start, array in arrays.items()):
                return
        self.lost = True
        raise _DeviceLost(f"{count} bytes at {address:#x}")

    def view(self, address, shape, dtype):
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.check(address, nbytes)
        raw = (ctypes.c_ubyte * nbytes).from_address(address)
        return np.frombuffer(memoryview(raw), dtype).reshape(shape)

    def enqueue(self, stream, operation):
        if stream in self.capturing:
            self.capturing[stream].append(operation)
        else:
            self.streams[stream].append(operation)

    def drain(self, operations):
        try:
            while operations:
                operations.pop(0)()
        except _DeviceLost:
            operations.clear()

    def new_handle(self):
        self._last_handle += 1
        return self._last_handle

    # --- functions of the runtime ---------------------------------------------------------------------

    def cudaSetDevice(self, index):
        return (code(0 if index == 0 else 101),)

    def cudaGetDeviceProperties(self, index):
        major, minor = divmod(self.sm, 10)
        return code(0), SimpleNamespace(name=b"Fake GPU\0\0", major=major, minor=minor, totalGlobalMem=self.total,
                                        integrated=0)  # fmt: skip

    def cudaMemGetInfo(self):
        return code(0), self.total - self.allocated, self.total

    def cudaRuntimeGetVersion(self):
        return code(0), 13000

    def cudaDriverGetVersion(self):
        return code(0), self.driver

    def cudaMalloc(self, size):
        if self.allocated + size > self.total:
            return code(OUT_OF_MEMORY), None
        array = (ctypes.c_ubyte * (size + ALIGNMENT))()
        start = -(-ctypes.addressof(array) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(start, 0xFF, size)  # NaN in every floating-point type
        aligned = (ctypes.c_ubyte * size).from_address(start)
        aligned.owner = array
        self.device[start] = aligned
        return code(0), start

    def cudaFree(self, address):
        return (code(0 if self.device.pop(address, None) is not None else INVALID_VALUE),)

    def cudaHostAlloc(self, size, flags):
        array = (ctypes.c_ubyte * size)()
        self.pinned[ctypes.addressof(array)] = array
        return code(0), ctypes.addressof(array)

    def cudaFreeHost(self, address):
        return (code(0 if self.pinned.pop(address, None) is not None else INVALID_VALUE),)

    def cudaStreamCreateWithFlags(self, flags):
        handle = self.new_handle()
        self.streams[handle] = []
        return code(0), real_cuda.cudaStream_t(handle)

    def cudaStreamDestroy(self, handle):
        self.drain(self.streams.pop(handle))
        return (code(0),)

    def cudaStreamSynchronize(self, handle):
        self.drain(self.streams[handle])
        return (code(LAUNCH_FAILURE if self.lost else 0),)

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        return self.cudaMemcpy2DAsync(target, count, source, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, rows, kind, stream):
        if width > min(target_pitch, source_pitch):
            return (code(12),)

        def copy():
            for row in range(rows):
                self.check(target + row * target_pitch, width)
                self.check(source + row * source_pitch, width)
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        self.enqueue(stream, copy)
        return (code(0),)

    def cudaMemsetAsync(self, target, value, count, stream):
        def fill():
            self.check(target, count)
            ctypes.memset(target, value, count)

        self.enqueue(stream, fill)
        return (code(0),)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream] = []
        return (code(0),)

    def cudaStreamEndCapture(self, stream):
        return code(0), _Graph(self.capturing.pop(stream))

    def cudaGraphInstantiate(self, graph, flags):
        return code(0), _Graph(list(graph.operations))

    def cudaGraphLaunch(self, graph, stream):
        for operation in graph.operations:
            self.enqueue(stream, operation)
        return (code(0),)

    def cudaGraphDestroy(self, graph):
        return (code(0),)

    def cudaGraphExecDestroy(self, graph):
        graph.operations = None
        return (code(0),)


class _DeviceLost(Exception):
    """An operation of the device failed."""


@dataclass
class _Graph:
    operations: list

    def __int__(self):
        return id(self)


class FakeTensorRT:
    """The module `tensorrt_rtx_bindings`, except for what runs on a GPU."""

    def __init__(self, runtime: FakeCuda, *, aliases=True, capturable=True):
        self._runtime, self.aliases, self.capturable = runtime, aliases, capturable
        self.contexts = []

    def __getattr__(self, name):
        return getattr(real_tensorrt, name)

    def Runtime(self, logger):
        def load(plan):
            return FakeEngine(self, self._runtime, logger, bytes(plan))

        return SimpleNamespace(deserialize_cuda_engine=load)


class FakeEngine:
    OWN = {"OWN"}
    device_memory_size_v2 = 4096

    def __init__(self, trt, runtime, logger, plan):
        description = json.loads(plan)
        self.trt, self.runtime, self.logger = trt, runtime, logger
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        # At higher levels ONNX Runtime 1.31 computes wrong products for converted graphs, or crashes.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(description["graph"], options, providers=["CPUExecutionProvider"])
        self.profiles = description["profiles"]
        self.io = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.num_io_tensors, self.num_optimization_profiles = len(self.io), len(self.profiles)

    def get_tensor_name(self, index):
        return list(self.io)[index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if name in self.input_names else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(self.trt.DataType, KINDS[self.io[name].type])

    def get_tensor_location(self, name):
        return self.trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self.io[name].shape]

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index][name]

    def get_aliased_input_tensor(self, name):
        return name.replace("present_", "past_") if self.trt.aliases and name.startswith("present_") else None

    def create_runtime_config(self):
        return FakeRuntimeConfig(self.runtime)

    def create_execution_context(self, config):
        context = FakeContext(self, config)
        self.trt.contexts.append(context)
        return context


class FakeRuntimeConfig:
    OWN = {"OWN"}

    def __init__(self, runtime):
        self.runtime = runtime

    def create_runtime_cache(self):
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy


@dataclass
class FakeRuntimeCache:
    OWN: ClassVar = {"OWN", "kernels"}
    kernels: list = field(default_factory=list)

    def serialize(self):
        return "\n".join(self.kernels).encode()

    def deserialize(self, blob):
        if not blob.startswith(b"kernel"):
            return False
        self.kernels = blob.decode().split("\n")
        return True


class FakeContext:
    OWN = {"OWN", "refuse", "shape_of"}

    def __init__(self, engine, config):
        self.engine, self.config = engine, config
        self.shapes, self.addresses, self.profile = {}, {}, None
        self.changes, self.ready = 0, False
        self.memory = 0

    def refuse(self, reason):
        self.engine.logger.log(real_tensorrt.ILogger.Severity.ERROR, f"Error Code 3: API Usage Error ({reason})")
        return False

    def set_device_memory(self, address, size):
        self.memory = size if address % ALIGNMENT == 0 else 0

    def set_optimization_profile_async(self, index, stream):
        self.profile, self.shapes = self.engine.profiles[index], {}
        cache = getattr(self.config, "cache", None)
        if cache is not None and (name := f"kernel {sorted(self.profile)} {index}") not in cache.kernels:
            cache.kernels.append(name)
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.profile.get(name, (self.engine.get_tensor_shape(name),) * 3)
        if len(shape) != len(least) or any(not a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return self.refuse(f"{name} {shape} is outside of {least} to {most}")
        if self.shapes.get(name) != tuple(shape):
            self.changes, self.ready = self.changes + 1, False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        free = {label: size for given, shape in self.shapes.items()
                for label, size in zip(self.engine.io[given].shape, shape, strict=True)}  # fmt: skip
        wanted = self.engine.io[name].shape
        if all(isinstance(size, int) or size in free for size in wanted):
            return [free.get(size, size) for size in wanted]
        zeros = {value.name: np.zeros(self.shape_of(value.name), DTYPES[KINDS[value.type]])
                 for value in self.engine.session.get_inputs()}  # fmt: skip
        return list(self.engine.session.run([name], zeros)[0].shape)

    def shape_of(self, name):
        return self.shapes.get(name) or self.engine.get_tensor_shape(name)

    def set_tensor_address(self, name, address):
        if address % ALIGNMENT:
            return self.refuse(f"{name} is not aligned")
        if self.addresses.get(name) != address:
            self.changes += 1
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream):
        return self.engine.trt.capturable

    def execute_async_v3(self, stream):
        runtime = self.engine.runtime
        if self.memory < self.engine.device_memory_size_v2 or self.addresses.keys() != self.engine.io.keys():
            return self.refuse("memory or addresses are missing")
        capturing = stream in runtime.capturing
        if capturing and not self.ready:
            return self.refuse("shapes changed since the last run")
        changes, self.ready = self.changes, True

        def work():
            if capturing and changes != self.changes:
                runtime.lost = True
                raise _DeviceLost("the context of a captured graph was changed")
            self._run()

        runtime.enqueue(stream, work)
        return True

    def _run(self):
        view, io = self.engine.runtime.view, self.engine.io
        feeds = {name: view(self.addresses[name], self.shape_of(name), DTYPES[KINDS[io[name].type]]).copy()
                 for name in self.engine.input_names}  # fmt: skip
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            view(self.addresses[name], array.shape, array.dtype)[...] = array
