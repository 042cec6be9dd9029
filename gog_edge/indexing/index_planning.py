"""Pictures that are like what a pack holds and yet not in it: its own images, seen as a policy looks at things."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gog_edge.errors import PackError
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import IndexEntry
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.vectors.faiss_index import VectorIndex, read_index, search_params
from gog_edge.retrieval.vectors.shards import Ids, Rows, VectorShards
from gog_edge.types import Pixels, Vectors

BATCH = 32
LEAST_SHARE = 0.55  # of each side that a look shows
ISOLATED_SAMPLE = 64


def sample_images(readers: Sequence[SegmentReader], dead: Ids, count: int, seed: int = 0) -> Ids:
    """Up to `count` ids of live images, evenly drawn, sorted."""
    live = np.setdiff1d(np.concatenate([np.empty(0, np.int64), *(reader.image_ids() for reader in readers)]), dead)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(live, min(count, len(live)), replace=False))


def look_at(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Another look at what a picture shows: a part of it, in other light, taken with fewer pixels."""
    height, width = pixels.shape[:2]
    share = rng.uniform(LEAST_SHARE, 1.0, 2)
    h, w = (max(1, int(side * part)) for side, part in zip((height, width), share, strict=True))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    light, tint = rng.normal(1.0, 0.12), rng.normal(1.0, 0.04, 3)
    lit = np.clip(pixels[y : y + h, x : x + w] * (light * tint), 0, 255).astype(np.uint8)
    scale = rng.uniform(0.5, 1.0)
    size = max(1, int(w * scale)), max(1, int(h * scale))
    return np.asarray(Image.fromarray(lit).resize(size, Image.Resampling.BILINEAR))


def heldout_crops(readers: Sequence[SegmentReader], dead: Ids, encoder: Encoder, count: int) -> Vectors | None:
    """Vectors [n, dim] of looks at up to `count` stored images; None where there is no image."""
    rng = np.random.default_rng(1)
    looks = []
    for image in sample_images(readers, dead, count).tolist():
        stored = next(found for reader in readers if (found := reader.picture(image)) is not None)
        looks.append(look_at(decode_picture(stored.data).pixels, rng))
    if not looks:
        return None
    return np.concatenate([encoder.embed_images(looks[at : at + BATCH]) for at in range(0, len(looks), BATCH)])


def golden_image(index: VectorIndex, dead: Ids, before: int | None) -> int | None:
    """The live image that every opening asks for: it must find itself.

    That of `before` where it still does, or else the one, of a sample, that is farthest from all others: only its own
    encoder brings it back. None where no image of the sample finds itself.
    """
    shards = index.shards
    kept = [] if before is None or before in dead else [before]
    for image in chain(kept, _lonely(shards, dead)):
        row = shards.first_rows(np.array([image], dtype=np.int64))
        if row[0] >= 0 and int(index.search(shards.take(row), 1).ids[0, 0]) == image:
            return image
    return None


def _lonely(shards: VectorShards, dead: Ids) -> Iterator[int]:
    """Live images of a sample, the one that is farthest from all others first."""
    rows = np.unique(np.linspace(0, len(shards) - 1, min(ISOLATED_SAMPLE, len(shards))).astype(np.int64))
    ids = shards.ids_of(rows)
    rows, ids = rows[~np.isin(ids, dead)], ids[~np.isin(ids, dead)]
    if not len(rows):
        return
    mine = shards.take(rows)
    nearest = np.full(len(rows), -1.0, dtype=np.float32)
    at = 0
    for block in shards.blocks():
        own = shards.ids_of(np.arange(at, at + len(block), dtype=np.int64))
        cosines = np.where(ids[:, None] == own[None, :], -1.0, mine @ block.T)  # [sample, block]
        nearest = np.maximum(nearest, cosines.max(axis=1))
        at += len(block)
    yield from ids[np.argsort(nearest, kind="stable")].tolist()


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


OnProgress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total
RECALL_K = 10
GROUP = 8  # crops of one picture
TIMED, LEAST = 120, 15  # searches that a median stands on, and at least, when they take long
TIMED_S = 3.0
MAX_QUERIES = 1_024
FURTHER = 4  # values of the parameter that reach the recall and are timed


@dataclass(frozen=True, slots=True)
class Trial:
    """Queries that are not stored, and what exact search finds for them."""

    queries: Vectors  # [n, dim]
    truth: Rows  # [n, k] nearest rows, best first
    held_out: bool


def make_trial(shards: VectorShards, queries: Vectors | None, on_progress: OnProgress | None = None) -> Trial:
    """Search exactly, block by block; stored vectors mixed with others stand in for `queries` that are not there.

    Raises:
        PackError: the queries are of another length than the vectors.
    """
    if queries is not None and (queries.ndim != 2 or queries.shape[1] != shards.dim):
        raise PackError(f"queries of shape {queries.shape}, wanted [n, {shards.dim}]; embed them as the pack was")
    held_out = queries is not None and len(queries) > 0
    asked = queries if queries is not None and held_out else _disturbed(shards)
    asked = np.ascontiguousarray(asked[:MAX_QUERIES], dtype=np.float32)
    return Trial(asked, exact_nearest(shards, asked, min(RECALL_K, len(shards)), on_progress), held_out)


