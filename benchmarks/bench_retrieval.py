"""Measure vector search in a pack: our index, and the peers that are available.

    python -m benchmarks.bench_retrieval --sizes 10000,100000,1000000 --peer-env usearch=/opt/usearch

Synthetic vectors with the statistics of CLIP's (benchmarks/retrieval/corpus.py), 512 dimensions, float16 on disk; the
queries are crops of 96 pictures, eight of each, which are not stored. Each engine runs in its own process over the same
vectors with the same number of threads, at its fastest setting that finds at least 95 % of the ten nearest. Engines
take turns in rounds; ratios are medians over the rounds of the ratio within a round. Vectors and indexes are created
once and kept in --work. Peers, and the whole search, are measured with up to a million vectors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError

with command_imports(__name__):
    from rich.console import RenderableType
    from rich.table import Table

    from benchmarks.peers.registry import parse_environments, parse_names
    from benchmarks.retrieval.comparison import RECALL, Figures, compare, opened
    from benchmarks.retrieval.corpus import SyntheticVectors, make_corpus
    from benchmarks.retrieval.engines import MAX_ROWS, OURS, PEERS
    from benchmarks.retrieval.whole_pack import WholeFigures
    from benchmarks.support.reporting import RESULTS, draw_bars, load_average, machine_card, print_results
    from gog_edge.engines.onnx.session import physical_cores

SIZES = "10000,100000,1000000"
MAX_RATIO = 40.0  # slower engines are in the table only: their bars would make the others invisible
NOTE = (
    "engines at the fastest setting that finds 95 % of the ten nearest; ours compares its candidates with the stored "
    "vectors, which it reads from the page cache; clip-retrieval without HTTP"
)


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the benchmark: what it adds to the JSON line, its table, and its bars in milliseconds."""

    line: Mapping[str, object]
    table: Table
    groups: Mapping[str, Mapping[str, float]]
    about: Mapping[str, str] = field(default_factory=dict)


def vector_section(args: argparse.Namespace) -> Section:
    """Compare the vector indexes at every size."""
    source, environments = SyntheticVectors.make(), parse_environments(args.peer_env, PEERS)
    peers = parse_names(args.peers, PEERS)
    figures: list[Figures] = []
    missing: dict[str, str] = {}
    for rows in args.sizes:
        corpus = make_corpus(source, rows, args.work)
        with opened(corpus, peers, environments, args.threads) as (engines, absent):
            figures += compare(corpus, engines, args.rounds)
            missing |= {f"{name}, {rows:,} vectors": reason for name, reason in absent.items()}
    about = {one.engine: one.about for one in figures}
    about |= {name: f"missing: {reason}" for name, reason in missing.items()}
    line = vector_line(figures) | {"missing": missing, "vectors": [asdict(one) for one in figures]}
    return Section(line, as_table(figures), as_groups(figures), about)


