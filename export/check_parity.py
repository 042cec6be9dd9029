"""`gog-edge export check --checkpoint`: compare an exported policy with its checkpoint in transformers.

    python -m export.check_parity out/policy --checkpoint runs/policy --episodes 5
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import check_parity


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(check_parity, "export.check_parity", argv)


if __name__ == "__main__":
    raise SystemExit(main())
