"""`gog-edge export random-checkpoint`: write a checkpoint of a released shape with random weights.

    python -m export.random_checkpoint --like qwen2.5-vl-3b runs/random-3b
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import random_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(random_checkpoint, "export.random_checkpoint", argv)


if __name__ == "__main__":
    raise SystemExit(main())
