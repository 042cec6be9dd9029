"""Every command that the package recommends exists after `pip install gog_edge[...]`."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

import gog_edge
from gog_edge.cli import app

PACKAGE = Path(gog_edge.__file__).parent
CHECKOUT = re.compile(r"python -m (export|index|benchmarks|atlas)\b")
RECOMMENDED = re.compile(r"gog-edge ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")


def strings():
    """Yield (place, text) for every string of the package; the values of f-strings are "..."."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value


def recommendations():
    return sorted({(place, *found.groups("")) for place, text in strings() for found in RECOMMENDED.finditer(text)})


def test_commands_of_the_checkout_are_not_recommended():
    mentions = {place for place, text in strings() if CHECKOUT.search(text)}
    assert {place.partition(":")[0] for place in mentions} <= {"cli/export.py"}  # its docstring names the aliases


@pytest.mark.parametrize("place, command, subcommand", recommendations())
def test_a_recommended_command_exists(place, command, subcommand):
    group = get_command(app)
    assert command in group.commands, f"{place}: gog-edge {command}"
    subcommands = getattr(group.commands[command], "commands", None)
    if subcommands is not None and subcommand:
        assert subcommand in subcommands, f"{place}: gog-edge {command} {subcommand}"


def test_the_engine_builder_and_the_exporter_are_among_them():
    found = {(command, subcommand) for _, command, subcommand in recommendations()}
    assert {("export", "engines"), ("export", "policy"), ("export", "check")} <= found