def whole_section(args: argparse.Namespace) -> Section:
    """Measure the whole search after encoding in its own process. Raises BackendError with its output if it fails."""
    rows = max((size for size in args.sizes if size <= MAX_ROWS), default=MAX_ROWS)
    command = [sys.executable, "-m", "benchmarks.retrieval.whole_pack", str(rows), str(args.work), str(args.encoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the whole search could not be measured:\n{done.stderr[-2000:]}")
    one = WholeFigures(**json.loads(done.stdout.splitlines()[-1]))
    table = Table("images", "1 crop p50", "8 crops p50", "p95", "8 / 1", "MiB in memory", "open s",
                  title="Whole search after encoding, ms")  # fmt: skip
    ratio = one.p50_ms_8 / one.p50_ms_1
    table.add_row(f"{one.rows:,}", f"{one.p50_ms_1:.2f}", f"{one.p50_ms_8:.2f}", f"{one.p95_ms_8:.2f}", f"{ratio:.2f}",
                  f"{one.resident_mib:.0f}", f"{one.open_s:.2f}")  # fmt: skip
    line = {f"whole_{name}": value for name, value in asdict(one).items()}
    return Section(line | {"whole_8_over_1": round(ratio, 3)}, table, {})


def vector_line(figures: Sequence[Figures]) -> dict[str, object]:
    """Return the main figures: ours at every size, and the best peer at the largest size of the peers."""
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
    """Return a table with engines as rows, size by size."""
    table = Table(title="Vector search, ms")
    for column in ("vectors", "engine", "recall@1", "recall@10", "1 crop p50", "p95", "8 crops p50", "p95",
                   "time / ours, 1 crop", "8 crops", "MiB in memory", "MiB on disk", "vectors/s built",
                   "open s"):  # fmt: skip
        table.add_column(column, justify="left" if column == "engine" else "right")
    last = 0
    for one in figures:
        table.add_row(
            f"{one.rows:,}" if one.rows != last else "", one.engine,
            f"{one.recall1:.3f}", f"{one.recall10:.3f}" + ("" if one.enough else f" (below {RECALL})"),
            f"{one.p50_ms_1:.2f}", f"{one.p95_ms_1:.2f}", f"{one.p50_ms_8:.2f}", f"{one.p95_ms_8:.2f}",
            f"{one.over_ours_1:.2f}", f"{one.over_ours_8:.2f}", f"{one.resident_mib:.0f}", f"{one.disk_mib:.0f}",
            f"{one.build_rows_s:,.0f}", f"{one.open_s:.2f}",
        )  # fmt: skip
        last = one.rows
    return table


def as_groups(figures: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Return the bars of the engines with sufficient recall, without those slower than MAX_RATIO times ours."""
    groups: dict[str, dict[str, float]] = {}
    for crops, key, ratio in (("eight crops", "p50_ms_8", "over_ours_8"), ("one crop", "p50_ms_1", "over_ours_1")):
        for one in figures:
            if one.enough and getattr(one, ratio) <= MAX_RATIO:
                groups.setdefault(f"{one.rows:,} vectors, {crops}", {})[one.engine] = getattr(one, key)
    return groups


def _label(rows: int) -> str:
    return f"{rows // 10**6}m" if rows % 10**6 == 0 else f"{rows // 1000}k" if rows % 1000 == 0 else str(rows)


def _sizes(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def publish(sections: Sequence[Section], args: argparse.Namespace, load: float) -> None:
    """Print card, tables and JSON; write the JSON and a bar chart to `args.out`."""
    card = machine_card()
    about = {name: text for section in sections for name, text in section.about.items()}
    line = {key: value for section in sections for key, value in section.line.items()}
    line |= {"about": about, "rounds": args.rounds, "threads": args.threads, "note": NOTE, "load_before": load,
             "machine": card}  # fmt: skip
    groups = {name: bars for section in sections for name, bars in section.groups.items()}
    caption = f"{card['processor']}, {args.threads} threads; recall@10 of at least {RECALL}; median ms, less is better"
    draw_bars(args.out / "retrieval.png", "Searching crops among synthetic CLIP vectors", caption, groups, "ms")
    tables: list[RenderableType] = [section.table for section in sections]
    print_results(card | about, [*tables, NOTE], line, args.out / "retrieval.json", width=200)


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=SIZES,
                        help="numbers of vectors, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--peers", default="all",
                        help=f"all, none, or of {', '.join(PEERS)}, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=PATH",
                        help="virtual environment of a peer")  # fmt: skip
    parser.add_argument("--encoder", type=Path, help="measure the whole search too, in a pack of this encoder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-retrieval"),
                        help="folder for vectors and indexes (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS,
                        help="folder for JSON and bar chart (default %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of each engine (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default %(default)s)")
    args = parser.parse_args(argv)
    load = load_average()
    sections = [vector_section(args), *([whole_section(args)] if args.encoder else [])]
    publish(sections, args, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
