"""Which FAISS indexes come into question for a number of vectors and a memory, best first; measuring decides.

The order is what was found on a million clustered vectors of 512 dimensions with two cores, at a recall@10 of 0.95:
inverted lists of fast-scanned codes propose, stored vectors decide. With half a byte for two dimensions 32 to 48
proposals of a query are enough; with half a byte for four it takes 100 or more, for half the memory; RaBitQ's one bit
for a dimension needs about 50 at that memory, but takes 1.7 times as long to scan as the first. Codes that need no
second look were slower still (RaBitQ with four bits: nine times). A graph over bytes (HNSW) takes five times the memory
of the first and the longest to build; it is left for where lists do not reach the recall, as they may not with queries
unlike the stored vectors, such as pictures among captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gog_edge.errors import PackError

EXACT_ROWS = 300_000  # up to here exact search is tried first, and kept where it answers in time
EXACT_MS = 5.0  # for eight queries at once
GRAPH_LINKS = 32
FLAT_LISTS = 512  # up to so many centroids are compared as they are; more are scanned as codes first
ROW_BYTES = 9  # of the shards: an id, and whether it is hidden
NPROBES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
CANDIDATES = (12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class Plan:
    """One index that could be built."""

    factory: str  # as FAISS's index_factory reads it
    param: str  # what is swept: "nprobe", "efSearch", or "" for nothing
    bytes: int  # of memory a search takes, beside the stored vectors that it reads from the disk
    exact: bool = False

    @property
    def values(self) -> tuple[int, ...]:
        """Of the parameter, rising."""
        return {"nprobe": NPROBES, "efSearch": EFFORTS, "": (0,)}[self.param]


def plans(rows: int, dim: int, memory: int | None = None) -> list[Plan]:
    """Indexes over `rows` vectors of `dim` that fit `memory` (bytes; None: no bound), best first.

    Raises:
        PackError: none fits; it says how much the smallest takes.
    """
    known = list(_all(rows, dim))
    fitting = [plan for plan in known if memory is None or plan.bytes <= memory]
    if not fitting:
        least = min(plan.bytes for plan in known)
        raise PackError(
            f"no index over {rows} vectors of {dim} fits {memory} bytes of memory; the smallest takes {least}; allow "
            "more, or leave pictures out"
        )
    return fitting


def plan_of(factory: str) -> Plan:
    """The plan of a factory string that somebody chose; its memory is not known before it is built."""
    param = "nprobe" if factory.startswith("IVF") else "efSearch" if factory.startswith("HNSW") else ""
    return Plan(factory, param, 0, exact=factory in ("Flat", "SQfp16"))


def list_count(rows: int) -> int:
    """Inverted lists for a number of rows: the power of two nearest to four times the root, at least 16 rows each."""
    return int(min(65_536, max(1, 2 ** round(math.log2(4 * math.sqrt(max(1, rows))))), max(1, rows // 16)))


def exact_bytes(rows: int, dim: int) -> int:
    """Half-precision vectors, two bytes for each dimension, all scanned."""
    return rows * (2 * dim + ROW_BYTES)


def lists_bytes(rows: int, dim: int, code: int) -> int:
    """Inverted lists with codes of `code` bytes: codes stand in blocks of 32, half of the last one empty on average;
    an id of eight bytes for each row; the centroids in single precision, and half a byte for four of their dimensions.
    """
    lists = list_count(rows)
    return (rows + 16 * lists) * code + rows * (8 + ROW_BYTES) + lists * (4 * dim + dim // 8)


def graph_bytes(rows: int, dim: int) -> int:
    """A byte for each dimension, and the graph: 2 M links of four bytes on the ground, M on each higher level that one
    row in M reaches; an offset of eight bytes and a level of four.
    """
    return rows * (dim + 4 * (2 * GRAPH_LINKS + 1) + 12 + ROW_BYTES)


def _all(rows: int, dim: int) -> Iterator[Plan]:
    if rows <= EXACT_ROWS:
        yield Plan("SQfp16", "", exact_bytes(rows, dim), exact=True)
    if dim % 8 == 0 and rows >= 1_024:
        for code, size in (
            (f"PQ{dim // 2}x4fsr", dim // 4), (f"PQ{dim // 4}x4fsr", dim // 8), ("RaBitQfs", dim // 8 + 8)
        ):  # fmt: skip
            yield Plan(f"{_lists(rows, dim)},{code}", "nprobe", lists_bytes(rows, dim, size))
    yield Plan(f"HNSW{GRAPH_LINKS},SQ8", "efSearch", graph_bytes(rows, dim))


def _lists(rows: int, dim: int) -> str:
    lists = list_count(rows)
    return f"IVF{lists}" if lists <= FLAT_LISTS else f"IVF{lists}(PQ{dim // 4}x4fs,RFlat)"
