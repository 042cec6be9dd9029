"""Embeds what a segment brought, shard by shard: a shard that lies there whole is never embedded again."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gog_edge.files import write_array
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Segment, Shard
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import Pixels, Vectors

T = TypeVar("T")
VECTORS = "vectors"
IMAGES, TILES, CAPTIONS = "images", "tiles", "captions"  # kinds of shards
BATCH = 32  # pictures or texts of one run of a graph
# Parts of a lead picture that are indexed beside the whole: four corners and the middle, as (x0, y0, x1, y1) of its
# sides. A crop that shows one thing of a crowded picture finds its part sooner than the whole.
TILE_BOXES = ((0, 0, 0.6, 0.6), (0.4, 0, 1, 0.6), (0, 0.4, 0.6, 1), (0.4, 0.4, 1, 1), (0.2, 0.2, 0.8, 0.8))
Embedded: TypeAlias = tuple[Ids, Vectors]
OnShard: TypeAlias = Callable[[str, int, int], None]  # kind, rows that are done, rows in all


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard that is to be: which rows of the segment it covers."""

    kind: str
    generation: int
    number: int
    first: int  # id of an image; for captions, the place in the order of links
    last: int

    @property
    def vectors(self) -> str:
        """File of its vectors, relative to the pack. It is written last: where it is, the shard is whole."""
        return f"{VECTORS}/{self.generation:06d}-{self.kind}-{self.number:06d}.npy"

    @property
    def ids(self) -> str:
        """File of its ids, relative to the pack."""
        return f"{VECTORS}/{self.generation:06d}-{self.kind}-{self.number:06d}.ids.npy"


def plan_shards(segment: Segment, generation: int, *, rows: int, tiles: bool, captions: bool) -> list[ShardPlan]:
    """The shards of a segment: pictures, then their tiles, then captions; each covers a range of image ids.

    A segment without images of its own may still give captions to those of earlier ones, in a shard that covers none.
    """
    span = segment.images
    starts = list(range(span.first, span.last + 1, rows)) or [span.first]
    kinds = [IMAGES, *([TILES] if tiles else []), *([CAPTIONS] if captions else [])]
    return [
        ShardPlan(kind, generation, number, first, min(first + rows - 1, span.last))
        for kind in kinds
        for number, first in enumerate(starts)
        if first <= span.last or kind == CAPTIONS
    ]


def embed_shard(folder: Path, plan: ShardPlan, reader: SegmentReader, encoder: Encoder,
                on_image: Callable[[int], None] | None = None) -> Shard:
    """Embed a shard, or find it done. Its files appear whole or not at all.

    `on_image` is told which image was embedded last, now and then.
    """
    if not (folder / plan.vectors).is_file():
        (folder / VECTORS).mkdir(parents=True, exist_ok=True)
        parts = []
        for ids, vectors in _EMBEDDERS[plan.kind](plan, reader, encoder):
            parts.append((ids, vectors.astype(np.float16)))
            if on_image is not None and len(ids):
                on_image(int(ids[-1]))
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in parts)])
        vectors = np.concatenate([np.empty((0, encoder.dim), np.float16), *(vectors for _, vectors in parts)])
        write_array(folder / plan.ids, ids)
        write_array(folder / plan.vectors, vectors)
    rows = len(np.load(folder / plan.vectors, mmap_mode="r", allow_pickle=False))
    return Shard(plan.vectors, plan.ids, rows)


def embed_shards(folder: Path, plans: Sequence[ShardPlan], reader: SegmentReader, encoder: Encoder,
                 on_shard: OnShard | None = None) -> list[tuple[str, Shard]]:
    """Embed every shard that is not done yet: (kind, shard), without those that hold nothing."""
    begin = min((plan.first for plan in plans), default=0)
    total = max((plan.last for plan in plans), default=0) + 1 - begin
    shards = []
    for plan in plans:

        def tell(image: int, plan: ShardPlan = plan) -> None:
            if on_shard is not None and plan.first <= image < plan.last:
                on_shard(plan.kind, image + 1 - begin, total)

        shards.append((plan.kind, embed_shard(folder, plan, reader, encoder, tell)))
        if on_shard is not None:
            on_shard(plan.kind, plan.last + 1 - begin, total)
    return [(kind, shard) for kind, shard in shards if shard.rows]


