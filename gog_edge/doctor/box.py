"""What this box has: gathered as plain facts, so that those of another box can be judged too."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gog_edge.doctor.jetson import Jetson, read_jetson
from gog_edge.doctor.nvidia import Gpus
from gog_edge.doctor.probe import KERNELS, probe
from gog_edge.engines.cuda import BINDINGS
from gog_edge.engines.manifest import TENSORRT, TENSORRT_RTX
from gog_edge.engines.tensorrt.plan import MODULES
from gog_edge.errors import BackendError
from gog_edge.planner import free_memory, memory_of

ONNXRUNTIME, FAISS = "onnxruntime", "faiss"
CUDA_BINDINGS = BINDINGS.rpartition(".")[0]  # the package, which tells its version
LIBRARIES = (ONNXRUNTIME, FAISS, MODULES[TENSORRT], MODULES[TENSORRT_RTX], CUDA_BINDINGS, KERNELS)
Probe = Callable[[str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Library:
    """A library as it was loaded, or why it was not."""

    version: str = ""  # "": not to be had; of our kernels: the processors they were compiled for
    trouble: str = ""  # what is wrong with it; of ONNX Runtime: with its providers for GPUs
    providers: tuple[str, ...] = ()  # of ONNX Runtime
    better: str = ""  # of our kernels: those that this processor runs, where they are not these
    gpu: bool = False  # faiss: built for GPUs
    gpus: int = 0  # faiss: that it sees
    sms: tuple[int, ...] = ()  # TensorRT for RTX: compute capabilities that it builds for

    @classmethod
    def looked_at(cls, name: str, look: Probe) -> Library:
        """What a look at it gives."""
        try:
            found = look(name)
            return cls(**{**found, "providers": tuple(found.get("providers", ())), "sms": tuple(found.get("sms", ()))})
        except (BackendError, TypeError) as exc:
            return cls(trouble=str(exc))


@dataclass(frozen=True, slots=True)
class Box:
    """The machine and what is installed."""

    system: str
    machine: str  # as uname names it, x86_64
    python: str
    cores: int
    memory: int | None  # bytes; None where nobody says
    free: int | None
    jetson: Jetson | None = None
    gpus: Gpus = field(default_factory=Gpus)
    libraries: Mapping[str, Library] = field(default_factory=dict)  # of LIBRARIES


def look_at_box(root: Path = Path("/"), look: Probe = probe) -> Box:
    """Look at everything, at all libraries at the same time; what fails is told in its place."""
    with ThreadPoolExecutor(2) as threads:
        gpus = threads.submit(_gpus, look)
        looked_at = threads.map(lambda name: Library.looked_at(name, look), LIBRARIES)
        return Box(
            system=_system(root),
            machine=platform.machine(),
            python=platform.python_version(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory=memory_of(root, "MemTotal"),
            free=free_memory(root),
            jetson=read_jetson(root),
            gpus=gpus.result(),
            libraries=dict(zip(LIBRARIES, looked_at, strict=True)),
        )


def _gpus(look: Probe) -> Gpus:
    try:
        return Gpus.from_json(look("gpus"))
    except (BackendError, KeyError, TypeError) as exc:
        return Gpus(trouble=f"NVIDIA's driver could not be asked: {exc}")


def _system(root: Path) -> str:
    """PRETTY_NAME of os-release(5), or what Python knows."""
    try:
        lines = (root / "etc/os-release").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PRETTY_NAME="))
    return next(names, "") or f"{platform.system()} {platform.release()}"
