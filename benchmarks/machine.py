"""The machine card that stands above every benchmark's table."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("onnxruntime", "faiss-cpu", "numpy")


def machine_card() -> dict[str, str]:
    """Processor, memory and versions, as text."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{names[0] if names else platform.processor()} x {os.cpu_count()}",
        "memory": f"{memory:.0f} GiB",
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
    }
