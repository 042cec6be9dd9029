"""Compiles the native operators of `gog_edge.engines.native` when the package is installed or its wheel is built.

The environment's GOG_EDGE_NATIVE says how: "off" compiles nothing, for a wheel that goes to another machine; "require"
makes an error of what is otherwise a warning. The package runs without the operators, on ONNX Runtime's own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("gog_edge", "engines", "native")
PLATFORM = "linux-x86_64"  # whose instructions the sources name
SWITCH, OFF, REQUIRE = "GOG_EDGE_NATIVE", "off", "require"
LINES = 5  # of what a compiler said that are shown
NO_COMPILER = "there is no C++ compiler; get one (apt install g++) and install again"
TOO_OLD = "get a newer compiler (apt install g++), or name one in the environment's CXX, and install again"


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # of any builder's settings
    """Puts the libraries beside their sources, and into a wheel, which then is for this platform alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile what is missing or older than its sources, for editable installations, too."""
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
    sources = [path for path in folder.iterdir() if path.suffix in (".cpp", ".h") or path.name == "flavours.py"]
    newest = max(path.stat().st_mtime_ns for path in sources)
    files = [flavour.file for flavour in flavours.FLAVOURS]
    stale = [flavour for flavour in flavours.FLAVOURS if not is_newer(folder / flavour.file, newest)]
    compiler = flavours.find_compiler()
    if stale and compiler is None:
        troubles = {flavour.file: NO_COMPILER for flavour in stale}
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            said = threads.map(lambda flavour: compile_one(flavours, compiler, flavour, folder), stale)
            troubles = {flavour.file: trouble for flavour, trouble in zip(stale, said, strict=True) if trouble}
    for file in troubles:
        (folder / file).unlink(missing_ok=True)  # of other sources than those that are there now
    return [file for file in files if file not in troubles], list(dict.fromkeys(troubles.values()))


def is_newer(library: Path, newest: int) -> bool:
    """Whether a library is there that was compiled after the newest source was written."""
    return library.is_file() and library.stat().st_mtime_ns > newest


def compile_one(flavours: ModuleType, compiler: str, flavour: Any, folder: Path) -> str:
    """Compile one library, beside its place and then moved there; what went wrong, "" where nothing did."""
    library = folder / flavour.file
    part = library.with_name(f"{library.name}.{os.getpid()}.part")
    command = flavours.compile_command(compiler, flavour, folder, part)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0:
            part.replace(library)
            return ""
        said = "\n".join(done.stderr.splitlines()[-LINES:]) or f"exit code {done.returncode}"
    except OSError as exc:
        said = str(exc)
    finally:
        part.unlink(missing_ok=True)
    return f"'{compiler}' does not compile {flavour.name}:\n{said}\n{TOO_OLD}"
