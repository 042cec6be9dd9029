"""Embed a pack that was read but not embedded yet, on many machines or processes, with Ray Data.

    python -m index.build_pack wikipedia.zim packs/wiki --name wiki --encoder encoder --stop-after reading
    python -m index.embed_ray packs/wiki --encoder encoder --workers 16 --cores 2 --address auto
    python -m index.build_pack wikipedia.zim packs/wiki --name wiki --encoder encoder

Needs the extra `ray`. Every machine of the cluster has gog_edge installed and sees the pack's folder and the encoder's
under the same paths (NFS, Lustre). Without --address, worker processes of this machine do it. Killed and run again, it
embeds what is left. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import FAILURES, explained
from gog_edge.cli.render_pack import Stages
from gog_edge.errors import InputError
from gog_edge.indexing.ray_embedding import LOCAL, Workers, embed_with_ray


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m index.embed_ray", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the pack, as index.build_pack left it after reading")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder folder that the build was begun with")
    parser.add_argument("--address", default=LOCAL, help="of a Ray cluster, or 'auto' (default: this machine alone)")
    parser.add_argument("--workers", type=int, default=2, help="encoders that run at a time (%(default)s)")
    parser.add_argument("--cores", type=int, default=1, help="of each worker (%(default)s)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        if min(args.workers, args.cores) < 1:
            raise InputError(f"{args.workers} workers of {args.cores} cores; give at least 1 of each")
        workers = Workers(args.workers, args.cores, args.address)
        with Stages() as stages:
            shards = embed_with_ray(args.out, args.encoder, workers, stages)
    except FAILURES as exc:
        print(f"embed_ray: {explained(exc)}", file=sys.stderr)
        return 1
    print(json.dumps({"pack": str(args.out), "shards": shards, "seconds": round(time.perf_counter() - started, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
