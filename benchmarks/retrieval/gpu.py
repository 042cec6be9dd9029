"""How quick is searching a pack's vectors on a GPU? FAISS in halves, exactly, over the vectors of `bench_retrieval`.

    python -m benchmarks.retrieval.gpu --sizes 1000000,8000000 --work runs/bench-retrieval

Vectors and crops are made once and kept in `--work`, as `benchmarks.bench_retrieval` makes them. First an index of each
kind is moved to the GPU and back, which must find there what it finds here. The last line is the result as JSON.
Without a GPU nothing is measured, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_card
from benchmarks.retrieval.corpus import Corpus, K, make_corpus
from benchmarks.retrieval.vectors import CROPS, World
from gog_edge.errors import BackendError, GogEdgeError
from gog_edge.files import write_json
from gog_edge.planner import parse_size
from gog_edge.retrieval.vectors.gpu_index import Gpu, GpuVectorIndex
from gog_edge.retrieval.vectors.shards import Ids, VectorShards

MANY = 64  # crops of several visitors at once
WARM = 10  # searches before any is timed


@dataclass(frozen=True, slots=True)
class Figures:
    """One number of vectors. Milliseconds of a whole search: GPU, stored vectors compared, ids told."""

    rows: int
    fill_s: float  # from the disk to the GPU
    vectors_mib: float  # in halves
    recall10: float
    p50_ms_1: float
    p95_ms_1: float
    p50_ms_8: float
    p95_ms_8: float
    p50_ms_64: float


def check_moving(gpu: Gpu, rows: int = 20_000, dim: int = 64) -> None:
    """Move an index of each kind to the GPU and back into a file. BackendError where one finds other things there."""
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    for factory in ("SQfp16", "IVF64,Flat", "IVF64,SQ8"):
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        moved = gpu.moved(index)
        with tempfile.TemporaryDirectory() as folder:
            moved.save(Path(folder) / "back.faiss")
            back = faiss.read_index(str(Path(folder) / "back.faiss"))
        for one in (index, back):
            if hasattr(one, "nprobe"):
                one.nprobe = 64
        found = [moved.search(vectors[:100], K, nprobe=64)[1], back.search(vectors[:100], K)[1]]
        same = [float((ids == index.search(vectors[:100], K)[1]).mean()) for ids in found]
        if min(same) < 0.95:  # halves round: neighbours that are nearly as near may change places
            raise BackendError(f"{factory}: {same[0]:.0%} are the same on the GPU, {same[1]:.0%} back on the CPU")


def measure(corpus: Corpus, gpu: Gpu, rounds: int) -> Figures:
    """Fill the GPU with a corpus and search. Raises OutOfDeviceMemory where it does not fit."""
    files = [(Path(v), Path(i)) for v, i in json.loads((corpus.folder / "shards.json").read_text())]
    queries = np.load(corpus.folder / "queries.npy")
    shards = VectorShards.open(files, queries.shape[-1])
    started = time.perf_counter()
    index = GpuVectorIndex.on_gpu(shards, gpu, tombstones=np.empty(0, np.int64))
    filled = time.perf_counter() - started
    try:
        found = np.stack([index.search(crops, K).ids for crops in queries])
        ms = {count: _times(index, queries, count, rounds) for count in (1, CROPS, MANY)}
    finally:
        index.close()
    return _figures(corpus, found, ms, filled, shards.dim)


def _times(index: GpuVectorIndex, queries: NDArray[np.float32], count: int, rounds: int) -> NDArray[np.float64]:
    """Milliseconds of each search of `count` crops."""
    flat = queries.reshape(-1, queries.shape[-1])
    ms = []
    for turn in range(WARM + rounds):
        crops = np.take(flat, range(turn * count, turn * count + count), axis=0, mode="wrap")
        started = time.perf_counter()
        index.search(crops, K)
        ms.append(1000 * (time.perf_counter() - started))
    return np.array(ms[WARM:])


def _figures(corpus: Corpus, found: Ids, ms: dict[int, NDArray[np.float64]], filled: float, dim: int) -> Figures:
    def share(count: int, percent: int) -> float:
        return round(float(np.percentile(ms[count], percent)), 3)

    return Figures(
        corpus.rows, round(filled, 2), round(2 * corpus.rows * dim / 2**20, 1), round(corpus.recall(found), 4),
        share(1, 50), share(1, 95), share(CROPS, 50), share(CROPS, 95), share(MANY, 50),
    )  # fmt: skip


def _table(figures: Sequence[Figures]) -> Table:
    table = Table("vectors", "recall@10", "1 crop p50", "p95", "8 crops p50", "p95", "64 crops p50", "MiB", "filled s",
                  title="Exact search in halves on the GPU, ms")  # fmt: skip
    for one in figures:
        table.add_row(f"{one.rows:,}", f"{one.recall10:.4f}", *(f"{ms:.2f}" for ms in (
            one.p50_ms_1, one.p95_ms_1, one.p50_ms_8, one.p95_ms_8, one.p50_ms_64)), f"{one.vectors_mib:,.0f}",
            f"{one.fill_s:.1f}")  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000000,8000000", help="numbers of vectors, with commas between")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-retrieval"), help="keeps vectors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="JSON goes here")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--temp", default="256M", help="scratch memory on the GPU")
    parser.add_argument("--rounds", type=int, default=200, help="searches that are timed")
    args = parser.parse_args(argv)
    try:
        gpu = Gpu(args.device, parse_size(args.temp))
        check_moving(gpu)
        world = World.make()
        figures = [measure(make_corpus(world, int(rows), args.work), gpu, args.rounds)
                   for rows in args.sizes.split(",")]  # fmt: skip
    except GogEdgeError as exc:
        sys.stderr.write(f"nothing was measured: {exc}\n")
        return 1
    gpu.close()
    line = {"machine": machine_card(), "faiss": faiss.__version__, "temp": args.temp,
            "sizes": [asdict(one) for one in figures]}  # fmt: skip
    Console(width=160).print(_table(figures))
    write_json(args.out / "retrieval-gpu.json", line)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
