"""`gog-edge export text`: export a sentence encoder through optimum to a text encoder folder.

    python -m export.export_text multilingual-e5-small out/text --query-prefix "query: " --passage-prefix "passage: "
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(text, "export.export_text", argv)


if __name__ == "__main__":
    raise SystemExit(main())
