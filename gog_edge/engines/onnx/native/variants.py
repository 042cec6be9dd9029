"""Build variants of the native operators, and which of them a processor supports.

`hatch_build.py` loads this file at installation, before the package's dependencies exist: it must only import from the
standard library.
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

SOURCES = ("operators.cpp", "attention.cpp", "matmul.cpp")
COMPILERS = ("c++", "g++", "clang++")

# Of the options that change floating-point results only the contraction to fused multiply-add is set, so that the
# results of a variant are the same on every processor.
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast",
           "-static-libstdc++", "-static-libgcc", "-s")  # fmt: skip
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"}

_CPUINFO = Path("/proc/cpuinfo")
_FLAG_FIELDS = ("flags", "Features")  # on x86 and on ARM
_FIELDS = ("model name", *_FLAG_FIELDS, "CPU part")


@dataclass(frozen=True, slots=True)
class BuildVariant:
    """One set of instruction-set extensions that the library is compiled for."""

    name: str
    options: tuple[str, ...]  # compiler options
    needs: frozenset[str]  # processor flags, by their names in /proc/cpuinfo

    @property
    def file(self) -> str:
        """Return the file name of the compiled library, in the folder of its sources."""
        return f"operators-{self.name}.so"


# Fastest first.
VARIANTS = (
    BuildVariant("avx512-bf16", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), _AVX512 | {"avx512_bf16"}),
    BuildVariant("avx512", ("-march=x86-64-v4", "-mavx512vnni"), _AVX512),
    BuildVariant("avx2-vnni", ("-march=x86-64-v3", "-mavxvnni"), _AVX2 | {"avx_vnni"}),
    BuildVariant("avx2", ("-march=x86-64-v3",), _AVX2),
)


def supported_variants(flags: Collection[str]) -> tuple[BuildVariant, ...]:
    """Return the variants that a processor with these flags supports, fastest first."""
    return tuple(variant for variant in VARIANTS if variant.needs.issubset(flags))


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: CXX from the environment, or the first of COMPILERS on PATH; [] if none."""
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    return [found for found in map(shutil.which, COMPILERS) if found][:1]


def compile_command(compiler: Sequence[str], variant: BuildVariant, folder: Path, out: Path) -> Sequence[str]:
    """Return the command that compiles the sources in `folder` to the library `out`."""
    return [*compiler, *OPTIONS, *variant.options, "-o", str(out), *(str(folder / source) for source in SOURCES)]


def source_digest(variant: BuildVariant, folder: Path) -> str:
    """Return the sha256 (hex) of the sources and compiler options of a library. It is stored next to the library."""
    sources = (path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".cpp", ".h"))
    options = " ".join([*OPTIONS, *variant.options]).encode()
    return hashlib.sha256(b"\0".join([options, *sources])).hexdigest()


def processor_flags() -> frozenset[str]:
    """Return the processor's flags from /proc/cpuinfo; empty if it cannot be read."""
    fields = (line.partition(":") for line in _cpuinfo())
    return frozenset(flag for name, _, value in fields if name.strip() in _FLAG_FIELDS for flag in value.split())


def describe_processor() -> str:
    """Return a description of model and instruction set; data computed for one processor is not used on another."""
    lines = _cpuinfo()
    return "\n".join([platform.machine(), *lines]) if lines else f"{platform.machine()} {platform.processor()}"


def _cpuinfo() -> list[str]:
    """Return the lines of the first core in /proc/cpuinfo, proc_cpuinfo(5), that describe model and instruction set."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return []
    return [line for line in lines if line.partition(":")[0].strip() in _FIELDS]
