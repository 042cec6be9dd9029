"""Build the engines of a bundle: TensorRT's for the GPUs named, or graphs for ONNX Runtime's providers for GPUs.

    python -m export.build_engines BUNDLE --engine tensorrt-rtx --sm 86,89,120
    python -m export.build_engines BUNDLE --engine tensorrt        # on the device, for its own GPU
    python -m export.build_engines BUNDLE --engine ort-cuda

TensorRT for RTX needs no GPU to build; one engine serves all GPUs that it was built for. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gog_edge.bundle import open_bundle
from gog_edge.engines.manifest import BUILT_ENGINES, FOLDER
from gog_edge.errors import GogEdgeError
from gog_edge.exporting.engines.builder import BuildReport, OnStep, build_engines
from gog_edge.exporting.engines.plan import peak_mib


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when built and within the parity limits, 1 when refused."""
    parser = argparse.ArgumentParser(
        prog="python -m export.build_engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder with bundle.toml")
    parser.add_argument("--engine", required=True, help=f"available: {', '.join(BUILT_ENGINES)}")
    parser.add_argument("--sm", type=_sms, default=(), help="tensorrt-rtx: GPUs, as 86,89,120 (default: all it knows)")
    parser.add_argument("--out", type=Path, help=f"folder to write (default: BUNDLE/{FOLDER}/ENGINE); an older one is "
                        "replaced")  # fmt: skip
    parser.add_argument("--context", type=int, help="tokens a cache holds (default: the policy's)")
    parser.add_argument("--no-parity", action="store_true", help="skip the parity check; the manifest says so")
    args = parser.parse_args(argv)
    out = args.out or args.bundle / FOLDER / args.engine
    try:
        with _shown() as on_step:
            report = build_engines(
                open_bundle(args.bundle), out, engine=args.engine, sms=args.sm, context=args.context,
                parity=not args.no_parity, on_step=on_step,
            )  # fmt: skip
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    Console().print(_table(report, out))
    print(json.dumps(_line(report, out)))
    return 0


def _sms(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of compute capabilities, such as 86,89,120") from None


@contextmanager
def _shown() -> Iterator[OnStep]:
    """A bar for each thing that is done."""
    with Progress(console=Console(stderr=True)) as progress:
        tasks = {}

        def on_step(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=of)

        yield on_step


def _table(report: BuildReport, out: Path) -> Table:
    engines = report.engines
    gpus = f", SM {', '.join(map(str, engines.sms))}" if engines.sms else ""
    table = Table("graph", "bytes", "of weights", "seconds", "peak MiB", "layers",
                  title=f"{engines.engine} {engines.version}{gpus} -> {out}")  # fmt: skip
    for graph in engines.graphs:
        cost = report.costs[graph.name]
        table.add_row(graph.name, f"{cost.bytes:,}", f"{cost.weights:,}", f"{cost.seconds}", f"{cost.peak_mib:,}",
                      str(sum(graph.layers.values())))  # fmt: skip
    return table


def _line(report: BuildReport, out: Path) -> dict[str, object]:
    engines = report.engines
    return {
        "out": str(out), "engine": engines.engine, "version": engines.version, "context": engines.context,
        "graphs": report.graphs(), "parity": engines.parity,
        "peak_mib": max(peak_mib(), *(cost.peak_mib for cost in report.costs.values())),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
