"""Measure building a pack: memory growth with the size of the snapshot, busy cores, and recovery from SIGKILL.

    python -m benchmarks.bench_build --articles 1000,8000 --kills 6

Writes synthetic ZIM files (each article with one picture), builds packs of them in separate processes, and samples
their memory and processor time by stage. Then the smallest build is repeated, killed with SIGKILL at random moments and
restarted until it is complete: the pack must contain the same rows and vectors, and no complete shard may be embedded
twice. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError

with command_imports(__name__):
    import numpy as np
    from rich.table import Table

    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from benchmarks.support.resources import SAMPLE_S, Usage, process_usage
    from benchmarks.support.synthetic_zim import write_zim
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.retrieval.manifest import Manifest, read_manifest
    from gog_edge.retrieval.pack import verify_pack

SEED = 5
SHARD_ROWS = 128  # small shards, so that a short build has many
FIRST_KILL_S = 1.5  # about when a build begins to work
READING, EMBEDDING, INDEXING = "reading", "embedding", "indexing"


@dataclass(frozen=True, slots=True)
class Stage:
    """Resources that a stage of a build used."""

    seconds: float
    peak_mib: float
    cores: float  # mean number of busy cores


@dataclass(frozen=True, slots=True)
class BuildRun:
    """A build process that ended or was killed."""

    code: int
    output: str
    stages: dict[str, Stage]


@dataclass(frozen=True, slots=True)
class _Sample:
    stage: str
    seconds: float
    usage: Usage


def run_build(zim: Path, pack: Path, encoder: Path, kill_after: float = float("inf")) -> BuildRun:
    """Run a build, sample its resources, and kill it with its children after `kill_after` seconds."""
    command = [sys.executable, "-m", "index.build_pack", str(zim), str(pack), "--encoder", str(encoder),
               "--shard-rows", str(SHARD_ROWS)]  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)  # fmt: skip
    samples: list[_Sample] = []
    while process.poll() is None:
        seconds = time.monotonic() - began
        if seconds > kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            break
        samples.append(_Sample(stage_of(pack), seconds, process_usage(process.pid)))
        time.sleep(SAMPLE_S)
    output = process.communicate()[0]
    return BuildRun(process.returncode, output, _stages(samples))


def stage_of(pack: Path) -> str:
    """Return the stage of the build in a folder, judged by its files."""
    if not any((pack / "store").glob("*.sqlite")):
        return READING
    return INDEXING if any((pack / "index").glob("*")) or (pack / "MANIFEST.json").exists() else EMBEDDING


def _stages(samples: Sequence[_Sample]) -> dict[str, Stage]:
    found = {}
    for name in (READING, EMBEDDING, INDEXING):
        own = [sample for sample in samples if sample.stage == name]
        if len(own) > 1:
            seconds = own[-1].seconds - own[0].seconds
            cpu_s = max(sample.usage.cpu_s for sample in own) - own[0].usage.cpu_s
            peak = max(sample.usage.memory_mib for sample in own)
            found[name] = Stage(round(seconds, 1), round(peak, 1), round(cpu_s / seconds, 2))
    return found


def complete_build(zim: Path, pack: Path, encoder: Path) -> BuildRun:
    """Build a pack from scratch and verify it. Raises BackendError with the output if it fails."""
    shutil.rmtree(pack, ignore_errors=True)
    done = run_build(zim, pack, encoder)
    if done.code:
        raise BackendError(f"the build of '{zim}' failed:\n{done.output[-2000:]}")
    verify_pack(pack)
    return done


def killed_build(zim: Path, pack: Path, encoder: Path, kills: int, seconds: float) -> dict[str, int]:
    """Build a pack, killing the process `kills` times on the way.

    Args:
        zim: the source.
        pack: folder, which is deleted first.
        encoder: folder of the encoder.
        kills: how many times.
        seconds: that an undisturbed build takes.

    Returns:
        Counts of kills, of shards, and of complete shards that were embedded again.
    """
    shutil.rmtree(pack, ignore_errors=True)
    rng = random.Random(SEED)
    written: dict[str, int] = {}  # by shard: modification time
    again = killed = 0
    while True:
        at = rng.uniform(FIRST_KILL_S, FIRST_KILL_S + seconds / kills) if killed < kills else float("inf")
        done = run_build(zim, pack, encoder, kill_after=at)
        for path in sorted((pack / "vectors").glob("*[0-9].npy")):
            modified = path.stat().st_mtime_ns
            again += written.get(path.name, modified) != modified
            written[path.name] = modified
        if done.code == 0:
            return {"kills": killed, "shards": len(written), "whole_shards_embedded_again": again}
        if killed >= kills:
            raise BackendError(f"the build did not continue after {killed} kills:\n{done.output[-2000:]}")
        killed += 1


def same_content(one: Path, two: Path) -> bool:
    """Return whether two packs contain the same rows and the same vectors."""
    first, second = read_manifest(one), read_manifest(two)
    stores = [_rows_hash(folder / segment.store) for folder, manifest in ((one, first), (two, second))
              for segment in manifest.segments]  # fmt: skip
    return stores[0] == stores[1] and _vectors(one, first) == _vectors(two, second)


def _rows_hash(store: Path) -> str:
    connection = sqlite3.connect(store)
    total = hashlib.sha256()
    for table in ("articles", "paragraphs", "names", "images", "pixels", "links"):
        for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2"):
            total.update(repr((table, row)).encode())
    connection.close()
    return total.hexdigest()


def _vectors(folder: Path, manifest: Manifest) -> list[bytes]:
    shards = (*manifest.images.shards, *manifest.captions.shards)
    return [np.load(folder / shard.vectors).tobytes() for shard in shards]


def measure(args: argparse.Namespace) -> tuple[dict[str, object], Table]:
    """Build packs of all sizes, then the killed one; return the results and a table."""
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table("articles", "stage", "seconds", "articles/s", "peak MiB", "busy cores", title="ZIM file to pack")
    sizes = sorted(int(size) for size in args.articles.split(","))
    stages: dict[int, dict[str, Stage]] = {}
    for size in sizes:
        zim = args.work / f"made-{size}.zim"
        if not zim.exists():
            write_zim(zim.with_suffix(".part"), size).rename(zim)
        stages[size] = complete_build(zim, args.work / f"pack-{size}", args.encoder).stages
        for name, stage in stages[size].items():
            rate = size / stage.seconds if stage.seconds else 0.0
            table.add_row(str(size), name, f"{stage.seconds}", f"{rate:.0f}", f"{stage.peak_mib}", f"{stage.cores}")
    smallest, largest = stages[sizes[0]], stages[sizes[-1]]
    growth = {name: round(largest[name].peak_mib / smallest[name].peak_mib, 3) for name in (READING, EMBEDDING)}
    seconds = sum(stage.seconds for stage in smallest.values())
    zim, pack = args.work / f"made-{sizes[0]}.zim", args.work / "pack-killed"
    killed: dict[str, Any] = killed_build(zim, pack, args.encoder, args.kills, seconds)
    killed["same_as_unbroken"] = same_content(args.work / f"pack-{sizes[0]}", pack)
    figures = {str(size): {name: asdict(stage) for name, stage in own.items()} for size, own in stages.items()}
    return {"memory_growth": growth, "size_growth": sizes[-1] / sizes[0], "stages": figures, "killed": killed,
            "encoder": str(args.encoder.name)}, table  # fmt: skip


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", default="1000,8000",
                        help="sizes of the snapshots; the smallest is also killed (default %(default)s)")  # fmt: skip
    parser.add_argument("--kills", type=int, default=6, help="(default %(default)s)")
    parser.add_argument("--encoder", type=Path, default=DEFAULT_BUNDLE / "encoder", help="default: the atlas's")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-build"),
                        help="folder for snapshots and packs (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "build.json",
                        help="file for the JSON (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    line, table = measure(args)
    card = machine_card()
    print_results(card, [table], line | {"machine": card}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
