"""`gog-edge doctor`: can this box serve that bundle, and what would mend it?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gog_edge.cli.errors import errors_shown
from gog_edge.cli.options import BundleOption, EnginesOption, SearchOption
from gog_edge.engines.built import ENGINES
from gog_edge.engines.choice import CPU_SEARCH


def doctor(
    bundle: BundleOption = None,
    engine: Annotated[str | None, typer.Option(help=f"What it is to be served with: {', '.join(ENGINES)}; the best "
                                               "that works here when left out.")] = None,
    engines: EnginesOption = None,
    search: SearchOption = CPU_SEARCH,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what this box has, what a bundle needs and the command for what is missing; exit code 1 if it cannot serve.

    Without --engine it is read for the best that works: tensorrt-rtx, tensorrt, ort-cuda, then ort on the CPU.
    """
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.doctor.examine import examine
    from gog_edge.show_doctor import show_report

    with errors_shown():
        report = examine(bundle or DEFAULT_BUNDLE, engine, engines, search=search)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        show_report(report)
    if not report.serves:
        raise typer.Exit(1)
