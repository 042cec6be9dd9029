"""`gog-edge pack embed-ray`: embed a pack that was read but not embedded yet, on many machines with Ray Data.

    python -m index.build_pack wikipedia.zim packs/wiki --name wiki --encoder encoder --stop-after reading
    python -m index.embed_ray packs/wiki --encoder encoder --workers 16 --cores 2 --address auto
    python -m index.build_pack wikipedia.zim packs/wiki --name wiki --encoder encoder
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.pack_distribution import embed_ray


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(embed_ray, "index.embed_ray", argv)


if __name__ == "__main__":
    raise SystemExit(main())
