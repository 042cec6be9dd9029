"""Facts about a machine: system, memory, Jetson release, GPUs, libraries.

They are plain data, so that the checks can be tested with the facts of other machines. Files are read below a root
folder for the same reason. On a Jetson these are:

    /proc/device-tree/model      the board, terminated by a zero byte (Devicetree Specification, 2.3.2)
    /etc/nv_tegra_release        "# R39 (release), REVISION: 2.0, GCID: ..., BOARD: generic, ...": Jetson Linux 39.2.0
    /var/lib/dpkg/status         Debian's package list; the version of `nvidia-jetpack` is JetPack's
    /var/lib/nvpmodel/status     "pmode:0002": the number of the power mode (nvpmodel)
    /etc/nvpmodel.conf           "< POWER_MODEL ID=2 NAME=MAXN_SUPER >" for each mode, each in a section of its own
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gog_edge.doctor.probe import NATIVE_OPERATORS, Gpus, run_probe
from gog_edge.engines.cuda import BINDINGS
from gog_edge.engines.manifest import TENSORRT, TENSORRT_RTX
from gog_edge.engines.tensorrt.plan import MODULES
from gog_edge.errors import BackendError
from gog_edge.planner import available_memory, read_meminfo

ONNXRUNTIME, FAISS = "onnxruntime", "faiss"
CUDA_BINDINGS = BINDINGS.rpartition(".")[0]  # the package, which has __version__
LIBRARIES = (ONNXRUNTIME, FAISS, MODULES[TENSORRT], MODULES[TENSORRT_RTX], CUDA_BINDINGS, NATIVE_OPERATORS)
Probe = Callable[[str], dict[str, Any]]

JETPACK_6_LINUX = 36  # no longer supported, with an error of its own
JETPACKS = {JETPACK_6_LINUX: "6", 38: "7", 39: "7"}  # by Jetson Linux; 38 runs on Thor only, 39 also on Orin
SUPPORTED_LINUX = (38, 39)  # Jetson Linux
UNLIMITED_PREFIX = "MAXN"  # of the names of power modes without limits


@dataclass(frozen=True, slots=True)
class Library:
    """A library as a probe loaded it, or the reason why it could not be loaded."""

    version: str = ""  # "" if it could not be loaded; native operators: the loaded build variant
    problem: str = ""  # ONNX Runtime: of its CUDA provider
    providers: tuple[str, ...] = ()  # ONNX Runtime: execution providers
    better: str = ""  # native operators: the fastest variant for this processor, if another one was loaded
    gpu: bool = False  # faiss: built with GPU support
    gpus: int = 0  # faiss: number of GPUs it detects
    sms: tuple[int, ...] = ()  # TensorRT for RTX: compute capabilities it builds for

    @classmethod
    def probed(cls, name: str, probe: Probe) -> Library:
        """Probe one library. A failure becomes its `problem`."""
        try:
            found = probe(name)
            return cls(**{**found, "providers": tuple(found.get("providers", ())), "sms": tuple(found.get("sms", ()))})
        except (BackendError, TypeError) as exc:
            return cls(problem=str(exc))


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A power mode of nvpmodel."""

    number: int
    name: str  # "" if nvpmodel.conf does not name it


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson's board and releases. "", () and None stand for unknown values."""

    model: str
    linux: tuple[int, ...] = ()  # Jetson Linux: (39, 2)
    jetpack: str = ""  # version of the package nvidia-jetpack; "6" or "7" if it is not installed
    power: PowerMode | None = None
    fastest: PowerMode | None = None  # the power mode without limits

    @property
    def supported(self) -> bool:
        """Return whether this release's TensorRT can build and run engines of this package."""
        return bool(self.linux) and self.linux[0] in SUPPORTED_LINUX

    @property
    def release(self) -> str:
        """Return Jetson Linux in dotted form, "39.2"."""
        return ".".join(map(str, self.linux))


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and what is installed on it."""

    system: str
    architecture: str  # as uname reports it, "x86_64"
    python: str
    cores: int
    memory: int | None  # bytes; None if unknown
    free: int | None  # bytes; None if unknown
    jetson: Jetson | None = None
    gpus: Gpus = field(default_factory=Gpus)
    libraries: Mapping[str, Library] = field(default_factory=dict)  # by the names in LIBRARIES


def collect_facts(root: Path = Path("/"), probe: Probe = run_probe) -> Machine:
    """Collect all facts. Libraries are probed two at a time; failures are recorded as problems."""
    with ThreadPoolExecutor(2) as threads:
        gpus = threads.submit(_probe_gpus, probe)
        libraries = threads.map(lambda name: Library.probed(name, probe), LIBRARIES)
        return Machine(
            system=_system(root),
            architecture=platform.machine(),
            python=platform.python_version(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory=read_meminfo(root, "MemTotal"),
            free=available_memory(root),
            jetson=read_jetson(root),
            gpus=gpus.result(),
            libraries=dict(zip(LIBRARIES, libraries, strict=True)),
        )


def _probe_gpus(probe: Probe) -> Gpus:
    try:
        return Gpus.from_json(probe("gpus"))
    except (BackendError, KeyError, TypeError) as exc:
        return Gpus(problem=f"NVIDIA's driver could not be queried: {exc}")


def _system(root: Path) -> str:
    """Return PRETTY_NAME from os-release(5), or the platform's name."""
    lines = _read_text(root / "etc/os-release").splitlines()
    names = (line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PRETTY_NAME="))
    return next(names, "") or f"{platform.system()} {platform.release()}"


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """Read a Jetson's facts; None on other machines. Files that cannot be read leave their facts unknown."""
    model = _read_text(root / "proc/device-tree/model").rstrip("\0\n")
    linux = parse_release(_read_text(root / "etc/nv_tegra_release"))
    if not linux and "jetson" not in model.lower():
        return None
    modes = parse_power_modes(_read_text(root / "etc/nvpmodel.conf"))
    number = re.search(r"pmode:\s*(\d+)", _read_text(root / "var/lib/nvpmodel/status"))
    fastest = next((mode for mode in reversed(modes) if mode.name.startswith(UNLIMITED_PREFIX)), None)
    power = None if number is None else PowerMode(int(number[1]), _mode_name(int(number[1]), modes))
    jetpack = package_version(root, "nvidia-jetpack") or JETPACKS.get(linux[0] if linux else 0, "")
    return Jetson(model, linux, jetpack, power, fastest)


def parse_release(text: str) -> tuple[int, ...]:
    """Return the release in `nv_tegra_release`, (39, 2); () if the text has none."""
    found = re.search(r"^# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return (int(found[1]), *map(int, found[2].split("."))) if found else ()


def parse_power_modes(text: str) -> list[PowerMode]:
    """Return the power modes in `nvpmodel.conf`, in the file's order."""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text, re.MULTILINE)
    return [PowerMode(int(number), name) for number, name in found]


def package_version(root: Path, name: str) -> str:
    """Return the version of an installed Debian package (deb-control(5), dpkg's status file); "" if not installed."""
    entries = _read_text(root / "var/lib/dpkg/status").split("\n\n")
    entry = next((entry for entry in entries if f"\nPackage: {name}\n" in f"\n{entry}\n"), "")
    found = re.search(r"^Version: (\S+)$", entry, re.MULTILINE)
    return found[1] if found and "\nStatus: install ok installed\n" in entry else ""


def _mode_name(number: int, modes: list[PowerMode]) -> str:
    return next((mode.name for mode in modes if mode.number == number), "")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
