"""Terminal output of `gog-edge export`: progress on stderr, tables on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from gog_edge.files import FileEntry

if TYPE_CHECKING:
    from gog_edge.exporting.engines.builder import BuildReport, OnStep
    from gog_edge.exporting.policy.parity import ParityReport


def track_layers(layers: range, part: str) -> Iterable[int]:
    """Iterate over layers with a progress bar."""
    return track(layers, part, console=Console(stderr=True))


@contextmanager
def show_steps() -> Iterator[OnStep]:
    """Yield a callback that shows one progress bar per step of an engine build."""
    with Progress(console=Console(stderr=True)) as progress:
        tasks = {}

        def on_step(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step)
            progress.update(tasks[step], completed=done, total=total)

        yield on_step


def show_files(title: str, files: Iterable[FileEntry]) -> None:
    """Print the files of a policy."""
    table = Table("file", "bytes", "sha256", title=title)
    for entry in files:
        table.add_row(entry.path, f"{entry.size:,}", entry.sha256[:16])
    Console().print(table)


def show_encoder(manifest: Mapping[str, Any], out: Path) -> None:
    """Print the files of an encoder, and the parity figures of its graphs."""
    title = f"{manifest['name']}, {manifest['precision']} -> {out}"
    table = Table("file", "MB", "max difference", "min cosine", title=title)
    by_graph = manifest["parity"]
    if "min_cosine" in by_graph:  # a text encoder has one graph
        by_graph = {"model": by_graph}
    for entry in manifest["files"]:
        parity = by_graph.get(entry["path"].removesuffix(".onnx"))
        figures = (f"{parity['max_abs']:.1e}", f"{parity['min_cosine']:.6f}") if parity else ("", "")
        table.add_row(entry["path"], f"{entry['size'] / 1e6:.2f}", *figures)
    Console().print(table)


def show_engines(report: BuildReport, out: Path) -> None:
    """Print the engines that were built and what building them took."""
    engines = report.engines
    gpus = f", SM {', '.join(map(str, engines.sms))}" if engines.sms else ""
    table = Table("graph", "bytes", "of weights", "seconds", "peak MiB", "layers",
                  title=f"{engines.engine} {engines.version}{gpus} -> {out}")  # fmt: skip
    for graph in engines.graphs:
        cost = report.costs[graph.name]
        table.add_row(graph.name, f"{cost.bytes:,}", f"{cost.weights:,}", f"{cost.seconds}", f"{cost.peak_mib:,}",
                      str(sum(graph.layers.values())))  # fmt: skip
    Console().print(table)


def show_parity(report: ParityReport, title: str) -> None:
    """Print a parity report as a table, then as one line of JSON."""
    parts = {"graphs": report.graphs, "native graphs": report.native, "with rounding": report.rounding}
    columns = {name: asdict(part) for name, part in parts.items() if part is not None}
    table = Table("measure", *columns, title=title)
    for key in columns["graphs"]:
        table.add_row(key, *(f"{figures[key]:.4g}" for figures in columns.values()))
    table.add_section()
    value = report.to_json()
    for key in value.keys() - {"graphs", "native", "rounding"}:
        table.add_row(key, str(value[key]))
    Console().print(table)
    typer.echo(json.dumps(value))
