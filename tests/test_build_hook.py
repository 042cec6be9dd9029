"""What `hatch_build.py` compiles at installation, and its messages and results if it cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from gog_edge.engines.onnx.native.variants import (
    SOURCES,
    VARIANTS,
    find_compiler,
    processor_flags,
    source_digest,
    supported_variants,
)

ROOT = Path(__file__).parents[1]
NATIVE = Path("gog_edge", "engines", "onnx", "native")
# Files that a build reads, and those of the package with which the installed library is found.
NEEDED = ("hatch_build.py", "pyproject.toml", ".gitignore", "README.md", "LICENSE", "gog_edge/__init__.py",
          "gog_edge/engines/__init__.py", "gog_edge/engines/onnx/__init__.py")  # fmt: skip
FILES = {variant.file for variant in VARIANTS}
PURE, PLATFORM_WHEEL = "gog_edge-0.1.0-py3-none-any.whl", "gog_edge-0.1.0-py3-none-linux_x86_64.whl"
FIND_LIBRARY = """
import onnxruntime
from gog_edge.engines.onnx.native import library
print(library())
onnxruntime.SessionOptions().register_custom_ops_library(str(library()))
"""

on_linux = pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="requires Linux on x86-64")
with_compiler = pytest.mark.skipif(not find_compiler(), reason="requires a C++ compiler")


def copy_tree(root):
    """Copy what a build needs, without any compiled library."""
    for name in NEEDED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    shutil.copytree(ROOT / NATIVE, root / NATIVE, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    return root


def build(root, target="wheel", **environment):
    """Run hatchling; return the finished process, and the file it wrote, or None."""
    inherited = {name: value for name, value in os.environ.items() if name != "GOG_EDGE_NATIVE"}
    out = root / "dist" / str(len(list(root.glob("dist/*"))))
    line = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(line, cwd=root, env=inherited | environment, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    return done, next(out.glob("gog_edge-*"), None)


def libraries(root):
    return {path.name for path in (root / NATIVE).iterdir() if path.suffix not in (".py", ".cpp", ".h", ".sha256", "")}


def libraries_in(wheel):
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


def write_placeholders(root):
    """Write a placeholder for every library, with the digest of the present sources."""
    for variant in VARIANTS:
        (root / NATIVE / variant.file).write_bytes(b"placeholder")
        (root / NATIVE / f"{variant.file}.sha256").write_text(source_digest(variant, root / NATIVE))
    return root


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


@pytest.fixture
def failing_compiler(tmp_path):
    """Return a function that creates a C++ compiler which fails if its options match a shell pattern."""

    def make(pattern):
        path = tmp_path / "old-c++"
        path.write_text(f'#!/bin/sh\ncase "$*" in {pattern}) echo "unrecognized option" >&2; exit 1 ;; esac\n'
                        f'exec {" ".join(find_compiler())} "$@" -O0\n')  # fmt: skip
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def no_compiler(tmp_path):
    """An environment with an empty PATH."""
    (tmp_path / "nothing").mkdir()
    return {"PATH": str(tmp_path / "nothing"), "CXX": ""}


# --- with a compiler ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A tree whose wheel was built, and the wheel."""
    root = copy_tree(tmp_path_factory.mktemp("compiled"))
    done, wheel = build(root, GOG_EDGE_NATIVE="require")
    assert done.returncode == 0, done.stderr
    return root, wheel


@on_linux
@with_compiler
def test_a_wheel_contains_all_variants_and_is_platform_specific(compiled):
    root, wheel = compiled
    assert wheel.name == PLATFORM_WHEEL and libraries_in(wheel) == FILES == libraries(root)
    text = zipfile.ZipFile(wheel).read("gog_edge-0.1.0.dist-info/WHEEL").decode()
    assert "Tag: py3-none-linux_x86_64\n" in text and "Root-Is-Purelib: false\n" in text


@on_linux
@with_compiler
@pytest.mark.skipif(not supported_variants(processor_flags()), reason="this processor supports no variant")
def test_the_fastest_supported_library_of_an_installed_wheel_loads(compiled, tmp_path):
    zipfile.ZipFile(compiled[1]).extractall(tmp_path)
    done = subprocess.run([sys.executable, "-c", FIND_LIBRARY], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / NATIVE / supported_variants(processor_flags())[0].file)


@on_linux
@with_compiler
def test_a_variant_that_the_compiler_does_not_support_is_left_out(tree, failing_compiler):
    done, wheel = build(tree, CXX=failing_compiler("*-mavxvnni*"))
    supported = FILES - {"operators-avx2-vnni.so"}
    assert done.returncode == 0 and "unrecognized option" in done.stderr and "install a newer compiler" in done.stderr
    assert "cannot compile avx2-vnni" in done.stderr and "avx512" not in done.stderr
    assert libraries(tree) == supported == libraries_in(wheel) and wheel.name == PLATFORM_WHEEL


