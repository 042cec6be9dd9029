"""Measure exact search in float16 on a GPU with FAISS, over the vectors of `bench_retrieval`.

    python -m benchmarks.retrieval.gpu --sizes 1000000,8000000 --work runs/bench-retrieval

Vectors and queries are generated once and stay in --work, as those of benchmarks.bench_retrieval. --out receives
retrieval-gpu.json. Without a GPU the exit code is 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import faiss
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from benchmarks.retrieval.corpus import CROPS, Corpus, K, SyntheticVectors, make_corpus
    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from gog_edge.planner import parse_size
    from gog_edge.retrieval.vectors.gpu_index import FaissGpu, GpuVectorIndex
    from gog_edge.retrieval.vectors.shards import Ids, VectorShards

MANY = 64  # crops of several users at once
WARM_UP = 10  # searches that are not timed


@dataclass(frozen=True, slots=True)
class Figures:
    """The results for one number of vectors. Times are of a whole search: GPU, rescoring with stored vectors, ids."""

    rows: int
    fill_s: float  # to copy the vectors from disk to the GPU
    vectors_mib: float  # in float16
    recall10: float
    p50_ms_1: float
    p95_ms_1: float
    p50_ms_8: float
    p95_ms_8: float
    p50_ms_64: float


def measure(corpus: Corpus, gpu: FaissGpu, rounds: int) -> Figures:
    """Copy a corpus to the GPU and search it. Raises OutOfDeviceMemory if it does not fit."""
    files = [(Path(v), Path(i)) for v, i in json.loads((corpus.folder / "shards.json").read_text())]
    queries = np.load(corpus.folder / "queries.npy")
    shards = VectorShards.open(files, queries.shape[-1])
    started = time.perf_counter()
    index = GpuVectorIndex.on_gpu(shards, gpu, tombstones=np.empty(0, np.int64))
    fill_s = time.perf_counter() - started
    try:
        found = np.stack([index.search(crops, K).ids for crops in queries])
        ms = {count: _search_ms(index, queries, count, rounds) for count in (1, CROPS, MANY)}
    finally:
        index.close()
    return _figures(corpus, found, ms, fill_s, shards.dim)


def _search_ms(index: GpuVectorIndex, queries: NDArray[np.float32], count: int, rounds: int) -> NDArray[np.float64]:
    """Return the milliseconds of each search with `count` crops."""
    flat = queries.reshape(-1, queries.shape[-1])
    ms = []
    for turn in range(WARM_UP + rounds):
        crops = np.take(flat, range(turn * count, turn * count + count), axis=0, mode="wrap")
        started = time.perf_counter()
        index.search(crops, K)
        ms.append(1000 * (time.perf_counter() - started))
    return np.array(ms[WARM_UP:])


def _figures(corpus: Corpus, found: Ids, ms: dict[int, NDArray[np.float64]], fill_s: float, dim: int) -> Figures:
    def percentile(count: int, percent: int) -> float:
        return round(float(np.percentile(ms[count], percent)), 3)

    return Figures(
        corpus.rows, round(fill_s, 2), round(2 * corpus.rows * dim / 2**20, 1), round(corpus.recall(found), 4),
        percentile(1, 50), percentile(1, 95), percentile(CROPS, 50), percentile(CROPS, 95), percentile(MANY, 50),
    )  # fmt: skip


def as_table(figures: Sequence[Figures]) -> Table:
    """Return a table with a row per number of vectors."""
    table = Table("vectors", "recall@10", "1 crop p50", "p95", "8 crops p50", "p95", "64 crops p50", "MiB", "fill s",
                  title="Exact search in float16 on the GPU, ms")  # fmt: skip
    for one in figures:
        table.add_row(f"{one.rows:,}", f"{one.recall10:.4f}", *(f"{ms:.2f}" for ms in (
            one.p50_ms_1, one.p95_ms_1, one.p50_ms_8, one.p95_ms_8, one.p50_ms_64)), f"{one.vectors_mib:,.0f}",
            f"{one.fill_s:.1f}")  # fmt: skip
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000000,8000000",
                        help="numbers of vectors, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench-retrieval"),
                        help="folder for the vectors (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default %(default)s)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default %(default)s)")
    parser.add_argument("--temp", default="256M", help="scratch memory on the GPU (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="timed searches (default %(default)s)")
    args = parser.parse_args(argv)
    with closing(FaissGpu(args.device, parse_size(args.temp))) as gpu:
        source = SyntheticVectors.make()
        figures = [measure(make_corpus(source, int(rows), args.work), gpu, args.rounds)
                   for rows in args.sizes.split(",")]  # fmt: skip
    card = machine_card()
    line = {"machine": card, "faiss": faiss.__version__, "temp": args.temp, "sizes": [asdict(one) for one in figures]}
    print_results(card, [as_table(figures)], line, args.out / "retrieval-gpu.json", width=160)
    return 0


if __name__ == "__main__":
    sys.exit(main())
