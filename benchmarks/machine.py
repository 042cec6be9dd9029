"""The machine card that stands above every benchmark's table."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

PACKAGES = ("onnxruntime", "faiss-cpu", "numpy")


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
        **{package: version(package) for package in PACKAGES},
    }
