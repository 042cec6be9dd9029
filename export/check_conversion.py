"""`gog-edge export check --engine-graphs`: compare the graphs that engines are built from with the bundle's own.

    python -m export.check_conversion BUNDLE --kind decomposed
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import check_conversion


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(check_conversion, "export.check_conversion", argv)


if __name__ == "__main__":
    raise SystemExit(main())
