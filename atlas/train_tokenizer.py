"""Train the tokenizer of the atlas policy on trajectories about fictional countries.

    python -m atlas.train_tokenizer runs/tokenizer --flags flag-icons-7.5.0.tgz
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from atlas.countries import from_geonames
    from atlas.flags import load_flag_icons
    from atlas.policy.tokenizer import save_tokenizer, train_tokenizer, trajectory_texts
    from atlas.policy.worlds import gather_names
    from gog_edge.policy.dialect.loader import load_dialect


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the tokenizer")
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--trajectories", type=int, default=15_000, help="texts to train on (default %(default)s)")
    args = parser.parse_args(argv)
    names = gather_names(from_geonames(load_flag_icons(args.flags)[1]))
    tokenizer = train_tokenizer(trajectory_texts(names, args.trajectories), load_dialect("atlas"))
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    print(json.dumps({"entries": tokenizer.get_vocab_size()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
