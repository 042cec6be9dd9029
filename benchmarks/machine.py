"""The machine card that stands above every benchmark's table."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13-bindings", "faiss-cpu", "faiss-gpu", "numpy")


def machine_card() -> dict[str, str]:
    """Processor, memory and versions, as text."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    return {
        "processor": f"{names[0] if names else platform.processor()} x {psutil.cpu_count()}",
        "memory": f"{memory:.0f} GiB",
        "python": sys.version.split()[0],
        **_versions(),
    }


def _versions() -> dict[str, str]:
    """Of the packages that are here."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
