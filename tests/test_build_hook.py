"""What `hatch_build.py` compiles at installation, and what it says and leaves where it cannot."""

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

from gog_edge.engines.onnx.native.flavours import FLAVOURS, SOURCES, digest, find_compiler, processor_flags, runnable

ROOT = Path(__file__).parents[1]
# What a build reads, and of the package what the libraries are found with.
NEEDED = ("hatch_build.py", "pyproject.toml", ".gitignore", "README.md", "LICENSE", "gog_edge/__init__.py",
          "gog_edge/engines/__init__.py", "gog_edge/engines/onnx/native/flavours.py")  # fmt: skip
NATIVE = Path("gog_edge", "engines", "native")
FILES = {flavour.file for flavour in FLAVOURS}
PURE, TAGGED = "gog_edge-0.1.0-py3-none-any.whl", "gog_edge-0.1.0-py3-none-linux_x86_64.whl"
FIND = """
import onnxruntime
from gog_edge.engines.native import library
print(library())
onnxruntime.SessionOptions().register_custom_ops_library(str(library()))
"""

for_linux = pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="they are for Linux on x86-64")
with_compiler = pytest.mark.skipif(not find_compiler(), reason="there is no C++ compiler")


def lay_tree(root):
    """A copy of what a build needs, without any library."""
    for name in NEEDED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    shutil.copytree(ROOT / NATIVE, root / NATIVE, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    return root


def build(root, target="wheel", **environment):
    """Run hatchling; the process as it ended, and what it made, None where it failed."""
    told = {name: value for name, value in os.environ.items() if name != "GOG_EDGE_NATIVE"} | environment
    out = root / "dist" / str(len(list(root.glob("dist/*"))))
    line = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(line, cwd=root, env=told, capture_output=True, text=True, timeout=300, check=False)
    return done, next(out.glob("gog_edge-*"), None)


def libraries(root):
    return {path.name for path in (root / NATIVE).iterdir() if path.suffix not in (".py", ".cpp", ".h", ".sha256", "")}


def libraries_in(wheel):
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


def fill(root):
    """Put something in the place of all libraries, as if it were made from their sources."""
    for flavour in FLAVOURS:
        (root / NATIVE / flavour.file).write_bytes(b"kept")
        (root / NATIVE / f"{flavour.file}.sha256").write_text(digest(flavour, root / NATIVE))
    return root


@pytest.fixture
def tree(tmp_path):
    return lay_tree(tmp_path / "tree")


@pytest.fixture
def compiler(tmp_path):
    """Gives a C++ compiler that ends badly where its options match a pattern of the shell."""

    def make(pattern):
        path = tmp_path / "old-c++"
        path.write_text(f'#!/bin/sh\ncase "$*" in {pattern}) echo "unrecognized option" >&2; exit 1 ;; esac\n'
                        f'exec {" ".join(find_compiler())} "$@" -O0\n')  # fmt: skip
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def no_compiler(tmp_path):
    """A PATH on which nothing is."""
    (tmp_path / "nothing").mkdir()
    return {"PATH": str(tmp_path / "nothing"), "CXX": ""}


# --- where there is a compiler -------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A tree after its wheel was built, and the wheel."""
    root = lay_tree(tmp_path_factory.mktemp("compiled"))
    done, wheel = build(root, GOG_EDGE_NATIVE="require")
    assert done.returncode == 0, done.stderr
    return root, wheel


@for_linux
@with_compiler
def test_a_wheel_has_a_library_for_every_kind_of_processor_and_is_for_this_platform(compiled):
    root, wheel = compiled
    assert wheel.name == TAGGED and libraries_in(wheel) == FILES == libraries(root)
    said = zipfile.ZipFile(wheel).read("gog_edge-0.1.0.dist-info/WHEEL").decode()
    assert "Tag: py3-none-linux_x86_64\n" in said and "Root-Is-Purelib: false\n" in said


@for_linux
@with_compiler
@pytest.mark.skipif(not runnable(processor_flags()), reason="this processor runs none of them")
def test_the_best_library_of_an_installed_wheel_is_found_and_loads(compiled, tmp_path):
    zipfile.ZipFile(compiled[1]).extractall(tmp_path)
    done = subprocess.run([sys.executable, "-c", FIND], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / NATIVE / runnable(processor_flags())[0].file)


@for_linux
@with_compiler
def test_an_older_compiler_leaves_out_what_it_does_not_know(tree, compiler):
    done, wheel = build(tree, CXX=compiler("*-mavxvnni*"))
    known = FILES - {"operators-avx2-vnni.so"}
    assert done.returncode == 0 and "unrecognized option" in done.stderr and "try a newer compiler" in done.stderr
    assert "avx2-vnni" in done.stderr and "avx512" not in done.stderr
    assert libraries(tree) == known == libraries_in(wheel) and wheel.name == TAGGED


# --- whether something is compiled -----------------------------------------------------------------


@for_linux
def test_what_was_made_from_these_sources_is_not_compiled_again(tree, compiler):
    done, wheel = build(fill(tree), CXX=compiler("*"), GOG_EDGE_NATIVE="require")
    assert done.returncode == 0, done.stderr
    assert libraries_in(wheel) == FILES and (tree / NATIVE / FLAVOURS[0].file).read_bytes() == b"kept"


@for_linux
@pytest.mark.parametrize("name", ["simd.h", "product.cpp", "flavours.py"])
def test_libraries_of_other_sources_do_not_stay(tree, compiler, name):
    """Not even where they cannot be compiled again, nor where the sources are older files."""
    path = fill(tree) / NATIVE / name
    path.write_text(path.read_text().replace('"-O3"', '"-O2"') if name.endswith(".py") else path.read_text() + "\n")
    os.utime(path, (0, 0))
    done, wheel = build(tree, CXX=compiler("*"))
    assert done.returncode == 0 and libraries(tree) == set() and wheel.name == PURE


@for_linux
@pytest.mark.parametrize("said", ["no-such-compiler", "no-such-cache c++"])
def test_a_compiler_that_was_named_is_not_replaced(tree, said):
    done, wheel = build(tree, CXX=said)
    assert done.returncode == 0 and wheel.name == PURE and said.split()[0] in done.stderr


@for_linux
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told_and_no_error(tree):
    (tree / NATIVE).chmod(0o555)
    try:
        done, wheel = build(tree)
    finally:
        (tree / NATIVE).chmod(0o755)
    assert done.returncode == 0 and wheel.name == PURE and "does not compile" in done.stderr


@for_linux
def test_without_a_compiler_the_wheel_is_for_any_processor_and_the_remedy_is_told(tree, no_compiler):
    done, wheel = build(tree, **no_compiler)
    assert done.returncode == 0 and wheel.name == PURE and libraries_in(wheel) == set()
    assert done.stderr.count("no C++ compiler; get one (apt install g++)") == 1


@for_linux
def test_what_is_required_and_cannot_be_compiled_is_an_error(tree, compiler, no_compiler):
    for environment in (no_compiler, {"CXX": compiler("*")}):
        done, wheel = build(tree, GOG_EDGE_NATIVE="require", **environment)
        assert done.returncode == 1 and wheel is None and "GOG_EDGE_NATIVE=require" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("GOG_EDGE_NATIVE", "off"), ("_PYTHON_HOST_PLATFORM", "linux-aarch64")])
