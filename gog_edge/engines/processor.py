"""What processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

_FLAGS = ("flags", "Features")  # x86's name and ARM's
_NAMES = ("model name", *_FLAGS, "CPU part")
_CPUINFO = Path("/proc/cpuinfo")


def _told() -> list[str]:
    """Model and instructions, as /proc/cpuinfo(5) says them of the first core; empty where nobody does."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return []
    return [line for line in lines if line.partition(":")[0].strip() in _NAMES]


def processor_flags() -> frozenset[str]:
    """Names of the instructions that it has."""
    told = (line.partition(":") for line in _told())
    return frozenset(flag for name, _, said in told if name.strip() in _FLAGS for flag in said.split())


def describe_processor() -> str:
    """Changes when code that was compiled for one machine may not do on the other."""
    told = _told()
    return "\n".join([platform.machine(), *told]) if told else f"{platform.machine()} {platform.processor()}"
