"""How a parity report is shown: a table for people, one line of JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from gog_edge.exporting.policy.parity import ParityReport


def print_parity(report: ParityReport, title: str) -> int:
    """Print the report; the exit status is 0 when it is within the limit."""
    parts = {"graphs": report.graphs, "for our operators": report.native, "with rounding": report.rounding}
    held = {name: asdict(part) for name, part in parts.items() if part is not None}
    table = Table("measure", *held, title=title)
    for key in held["graphs"]:
        table.add_row(key, *(f"{part[key]:.4g}" for part in held.values()))
    table.add_section()
    whole = report.to_json()
    for key in whole.keys() - {"graphs", "native", "rounding"}:
        table.add_row(key, str(whole[key]))
    Console().print(table)
    print(json.dumps(whole))
    return 0 if report.passed else 1
