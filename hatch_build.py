"""Hatchling build hook that compiles the native operators of `gog_edge.engines.onnx.native` at installation.

The environment variable GOG_EDGE_NATIVE controls it: "off" compiles nothing, for a wheel for another machine; "require"
turns warnings into errors. Without the operators the package works, with ONNX Runtime's own.
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
PLATFORM = "linux-x86_64"  # the sources use its instructions
VARIABLE, OFF, REQUIRE = "GOG_EDGE_NATIVE", "off", "require"
SHOWN_LINES = 5  # of a compiler's error output
NO_COMPILER = "no C++ compiler was found; install one (apt install g++) and install gog_edge again"
COMPILE_REMEDY = (
    "install a newer compiler (apt install g++; on Fedora and similar systems also libstdc++-static), or name one in "
    "the environment variable CXX, and install gog_edge again"
)


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # the generic argument is the builder's config
    """Compiles the libraries into the folder of their sources, and adds them to wheels, which are then per platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile libraries that are missing or outdated. Editable installations use them from the source folder."""
        mode = os.environ.get(VARIABLE, "")
        if mode not in ("", OFF, REQUIRE):
            self.app.abort(f"{VARIABLE} must be '{OFF}' or '{REQUIRE}' or unset, got '{mode}'")
        if mode == OFF or sysconfig.get_platform() != PLATFORM:
            return
        folder = Path(self.root) / FOLDER
        libraries, errors = compile_all(folder, load_variants(folder))
        for error in errors:
            self.app.display_warning(f"native operators of gog_edge: {error}")
        if errors and mode == REQUIRE:
            self.app.abort(f"not all native operators were compiled, and {VARIABLE}={REQUIRE} is set")
        if libraries and version == "standard":
            build_data["artifacts"] += [f"/{(FOLDER / name).as_posix()}" for name in libraries]
            build_data["tag"] = f"py3-none-{PLATFORM.replace('-', '_')}"
            build_data["pure_python"] = False


def load_variants(folder: Path) -> ModuleType:
    """Load variants.py on its own: the package cannot be imported before its dependencies are installed."""
    spec = importlib.util.spec_from_file_location("gog_edge_native_variants", folder / "variants.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"'{folder / 'variants.py'}' cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def compile_all(folder: Path, variants: ModuleType) -> tuple[list[str], list[str]]:
    """Compile all variants that are not up to date; return the names of the current libraries, and error messages."""
    files = [variant.file for variant in variants.VARIANTS]
    digests = {variant: variants.source_digest(variant, folder) for variant in variants.VARIANTS}
    outdated = [variant for variant, digest in digests.items() if not is_current(folder / variant.file, digest)]
    compiler = variants.find_compiler()
    if compiler:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            messages = threads.map(lambda variant: compile_one(variants, compiler, variant, folder), outdated)
            errors = {variant.file: text for variant, text in zip(outdated, messages, strict=True) if text}
    else:
        errors = {variant.file: NO_COMPILER for variant in outdated}
    for file in errors:  # a library of other sources must not remain
        with suppress(OSError):
            (folder / file).unlink()
    return [file for file in files if file not in errors], list(dict.fromkeys(errors.values()))


def digest_file(library: Path) -> Path:
    """Return the path of the file that holds the digest of a library's sources."""
    return library.with_name(f"{library.name}.sha256")


def is_current(library: Path, digest: str) -> bool:
    """Return whether a library exists and was compiled from sources with this digest."""
    stored = digest_file(library)
    return library.is_file() and stored.is_file() and stored.read_text() == digest


def compile_one(variants: ModuleType, compiler: Sequence[str], variant: Any, folder: Path) -> str:
    """Compile one library to a temporary file and rename it. Return an error message, or "" on success."""
    library = folder / variant.file
    part = library.with_name(f"{library.name}.{os.getpid()}.part")
    command = variants.compile_command(compiler, variant, folder, part)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0:
            part.replace(library)
            digest_file(library).write_text(variants.source_digest(variant, folder))
            return ""
        output = "\n".join(done.stderr.splitlines()[-SHOWN_LINES:]) or f"exit code {done.returncode}"
    except OSError as exc:
        output = str(exc)
    finally:
        with suppress(OSError):
            part.unlink()
    return f"'{' '.join(compiler)}' cannot compile {variant.name}:\n{output}\n{COMPILE_REMEDY}"