def test_a_wheel_for_another_machine_has_no_library_though_some_are_there(tree, name, value):
    """A Jetson compiles none; a PC makes its wheel with the switch off."""
    done, wheel = build(fill(tree), **{name: value})
    assert done.returncode == 0 and "operators" not in done.stderr and wheel.name == PURE
    assert libraries_in(wheel) == set() and libraries(tree) == FILES
    assert "Root-Is-Purelib: true\n" in zipfile.ZipFile(wheel).read("gog_edge-0.1.0.dist-info/WHEEL").decode()


def test_a_switch_that_there_is_not_is_an_error(tree):
    done, wheel = build(tree, GOG_EDGE_NATIVE="no")
    assert done.returncode == 1 and wheel is None and "known are 'off' and 'require'" in done.stderr


@for_linux
def test_an_editable_installation_has_them_beside_their_sources(tree, compiler, capsys, monkeypatch):
    """Its own wheel is a path to the tree, for any processor."""
    monkeypatch.setenv("CXX", compiler("*"))
    monkeypatch.delenv("GOG_EDGE_NATIVE", raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build_of_a_tree", tree / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = {"artifacts": []}
    module.NativeBuildHook(str(fill(tree)), {}, None, None, "", "wheel").initialize("editable", data)
    assert data == {"artifacts": []} and libraries(tree) == FILES and not capsys.readouterr().err


def test_the_sources_are_in_an_sdist_and_no_library(tree):
    done, sdist = build(fill(tree), target="sdist")
    assert done.returncode == 0, done.stderr
    with tarfile.open(sdist) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"hatch_build.py", "flavours.py", "simd.h", *SOURCES} <= names and not FILES & names
