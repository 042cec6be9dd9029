"""Missing packages are reported with the extra that installs them, and defaults in help texts are those of the code."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from gog_edge.cli import app
from gog_edge.cli.common import _EXTRAS, command_main, describe_error, print_errors
from gog_edge.engines.tensorrt.plan import MODULES
from gog_edge.exporting.policy.export import DEFAULT_BLOCK
from gog_edge.indexing.calibration import TARGET_FALSE_ACCEPT
from gog_edge.indexing.distribution.milvus_loading import INDEX_TYPES
from gog_edge.indexing.generation import PackOptions
from gog_edge.policy.probe import MAX_TOKENS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Modules whose distribution has another name and may not be installed here.
DISTRIBUTIONS = {"faiss": {"faiss-cpu", "faiss-gpu"}, "onnxruntime": {"onnxruntime", "onnxruntime-gpu"},
                 "tensorrt": {"tensorrt-cu13"}, "optimum": {"optimum"}, "cuda": {"cuda-bindings"}}  # fmt: skip


def missing(module):
    return ModuleNotFoundError(f"No module named '{module}'", name=module)


@pytest.mark.parametrize("extra", _EXTRAS)
def test_an_extra_installs_its_modules(extra):
    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"][extra]}
    installed = packages_distributions()
    for module in _EXTRAS[extra]:
        names = DISTRIBUTIONS.get(module) or set(map(canonicalize_name, installed.get(module, [module])))
        assert required & names, f"{extra} does not install {module}"


@pytest.mark.parametrize("module, extra", [
    ("onnxruntime", "cpu"), ("faiss.swigfaiss", "cpu"), ("torch", "export"), ("optimum", "text"),
    ("cuda", "tensorrt-rtx"),
    *((module, engine) for engine, module in MODULES.items()), ("ijson", "index"), ("sqlite_utils", "index"),
])  # fmt: skip
def test_the_extra_of_a_missing_module(module, extra):
    package = module.partition(".")[0]
    assert describe_error(missing(module)) == f"{package} is not installed; pip install 'gog_edge[{extra}]'"


@pytest.mark.parametrize("module, extra", [
    ("torch", "text"),  # also in `export`, but of a version that optimum does not support
    ("onnxruntime", "text"), ("faiss", "cpu"), ("jinja2", "export"), ("sqlite_utils", "index"),
])  # fmt: skip
def test_the_extra_of_a_command_is_recommended_for_its_own_modules_only(module, extra):
    assert describe_error(missing(module), "text").endswith(f"pip install 'gog_edge[{extra}]'")


@pytest.mark.parametrize("module", ["gog_edge.retrieval.removed", "antigravity_pro", None])
def test_a_module_of_no_extra_is_a_defect_with_a_traceback(module):
    error = ModuleNotFoundError("No module", name=module)

    @command_main
    def main():
        raise error

    with pytest.raises(ModuleNotFoundError) as raised:
        main()
    assert raised.value is error
    with pytest.raises(ModuleNotFoundError) as raised, print_errors(extra="text"):
        raise error
    assert raised.value is error


def test_the_export_of_a_sentence_encoder_needs_the_extra_text_only():
    """Its modules are imported in a process that has none of the other extras."""
    others = {module for modules in _EXTRAS.values() for module in modules} - set(_EXTRAS["text"])
    code = ("import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); "
            "sys.modules |= {name: __import__('types').ModuleType(name) for name in OPTIMUM}; "
            "import optimum.exporters.onnx as exporters, optimum.exporters.tasks as tasks; "
            "exporters.export = tasks.TasksManager = None; "
            "import gog_edge.exporting.text.checkpoint, gog_edge.exporting.text.encoder")  # fmt: skip
    code = code.replace("OPTIMUM", str(["optimum", "optimum.exporters", "optimum.exporters.onnx",
                                        "optimum.exporters.tasks"]))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *sorted(others)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def option(command, name):
    """The default and the help of an option."""
    found = get_command(app)
    for word in command.split():
        found = found.commands[word]
    parameter = next(one for one in found.params if name in one.opts)
    return parameter.default, parameter.help


@pytest.mark.parametrize("command, name, value", [
    ("export policy", "--block", DEFAULT_BLOCK),
    ("probe", "--tokens", MAX_TOKENS),
    ("pack calibrate", "--false-accept", TARGET_FALSE_ACCEPT),
])  # fmt: skip
def test_the_default_of_an_option_is_that_of_the_function(command, name, value):
    assert option(command, name)[0] == value


def test_defaults_and_choices_in_help_texts():
    options = PackOptions()
    assert f"Default: {options.shard_rows:,}." in option("pack build", "--shard-rows")[1]
    for command in ("build", "add", "compact"):
        assert f"{options.recall} for a new one." in option(f"pack {command}", "--recall")[1]
        assert "no limit for a new one." in option(f"pack {command}", "--memory")[1] and options.memory is None
    default, text = option("pack load-milvus", "--index")
    assert re.findall(r"[A-Z_0-9]{4,}", text) == list(INDEX_TYPES) and default in INDEX_TYPES


def help_texts(command, path="gog-edge"):
    """Yield (place, text) for every command and option."""
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", "") or ""
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from help_texts(subcommand, f"{path} {name}")


def test_help_texts_have_no_private_wording():
    words = re.compile(r"\b(this|a|the) box\b|is to be|left out|\bbesides\b|^Of |^What it|^Say ")
    assert not [(place, text) for place, text in help_texts(get_command(app)) if words.search(text)]
