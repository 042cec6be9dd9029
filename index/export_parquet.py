"""Write a pack's vectors as Parquet, with the ids, titles, captions and licences of what they show.

    python -m index.export_parquet packs/wiki exports/wiki

It is what goes between: Milvus (index.load_milvus), Qdrant, OpenSearch and notebooks read it. Needs the extra `milvus`
(pyarrow). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import FAILURES, explained
from gog_edge.indexing.parquet_export import export_parquet, read_holding
from gog_edge.retrieval.vectors.milvus import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m index.export_parquet", description=__doc__.split("\n")[0])
    parser.add_argument("pack", type=Path, help="folder of the pack")
    parser.add_argument("out", type=Path, help="folder of the files")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the vectors (%(default)s)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        files = {path.name: read_holding(path).rows for path in export_parquet(args.pack, args.out, dtype=args.dtype)}
    except FAILURES as exc:
        print(f"export_parquet: {explained(exc)}", file=sys.stderr)
        return 1
    print(json.dumps({"out": str(args.out), "rows": files, "seconds": round(time.perf_counter() - started, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
