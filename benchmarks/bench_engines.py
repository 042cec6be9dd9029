"""Measure building TensorRT for RTX engines of released models on a machine without a GPU: time, memory, sizes.

    python -m benchmarks.bench_engines --shapes qwen2.5-vl-7b,qwen3-vl-8b --work DIR

For each shape: a policy of random weights in int4 (created once, kept in --work) with the atlas's encoder, and the
engines for several GPUs. Each build is a process of its own, which is measured with its children. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError

with command_imports(__name__):
    from rich.table import Table

    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from benchmarks.support.resources import SAMPLE_S, process_usage
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.engines.manifest import MANIFEST, TENSORRT_RTX, EngineManifest
    from gog_edge.files import read_json


def make_bundle(shape: str, work: Path) -> Path:
    """Return a bundle whose policy has a shape; create it if it does not exist."""
    bundle, checkpoint = work / shape, work / f"{shape}-checkpoint"
    if (bundle / "policy" / "manifest.json").is_file():
        return bundle
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(DEFAULT_BUNDLE, bundle, ignore=shutil.ignore_patterns("policy", "engines"), dirs_exist_ok=True)
    run_measured(["export.random_checkpoint", "--like", shape, str(checkpoint)])
    run_measured(["export.export_policy", str(checkpoint), str(bundle / "policy"), "--precision", "int4",
                  "--cpu-layout", "none", "--no-parity", "--name", shape])  # fmt: skip
    shutil.rmtree(checkpoint)
    return bundle


def run_measured(command: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Run a `python -m` command; return its JSON line, and the peak memory of it and its children in MiB.

    Raises:
        BackendError: the command failed; contains the end of its output.
    """
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, process_usage(process.pid).memory_mib)
        time.sleep(SAMPLE_S)
    output = process.communicate()[0]
    if process.returncode:
        raise BackendError(f"{' '.join(command)} failed:\n{output[-2000:]}")
    return dict(json.loads(output.splitlines()[-1])), peak


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build the engines of a shape, measure, and delete them."""
    bundle, out = make_bundle(shape, args.work), args.work / f"{shape}-engines"
    options = ["--sm", args.sm, "--out", str(out), *([] if args.parity else ["--no-parity"])]
    report, peak = run_measured(["export.build_engines", str(bundle), "--engine", TENSORRT_RTX, *options])
    engines = EngineManifest.from_json(read_json(out / MANIFEST, what="engines"))
    shutil.rmtree(out)
    graphs = {entry["name"]: entry for entry in report["graphs"]}  # all GPUs share the graphs
    for entry in graphs.values():
        del entry["sm"]
    return {
        "peak_mib": round(peak), "seconds": round(sum(entry["seconds"] for entry in graphs.values()), 1),
        "sms": engines.sms, "version": engines.version, "context": engines.context, "parity": engines.parity,
        "graphs": list(graphs.values()),
    }  # fmt: skip


def as_table(figures: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a row for each graph, and one for each shape as a whole."""
    table = Table("shape", "graph", "seconds", "peak MiB", "weights MB", "engine MB", "layers", "KV updates",
                  "attention")  # fmt: skip
    for shape, figure in figures.items():
        for entry in figure["graphs"]:
            sizes = (f"{entry[key] / 1e6:,.0f}" for key in ("weights", "bytes"))
            counts = (str(entry[key]) for key in ("layers", "kv_cache_update", "attention"))
            table.add_row(shape, entry["name"], str(entry["seconds"]), f"{entry['peak_mib']:,}", *sizes, *counts)
        table.add_row(shape, "[b]all", str(figure["seconds"]), f"{figure['peak_mib']:,}", end_section=True)
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen2.5-vl-7b,qwen3-vl-8b",
                        help="of export.random_checkpoint, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--sm", default="86,89,120", help="compute capabilities of the GPUs (default %(default)s)")
    parser.add_argument("--parity", action="store_true", help="check the converted graphs, too, which takes long")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-engines"),
                        help="folder for bundles and engines (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json",
                        help="file for the JSON (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    figures = {shape: measure(shape, args) for shape in args.shapes.split(",")}
    card = machine_card()
    print_results(card, [as_table(figures)], {"shapes": figures, "machine": card}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
