"""Does building a pack keep its promises? No memory growth with size, all cores at work, nothing lost to a kill.

    python -m benchmarks.bench_build --articles 1000,8000 --kills 6

Writes ZIM files of made articles (each with one picture), builds packs of them in processes of their own and watches
those: memory and cores, stage by stage. Then the smaller one is built again, killed with SIGKILL at random moments and
started again until it is done: the pack must hold the same rows and vectors, and no shard may have been embedded twice
but the one that was open. Last line: JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.building.made_zim import write_zim
from benchmarks.building.watch import EMBEDDING, READING, Watched, watch
from benchmarks.machine import machine_card
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import BackendError
from gog_edge.files import write_json
from gog_edge.retrieval.manifest import Manifest, read_manifest
from gog_edge.retrieval.pack import verify_pack

SEED = 5
SHARD_ROWS = 128  # small ones, so that a short build has many
FIRST_KILL = 1.5  # seconds after a start: about when it begins to work


def build(zim: Path, pack: Path, encoder: Path, **kill: object) -> Watched:
    """One start of the build."""
    command = [sys.executable, "-m", "index.build_pack", str(zim), str(pack), "--encoder", str(encoder),
               "--shard-rows", str(SHARD_ROWS)]  # fmt: skip
    return watch(command, pack, **kill)  # type: ignore[arg-type]


def whole_build(zim: Path, pack: Path, encoder: Path) -> Watched:
    """A build from nothing to its end. Raises BackendError with what it said."""
    shutil.rmtree(pack, ignore_errors=True)
    done = build(zim, pack, encoder)
    if done.code:
        raise BackendError(f"the build of '{zim}' failed:\n{done.output[-2000:]}")
    verify_pack(pack)
    return done


def killed_build(zim: Path, pack: Path, encoder: Path, kills: int, seconds: float) -> dict[str, int]:
    """A build that would take `seconds`, killed so many times on its way: what was embedded twice."""
    shutil.rmtree(pack, ignore_errors=True)
    rng = random.Random(SEED)
    embedded: dict[str, int] = {}
    again = killed = 0
    while True:
        at = rng.uniform(FIRST_KILL, FIRST_KILL + seconds / kills) if killed < kills else float("inf")
        done = build(zim, pack, encoder, kill_when=lambda passed, at=at: passed > at)
        for path in sorted((pack / "vectors").glob("*[0-9].npy")):
            made = path.stat().st_mtime_ns
            again += embedded.get(path.name, made) != made
            embedded[path.name] = made
        if done.code == 0:
            return {"kills": killed, "shards": len(embedded), "whole_shards_embedded_again": again}
        if killed >= kills:
            raise BackendError(f"the build did not go on after {killed} kills:\n{done.output[-2000:]}")
        killed += 1


def same(one: Path, two: Path) -> bool:
    """Whether two packs hold the same rows and the same vectors."""
    first, second = read_manifest(one), read_manifest(two)
    stores = [_rows(folder / segment.store) for folder, manifest in ((one, first), (two, second))
              for segment in manifest.segments]  # fmt: skip
    return stores[0] == stores[1] and _vectors(one, first) == _vectors(two, second)


def _rows(store: Path) -> str:
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


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All of it."""
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table("articles", "stage", "seconds", "a second", "peak MiB", "cores busy", title="a ZIM becomes a pack")
    sizes = sorted(int(size) for size in args.articles.split(","))
    figures: dict[str, object] = {}
    for size in sizes:
        zim = args.work / f"made-{size}.zim"
        if not zim.exists():
            write_zim(zim.with_suffix(".part"), size).rename(zim)
        done = whole_build(zim, args.work / f"pack-{size}", args.encoder)
        for name, stage in done.stages.items():
            rate = size / stage.seconds if stage.seconds else 0.0
            table.add_row(str(size), name, f"{stage.seconds}", f"{rate:.0f}", f"{stage.peak_mib}", f"{stage.cores}")
        figures[str(size)] = {name: asdict(stage) for name, stage in done.stages.items()}
        last = done
    growth = {stage: round(_peak(figures[str(sizes[-1])], stage) / _peak(figures[str(sizes[0])], stage), 3)
              for stage in (READING, EMBEDDING)}  # fmt: skip
    small = args.work / f"pack-{sizes[0]}"
    seconds = sum(figures[str(sizes[0])][name]["seconds"] for name in last.stages)  # type: ignore[index]
    after = killed_build(args.work / f"made-{sizes[0]}.zim", args.work / "pack-killed", args.encoder, args.kills,
                         seconds)  # fmt: skip
    after["same_as_unbroken"] = same(small, args.work / "pack-killed")
    Console().print(table)
    return {"memory_growth": growth, "size_growth": sizes[-1] / sizes[0], "stages": figures, "killed": after,
            "encoder": str(args.encoder.name)}  # fmt: skip


def _peak(figures: object, stage: str) -> float:
    return float(figures[stage]["peak_mib"])  # type: ignore[index]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", default="1000,8000", help="sizes of the snapshots; the smallest is also killed")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--encoder", type=Path, default=DEFAULT_BUNDLE / "encoder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-build"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/build.json"))
    args = parser.parse_args(argv)
    line = measure(args) | {"machine": machine_card()}
    Console().print(*(f"{key}: {value}" for key, value in machine_card().items()), sep="\n", highlight=False)
    write_json(args.out, line)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
