"""Compare whole atlas episodes with transformers: logits and tokens of the exported policy against the checkpoint's.

    python -m benchmarks.check_atlas_parity --checkpoint atlas/checkpoints/policy --episodes 50

Each episode first runs through the agent loop with real retrieval and real crops. What the loop sent to the policy is
then given to transformers, which computes every turn from scratch. The exit code is 1 if a figure exceeds its limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from benchmarks.bench_atlas import Bench, load_test_set
    from benchmarks.support.recorded_policy import RecordedPolicy
    from gog_edge.agent.events import Workflow
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.cli.render_export import show_parity
    from gog_edge.exporting.policy.checkpoint import Checkpoint
    from gog_edge.exporting.policy.parity import ParityEpisode, measure_parity

MAX_TOKENS = 96  # generated after each turn; the turns of the atlas policy are shorter


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if all figures are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: the atlas")
    parser.add_argument("--checkpoint", type=Path, required=True, help="that the bundle's policy was exported from")
    parser.add_argument("--set", default="held-out",
                        help="test set of benchmarks/testsets.json (default %(default)s)")  # fmt: skip
    parser.add_argument("--episodes", type=int, default=50, help="(default %(default)s)")
    args = parser.parse_args(argv)
    bench = Bench(args.bundle, threads=2)
    dialect = bench.dialect
    recorded = RecordedPolicy(bench.policy, dialect)
    bench.policy = recorded
    bench.run(load_test_set(args.set, bench.countries, bench.flags)[: args.episodes], Workflow.GOG)
    bench.close()
    episodes = [
        ParityEpisode(dialect.system_prompt, tuple(one.turns), max_tokens=MAX_TOKENS)
        for one in recorded.conversations
    ]
    report = measure_parity(bench.folder, Checkpoint.open(args.checkpoint), episodes)
    show_parity(report, f"{len(episodes)} atlas episodes against {args.checkpoint}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
