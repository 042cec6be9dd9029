"""What processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

_NAMES = ("model name", "flags", "Features", "CPU part")  # x86's and ARM's
_CPUINFO = Path("/proc/cpuinfo")


def processor_facts() -> dict[str, str]:
    """Model and instructions, as /proc/cpuinfo(5) says them of the first core; empty where nobody does."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    told = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in told if name.strip() in _NAMES}


def processor_flags() -> frozenset[str]:
    """Names of the instructions that it has."""
    facts = processor_facts()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())


def describe_processor() -> str:
    """Changes when compiled code for one machine may not do on the other."""
    facts = processor_facts()
    if not facts:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *(f"{name}: {value}" for name, value in facts.items())])
