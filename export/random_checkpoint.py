"""Write a checkpoint folder of a released model's true shape with random weights, to measure export, load and speed.

    python -m export.random_checkpoint --like qwen2.5-vl-3b runs/random-3b

The tokenizer has Qwen's special tokens at their true ids, and as many others of made-up merges. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from gog_edge.errors import GogEdgeError
from gog_edge.exporting.policy.random_checkpoint import SHAPES, shape_of, write_random_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 when refused."""
    parser = argparse.ArgumentParser(prog="python -m export.random_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--like", required=True, help=", ".join(SHAPES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        size = write_random_checkpoint(
            shape_of(args.like), args.out, seed=args.seed, progress=lambda items: track(list(items), "writing")
        )
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    print(json.dumps({"out": str(args.out), "bytes": size, "seconds": round(time.monotonic() - started, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
