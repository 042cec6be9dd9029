"""The documentation: links resolve, commands and options exist, code blocks run, figures name their files."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import closing
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer
from loopback import serving

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.config import Limits, RemoteConfig
from gog_edge.runtime import open_runtime
from gog_edge.serve.app import create_app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:gog_edge|benchmarks|tests|docs|atlas|jetson|export|index)/[\w./-]+\.(?:py|json|png|md|sh|toml)")


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    """Return the anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """Yield every `gog-edge ...` and `python -m ...` command line of a page, in blocks and inline."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for fence in re.findall(r"```(?:sh|bash)?\n(.*?)```", text, flags=re.DOTALL):
        lines += [line.strip() for line in fence.splitlines()]
    for line in [*lines, *CODE.findall(text)]:
        for part in re.split(r"&&|\|\||;|  #", line):
            part = part.strip().removeprefix("$ ")
            if part.startswith(("gog-edge ", "python -m ")) and "..." not in part:
                yield from alternatives(part)


def alternatives(line):
    """Yield a command line once for each of its `a|b|c`, as in `gog-edge pack add|remove`."""
    choice = re.search(r"(?<![\w-])[\w-]+(?:\|[\w-]+)+(?![\w-])", line)
    if choice is None:
        yield line
        return
    for word in choice.group().split("|"):
        yield from alternatives(line[: choice.start()] + word + line[choice.end() :])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page_id(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(path), f"{page_id(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page):
    for name in CODE.findall(page.read_text(encoding="utf-8")):
        if FILE.fullmatch(name):
            assert (ROOT / name).is_file(), f"{page_id(page)} names {name}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_their_options_exist(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[0] == "python":
            check_module(page, words)
        else:
            check_command(page, words[1:])


def check_module(page, words):
    module = words[2]
    if module.split(".")[0] not in ("gog_edge", "export", "index", "benchmarks", "atlas"):
        return
    assert importlib.util.find_spec(module) is not None, f"{page_id(page)}: there is no module {module}"
    if module == "gog_edge.serve":
        check_command(page, ["serve", *words[3:]])
        return
    options = {word.split("=")[0] for word in words[3:] if word.startswith("--")}
    if options:
        known = help_of(module)
        missing = [option for option in options if not re.search(rf"{option}(?![\w-])", known)]
        assert not missing, f"{page_id(page)}: python -m {module} has no option {missing[0]}"


@cache
def help_of(module):
    """Return the --help text of a module, wide enough that no option is cut."""
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
    return done.stdout


def check_command(page, words):
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        found = command.commands.get(words[0])
        assert found is not None, f"{page_id(page)}: there is no command 'gog-edge {words[0]}'"
        command, words = found, words[1:]
    known = {option for parameter in command.params for option in getattr(parameter, "opts", ())}
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0].strip("[]")
            assert name in known or name == "--help", f"{page_id(page)}: '{command.name}' has no option {name}"


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_api_runs():
    program = "\n".join(blocks("docs/python-api.md", "python"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Helsinki" in done.stdout


def test_the_requests_of_the_http_api_are_answered():
    address = re.compile(r"localhost:8080")
    runtime = open_runtime(DEFAULT_BUNDLE, threads=2)
    with closing(runtime), serving(create_app(runtime)) as url:
        for block in blocks("docs/http-api.md", "sh"):
            command = address.sub(url.removeprefix("http://"), block.strip())
            words = shlex.split(command)
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
            assert '"error"' not in done.stdout and ("answer" in done.stdout or "evidence" in done.stdout), command


def test_the_limits_of_bundle_toml_are_the_defaults():
    first, remote, _ = (tomllib.loads(block) for block in blocks("docs/bundle.md", "toml"))
    assert Limits.from_table(first["limits"], where="bundle.toml") == Limits()
    assert set(first["limits"]) == {field.name for field in fields(Limits)}
    RemoteConfig.from_table(remote["policy"], where="docs/bundle.md")
    text = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    assert all(f"`{field.name}`" in text or field.name in remote["policy"] for field in fields(RemoteConfig))


def test_the_readme_is_short_and_names_both_set_ups():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert "pip install -e '.[cpu]' && python -m gog_edge.serve" in text
    assert "pip install -e '.[dev]' && ruff check . && mypy && pytest" in text


def test_the_quality_table_is_that_of_the_results_file():
    results = json.loads((ROOT / "benchmarks/results/atlas.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kinds = {"at a glance": "glance", "one flag (whole picture)": "whole", "several flags (gaze)": "gaze",
             "two hops": "two_hops", "no picture needed": "text", "look-alikes, half hidden": "reflect",
             "in no snapshot": "invented"}  # fmt: skip
    rows = {name: tuple(results["workflows"][flow]["kinds"][kind] for flow in ("gog", "full_image", "direct"))
            for name, kind in kinds.items()}  # fmt: skip
    rows["**all**"] = tuple(results["workflows"][flow]["accuracy"] for flow in ("gog", "full_image", "direct"))
    for name, shares in rows.items():
        mark = "**" if name.startswith("**") else ""
        cells = " | ".join(f"{mark}{100 * share:.0f} %{mark}" for share in shares)
        assert f"| {name} | {cells} |" in text
    assert f"{results['median_ms']:.0f} ms" in text and f"{results['first_answer_s']:.1f} s" in text


def test_the_packages_in_the_architecture_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"```\ngog_edge/\n(.*?)```", text, flags=re.DOTALL).group(1)
    package = {path.stem for path in (ROOT / "gog_edge").rglob("*.py")}
    folders = {path.name for path in (ROOT / "gog_edge").rglob("*") if path.is_dir()}
    for line in tree.split("atlas/   ")[0].splitlines():
        assert {name.strip("/") for name in re.findall(r"[\w]+/", line)} - folders - {"atlas", "data"} == set(), line
    serve = re.search(r"  serve/ +(.*)", tree).group(1)
    names = {name for name in re.split(r"[ ,]+", serve) if name and not name.endswith("/")}
    assert names == {path.stem for path in (ROOT / "gog_edge/serve").glob("*.py")} - {"__init__", "__main__"}
    assert names <= package


def test_every_key_of_a_dialect_is_documented():
    from gog_edge.policy.dialect import loader

    text = (ROOT / "docs/dialects.md").read_text(encoding="utf-8")
    source = tomllib.loads((Path(loader.__file__).parent / "gog.toml").read_text(encoding="utf-8"))
    for table, value in source.items():
        assert table in text
        for key in value if isinstance(value, dict) else ():
            assert f"`{key}`" in text, f"docs/dialects.md does not describe [{table}] {key}"


MODULES = ("export.export_policy", "index.build_pack", "benchmarks.bench_atlas", "gog_edge.serve")


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_help(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "usage" in done.stdout.lower()
