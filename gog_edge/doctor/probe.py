"""Probes that load a driver or a native library, each in a process of its own, since loading may crash or hang.

    python -m gog_edge.doctor.probe gpus

prints one JSON object as its last line. GPUs are listed with the driver's own libraries, which exist wherever the
driver does, on a Jetson too: `libcuda` (NVIDIA's "CUDA Driver API") for the GPUs, `libnvidia-ml` ("NVML API") for the
driver's version and free memory. The numeric constants are those of `cuda.h` and `nvml.h`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gog_edge.engines.cuda import DeviceProperties
from gog_edge.engines.manifest import TENSORRT_RTX
from gog_edge.engines.tensorrt.plan import MODULES, supported_sms
from gog_edge.errors import BackendError

TIMEOUT_S = 60.0  # a driver may take several seconds to initialize a GPU
CUDA_PROVIDER = "CUDAExecutionProvider"
NATIVE_OPERATORS = "gog_edge.engines.onnx.native"
_SM_MAJOR, _SM_MINOR, _INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_...
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, slots=True)
class Gpu(DeviceProperties):
    """One GPU and its free memory."""

    free: int | None = None  # bytes; None if unknown


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs and the driver."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # version; "" if unknown, as on most Jetsons
    cuda: tuple[int, int] = (0, 0)  # the latest CUDA release that the driver supports
    problem: str = ""  # why there is no GPU

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Gpus:
        """Parse what `asdict` returned after a round trip through JSON."""
        return cls(tuple(Gpu(**one) for one in raw["gpus"]), raw["driver"], tuple(raw["cuda"]), raw["problem"])


def run_probe(name: str, *, timeout: float = TIMEOUT_S, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a probe in its own process and return its result.

    Args:
        name: one of PROBES, or a module to import.
        timeout: in seconds.
        command: the command to run instead of this module.

    Raises:
        BackendError: the process failed, crashed or timed out.
    """
    line = command or (sys.executable, "-m", "gog_edge.doctor.probe", name)
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        raise BackendError(f"no result within {timeout:.0f} s") from None
    except OSError as exc:
        raise BackendError(f"'{line[0]}' cannot be run ({exc.strerror})") from exc
    if done.returncode:
        how = f"terminated by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise BackendError(f"loading failed, {how}: {_last_line(done.stderr) or 'no message on stderr'}")
    try:
        found = json.loads(_last_line(done.stdout))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BackendError(f"the result is not a JSON object: {done.stdout[-200:]!r}")
    return found


def probe_here(name: str) -> dict[str, Any]:
    """Run a probe in this process; see `run_probe` for the names."""
    return PROBES[name]() if name in PROBES else {"version": str(importlib.import_module(name).__version__)}


def list_gpus() -> Gpus:
    """Query the driver. A broken driver may end the process, so call this in a probe."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus(problem="no NVIDIA driver is installed: 'libcuda.so.1' cannot be loaded")
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return Gpus(problem="NVIDIA's driver is installed but detects no GPU")
    if code:
        return Gpus(problem=f"NVIDIA's driver cannot be initialized: {_error_text(cuda, code)}")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = [_device(cuda, index) for index in range(count.value)]
    driver, free = _query_nvml([_bus_id(cuda, device) for device in devices])
    gpus = tuple(_describe_gpu(cuda, *one) for one in zip(devices, free, strict=True))
    return Gpus(gpus, driver, (version.value // 1000, version.value % 1000 // 10))


def _device(cuda: ctypes.CDLL, index: int) -> int:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    return device.value


def _describe_gpu(cuda: ctypes.CDLL, device: int, free: int | None) -> Gpu:
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor, integrated = _attributes(cuda, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major + minor, memory.value, bool(integrated), free)


def _attributes(cuda: ctypes.CDLL, device: int) -> Iterator[int]:
    for attribute in (_SM_MAJOR, _SM_MINOR, _INTEGRATED):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        yield value.value


def _bus_id(cuda: ctypes.CDLL, device: int) -> bytes:
    """Return the GPU's PCI bus id: CUDA and NVML enumerate GPUs in different orders."""
    text = ctypes.create_string_buffer(32)
    cuda.cuDeviceGetPCIBusId(text, len(text), device)
    return text.value


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _query_nvml(bus_ids: list[bytes]) -> tuple[str, list[int | None]]:
    """Return the driver's version and each GPU's free bytes; "" and None without NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "", [None] * len(bus_ids)
    if nvml.nvmlInit_v2():
        return "", [None] * len(bus_ids)
    version = ctypes.create_string_buffer(96)
    nvml.nvmlSystemGetDriverVersion(version, len(version))
    free = [_free_memory(nvml, bus_id) for bus_id in bus_ids]
    nvml.nvmlShutdown()
    return version.value.decode(errors="replace"), free


def _free_memory(nvml: ctypes.CDLL, bus_id: bytes) -> int | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.free)


def _error_text(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode(errors="replace") if text.value else f"error {code}"


def _probe_onnxruntime() -> dict[str, Any]:
    """Load a graph on CUDA, too: a provider is listed if it was compiled in, even if its libraries are missing."""
    import onnxruntime as ort

    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.engines.onnx.session import open_session

    providers, problem = ort.get_available_providers(), ""
    if CUDA_PROVIDER in providers:
        try:
            open_session(DEFAULT_BUNDLE / "encoder" / "text.onnx", providers=(CUDA_PROVIDER,))
        except BackendError as exc:
            problem = str(exc)
    return {"version": ort.__version__, "providers": providers, "problem": problem}


def _probe_faiss() -> dict[str, Any]:
    import faiss

    return {"version": faiss.__version__, "gpu": hasattr(faiss, "StandardGpuResources"), "gpus": faiss.get_num_gpus()}


def _probe_tensorrt_rtx() -> dict[str, Any]:
    trt = importlib.import_module(MODULES[TENSORRT_RTX])
    return {"version": str(trt.__version__), "sms": sorted(supported_sms(trt))}


def _probe_native_operators() -> dict[str, Any]:
    """Load the native operator library into ONNX Runtime."""
    from gog_edge.engines.onnx.native import library, unavailable_reason
    from gog_edge.engines.onnx.native.variants import processor_flags, supported_variants

    path = library()
    if path is None:
        return {"problem": unavailable_reason()}
    import onnxruntime as ort

    from gog_edge.engines.onnx.session import RUN_ERRORS

    problem = ""
    try:
        ort.SessionOptions().register_custom_ops_library(str(path))
    except RUN_ERRORS as exc:
        problem = str(exc)
    best, *others = supported_variants(processor_flags())
    loaded = next(one for one in (best, *others) if one.file == path.name)
    return {"version": loaded.name, "problem": problem, "better": best.name if loaded != best else ""}


PROBES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "gpus": lambda: asdict(list_gpus()),
    "onnxruntime": _probe_onnxruntime,
    "faiss": _probe_faiss,
    NATIVE_OPERATORS: _probe_native_operators,
    MODULES[TENSORRT_RTX]: _probe_tensorrt_rtx,
}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main(argv: Sequence[str]) -> int:
    """Print the result of the named probe; return 1 if the library cannot be loaded."""
    try:
        found = probe_here(argv[0])
    except (ImportError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(json.dumps(found, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