def exact_nearest(shards: VectorShards, queries: Vectors, k: int, on_progress: OnProgress | None = None) -> Rows:
    """The k nearest rows [n, k] of each query, best first; one block of vectors is held at a time."""
    scores, rows = np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1, dtype=np.int64)
    done = 0
    for block in shards.blocks():
        found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([scores, found[0]], axis=1)
        rows = np.concatenate([rows, found[1] + done], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        done += len(block)
        if on_progress is not None:
            on_progress("exact search", done, len(shards))
    return rows


def tuned(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, folder: Path, shards: VectorShards) -> IndexEntry:
    """The entry with the fastest way to search that reaches the recall; with the best recall where none does."""
    points = list(_points(entry, plan, trial, recall, folder / entry.path))
    reached = [point for point in points if point.recall >= recall] or [max(points, key=lambda point: point.recall)]
    return min(measured(reached, trial, folder, shards), key=lambda point: point.p50_ms_8)


def measured(entries: Sequence[IndexEntry], trial: Trial, folder: Path, shards: VectorShards) -> list[IndexEntry]:
    """The same index searched in several ways: recall by ids, and times by turns, alone and in groups of eight."""
    indexes = [VectorIndex.open(folder, entry, shards, tombstones=np.empty(0, dtype=np.int64)) for entry in entries]
    times = _times(indexes, trial.queries, trial.truth.shape[1])
    return [
        replace(entry, recall=_recall(index, trial), p50_ms_1=round(one, 3), p50_ms_8=round(eight, 3))
        for entry, index, (one, eight) in zip(entries, indexes, times, strict=True)
    ]


def _recall(index: VectorIndex, trial: Trial) -> float:
    found = index.search(trial.queries, trial.truth.shape[1]).ids
    wanted = index.shards.ids_of(trial.truth)
    shares = [len(np.intersect1d(f, w)) / len(np.unique(w)) for f, w in zip(found, wanted, strict=True)]
    return round(float(np.mean(shares)), 4)


def _points(entry: IndexEntry, plan: Plan, trial: Trial, recall: float, path: Path) -> Iterator[IndexEntry]:
    """For each value of the parameter, with the fewest candidates that reach the recall."""
    index, further = read_index(path), FURTHER
    for value in plan.values:
        params = {plan.param: value} if plan.param else {}
        most = entry.recall_k if plan.exact else min(entry.rows, value if plan.param == "efSearch" else CANDIDATES[-1])
        found = index.search(trial.queries, most, params=search_params(index, params, count=most))[1]
        places = _places(found, trial.truth)
        counts = [count for count in CANDIDATES if count < most and not plan.exact] + [most]
        reached = [(count, _worse_half(places < count)) for count in counts]
        count, best = next((pair for pair in reached if pair[1] >= recall), reached[-1])
        yield replace(entry, params=params, candidates=0 if plan.exact else count, recall=best)
        further -= best >= recall
        if not further:
            return


def _places(found: Rows, truth: Rows) -> NDArray[np.int64]:
    """Where in `found` [n, c] each true row [n, k] stands; c where it is missing."""
    same = found[:, None, :] == truth[:, :, None]
    return np.asarray(np.where(same.any(axis=2), same.argmax(axis=2), found.shape[1]), dtype=np.int64)


def _worse_half(hit: NDArray[np.bool_]) -> float:
    """The recall of the worse half of the queries: what was chosen on one must hold for the other."""
    halves = [half for half in (hit[::2], hit[1::2]) if len(half)]
    return min(float(half.mean()) for half in halves)


def _times(indexes: Sequence[VectorIndex], queries: Vectors, k: int) -> list[tuple[float, float]]:
    """Medians in milliseconds for one query and for eight. All take turns, so that what disturbs one disturbs all."""
    groups = [queries[at : at + GROUP] for at in range(0, max(1, len(queries) - GROUP + 1), GROUP)]
    spent: list[list[tuple[float, float]]] = [[] for _ in indexes]
    started = time.perf_counter()
    for turn in range(TIMED):
        if turn >= LEAST and time.perf_counter() - started > TIMED_S * len(indexes):
            break
        group = groups[turn % len(groups)]
        eight = np.resize(group, (GROUP, group.shape[1]))
        for index, times in zip(indexes, spent, strict=True):
            times.append((_ms(index, eight[:1], k), _ms(index, eight, k)))
    return [(float(one), float(eight)) for one, eight in (np.median(times, axis=0) for times in spent)]


def _ms(index: VectorIndex, queries: Vectors, k: int) -> float:
    started = time.perf_counter()
    index.search(queries, k)
    return 1e3 * (time.perf_counter() - started)


def _disturbed(shards: VectorShards, count: int = 512) -> Vectors:
    """Stored vectors, each with some of another one: [n, dim] of unit length."""
    rng = np.random.default_rng(0)
    rows = rng.choice(len(shards), min(count, len(shards)), replace=False)
    mixed = shards.take(rows) + np.float32(0.4) * shards.take(rng.permutation(rows))
    return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12), dtype=np.float32)
