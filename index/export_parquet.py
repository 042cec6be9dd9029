"""`gog-edge pack export-parquet`: export a pack's vectors as Parquet, with ids, titles, captions and licences.

    python -m index.export_parquet packs/wiki exports/wiki
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.pack_distribution import export_parquet


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(export_parquet, "index.export_parquet", argv)


if __name__ == "__main__":
    raise SystemExit(main())
