"""`gog-edge doctor`, and how its report is printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from gog_edge.cli.common import BundleOption, EnginesOption, SearchOption, print_errors
from gog_edge.doctor.finding import Finding, Report, State
from gog_edge.engines.manifest import ENGINES
from gog_edge.engines.registry import CPU_SEARCH

_COLOURS = {State.OK: "green", State.MISSING: "yellow", State.WRONG: "yellow"}


def show_report(report: Report, console: Console | None = None) -> None:
    """Print a line for each finding, whether the engine can serve the bundle, and the commands that fix problems.

    Commands are never wrapped, so that they can be copied.
    """
    console = console or Console()
    console.print(_table(report))
    why = "requested" if report.requested else "the best that works here" if report.serves else "none works here"
    searching = f", search {report.search}" * (report.search != CPU_SEARCH)
    verdict = "[green]can serve[/]" if report.serves else "[red]cannot serve[/]"
    console.print(f"[bold]{report.engine}{searching}[/] ({why}) {verdict} '{escape(report.bundle)}'", highlight=False)
    blocking = report.blocking
    _print_remedies(console, f"[red]required for {report.engine}[/]", blocking)
    _print_remedies(console, "optional", (one for one in report.findings if one not in blocking))


def _table(report: Report) -> Table:
    table = Table("", "what", "", Column("found", overflow="fold"), show_edge=False)
    blocking, part = set(report.blocking), ""
    for one in report.findings:
        if part and one.part != part:
            table.add_section()
        colour = "red" if one in blocking else _COLOURS[one.state]
        label = "machine" if one.part == "box" else one.part  # "box" is its name in JSON
        table.add_row(label if one.part != part else "", escape(one.name), f"[{colour}]{one.state}[/]",
                      escape(one.detail))  # fmt: skip
        part = one.part
    return table


def _print_remedies(console: Console, head: str, findings: Iterable[Finding]) -> None:
    fixable = [one for one in findings if one.remedy]
    if fixable:
        console.print(f"{head}:")
    for one in fixable:
        console.print(f"  {escape(one.name)}: {escape(one.remedy)}", highlight=False, soft_wrap=True)


def doctor(
    bundle: BundleOption = None,
    engine: Annotated[str | None, typer.Option(help=f"Engine to check: {', '.join(ENGINES)}; default: the best that "
                                               "works.")] = None,
    engines: EnginesOption = None,
    search: SearchOption = CPU_SEARCH,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check this machine and a bundle; print the command for what is missing. Exit code 1 if it cannot serve.

    Without --engine, the first one that works is checked, in the order tensorrt-rtx, tensorrt, ort-cuda, ort (the CPU).
    """
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.doctor.examine import examine

    with print_errors():
        report = examine(bundle or DEFAULT_BUNDLE, engine, engines, search=search)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        show_report(report)
    if not report.serves:
        raise typer.Exit(1)
