"""Hold whole atlas episodes again in transformers: are the exported policy's logits and tokens the checkpoint's?

    python -m benchmarks.check_atlas_parity --checkpoint atlas/checkpoints/policy --episodes 50

Each episode is run through the real loop first (real retrieval, real crops); what the loop told the policy is then told
to transformers, which computes every turn from scratch. Exit status 1 when anything is over the limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_atlas import Bench, load_test_set
from export.report import print_parity
from gog_edge.agent.events import Workflow
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.parity import ParityEpisode, measure_parity
from gog_edge.policy.scripted import RecordedPolicy

LONGEST_TURN = 96  # tokens generated after each turn; the atlas policy's turns are shorter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--set", default="held-out")
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args(argv)
    bench = Bench(args.bundle, threads=2)
    dialect = bench.dialect
    recorded = RecordedPolicy(bench.policy, dialect)
    bench.policy = recorded
    bench.run(load_test_set(args.set, bench.countries, bench.flags)[: args.episodes], Workflow.GOG)
    episodes = [
        ParityEpisode(dialect.system_prompt, tuple(one.turns), max_tokens=LONGEST_TURN)
        for one in recorded.conversations
    ]
    report = measure_parity(open_bundle(args.bundle).policy, Checkpoint.open(args.checkpoint), episodes)
    return print_parity(report, f"{len(episodes)} atlas episodes against {args.checkpoint}")


if __name__ == "__main__":
    sys.exit(main())
