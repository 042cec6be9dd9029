"""`gog-edge export engines`: build the engines of a bundle for GPUs.

    python -m export.build_engines BUNDLE --engine tensorrt-rtx --sm 86,89,120
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import engines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(engines, "export.build_engines", argv)


if __name__ == "__main__":
    raise SystemExit(main())
