"""How quick and how good is searching a pack's vectors? Our index, and the peers that run here.

    python -m benchmarks.bench_retrieval --sizes 10000,100000,1000000 --peer-env usearch=/opt/usearch

Made vectors with the statistics of CLIP's (`benchmarks/retrieval/vectors.py`), 512 dimensions, halves on disk; crops of
96 pictures, eight of each, that are not stored. Each engine runs in a process of its own, over the same vectors, with
the same number of threads, and searches the quickest way it has that finds at least 95 % of the ten nearest. Engines
take turns in rounds; ratios are medians over the rounds of the ratio within a round. Vectors and indexes are made once
and kept in `--work`. Peers, and the whole search, stop at a million.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_card
from benchmarks.picture import draw_bars
from benchmarks.retrieval.corpus import make_corpus
from benchmarks.retrieval.engines import MOST_ROWS, OURS, PEERS, environments, peer_names
from benchmarks.retrieval.race import Figures, opened, race
from benchmarks.retrieval.vectors import World
from benchmarks.retrieval.whole_pack import WholeFigures
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.errors import BackendError, GogEdgeError
from gog_edge.files import write_json

SIZES = "10000,100000,1000000"
DRAWN = 40.0  # times as slow as ours: what is slower makes the other bars vanish, and is told in the table alone
NOTE = (
    "engines search the quickest way that finds 95 % of the ten nearest; ours compares what it found with the stored "
    "vectors, which it reads from the disk's cache; clip-retrieval without HTTP"
)


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the benchmark: what it adds to the last line, its table, and its bars in milliseconds."""

    line: Mapping[str, object]
    table: Table
    groups: Mapping[str, Mapping[str, float]]
    about: Mapping[str, str] = field(default_factory=dict)


def vector_section(args: argparse.Namespace) -> Section:
    """Race the vector indexes at every size."""
    world, homes = World.make(), environments(args.peer_env)
    figures: list[Figures] = []
    missing: dict[str, str] = {}
    for rows in args.sizes:
        corpus = make_corpus(world, rows, args.work)
        with opened(corpus, peer_names(args.peers), homes, args.threads) as (engines, absent):
            figures += race(corpus, engines, args.rounds)
            missing |= {f"{name}, {rows:,} vectors": why for name, why in absent.items()}
    about = {one.engine: one.about for one in figures} | {name: f"missing: {why}" for name, why in missing.items()}
    line = vector_line(figures) | {"missing": missing, "vectors": [asdict(one) for one in figures]}
    return Section(line, as_table(figures), as_groups(figures), about)


