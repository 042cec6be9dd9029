"""Compiles the native operators of `gog_edge.engines.onnx.native` when the package is installed or its wheel is built.

The environment's GOG_EDGE_NATIVE says how: "off" compiles nothing, for a wheel that goes to another machine; "require"
makes an error of what is otherwise a warning. The package runs without the operators, on ONNX Runtime's own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gog_edge", "engines", "onnx", "native")
PLATFORM = "linux-x86_64"  # whose instructions the sources name
SWITCH, OFF, REQUIRE = "GOG_EDGE_NATIVE", "off", "require"
LINES = 5  # of what a compiler said that are shown
NO_COMPILER = "there is no C++ compiler; get one (apt install g++) and install again"
OTHER = ("try a newer compiler (apt install g++; on Fedora and its like libstdc++-static, too), or name one in the "
         "environment's CXX, and install again")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # of any builder's settings
    """Puts the libraries beside their sources, and into a wheel, which then is for this platform alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile what is missing or of other sources, for editable installations, too."""
        switch = os.environ.get(SWITCH, "")
        if switch not in ("", OFF, REQUIRE):
            self.app.abort(f"{SWITCH}='{switch}'; known are '{OFF}' and '{REQUIRE}'")
        if switch == OFF or sysconfig.get_platform() != PLATFORM:
            return
        folder = Path(self.root) / FOLDER
        libraries, troubles = compile_all(folder, load_flavours(folder))
        for trouble in troubles:
            self.app.display_warning(f"gog_edge's native operators: {trouble}")
        if troubles and switch == REQUIRE:
            self.app.abort(f"{SWITCH}={REQUIRE}, and not all of them were compiled")
        if libraries and version == "standard":
            build_data["artifacts"] += [f"/{(FOLDER / name).as_posix()}" for name in libraries]
            build_data["tag"] = f"py3-none-{PLATFORM.replace('-', '_')}"
            build_data["pure_python"] = False


def load_flavours(folder: Path) -> ModuleType:
    """The list of what to compile, without the package, whose dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("gog_edge_flavours", folder / "flavours.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"'{folder / 'flavours.py'}' cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def compile_all(folder: Path, flavours: ModuleType) -> tuple[list[str], list[str]]:
    """Names of the libraries that are there now, and what to say of the others."""
    files = [flavour.file for flavour in flavours.FLAVOURS]
    digests = {flavour: flavours.digest(flavour, folder) for flavour in flavours.FLAVOURS}
    stale = [flavour for flavour, digest in digests.items() if not is_of(folder / flavour.file, digest)]
    compiler = flavours.find_compiler()
    if compiler:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            said = threads.map(lambda flavour: compile_one(flavours, compiler, flavour, folder), stale)
            troubles = {flavour.file: trouble for flavour, trouble in zip(stale, said, strict=True) if trouble}
    else:
        troubles = {flavour.file: NO_COMPILER for flavour in stale}
    for file in troubles:  # of other sources than those that are there now
        with suppress(OSError):
            (folder / file).unlink()
    return [file for file in files if file not in troubles], list(dict.fromkeys(troubles.values()))


def stamp_of(library: Path) -> Path:
    """The file beside a library that says what it was made from."""
    return library.with_name(f"{library.name}.sha256")


def is_of(library: Path, digest: str) -> bool:
    """Whether a library is there that was made from just this."""
    stamp = stamp_of(library)
    return library.is_file() and stamp.is_file() and stamp.read_text() == digest


def compile_one(flavours: ModuleType, compiler: Sequence[str], flavour: Any, folder: Path) -> str:
    """Compile one library, beside its place and then moved there; what went wrong, "" where nothing did."""
    library = folder / flavour.file
    part = library.with_name(f"{library.name}.{os.getpid()}.part")
    command = flavours.compile_command(compiler, flavour, folder, part)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0:
            part.replace(library)
            stamp_of(library).write_text(flavours.digest(flavour, folder))
            return ""
        said = "\n".join(done.stderr.splitlines()[-LINES:]) or f"exit code {done.returncode}"
    except OSError as exc:
        said = str(exc)
    finally:
        with suppress(OSError):
            part.unlink()
    return f"'{' '.join(compiler)}' does not compile {flavour.name}:\n{said}\n{OTHER}"
