"""Mutate every file that the product reads, and report what the readers do with the mutants.

    python -m benchmarks.mutation --count 20000
    python -m benchmarks.mutation --only safetensors --count 500
    python -m benchmarks.mutation --only bundle/bundle.toml --count 500

A mutant is accepted, or refused with one of gog_edge's errors; everything else is a failure: another exception, an
accepted number that is not finite, a hang, more than 4 GiB of memory, the death of the process, or the refusal of the
valid file. Each failing mutant is kept in --keep, with its place among the valid files and what happened.
Needs the extras `cpu,bench,export,index`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import InputError

with command_imports(__name__):
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column, Table

    from benchmarks.mutation.runner import FAILURES, FINE, Outcome, plan_jobs, run_jobs, write_seeds
    from benchmarks.mutation.targets import TARGETS, Target
    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from gog_edge.files import write_json

OUTCOMES = (*FINE, *FAILURES)


class Report:
    """Counts by format and target, and the failures, whose mutants are written to files."""

    def __init__(self, keep: Path, work: Path) -> None:
        self.keep, self.work = keep, work
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)  # by target
        self.failures: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Count an outcome; keep the mutant of a failure."""
        self.counts[outcome.job.target.name][outcome.outcome] += 1
        if outcome.outcome in FINE:
            return
        self.failures.append(outcome)
        target = outcome.job.target
        folder = self.keep / f"{target.name.replace('/', '__')}--{outcome.job.seed}-{outcome.job.number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(target.file).name).write_bytes(outcome.job.data(self.work / target.seed))
        write_json(folder / "failure.json", {"seed": target.seed, "file": target.file, "outcome": outcome.outcome,
                                             "detail": outcome.detail})  # fmt: skip

    def by_format(self) -> dict[str, dict[str, int]]:
        """Return the number of each outcome by format."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for target in TARGETS:
            counts[target.kind] += self.counts[target.name]
        return {kind: {name: count[name] for name in OUTCOMES} for kind, count in counts.items() if count}

    def tables(self) -> list[Table]:
        """Return the counts and the failures as tables."""
        counts = Table("format", *(Column(name, justify="right") for name in OUTCOMES), title="mutants")
        for kind, count in self.by_format().items():
            counts.add_row(kind, *(f"{count[name]:,}" if count[name] else "" for name in OUTCOMES))
        failures = Table("file", "outcome", Column("count", justify="right"), "first", title="failures")
        grouped: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
        for one in self.failures:
            grouped[one.job.target.name, one.outcome, one.detail.partition(":")[0]].append(one)
        for (target, outcome, _), group in sorted(grouped.items()):
            failures.add_row(target, outcome, str(len(group)), escape(group[0].detail))
        return [counts, failures] if grouped else [counts]


def select(only: Sequence[str]) -> list[Target]:
    """Return the targets of the given formats, seeds or files, by default all. Raises InputError for an unknown one."""
    unknown = [name for name in only if not any(name in (one.kind, one.seed, one.name) for one in TARGETS)]
    if unknown:
        kinds = ", ".join(dict.fromkeys(target.kind for target in TARGETS))
        raise InputError(f"'{unknown[0]}' is neither a format ({kinds}) nor a seed nor a file: "
                         f"{', '.join(target.name for target in TARGETS)}")  # fmt: skip
    return [one for one in TARGETS if not only or {one.kind, one.seed, one.name} & set(only)]


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the mutants; the exit code is 1 if one of them failed."""
    args = _arguments(argv)
    targets = select(args.only)
    started = monotonic()
    with TemporaryDirectory(prefix="mutation-", dir=args.work) as temporary:
        work = Path(temporary)
        report = Report(args.keep, work)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("writing valid files", total=None)
            write_seeds(targets, work)
            jobs = plan_jobs(targets, args.count, args.seed)
            progress.update(task, total=len(jobs))

            def add(outcome: Outcome) -> None:
                report.add(outcome)
                name = f"{outcome.job.target.name}, {len(report.failures)} failures"
                progress.update(task, advance=1, description=name)

            run_jobs(jobs, work, seconds=args.seconds, workers=args.workers, on_outcome=add)
    line = {"machine": machine_card(), "seed": args.seed, "mutants": len(jobs), "failures": len(report.failures),
            "minutes": round((monotonic() - started) / 60, 1), "by_format": report.by_format(),
            "by_file": {name: dict(count) for name, count in sorted(report.counts.items()) if count}}  # fmt: skip
    print_results(machine_card(), report.tables(), line, args.out)
    return 1 if report.failures else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--count", type=int, default=20_000, help="number of mutants (default %(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="FORMAT", help="a format, seed or file; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=16, help="of the mutations (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="that one mutant may take (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for temporary files; default: the system's")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/mutation"), help="folder for failing mutants (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "mutation.json", help="results file (default %(default)s)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
