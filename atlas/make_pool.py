"""Draw the pool of training scenes. Resumable: existing shards are kept.

    python -m atlas.make_pool runs/pool --flags flag-icons-7.5.0.tgz --shards 100
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from atlas.countries import from_geonames, held_out
from atlas.flags import load_flag_icons, png_pixels
from atlas.policy.pool import draw_shard, shard_path, write_shard
from gog_edge.cli.common import command_main


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pool")
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--shards", type=int, default=100, help="number of shards of 256 scenes (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first shard (default %(default)s)")
    args = parser.parse_args(argv)
    pngs, names = load_flag_icons(args.flags)
    countries = from_geonames(names)
    hidden = held_out(countries)
    keys = [country.flag for country in countries if country.iso not in hidden]
    flags = {key: png_pixels(pngs[key]) for key in keys}
    args.out.mkdir(parents=True, exist_ok=True)
    for number in track(range(args.first, args.first + args.shards), "drawing"):
        if not shard_path(args.out, number).exists():
            write_shard(args.out, number, draw_shard(number, flags, keys))
    print(json.dumps({"shards": args.shards, "flags": len(keys), "held_out": len(hidden)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
