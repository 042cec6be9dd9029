"""Serve a bundle on this machine.

    python -m gog_edge.serve --port 8080
    python -m gog_edge.serve --bundle /media/museum --host 0.0.0.0 --engine tensorrt-rtx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.config import ServeConfig
from gog_edge.engines.manifest import ENGINES, ORT
from gog_edge.engines.registry import CPU_SEARCH, SEARCHES, EngineChoice
from gog_edge.errors import GogEdgeError
from gog_edge.serve.server import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; 2 when it cannot begin."""
    default = ServeConfig()
    parser = argparse.ArgumentParser(prog="python -m gog_edge.serve", description="Serve a bundle on this machine.")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="folder of a bundle (default: the atlas)")
    parser.add_argument("--host", default=default.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=default.threads, help="cores to use (default: all)")
    parser.add_argument("--traces", type=Path, help="folder that gets a trace of each question (default: none is kept)")
    parser.add_argument("--engine", choices=ENGINES, default=ORT, help="what runs the graphs (default: %(default)s)")
    parser.add_argument("--engines", type=Path, help="folder of built engines (default: engines/ENGINE in the bundle)")
    parser.add_argument("--search", choices=SEARCHES, default=CPU_SEARCH,
                        help="what searches the packs (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        config = ServeConfig(host=options.host, port=options.port, threads=options.threads, traces=options.traces)
        serve(options.bundle, config, EngineChoice(options.engine, options.engines, options.search))
    except GogEdgeError as exc:
        sys.stderr.write(f"gog_edge: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
