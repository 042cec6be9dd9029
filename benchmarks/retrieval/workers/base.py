"""The base of all worker scripts: build an index, or open it and answer JSON lines.

    python NAME_worker.py build FOLDER THREADS [VARIANT]     writes FOLDER/NAME and prints the cost
    python NAME_worker.py serve FOLDER THREADS [VARIANT]     opens it and answers

`FOLDER/shards.json` lists pairs of files [vectors, ids], `FOLDER/queries.npy` contains crops [pictures, 8, dim]
float32. Self-contained: the Python that runs it need not have gog_edge. Engines import their library after the thread
counts are set.
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
    single_query = False  # whether a call takes only one query, so that a batch is a loop

    def __init__(self, folder: Path, threads: int, variant: str = "") -> None:
        self.folder, self.threads, self.variant = folder, threads, variant
        self.settings: list[Any] = [None]

    @property
    def home(self) -> Path:
        """Return the folder of its index."""
        return self.folder / self.name

    def shards(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        """Yield ids [n] and vectors [n, dim] float16 of each shard, memory-mapped."""
        for vectors, ids in json.loads((self.folder / "shards.json").read_text()):
            yield np.load(ids), np.load(vectors, mmap_mode="r")

    def build(self) -> None:
        """Write the index to `home`."""

    def open(self) -> None:
        """Open the index and assign `settings`: JSON values, fastest first."""

    def configure(self, setting: Any) -> None:
        """Use a setting for the searches that follow."""

    def search(self, queries: Queries) -> Ids:
        """Return the ids of the K nearest [n, K] for queries [n, dim] float32."""
        raise NotImplementedError


def main(engine_class: type[Engine]) -> None:
    """Build, or answer requests until the input ends."""
    command, folder, threads, *variant = sys.argv[1:]
    os.environ.update({name: threads for name in THREAD_SETTINGS})
    engine = engine_class(Path(folder), int(threads), *variant)
    if command == "build":
        print(json.dumps(build(engine)), flush=True)
    else:
        serve(engine)


def build(engine: Engine) -> dict[str, float]:
    """Return seconds and bytes of the index. They are stored next to it, so that it is built once."""
    note = engine.home.with_name(f"{engine.name}.json")
    if note.exists():
        known: dict[str, float] = json.loads(note.read_text())
        return known
    shutil.rmtree(engine.home, ignore_errors=True)
    engine.home.mkdir(parents=True)
    started = time.perf_counter()
    engine.build()
    cost = {"build_s": time.perf_counter() - started,
            "disk_bytes": sum(path.stat().st_size for path in engine.home.rglob("*") if path.is_file())}  # fmt: skip
    note.write_text(json.dumps(cost))
    return cost


def serve(engine: Engine) -> None:
    """Open the index, warm up, print the opening line, and answer requests."""
    started = time.perf_counter()
    engine.open()
    seconds = time.perf_counter() - started
    queries = np.load(engine.folder / "queries.npy").astype(np.float32)
    engine.configure(engine.settings[0])
    search(engine, queries[:2], 8)
    print(json.dumps({"about": engine.about, "open_s": seconds, "settings": engine.settings}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        engine.configure(request["setting"])
        pictures = queries[request["first"] : request["first"] + request["count"]]
        print(json.dumps(search(engine, pictures, request["crops"])), flush=True)


def search(engine: Engine, pictures: NDArray[np.float32], crops: int) -> dict[str, Any]:
    """Return the milliseconds of each picture's search with its first `crops` crops, and the ids found."""
    ms, found = [], []
    for picture in pictures:
        queries = np.ascontiguousarray(picture[:crops])
        started = time.perf_counter()
        if engine.single_query:
            ids = np.concatenate([engine.search(queries[i : i + 1]) for i in range(crops)])
        else:
            ids = engine.search(queries)
        ms.append(1e3 * (time.perf_counter() - started))
        found.append(np.asarray(ids, dtype=np.int64).tolist())
    return {"ms": ms, "ids": found}
