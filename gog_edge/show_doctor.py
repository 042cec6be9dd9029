"""What the doctor found, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from gog_edge.doctor.finding import Finding, Report, State
from gog_edge.engines.choice import CPU_SEARCH

_COLOURS = {State.OK: "green", State.MISSING: "yellow", State.WRONG: "yellow"}


def show_report(report: Report, console: Console | None = None) -> None:
    """Print a line for each finding, whether the engine can serve the bundle, and the commands that mend the rest.

    Commands are never wrapped: they are there to be copied.
    """
    console = console or Console()
    console.print(_table(report))
    why = "asked for" if report.asked else "the best that works here" if report.serves else "none works here"
    searching = f", search {report.search}" * (report.search != CPU_SEARCH)
    verdict = "[green]can serve[/]" if report.serves else "[red]cannot serve[/]"
    console.print(f"[bold]{report.engine}{searching}[/] ({why}) {verdict} '{escape(report.bundle)}'", highlight=False)
    blocking = report.blocking
    _mend(console, f"[red]what {report.engine} needs[/]", blocking)
    _mend(console, "what else could be mended", (one for one in report.findings if one not in blocking))


def _table(report: Report) -> Table:
    table = Table("", "what", "", Column("found", overflow="fold"), show_edge=False)
    blocking, part = set(report.blocking), ""
    for one in report.findings:
        if part and one.part != part:
            table.add_section()
        colour = "red" if one in blocking else _COLOURS[one.state]
        table.add_row(one.part if one.part != part else "", escape(one.what), f"[{colour}]{one.state}[/]",
                      escape(one.said))  # fmt: skip
        part = one.part
    return table


def _mend(console: Console, head: str, findings: Iterable[Finding]) -> None:
    mended = [one for one in findings if one.remedy]
    if mended:
        console.print(f"{head}:")
    for one in mended:
        console.print(f"  {escape(one.what)}: {escape(one.remedy)}", highlight=False, soft_wrap=True)
