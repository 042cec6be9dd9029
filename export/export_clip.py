"""`gog-edge export clip`: export an open_clip model to an encoder folder.

    python -m export.export_clip ViT-B-32 out/encoder --weights vit_b_32.safetensors --tag laion2b_s34b_b79k
    python -m export.export_clip atlas/checkpoints/encoder gog_edge/data/atlas/encoder
"""

from __future__ import annotations

from collections.abc import Sequence

from gog_edge.cli.common import run_as_module
from gog_edge.cli.export import clip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_as_module(clip, "export.export_clip", argv)


if __name__ == "__main__":
    raise SystemExit(main())
