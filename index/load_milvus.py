"""Put a pack's vectors on a Milvus server and switch searches to them.

    python -m index.load_milvus packs/wiki http://10.0.0.5:19530 --index IVF_RABITQ --dtype float16 --drop-old

PACK is a pack, which is exported first, or what index.export_parquet wrote. A new collection is filled and indexed
beside the one in use; then the alias <pack>_<space> switches to it in one call. A box serves it with `milvus = "URI"`
beside `path` under [[packs]] in bundle.toml; its copy of the pack then needs no vectors/ and no index/. A URI that ends
in .db is a file of milvus-lite. Needs the extra `milvus`. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gog_edge.cli.common import FAILURES, explained
from gog_edge.cli.render_pack import Stages
from gog_edge.config import MilvusConfig
from gog_edge.indexing.milvus_loading import KINDS, Loaded, load_export
from gog_edge.indexing.parquet_export import export_parquet
from gog_edge.retrieval.manifest import MANIFEST
from gog_edge.retrieval.vectors.milvus import DTYPES, MilvusServer


def load(args: argparse.Namespace, stages: Stages) -> list[Loaded]:
    """Export where it is a pack, and load. Raises PackError and BackendError."""
    server = MilvusServer.open(MilvusConfig(args.uri, args.key_env, args.timeout_s))
    try:
        with tempfile.TemporaryDirectory() as beside:
            export = args.pack
            if (export / MANIFEST).is_file():
                export = Path(beside)
                export_parquet(args.pack, export, on_progress=lambda space, *rows: stages(f"{space} to Parquet", *rows))
            return load_export(export, server, index=args.index, dtype=args.dtype, drop_old=args.drop_old,
                               search=dict(args.search), on_progress=stages)
    finally:
        server.close()


def _param(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m index.load_milvus", description=__doc__.split("\n")[0])
    parser.add_argument("pack", type=Path, help="folder of the pack, or of its Parquet export")
    parser.add_argument("uri", help="of the server, as http://10.0.0.5:19530, or a file of milvus-lite (.db)")
    parser.add_argument("--key-env", default="", help="environment variable that holds the server's token")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="seconds that a call may take (%(default)s)")
    parser.add_argument("--index", choices=list(KINDS), default="IVF_FLAT", help="%(default)s")
    parser.add_argument("--search", type=_param, action="append", default=[], metavar="NAME=NUMBER",
                        help="a parameter of searches, as nprobe=128")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of the vectors there; milvus-lite knows float32 only (%(default)s)")
    parser.add_argument("--drop-old", action="store_true", help="drop collections of earlier generations afterwards")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        with Stages() as stages:
            loaded = load(args, stages)
    except FAILURES as exc:
        print(f"load_milvus: {explained(exc)}", file=sys.stderr)
        return 1
    spaces = {one.alias: asdict(one) for one in loaded}
    print(json.dumps({"uri": args.uri, "seconds": round(time.perf_counter() - started, 2), "aliases": spaces}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
