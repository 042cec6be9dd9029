"""Compare this checkout with another one, interleaved in one run: start to first answer, milliseconds per question.

    python -m benchmarks.compare_checkouts --other /path/to/checkout/.venv/bin/python --rounds 7

In every round, each checkout runs once in a process of its own, in alternating order, on its own default bundle: it
answers the first sample question, then all sample questions --repeats times. A first round warms up files and caches.
Ratios are this checkout over the other, within a round; their median and range are reported, because the speed of a
shared machine changes from minute to minute. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError, InputError

with command_imports(__name__):
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from benchmarks.support.reporting import load_average, machine_card, print_results

THIS, OTHER = "this", "other"
MIN_ROUNDS = 5
METRICS = {"first_answer_s": "start to first answer, s", "question_ms": "median per question, ms"}
# Runs in both checkouts, and therefore uses only what both have.
WORKER = """
import json, sys, time
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.runtime import open_runtime
threads, repeats = map(int, sys.argv[1:])
runtime = open_runtime(DEFAULT_BUNDLE, threads=threads)
questions = [(sample.picture.read_bytes(), question) for sample in runtime.samples for question in sample.questions]
def ask(picture, question):
    started = time.perf_counter()
    *_, last = runtime.ask(picture, question)
    return 1e3 * (time.perf_counter() - started), last.record.answer
_, first = ask(*questions[0])
answered = time.time()
rounds = [[ask(*question) for question in questions] for _ in range(repeats)]
print(json.dumps({"answered": answered, "ms": [[ms for ms, _ in one] for one in rounds],
                  "answers": [answer for _, answer in rounds[0]]}))
"""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout and the Python that runs it."""

    name: str
    python: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one process."""

    first_answer_s: float
    question_ms: float
    answers: tuple[str, ...]


def run(checkout: Checkout, threads: int, repeats: int) -> Run:
    """Measure a checkout in a new process. Raises BackendError with the end of its output if it fails."""
    command = [str(checkout.python), "-c", WORKER, str(threads), str(repeats)]
    started = time.time()
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"'{checkout.folder}' failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return Run(result["answered"] - started, float(np.median(result["ms"])), tuple(result["answers"]))


def measure(checkouts: Sequence[Checkout], rounds: int, threads: int, repeats: int) -> dict[str, list[Run]]:
    """Return the runs of each checkout, without the warm-up; the order alternates from round to round."""
    runs: dict[str, list[Run]] = {one.name: [] for one in checkouts}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for checkout in checkouts if number % 2 else reversed(checkouts):
            runs[checkout.name].append(run(checkout, threads, repeats))
    return {name: found[1:] for name, found in runs.items()}


def compare(this: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return the medians of both, and the median and range of the ratios this / other within the rounds."""
    ratios = np.array(this) / np.array(other)
    figures = {THIS: np.median(this), OTHER: np.median(other), "ratio": np.median(ratios),
               "ratio_min": ratios.min(), "ratio_max": ratios.max()}  # fmt: skip
    return {name: round(float(value), 4) for name, value in figures.items()}


def as_table(figures: dict[str, dict[str, float]]) -> Table:
    """Return a table with a row per metric."""
    table = Table("metric", "this", "other", "ratio", "range of the ratio")
    for key, label in METRICS.items():
        one = figures[key]
        table.add_row(label, f"{one[THIS]:.2f}", f"{one[OTHER]:.2f}", f"{one['ratio']:.3f}",
                      f"{one['ratio_min']:.3f} to {one['ratio_max']:.3f}")  # fmt: skip
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, metavar="PYTHON",
                        help="Python of the other checkout's virtual environment")  # fmt: skip
    parser.add_argument("--checkout", type=Path, metavar="DIR",
                        help="the other checkout (default: the folder that contains the environment)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7,
                        help=f"at least {MIN_ROUNDS} for a result (default %(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5,
                        help="of the sample questions in each round (default %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON line to this file, too")
    args = parser.parse_args(argv)
    python = args.other.absolute()  # not resolved: the link decides which environment it is
    folder = (args.checkout or python.parents[2]).resolve()
    if not python.is_file() or not (folder / "gog_edge").is_dir():
        raise InputError(f"'{folder}' must contain gog_edge, and '{python}' must exist; see --other and --checkout")
    ours = Checkout(THIS, Path(sys.executable), Path(__file__).resolve().parents[1])
    load = load_average()
    runs = measure([ours, Checkout(OTHER, python, folder)], args.rounds, args.threads, args.repeats)
    figures = {
        key: compare(*([getattr(one, key) for one in runs[name]] for name in (THIS, OTHER))) for key in METRICS
    }
    pairs = list(zip(runs[THIS][0].answers, runs[OTHER][0].answers, strict=True))
    line = {**figures, "questions": len(pairs), "different_answers": sum(one != two for one, two in pairs),
            "rounds": args.rounds, "enough_rounds": args.rounds >= MIN_ROUNDS, "load_before": load,
            "machine": machine_card()}  # fmt: skip
    print_results(machine_card(), [as_table(figures)], line, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
