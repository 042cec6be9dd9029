"""How a parity report is shown: a table for people, one line of JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from gog_edge.exporting.parity import ParityReport


def print_parity(report: ParityReport, title: str) -> int:
    """Print the report; the exit status is 0 when it is within the limit."""
    table = Table("measure", "graphs", "with rounding", title=title)
    whole, graphs, rounding = report.to_json(), asdict(report.graphs), asdict(report.rounding)
    for key in graphs:
        table.add_row(key, f"{graphs[key]:.4g}", f"{rounding[key]:.4g}")
    table.add_section()
    for key in whole.keys() - {"graphs", "rounding"}:
        table.add_row(key, str(whole[key]))
    Console().print(table)
    print(json.dumps(report.to_json()))
    return 0 if report.passed else 1
