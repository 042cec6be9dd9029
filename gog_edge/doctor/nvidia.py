"""The GPUs of this box, by the driver's own libraries: they are there wherever the driver is, on a Jetson too.

`libcuda` (NVIDIA's "CUDA Driver API") names the GPUs, `libnvidia-ml` ("NVML API") the driver and what memory is free.
Numbers below are those of `cuda.h` and `nvml.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gog_edge.engines.cuda import DeviceProperties

_SM_MAJOR, _SM_MINOR, _INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_...
_NO_DEVICE = 100


@dataclass(frozen=True, slots=True)
class Gpu(DeviceProperties):
    """One GPU, and how much of its memory is free."""

    free: int | None = None  # bytes; None where nobody says


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs, and the driver."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # its version; "" where nobody says, as on most Jetsons
    cuda: tuple[int, int] = (0, 0)  # the newest release of CUDA that the driver runs
    trouble: str = ""  # why there is none

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Gpus:
        """What `asdict` of one gave, by way of JSON."""
        return cls(tuple(Gpu(**one) for one in raw["gpus"]), raw["driver"], tuple(raw["cuda"]), raw["trouble"])


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def list_gpus() -> Gpus:
    """Ask the driver. What it does in here may end the process: call it in one that may be ended."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus(trouble="there is no NVIDIA driver: 'libcuda.so.1' cannot be loaded")
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return Gpus(trouble="NVIDIA's driver is here and sees no GPU")
    if code:
        return Gpus(trouble=f"NVIDIA's driver does not start: {_error(cuda, code)}")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = [_device(cuda, index) for index in range(count.value)]
    driver, free = _ask_nvml([_bus_id(cuda, device) for device in devices])
    gpus = tuple(_gpu(cuda, *one) for one in zip(devices, free, strict=True))
    return Gpus(gpus, driver, (version.value // 1000, version.value % 1000 // 10))


def _device(cuda: ctypes.CDLL, index: int) -> int:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    return device.value


def _gpu(cuda: ctypes.CDLL, device: int, free: int | None) -> Gpu:
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
    """The GPU's place on the PCI bus: CUDA and NVML count GPUs in different orders."""
    text = ctypes.create_string_buffer(32)
    cuda.cuDeviceGetPCIBusId(text, len(text), device)
    return text.value


def _ask_nvml(bus_ids: list[bytes]) -> tuple[str, list[int | None]]:
    """The driver's version, and free bytes of each GPU; nothing where NVML is not to be had."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "", [None] * len(bus_ids)
    if nvml.nvmlInit_v2():
        return "", [None] * len(bus_ids)
    version = ctypes.create_string_buffer(96)
    nvml.nvmlSystemGetDriverVersion(version, len(version))
    free = [_free(nvml, bus_id) for bus_id in bus_ids]
    nvml.nvmlShutdown()
    return version.value.decode(errors="replace"), free


def _free(nvml: ctypes.CDLL, bus_id: bytes) -> int | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.free)


def _error(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode(errors="replace") if text.value else f"error {code}"