# --- which libraries are compiled -----------------------------------------------------------------


@on_linux
def test_current_libraries_are_not_compiled_again(tree, failing_compiler):
    done, wheel = build(write_placeholders(tree), CXX=failing_compiler("*"), GOG_EDGE_NATIVE="require")
    assert done.returncode == 0, done.stderr
    assert libraries_in(wheel) == FILES and (tree / NATIVE / VARIANTS[0].file).read_bytes() == b"placeholder"


@on_linux
@pytest.mark.parametrize("name", ["simd.h", "matmul.cpp", "variants.py"])
def test_outdated_libraries_are_removed(tree, failing_compiler, name):
    """Even if they cannot be compiled again, or the changed sources have an older timestamp."""
    path = write_placeholders(tree) / NATIVE / name
    path.write_text(path.read_text().replace('"-O3"', '"-O2"') if name.endswith(".py") else path.read_text() + "\n")
    os.utime(path, (0, 0))
    done, wheel = build(tree, CXX=failing_compiler("*"))
    assert done.returncode == 0 and libraries(tree) == set() and wheel.name == PURE


@on_linux
@pytest.mark.parametrize("command", ["no-such-compiler", "no-such-cache c++"])
def test_there_is_no_fallback_from_the_compiler_in_cxx(tree, command):
    done, wheel = build(tree, CXX=command)
    assert done.returncode == 0 and wheel.name == PURE and command.split()[0] in done.stderr


@on_linux
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_warning(tree):
    (tree / NATIVE).chmod(0o555)
    try:
        done, wheel = build(tree)
    finally:
        (tree / NATIVE).chmod(0o755)
    assert done.returncode == 0 and wheel.name == PURE and "cannot compile" in done.stderr


@on_linux
def test_without_a_compiler_the_wheel_is_pure_and_a_remedy_is_printed(tree, no_compiler):
    done, wheel = build(tree, **no_compiler)
    assert done.returncode == 0 and wheel.name == PURE and libraries_in(wheel) == set()
    assert done.stderr.count("no C++ compiler was found; install one (apt install g++)") == 1


@on_linux
def test_require_turns_a_failed_compilation_into_an_error(tree, failing_compiler, no_compiler):
    for environment in (no_compiler, {"CXX": failing_compiler("*")}):
        done, wheel = build(tree, GOG_EDGE_NATIVE="require", **environment)
        assert done.returncode == 1 and wheel is None and "GOG_EDGE_NATIVE=require" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("GOG_EDGE_NATIVE", "off"), ("_PYTHON_HOST_PLATFORM", "linux-aarch64")])
def test_a_wheel_for_another_machine_contains_no_library(tree, name, value):
    """A Jetson compiles none; a PC builds a wheel for it with GOG_EDGE_NATIVE=off."""
    done, wheel = build(write_placeholders(tree), **{name: value})
    assert done.returncode == 0 and "operators" not in done.stderr and wheel.name == PURE
    assert libraries_in(wheel) == set() and libraries(tree) == FILES
    assert "Root-Is-Purelib: true\n" in zipfile.ZipFile(wheel).read("gog_edge-0.1.0.dist-info/WHEEL").decode()


def test_an_invalid_mode_is_an_error(tree):
    done, wheel = build(tree, GOG_EDGE_NATIVE="no")
    assert done.returncode == 1 and wheel is None and "must be 'off' or 'require' or unset, got 'no'" in done.stderr


@on_linux
def test_an_editable_installation_uses_the_libraries_in_the_source_folder(tree, failing_compiler, capsys, monkeypatch):
    """Its wheel only contains the path of the tree and is therefore pure."""
    monkeypatch.setenv("CXX", failing_compiler("*"))
    monkeypatch.delenv("GOG_EDGE_NATIVE", raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build_of_a_tree", tree / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = {"artifacts": []}
    hook = module.NativeBuildHook(str(write_placeholders(tree)), {}, None, None, "", "wheel")
    hook.initialize("editable", data)
    assert data == {"artifacts": []} and libraries(tree) == FILES and not capsys.readouterr().err


def test_an_sdist_contains_the_sources_and_no_library(tree):
    done, sdist = build(write_placeholders(tree), target="sdist")
    assert done.returncode == 0, done.stderr
    with tarfile.open(sdist) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"hatch_build.py", "variants.py", "simd.h", *SOURCES} <= names and not FILES & names
