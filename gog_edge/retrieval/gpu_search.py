"""The exactly nearest vectors, searched by TensorRT: for GPUs that FAISS has no package for, as a Jetson's.

Vectors lie on the GPU in halves, in blocks; each is compared with the queries as a whole, by an engine of
`exporting.search_graph`. Queries and products are halves, too: all rows that may be among the nearest are given on, and
`VectorIndex` compares them again with the stored vectors. Where a block may hold more of them than it gives, the query
is searched in the stored vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gog_edge.retrieval.index import BATCH, Found, Scores, VectorIndex
from gog_edge.retrieval.slabs import nearest_rows
from gog_edge.retrieval.vectors import BLOCK_ROWS as READ_ROWS
from gog_edge.retrieval.vectors import Ids, Rows, VectorShards
from gog_edge.types import Vectors

if TYPE_CHECKING:  # a box that searches on the CPU loads nothing of it
    from gog_edge.engines.trt_graph import Resident, TrtGraph

BLOCK_ROWS = 4 * READ_ROWS
NEAREST = 256  # rows that one block gives of a query
QUERIES = BATCH  # at once
# Two products are compared, and three roundings to halves take up to 2^-11 of each: of the query, of vectors that are
# stored in single precision, and of the product itself.
SLACK = np.float32(2 * 3 * 2**-11)
HALF = np.dtype(np.float16)
NONE = np.empty(0, np.int64)  # rows
SCRATCH_BYTES = QUERIES * BLOCK_ROWS * HALF.itemsize  # products of one block


@dataclass(frozen=True, slots=True)
class Block:
    """Vectors on the GPU that belong to consecutive rows."""

    vectors: Resident
    first: int  # row of its number 0
    rows: int  # the array has at least NEAREST, the others zeros


@dataclass(frozen=True, slots=True)
class TrtPart:
    """All rows of some shards; an `index.Part`."""

    graph: TrtGraph
    shards: VectorShards
    blocks: list[Block]
    candidates: int = NEAREST  # that there are any: scores are those of the stored vectors, as on the CPU

    @classmethod
    def filled(cls, graph: TrtGraph, shards: VectorShards) -> TrtPart:
        """Copy all rows to the GPU. OutOfDeviceMemory leaves nothing behind."""
        return cls(graph, shards, [_block(graph, shards, first) for first in range(0, len(shards), BLOCK_ROWS)])

    def ask(self, k: int, crowd: float) -> float:
        """How many rows to ask for, to know the nearest `k` ids, `crowd` rows each on average."""
        return k * crowd

    def find(self, queries: Vectors, count: int, *, without: Rows | None = None, wider: int = 1) -> Found:
        """Each query's nearest `count` rows, and those that may be among them; never one of `without`.

        More than `NEAREST`, or with some left out, are looked for in the stored vectors.
        """
        if without is not None or count > NEAREST:
            return nearest_rows(self.shards, queries, count, NONE if without is None else without)
        return _stacked([self._nearest(queries[at : at + QUERIES], count) for at in range(0, len(queries), QUERIES)])

    def _nearest(self, queries: Vectors, count: int) -> Found:
        found = [self._search(block, queries) for block in self.blocks]
        scores, rows = likeliest(found, count)
        ends = [scores[:, -1] for block, (scores, _) in zip(self.blocks, found, strict=True) if block.rows > NEAREST]
        short = np.flatnonzero(cut_short(scores, ends, count))
        if len(short):
            near = nearest_rows(self.shards, queries[short], count, NONE)
            width = scores.shape[1]
            scores[short], rows[short] = _padded(near[0], width, -np.inf), _padded(near[1], width, -1)
        return scores, rows

    def _search(self, block: Block, queries: Vectors) -> Found:
        said = self.graph.run({"queries": queries, "vectors": block.vectors})
        real = said["rows"] < block.rows
        scores = np.where(real, said["scores"], np.float32(-np.inf))
        return scores, np.where(real, said["rows"] + block.first, -1)


class TrtVectorIndex(VectorIndex):
    """The exactly nearest vectors of a pack's space, as `VectorIndex` tells them, proposed by TensorRT."""

    def __init__(self, part: TrtPart, tombstones: Ids) -> None:
        super().__init__(part, None, part.shards, tombstones, threads=1)
        self._blocks = part.blocks

    @classmethod
    def on_gpu(cls, graph: TrtGraph, shards: VectorShards, *, tombstones: Ids) -> TrtVectorIndex:
        """Copy all vectors to the GPU; `graph` is an engine of `SEARCH`, opened with `captured=0`: blocks are many.

        Raises:
            OutOfDeviceMemory: they do not fit.
            PackError: the shards' files are damaged.
        """
        return cls(TrtPart.filled(graph, shards), tombstones)

    def close(self) -> None:
        """Give back the GPU's memory; nobody may be searching. A second time does nothing."""
        super().close()
        self._blocks.clear()


def vectors_bytes(rows: int, dim: int) -> int:
    """Memory that rows take on a GPU: halves, as many as there must be at least."""
    return max(rows, NEAREST) * dim * HALF.itemsize if rows else 0


def _block(graph: TrtGraph, shards: VectorShards, first: int) -> Block:
    rows = min(BLOCK_ROWS, len(shards) - first)
    vectors = graph.reserve((max(rows, NEAREST), shards.dim), HALF)
    for at in range(0, rows, READ_ROWS):
        read = np.arange(first + at, first + min(at + READ_ROWS, rows))
        graph.fill(vectors, at, shards.take(read).astype(HALF))
    return Block(vectors, first, rows)


def likeliest(found: Sequence[Found], count: int) -> Found:
    """Of what blocks gave, the `count` best of each query and all that roundoff may have put behind them."""
    scores = np.concatenate([scores for scores, _ in found], axis=1)
    rows = np.concatenate([rows for _, rows in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    last = _last(scores, count)[:, None]
    width = int(np.count_nonzero(scores >= last - SLACK, axis=1).max(initial=0))
    return scores[:, :width], rows[:, :width]


def cut_short(scores: Scores, ends: Sequence[Scores], count: int) -> NDArray[np.bool_]:
    """Of which queries a block may hold more rows among the likeliest than it gave.

    `ends`: the least score [n] that each block gave which holds more rows than it gives.
    """
    least = _last(scores, count) - SLACK
    return np.any([end >= least for end in ends], axis=0) if ends else np.zeros(len(scores), dtype=bool)


def _last(scores: Scores, count: int) -> Scores:
    """The score [n] of the last that is wanted; -inf where there are fewer."""
    return scores[:, min(count, scores.shape[1]) - 1]


def _stacked(found: Sequence[Found]) -> Found:
    """Batches of queries one below the other, as wide as the widest."""
    width = max(scores.shape[1] for scores, _ in found)
    return (
        np.concatenate([_padded(scores, width, -np.inf) for scores, _ in found]),
        np.concatenate([_padded(rows, width, -1) for _, rows in found]),
    )


def _padded(columns: NDArray[Any], width: int, value: float) -> NDArray[Any]:
    return np.pad(columns, ((0, 0), (0, width - columns.shape[1])), constant_values=value)