def whole_section(args: argparse.Namespace) -> Section:
    """Time the whole search after encoding, in a process of its own. Raises BackendError with what it said."""
    rows = max((size for size in args.sizes if size <= MOST_ROWS), default=MOST_ROWS)
    command = [sys.executable, "-m", "benchmarks.retrieval.whole_pack", str(rows), str(args.work), str(args.encoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the whole search could not be timed:\n{done.stderr[-2000:]}")
    one = WholeFigures(**json.loads(done.stdout.splitlines()[-1]))
    table = Table("images", "1 crop p50", "8 crops p50", "p95", "8 / 1", "MiB in memory", "opened s",
                  title="The whole search after encoding, ms")  # fmt: skip
    ratio = one.p50_ms_8 / one.p50_ms_1
    table.add_row(f"{one.rows:,}", f"{one.p50_ms_1:.2f}", f"{one.p50_ms_8:.2f}", f"{one.p95_ms_8:.2f}", f"{ratio:.2f}",
                  f"{one.resident_mib:.0f}", f"{one.open_s:.2f}")  # fmt: skip
    line = {f"whole_{name}": value for name, value in asdict(one).items()}
    return Section(line | {"whole_8_over_1": round(ratio, 3)}, table, {})


def vector_line(figures: Sequence[Figures]) -> dict[str, object]:
    """What is looked for first: ours at every size, and the best peer at the largest that peers ran at."""
    line: dict[str, object] = {}
    for one in figures:
        if one.engine == OURS:
            size = _label(one.rows)
            line |= {f"p50_ms_1_crop_{size}": one.p50_ms_1, f"p50_ms_8_crops_{size}": one.p50_ms_8,
                     f"recall10_{size}": one.recall10, f"resident_mib_{size}": one.resident_mib,
                     f"open_s_{size}": one.open_s,
                     f"crops_8_over_1_{size}": round(one.p50_ms_8 / one.p50_ms_1, 3)}  # fmt: skip
    peers = [one for one in figures if one.engine != OURS and one.enough]
    if peers:
        rows = max(one.rows for one in peers)
        for crops, key in ((8, "over_ours_8"), (1, "over_ours_1")):
            best = min((one for one in peers if one.rows == rows), key=lambda one: float(getattr(one, key)))
            end = "" if crops == 8 else "_1_crop"
            line |= {f"speed_over_best_peer{end}": getattr(best, key), f"best_peer{end}": best.engine}
        line["best_peer_rows"] = rows
    return line


def as_table(figures: Sequence[Figures]) -> Table:
    """Engines as rows, size by size."""
    table = Table(title="Vector search, ms")
    for column in ("vectors", "engine", "recall@1", "@10", "1 crop p50", "p95", "8 crops p50", "p95", "x ours (1)",
                   "x ours (8)", "MiB in memory", "MiB on disk", "built/s", "opened s"):  # fmt: skip
        table.add_column(column, justify="left" if column == "engine" else "right")
    last = 0
    for one in figures:
        table.add_row(
            f"{one.rows:,}" if one.rows != last else "", one.engine,
            f"{one.recall1:.3f}", f"{one.recall10:.3f}" + ("" if one.enough else " (too few)"),
            f"{one.p50_ms_1:.2f}", f"{one.p95_ms_1:.2f}", f"{one.p50_ms_8:.2f}", f"{one.p95_ms_8:.2f}",
            f"{one.over_ours_1:.2f}", f"{one.over_ours_8:.2f}", f"{one.resident_mib:.0f}", f"{one.disk_mib:.0f}",
            f"{one.build_rows_s:,.0f}", f"{one.open_s:.2f}",
        )  # fmt: skip
        last = one.rows
    return table


def as_groups(figures: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Bars of those that find enough and are not too slow to be drawn beside ours."""
    groups: dict[str, dict[str, float]] = {}
    for crops, key, ratio in (("eight crops", "p50_ms_8", "over_ours_8"), ("one crop", "p50_ms_1", "over_ours_1")):
        for one in figures:
            if one.enough and getattr(one, ratio) <= DRAWN:
                groups.setdefault(f"{one.rows:,} vectors, {crops}", {})[one.engine] = getattr(one, key)
    return groups


def _label(rows: int) -> str:
    return f"{rows // 10**6}m" if rows % 10**6 == 0 else f"{rows // 1000}k" if rows % 1000 == 0 else str(rows)


def _sizes(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when ours cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="numbers of vectors, with commas between")
    parser.add_argument("--peers", default="all", help=f"all, none, or of {', '.join(PEERS)}, with commas between")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=PATH",
                        help="a peer's virtual environment")  # fmt: skip
    parser.add_argument("--encoder", type=Path, help="times the whole search too, in a pack of this encoder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-retrieval"), help="keeps vectors and indexes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="JSON and picture go here")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine")
    args = parser.parse_args(argv)
    load = round(psutil.getloadavg()[0], 2)
    try:
        sections = [vector_section(args), *([whole_section(args)] if args.encoder else [])]
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    publish(sections, args, load)
    return 0


def publish(sections: Sequence[Section], args: argparse.Namespace, load: float) -> None:
    """Print card, tables and a last line of JSON; keep the line and a picture under `args.out`."""
    card, console = machine_card(), Console(width=200)
    about = {name: text for section in sections for name, text in section.about.items()}
    console.print(*(f"{key}: {value}" for key, value in (card | about).items()), sep="\n", highlight=False)
    console.print(*(section.table for section in sections), NOTE, sep="\n")
    line = {key: value for section in sections for key, value in section.line.items()}
    line |= {"about": about, "rounds": args.rounds, "threads": args.threads, "note": NOTE, "load_before": load,
             "machine": card}  # fmt: skip
    groups = {name: bars for section in sections for name, bars in section.groups.items()}
    caption = f"{card['processor']}, {args.threads} threads; recall@10 of at least 0.95; median ms, less is better"
    draw_bars(args.out / "retrieval.png", "Searching crops among made CLIP vectors", caption, groups, "ms")
    write_json(args.out / "retrieval.json", line)
    print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
