"""`gog-edge export policy`: export a Qwen2.5-VL or Qwen3-VL checkpoint to a policy folder.

    python -m export.export_policy runs/policy out/policy --precision int4
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import policy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(policy, "export.export_policy", argv)


if __name__ == "__main__":
    raise SystemExit(main())
