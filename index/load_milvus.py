"""`gog-edge pack load-milvus`: load a pack's vectors into a Milvus server and direct searches to them.

    python -m index.load_milvus packs/wiki http://10.0.0.5:19530 --index IVF_RABITQ --dtype float16 --drop-old
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.pack_distribution import load_milvus


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(load_milvus, "index.load_milvus", argv)


if __name__ == "__main__":
    raise SystemExit(main())
