"""Do engines of released models build on a machine without a GPU: how long, in how much memory, of what size?

    python -m benchmarks.bench_engines --shapes qwen2.5-vl-7b,qwen3-vl-8b --work DIR

For each shape: a policy of random weights in int4 (kept in --work and used again) beside the atlas's encoder, and
TensorRT for RTX's engines for several GPUs in one. Building is a process of its own, which is watched with all that it
starts. A machine card, a table, last line: JSON.
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

from rich.console import Console
from rich.table import Table

from benchmarks.building.watch import EVERY, taken
from benchmarks.machine import machine_card
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.manifest import MANIFEST, TENSORRT_RTX, BuiltEngines
from gog_edge.errors import BackendError
from gog_edge.files import read_json, write_json


def prepared(shape: str, work: Path) -> Path:
    """A bundle whose policy has that shape; made where it is not there yet, and kept."""
    bundle, checkpoint = work / shape, work / f"{shape}-checkpoint"
    if (bundle / "policy" / "manifest.json").is_file():
        return bundle
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(DEFAULT_BUNDLE, bundle, ignore=shutil.ignore_patterns("policy", "engines"), dirs_exist_ok=True)
    watched(["export.random_checkpoint", "--like", shape, str(checkpoint)])
    watched(["export.export_policy", str(checkpoint), str(bundle / "policy"), "--precision", "int4", "--second", "none",
             "--no-parity", "--name", shape])  # fmt: skip
    shutil.rmtree(checkpoint)
    return bundle


def watched(command: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Run one of our commands: its last line, and the most MiB that it and its children had at a time; pages of
    files count for each that maps them.

    BackendError with what it said where it fails.
    """
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, taken(process.pid)[0])
        time.sleep(EVERY)
    said = process.communicate()[0]
    if process.returncode:
        raise BackendError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return dict(json.loads(said.splitlines()[-1])), peak


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build the engines of a shape, and throw them away."""
    bundle, out = prepared(shape, args.work), args.work / f"{shape}-engines"
    options = ["--sm", args.sm, "--out", str(out), *([] if args.parity else ["--no-parity"])]
    said, peak = watched(["export.build_engines", str(bundle), "--engine", TENSORRT_RTX, *options])
    engines = BuiltEngines.from_json(read_json(out / MANIFEST, what="engines"))
    shutil.rmtree(out)
    one_each = {entry["name"]: entry for entry in said["graphs"]}  # the GPUs share them
    for entry in one_each.values():
        del entry["sm"]
    return {
        "peak_mib": round(peak), "seconds": round(sum(entry["seconds"] for entry in one_each.values()), 1),
        "sms": engines.sms, "version": engines.version, "context": engines.context, "parity": engines.parity,
        "graphs": list(one_each.values()),
    }  # fmt: skip


def as_table(figures: dict[str, dict[str, Any]]) -> Table:
    """A row for each graph, one for all of a shape."""
    table = Table("shape", "graph", "seconds", "peak MiB", "weights MB", "engine MB", "layers", "KV", "attention")
    for shape, figure in figures.items():
        for entry in figure["graphs"]:
            sizes = (f"{entry[key] / 1e6:,.0f}" for key in ("weights", "bytes"))
            counts = (str(entry[key]) for key in ("layers", "kv_cache_update", "attention"))
            table.add_row(shape, entry["name"], str(entry["seconds"]), f"{entry['peak_mib']:,}", *sizes, *counts)
        table.add_row(shape, "[b]all", str(figure["seconds"]), f"{figure['peak_mib']:,}", end_section=True)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen2.5-vl-7b,qwen3-vl-8b", help="as export.random_checkpoint knows them")
    parser.add_argument("--sm", default="86,89,120", help="GPUs")
    parser.add_argument("--parity", action="store_true", help="check the lifted graphs, too: it takes long")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-engines"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    figures = {shape: measure(shape, args) for shape in args.shapes.split(",")}
    line = {"shapes": figures, "machine": machine_card()}
    Console().print(*(f"{key}: {value}" for key, value in machine_card().items()), sep="\n", highlight=False)
    Console().print(as_table(figures))
    write_json(args.out, line)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
