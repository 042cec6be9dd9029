"""What the engines' processes share: built once, then asked line by line.

    python NAME_worker.py build FOLDER THREADS     writes FOLDER/NAME and says how long that took
    python NAME_worker.py serve FOLDER THREADS     opens it and answers JSON lines

`FOLDER/shards.json` lists [vectors, ids] files, `FOLDER/queries.npy` holds crops [pictures, 8, dim] float32. Stands
alone: the Python that runs it need not have gog_edge, and engines are imported after the thread counts are set.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Queries = NDArray[np.float32]  # [n, dim]
Ids = NDArray[np.int64]  # [n, K]

K = 10
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS",
                   "LANCE_CPU_THREADS", "TOKIO_WORKER_THREADS")  # fmt: skip


class Engine:
    """One engine over one set of vectors."""

    name = ""
    about = ""  # version and settings
    one_by_one = False  # takes a single query a call: a batch is a loop

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.home = folder / self.name
        self.points: list[Any] = [None]

    def shards(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        """Ids [n] and vectors [n, dim] float16, shard by shard, mapped."""
        for vectors, ids in json.loads((self.folder / "shards.json").read_text()):
            yield np.load(ids), np.load(vectors, mmap_mode="r")

    def build(self) -> None:
        """Write what `open` reads, to `home`."""

    def open(self) -> None:
        """Make ready to search; `points` are then the ways to search, the quickest first, JSON values."""

    def set(self, point: Any) -> None:
        """Search so from now on."""

    def search(self, queries: Queries) -> Ids:
        """Ids [n, K] of queries [n, dim] float32."""
        raise NotImplementedError


def main(engine_class: type[Engine]) -> None:
    """Build, or answer lines until the input ends."""
    what, folder, threads = sys.argv[1:]
    os.environ.update({name: threads for name in THREAD_SETTINGS})
    engine = engine_class(Path(folder), int(threads))
    if what == "build":
        print(json.dumps(build(engine)), flush=True)
    else:
        serve(engine)


def build(engine: Engine) -> dict[str, float]:
    """Seconds and bytes; kept beside, so that it is not built twice."""
    note = engine.home.with_name(f"{engine.name}.json")
    if note.exists():
        known: dict[str, float] = json.loads(note.read_text())
        return known
    shutil.rmtree(engine.home, ignore_errors=True)
    engine.home.mkdir(parents=True)
    started = time.perf_counter()
    engine.build()
    told = {"build_s": time.perf_counter() - started,
            "disk_bytes": sum(path.stat().st_size for path in engine.home.rglob("*") if path.is_file())}  # fmt: skip
    note.write_text(json.dumps(told))
    return told


def serve(engine: Engine) -> None:
    """Open, say so, and answer."""
    started = time.perf_counter()
    engine.open()
    opened = time.perf_counter() - started
    queries = np.load(engine.folder / "queries.npy").astype(np.float32)
    engine.set(engine.points[0])
    search(engine, queries[:2], 8)
    print(json.dumps({"about": engine.about, "open_s": opened, "points": engine.points}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        engine.set(request["point"])
        pictures = queries[request["first"] : request["first"] + request["count"]]
        print(json.dumps(search(engine, pictures, request["crops"])), flush=True)


def search(engine: Engine, pictures: NDArray[np.float32], crops: int) -> dict[str, Any]:
    """Milliseconds of each picture's search with its first `crops` crops, and the ids found."""
    spent, found = [], []
    for picture in pictures:
        asked = np.ascontiguousarray(picture[:crops])
        started = time.perf_counter()
        if engine.one_by_one:
            ids = np.concatenate([engine.search(asked[i : i + 1]) for i in range(crops)])
        else:
            ids = engine.search(asked)
        spent.append(1e3 * (time.perf_counter() - started))
        found.append(np.asarray(ids, dtype=np.int64).tolist())
    return {"ms": spent, "ids": found}
