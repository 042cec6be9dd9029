"""Feed mutants to readers in child processes with limits of memory and time, so that hangs are found too."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TypeAlias

from benchmarks.mutation.readers import SilentDamage, check_values
from benchmarks.mutation.seeds import SEEDS
from benchmarks.mutation.targets import Target
from gog_edge.errors import GogEdgeError

MEMORY_BYTES = 4 * 2**30  # of a child
START_S = 120.0  # until a child has imported everything and sent its first outcome
UNCHANGED = -1  # number of the mutant that is the valid file
MAX_JOBS = 500  # of one child
ACCEPTED, REFUSED = FINE = ("accepted", "refused")
TRACEBACK, DAMAGE, HANG, MEMORY, CRASH, UNFOUNDED = FAILURES = (
    "traceback", "silent damage", "hang", "memory", "crash", "valid file refused",
)  # fmt: skip
_FRAMES = 3  # of a traceback


@dataclass(frozen=True, slots=True)
class Job:
    """One mutant: the same for the same fields."""

    target: Target
    number: int  # UNCHANGED: the valid file
    seed: int

    def data(self, folder: Path) -> bytes:
        """Return the mutant of the file in a seed folder."""
        original = (folder / self.target.file).read_bytes()
        return original if self.number == UNCHANGED else self.target.mutant(original, self.seed, self.number)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reader did with one mutant."""

    job: Job
    outcome: str  # one of FINE or FAILURES
    detail: str = ""


OnOutcome: TypeAlias = Callable[[Outcome], None]


def plan_jobs(targets: Sequence[Target], count: int, seed: int) -> list[Job]:
    """Return the valid file and at least one mutant of each target, in the order of the targets: about `count`."""
    total = sum(target.weight for target in targets)
    return [Job(target, number, seed) for target in targets
            for number in range(UNCHANGED, max(1, round(count * target.weight / total)))]  # fmt: skip


def write_seeds(targets: Sequence[Target], work: Path) -> None:
    """Write the seeds of some targets into `work`, those that are not there yet."""
    for name in dict.fromkeys(target.seed for target in targets):
        part = work / f"{name}.part"
        if not (work / name).is_dir():
            shutil.rmtree(part, ignore_errors=True)
            SEEDS[name](part)
            part.rename(work / name)


def run_jobs(jobs: Sequence[Job], work: Path, *, seconds: float, workers: int, on_outcome: OnOutcome) -> None:
    """Read every mutant in child processes, and call `on_outcome` with each outcome, one at a time.

    Args:
        jobs: the mutants.
        work: folder with the seeds.
        seconds: that one mutant may take.
        workers: number of children at a time.
        on_outcome: called with each outcome.
    """
    parts = [jobs[start : start + MAX_JOBS] for start in range(0, len(jobs), MAX_JOBS)]
    lock = Lock()

    def report(outcome: Outcome) -> None:
        with lock:
            on_outcome(outcome)

    run = partial(_run_part, work=work, seconds=seconds, on_outcome=report)
    with ThreadPoolExecutor(workers) as threads:
        for _ in threads.map(run, parts):
            pass


def _run_part(jobs: Sequence[Job], work: Path, seconds: float, on_outcome: OnOutcome) -> None:
    """Read mutants one after the other; a child that hangs or dies is replaced, and the next mutant is read."""
    done = 0
    while done < len(jobs):
        for outcome in _run_child(jobs[done:], work, seconds):
            on_outcome(outcome)
            done += 1


def _run_child(jobs: Sequence[Job], work: Path, seconds: float) -> Iterator[Outcome]:
    """Yield the outcomes of one child until it is done, hangs or dies; the last one is that of the failing mutant."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(list(jobs), work, sender), daemon=True)
    child.start()
    sender.close()
    limit = START_S
    try:
        for job in jobs:
            if not receiver.poll(limit):
                yield Outcome(job, HANG, f"no result within {limit:.0f} s")
                return
            try:
                outcome: Outcome = receiver.recv()
            except EOFError:
                child.join()
                yield Outcome(job, CRASH, _describe_exit(child.exitcode))
                return
            yield outcome
            limit = seconds
            if outcome.outcome == MEMORY:
                return  # what a MemoryError left behind is unknown
    finally:
        child.kill()
        child.join()
        receiver.close()


def _describe_exit(code: int | None) -> str:
    return f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"


def _work(jobs: Sequence[Job], work: Path, sender: Connection) -> None:
    """Read mutants in this process and send each outcome."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(os.devnull).open("w") as silent:
        os.dup2(silent.fileno(), 1)
        os.dup2(silent.fileno(), 2)
    with TemporaryDirectory(prefix="mutant-", dir=work) as temporary:  # of the same file system: files are linked
        for job in jobs:
            target, root = job.target, Path(temporary) / "seed"
            shutil.copytree(work / target.seed, root, copy_function=os.link)
            target.install(root, job.data(work / target.seed))
            sender.send(_read(root, job))
            shutil.rmtree(root, ignore_errors=True)


def _read(root: Path, job: Job) -> Outcome:
    try:
        check_values(job.target.read(root))
    except GogEdgeError as exc:
        return Outcome(job, UNFOUNDED if job.number == UNCHANGED else REFUSED, str(exc)[:500])
    except SilentDamage as exc:
        return Outcome(job, DAMAGE, str(exc))
    except MemoryError as exc:
        return Outcome(job, MEMORY, _last_frames(exc))
    except BaseException as exc:  # whatever a reader lets through is a failure
        return Outcome(job, TRACEBACK, _last_frames(exc))
    return Outcome(job, ACCEPTED)


def _last_frames(exc: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "benchmarks/mutation" not in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-_FRAMES:]]
    return f"{type(exc).__name__}: {str(exc)[:300]!r} [{' > '.join(places)}]"