# --- pictures -----------------------------------------------------------------------------------


def _embed_images(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    yield from embed_pictures(reader.pictures(plan.first, plan.last), encoder, lambda pixels: [pixels])


def _embed_tiles(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    leads = set(reader.lead_images(plan.first, plan.last).tolist())
    pictures = ((image, data) for image, data in reader.pictures(plan.first, plan.last) if image in leads)
    yield from embed_pictures(pictures, encoder, cut_tiles)


def cut_tiles(pixels: Pixels) -> list[Pixels]:
    """The parts of a picture that `TILE_BOXES` names."""
    height, width = pixels.shape[:2]
    return [
        pixels[int(y0 * height) : max(int(y0 * height) + 1, round(y1 * height)),
               int(x0 * width) : max(int(x0 * width) + 1, round(x1 * width))]
        for x0, y0, x1, y1 in TILE_BOXES
    ]  # fmt: skip


def embed_pictures(pictures: Iterable[tuple[int, bytes]], encoder: Encoder,
                   views: Callable[[Pixels], list[Pixels]]) -> Iterator[Embedded]:
    """Ids [n] and vectors [n, dim] batch by batch: files are decoded on other cores while the graph runs."""

    def prepare(batch: Sequence[tuple[int, bytes]]) -> tuple[Ids, NDArray[np.float32]]:
        seen = [(image, view) for image, data in batch for view in views(decode_picture(data).pixels)]
        ids = np.array([image for image, _ in seen], dtype=np.int64)
        return ids, encoder.preprocess([view for _, view in seen])

    for ids, pixels in _ahead(prepare, _batches(pictures, BATCH)):
        for at in range(0, len(ids), BATCH):
            yield ids[at : at + BATCH], encoder.embed_pixels(pixels[at : at + BATCH])


def _ahead(work: Callable[[Sequence[tuple[int, bytes]]], T],
           batches: Iterator[Sequence[tuple[int, bytes]]]) -> Iterator[T]:
    """Results in order, a few batches ahead of who takes them: memory stays bounded."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque(pool.submit(work, batch) for batch in islice(batches, workers + 1))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield result


# --- captions -----------------------------------------------------------------------------------


def _embed_captions(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    """What is written under the segment's images; where nothing is, the title of the article.

    Links to images of earlier segments stand in the first shard: a caption that is new there is embedded here. What
    earlier segments embedded is not embedded again.
    """
    yield from embed_captions(distinct_captions(plan, reader), encoder)


def embed_captions(captions: Iterable[tuple[int, str]], encoder: Encoder) -> Iterator[Embedded]:
    """Ids [n] and vectors [n, dim] batch by batch, of what is written under images."""
    for batch in _batches(captions, BATCH):
        ids = np.array([image for image, _ in batch], dtype=np.int64)
        yield ids, encoder.embed_texts([text for _, text in batch])


def distinct_captions(plan: ShardPlan, reader: SegmentReader) -> Iterator[tuple[int, str]]:
    """Images in order, each with every text that stands under it once."""
    at = (0 if plan.number == 0 else plan.first - 1, 2**62)
    seen: tuple[int, set[str]] = (0, set())
    while links := reader.captions(at, BATCH):
        titles = reader.titles({link.article for link in links if not link.caption})
        for link in links:
            at = link.image, link.article
            if link.image > plan.last:
                return
            text = link.caption or titles.get(link.article, "")
            if seen[0] != link.image:
                seen = (link.image, set())
            if text and text not in seen[1]:
                seen[1].add(text)
                yield link.image, text


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


_EMBEDDERS: dict[str, Callable[[ShardPlan, SegmentReader, Encoder], Iterator[Embedded]]] = {
    IMAGES: _embed_images,
    TILES: _embed_tiles,
    CAPTIONS: _embed_captions,
}
