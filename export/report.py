"""How a parity report is shown: a table for people, one line of JSON for programs."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from gog_edge.exporting.parity import ParityReport


def print_parity(report: ParityReport, title: str) -> int:
    """Print the report; the exit status is 0 when it is within the limit."""
    table = Table("measure", "value", title=title)
    for key, value in report.to_json().items():
        table.add_row(key, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(report.to_json()))
    return 0 if report.passed else 1
