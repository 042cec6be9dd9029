"""Compare a bundle's graphs, rewritten as engines are built from them, with its own. Nothing is built; no GPU needed.

    python -m export.check_lifted BUNDLE --kind decomposed

For engines that are built with --no-parity: what a graph says depends on no box. Exit status 1 when the difference is
over a limit. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from gog_edge.bundle import Bundle, open_bundle
from gog_edge.engines.manifest import DECODER
from gog_edge.errors import GogEdgeError
from gog_edge.exporting.conversion.convert import KINDS, Kind, lift_graph
from gog_edge.exporting.conversion.parity import check_lifted, measure_lifted
from gog_edge.exporting.engines.sources import bundle_graphs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when within the limits."""
    parser = argparse.ArgumentParser(
        prog="python -m export.check_lifted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder with bundle.toml")
    parser.add_argument("--kind", choices=KINDS, required=True, help="standard: TensorRT for RTX, TensorRT from 10.15 "
                        "on; decomposed: TensorRT before; half: ort-cuda")  # fmt: skip
    parser.add_argument("--context", type=int, help="tokens a cache holds (default: the policy's)")
    args = parser.parse_args(argv)
    try:
        report = compare(open_bundle(args.bundle), args.kind, args.context)
        print(json.dumps(report))
        check_lifted(report)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except OSError as exc:  # all graphs are written once more, to the folder for what is temporary
        sys.stderr.write(f"error: the graphs cannot be rewritten in '{gettempdir()}' ({exc}); name a folder with room "
                         "for them: TMPDIR=FOLDER\n")  # fmt: skip
        return 1
    return 0


def compare(bundle: Bundle, kind: Kind, context: int | None = None) -> dict[str, Any]:
    """Figures of every graph; see `measure_lifted`."""
    found = bundle_graphs(bundle, context)
    with TemporaryDirectory() as folder:
        lifted = {graph.name: Path(folder) / f"{graph.name}.onnx" for graph in found.graphs}
        for graph in found.graphs:
            lift_graph(graph.path, lifted[graph.name], kind, context=found.context * (graph.name == DECODER))
        return measure_lifted(bundle, lifted, kind, context=found.context)


if __name__ == "__main__":
    raise SystemExit(main())
