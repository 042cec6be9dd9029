"""The forms in which the native operators are compiled, best first, and which of them a processor runs.

Read at installation, too, before anything else of the package can be imported: it needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("operators.cpp", "attention.cpp", "product.cpp")
COMPILERS = ("c++", "g++", "clang++")

# No option that changes what a sum comes to but for fused products: results are the same on every processor of a kind.
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast",
           "-static-libstdc++", "-static-libgcc", "-s")  # fmt: skip
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"}


@dataclass(frozen=True, slots=True)
class Flavour:
    """One compilation."""

    name: str
    options: tuple[str, ...]  # of the compiler
    needs: frozenset[str]  # flags of the processor, as /proc/cpuinfo says them

    @property
    def file(self) -> str:
        """Of the library, in the folder of its sources."""
        return f"operators-{self.name}.so"


FLAVOURS = (
    Flavour("avx512-bf16", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), _AVX512 | {"avx512_bf16"}),
    Flavour("avx512", ("-march=x86-64-v4", "-mavx512vnni"), _AVX512),
    Flavour("avx2-vnni", ("-march=x86-64-v3", "-mavxvnni"), _AVX2 | {"avx_vnni"}),
    Flavour("avx2", ("-march=x86-64-v3",), _AVX2),
)


def runnable(flags: Collection[str]) -> tuple[Flavour, ...]:
    """Those that a processor with such flags runs, best first."""
    return tuple(flavour for flavour in FLAVOURS if flavour.needs.issubset(flags))


def find_compiler() -> list[str]:
    """The C++ compiler, as a command: what the environment's CXX says, else the first that is there; else empty."""
    if said := os.environ.get("CXX"):
        return shlex.split(said)
    return [found for found in map(shutil.which, COMPILERS) if found][:1]


def compile_command(compiler: Sequence[str], flavour: Flavour, folder: Path, out: Path) -> Sequence[str]:
    """What compiles the sources in `folder` to a library."""
    return [*compiler, *OPTIONS, *flavour.options, "-o", str(out), *(str(folder / source) for source in SOURCES)]


def digest(flavour: Flavour, folder: Path) -> str:
    """Of all that a library is made from, in hexadecimal; it is kept beside the library."""
    sources = (path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".cpp", ".h"))
    options = " ".join([*OPTIONS, *flavour.options]).encode()
    return hashlib.sha256(b"\0".join([options, *sources])).hexdigest()


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
