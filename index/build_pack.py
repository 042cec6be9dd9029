"""`gog-edge pack build`: build a pack from a snapshot, or update one to a newer snapshot.

    python -m index.build_pack wikipedia_en_top_maxi_2026-01.zim packs/top --encoder encoder --memory 4G
    python -m index.build_pack collection/ packs/museum --encoder encoder --name museum
    python -m index.build_pack wikipedia_en_top_maxi_2026-07.zim packs/top --encoder encoder --update
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.pack import build


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(build, "index.build_pack", argv)


if __name__ == "__main__":
    raise SystemExit(main())
