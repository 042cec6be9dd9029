"""Compare an exported policy with its checkpoint in transformers, over whole conversations.

    python -m export.check_parity out/policy --checkpoint runs/policy --episodes 5

Exit status 1 when the difference is over the limit. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.report import print_parity
from gog_edge.engines.onnx.native import why_none
from gog_edge.errors import CheckpointError, GogEdgeError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.parity import measure_parity, random_episodes
from gog_edge.policy.model import PolicyModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when within the limit."""
    parser = argparse.ArgumentParser(prog="python -m export.check_parity", description=__doc__.split("\n")[0])
    parser.add_argument("policy", type=Path, help="policy folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint it was exported from")
    parser.add_argument("--adapter", type=Path, help="the PEFT folder that was merged into it")
    parser.add_argument("--episodes", type=int, default=3, help="random conversations to hold")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        model = PolicyModel.open(args.policy)
        checkpoint = Checkpoint.open(args.checkpoint, args.adapter)
        if checkpoint.sha256 != model.manifest.source_sha256:
            raise CheckpointError(f"'{args.policy}' was not exported from '{args.checkpoint}' as it is now")
        episodes, manifest = random_episodes(model, args.episodes, seed=args.seed), model.manifest
        del model
        report = measure_parity(args.policy, checkpoint, episodes)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    if manifest.native and report.native is None:
        sys.stderr.write(f"not compared: the graphs for our own operators, which do not run here: {why_none()}\n")
    return print_parity(report, f"{args.policy} against {args.checkpoint}")


if __name__ == "__main__":
    raise SystemExit(main())
