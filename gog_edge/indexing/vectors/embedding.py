"""Embed images, captions and paragraphs of a segment shard by shard, and the queries that indexes are measured with.

A shard whose file exists is complete and is never embedded again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gog_edge.errors import PackError
from gog_edge.files import write_array
from gog_edge.indexing import OnProgress
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Fingerprint, Manifest, Segment, Shard
from gog_edge.retrieval.text.encoder import TextEncoder, passage_text
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import Pixels, Vectors

T = TypeVar("T")
VECTORS = "vectors"  # folder
IMAGES, TILES, CAPTIONS, PARAGRAPHS = "images", "tiles", "captions", "paragraphs"  # kinds of shards
BATCH = 32  # images or texts of one run of the encoder
PARAGRAPH_BATCH = 256  # paragraphs that are read at once; the text encoder sorts them by length
# Parts of a lead image that are embedded in addition to the whole, as shares of its sides (x0, y0, x1, y1): the corners
# and the centre. A crop with one subject of a crowded picture is closer to a part than to the whole.
TILE_BOXES = ((0, 0, 0.6, 0.6), (0.4, 0, 1, 0.6), (0, 0.4, 0.6, 1), (0.4, 0.4, 1, 1), (0.2, 0.2, 0.8, 0.8))
HELD_OUT_QUERIES = 256  # views of stored images, or titles of paragraphs, that an index is measured with
MIN_VIEW_SHARE = 0.55  # of each side of the image that a random view shows
Embedded: TypeAlias = tuple[Ids, Vectors]  # ids [n] and float32 vectors [n, dim]


# --- the encoders of a pack ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoders:
    """The encoders that a pack is built with."""

    image: Encoder | None = None  # None: a pack without vectors of images and captions
    text: TextEncoder | None = None  # None: a pack without vectors of paragraphs

    def of(self, space: str) -> Encoder | TextEncoder | None:
        """Return the encoder of "images", "captions" or "paragraphs"."""
        return self.text if space == "paragraphs" else self.image

    def dim_of(self, space: str) -> int:
        """Return the length of the vectors of a space; 0 without its encoder."""
        encoder = self.of(space)
        return 0 if encoder is None else encoder.dim

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprints as the settings of a build contain them."""
        return {key: None if encoder is None else asdict(encoder.fingerprint)
                for key, encoder in (("encoder", self.image), ("text_encoder", self.text))}


def fingerprint_of(encoder: Encoder | TextEncoder | None) -> Fingerprint | None:
    """Return the fingerprint of an encoder; None without one."""
    return None if encoder is None else encoder.fingerprint


def check_encoders(manifest: Manifest, encoders: Encoders) -> None:
    """Raise PackError if the encoders are not those that a pack was built with."""
    for kind, wanted, given in (("encoder", manifest.encoder, fingerprint_of(encoders.image)),
                                ("text encoder", manifest.text_encoder, fingerprint_of(encoders.text))):
        if wanted != given:
            names = ["none" if one is None else f"'{one.name}'" for one in (wanted, given)]
            raise PackError(f"pack '{manifest.name}' was built with another {kind} ({names[0]}, now {names[1]}); use "
                            "that one, or build a new pack")


def memory_shares(rows: Mapping[str, int], encoders: Encoders) -> dict[str, float]:
    """Return the share of a memory limit for each space that has rows, by the size of its vectors."""
    sizes = {space: count * encoders.dim_of(space) for space, count in rows.items()}
    total = sum(sizes.values())
    return {space: size / total for space, size in sizes.items() if size}


# --- shards ---------------------------------------------------------------------------------------


# --- shards -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard to be embedded: the kind, and the range of ids, of images or of paragraphs, that it covers."""

    kind: str
    generation: int
    number: int
    first: int
    last: int

    @property
    def vectors(self) -> str:
        """Return the path of its vectors, relative to the pack. The file is written last and marks the shard done."""
        return f"{VECTORS}/{self.generation:06d}-{self.kind}-{self.number:06d}.npy"

    @property
    def ids(self) -> str:
        """Return the path of its ids, relative to the pack."""
        return f"{VECTORS}/{self.generation:06d}-{self.kind}-{self.number:06d}.ids.npy"


def plan_shards(segment: Segment, generation: int, *, rows: int, kinds: Sequence[str]) -> list[ShardPlan]:
    """Return the shards of a segment, kind by kind, each covering `rows` ids of images or of paragraphs.

    A segment without images may contain new captions of earlier images. They go into a shard of an empty id range.
    """
    plans = []
    for kind in kinds:
        ids = segment.paragraphs if kind == PARAGRAPHS else segment.images
        starts = list(range(ids.first, ids.last + 1, rows)) or ([ids.first] if kind == CAPTIONS else [])
        plans += [ShardPlan(kind, generation, number, first, min(first + rows - 1, ids.last))
                  for number, first in enumerate(starts)]  # fmt: skip
    return plans


def embed_shard(folder: Path, plan: ShardPlan, reader: SegmentReader, encoders: Encoders,
                on_row: Callable[[int], None] | None = None) -> Shard:
    """Embed a shard unless its files exist. They are written atomically.

    Args:
        folder: the pack.
        plan: the shard.
        reader: the segment that it belongs to.
        encoders: the pack's encoders.
        on_row: called after each batch with its last id.
    """
    if not (folder / plan.vectors).is_file():
        (folder / VECTORS).mkdir(parents=True, exist_ok=True)
        dim, embedded = _embed(plan, reader, encoders)
        parts = []
        for ids, vectors in embedded:
            parts.append((ids, vectors.astype(np.float16)))
            if on_row is not None and len(ids):
                on_row(int(ids[-1]))
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in parts)])
        vectors = np.concatenate([np.empty((0, dim), np.float16), *(vectors for _, vectors in parts)])
        write_array(folder / plan.ids, ids)
        write_array(folder / plan.vectors, vectors)
    rows = len(np.load(folder / plan.vectors, mmap_mode="r", allow_pickle=False))
    return Shard(plan.vectors, plan.ids, rows)


def _embed(plan: ShardPlan, reader: SegmentReader, encoders: Encoders) -> tuple[int, Iterator[Embedded]]:
    """Return the dimension of a shard's vectors, and the vectors batch by batch."""
    if plan.kind == PARAGRAPHS:
        if encoders.text is None:
            raise PackError(f"the shard '{plan.vectors}' needs the pack's text encoder; give --text-encoder DIR")
        return encoders.text.dim, _embed_paragraphs(plan, reader, encoders.text)
    if encoders.image is None:
        raise PackError(f"the shard '{plan.vectors}' needs the pack's encoder; give --encoder DIR")
    return encoders.image.dim, _EMBEDDERS[plan.kind](plan, reader, encoders.image)


def embed_shards(folder: Path, plans: Sequence[ShardPlan], reader: SegmentReader, encoders: Encoders,
                 on_progress: OnProgress | None = None) -> list[tuple[str, Shard]]:
    """Embed the shards that are not done, and return all that have rows as (kind, shard)."""
    shards = []
    for plan in plans:
        same = [other for other in plans if other.kind == plan.kind]
        begin, total = same[0].first, same[-1].last + 1 - same[0].first

        def report(row: int, plan: ShardPlan = plan, begin: int = begin, total: int = total) -> None:
            if on_progress is not None and plan.first <= row < plan.last:
                on_progress(plan.kind, row + 1 - begin, total)

        shards.append((plan.kind, embed_shard(folder, plan, reader, encoders, report)))
        if on_progress is not None:
            on_progress(plan.kind, plan.last + 1 - begin, total)
    return [(kind, shard) for kind, shard in shards if shard.rows]


# --- images -------------------------------------------------------------------------------------


def _embed_images(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    yield from embed_files(reader.image_files(plan.first, plan.last), encoder, lambda pixels: [pixels])


def _embed_tiles(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    leads = set(reader.lead_images(plan.first, plan.last).tolist())
    files = ((image, data) for image, data in reader.image_files(plan.first, plan.last) if image in leads)
    yield from embed_files(files, encoder, cut_tiles)


def cut_tiles(pixels: Pixels) -> list[Pixels]:
    """Return the parts of an image [height, width, 3] that `TILE_BOXES` lists: views of it, of at least 1 x 1 pixel."""
    height, width = pixels.shape[:2]
    return [
        pixels[int(y0 * height) : max(int(y0 * height) + 1, round(y1 * height)),
               int(x0 * width) : max(int(x0 * width) + 1, round(x1 * width))]
        for x0, y0, x1, y1 in TILE_BOXES
    ]  # fmt: skip


def embed_files(files: Iterable[tuple[int, bytes]], encoder: Encoder,
                views: Callable[[Pixels], list[Pixels]]) -> Iterator[Embedded]:
    """Embed the views of image files, given as (id, file), batch by batch.

    Files are decoded and preprocessed in threads while the encoder runs.
    """

    def prepare(batch: Sequence[tuple[int, bytes]]) -> tuple[Ids, NDArray[np.float32]]:
        cut = [(image, view) for image, data in batch for view in views(decode_picture(data).pixels)]
        ids = np.array([image for image, _ in cut], dtype=np.int64)
        return ids, encoder.preprocess([view for _, view in cut])

    for ids, pixels in _map_in_threads(prepare, _batches(files, BATCH)):
        for at in range(0, len(ids), BATCH):
            yield ids[at : at + BATCH], encoder.embed_pixels(pixels[at : at + BATCH])


def _map_in_threads(work: Callable[[Sequence[tuple[int, bytes]]], T],
                    batches: Iterator[Sequence[tuple[int, bytes]]]) -> Iterator[T]:
    """Yield results in order. At most one batch more than there are cores is in progress: memory is bounded."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[T]] = deque(pool.submit(work, batch) for batch in islice(batches, workers + 1))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield result


# --- captions -----------------------------------------------------------------------------------


def _embed_captions(plan: ShardPlan, reader: SegmentReader, encoder: Encoder) -> Iterator[Embedded]:
    yield from embed_captions(distinct_captions(plan, reader), encoder)


def embed_captions(captions: Iterable[tuple[int, str]], encoder: Encoder) -> Iterator[Embedded]:
    """Embed captions, given as (image id, text), batch by batch."""
    for batch in _batches(captions, BATCH):
        ids = np.array([image for image, _ in batch], dtype=np.int64)
        yield ids, encoder.embed_texts([text for _, text in batch])


def distinct_captions(plan: ShardPlan, reader: SegmentReader) -> Iterator[tuple[int, str]]:
    """Yield (image id, caption) by id, each distinct caption of an image once.

    An image without a caption has the title of its article. Captions that were embedded with an earlier segment are
    left out; new captions of earlier images belong to the first shard.
    """
    at = (0 if plan.number == 0 else plan.first - 1, 2**62)  # position in the order of links
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


# --- paragraphs ---------------------------------------------------------------------------------


def _embed_paragraphs(plan: ShardPlan, reader: SegmentReader, encoder: TextEncoder) -> Iterator[Embedded]:
    for batch in _batches(range(plan.first, plan.last + 1), PARAGRAPH_BATCH):
        rows = reader.paragraphs(batch)
        ids = np.array(sorted(rows), dtype=np.int64)
        passages = (rows[number] for number in ids.tolist())
        yield ids, encoder.embed_passages([passage_text(row.title, row.section, row.text) for row in passages])


def embed_paragraph_queries(readers: Sequence[SegmentReader], deleted: Ids, encoder: TextEncoder,
                            count: int) -> Vectors | None:
    """Embed title and section of up to `count` live paragraphs: [n, dim] queries whose vectors are not stored.

    Returns None if there is no paragraph.
    """
    ids = np.concatenate([np.empty(0, np.int64), *(reader.paragraph_ids() for reader in readers)])
    live = np.setdiff1d(ids, deleted)
    if not len(live):
        return None
    chosen = np.sort(np.random.default_rng(1).choice(live, min(count, len(live)), replace=False)).tolist()
    rows = {number: row for reader in readers for number, row in reader.paragraphs(chosen).items()}
    return encoder.embed_queries([f"{rows[number].title} {rows[number].section}".strip() for number in chosen])


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


_EMBEDDERS: dict[str, Callable[[ShardPlan, SegmentReader, Encoder], Iterator[Embedded]]] = {
    IMAGES: _embed_images,
    TILES: _embed_tiles,
    CAPTIONS: _embed_captions,
}


# --- views of stored images, as queries ---------------------------------------------------------


def sample_images(readers: Sequence[SegmentReader], deleted: Ids, count: int, seed: int = 0) -> Ids:
    """Return up to `count` ids of live images, drawn uniformly, sorted."""
    live = np.setdiff1d(np.concatenate([np.empty(0, np.int64), *(reader.image_ids() for reader in readers)]), deleted)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(live, min(count, len(live)), replace=False))


def random_view(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a random crop of an image with changed brightness, tint and resolution.

    Each side of the crop is MIN_VIEW_SHARE to 1 of the image's, and is then scaled by 0.5 to 1: [height, width, 3]
    uint8, at least 1 x 1 pixel.
    """
    height, width = pixels.shape[:2]
    share = rng.uniform(MIN_VIEW_SHARE, 1.0, 2)
    h, w = (max(1, int(side * part)) for side, part in zip((height, width), share, strict=True))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    brightness, tint = rng.normal(1.0, 0.12), rng.normal(1.0, 0.04, 3)
    lit = np.clip(pixels[y : y + h, x : x + w] * (brightness * tint), 0, 255).astype(np.uint8)
    scale = rng.uniform(0.5, 1.0)
    size = max(1, int(w * scale)), max(1, int(h * scale))
    return np.asarray(Image.fromarray(lit).resize(size, Image.Resampling.BILINEAR))


def embed_random_views(readers: Sequence[SegmentReader], deleted: Ids, encoder: Encoder, count: int) -> Vectors | None:
    """Embed random views of up to `count` live images: [n, dim] queries whose vectors are not stored.

    Returns None if there is no image.
    """
    rng = np.random.default_rng(1)
    views = []
    for image in sample_images(readers, deleted, count).tolist():
        stored = next(found for reader in readers if (found := reader.image_file(image)) is not None)
        views.append(random_view(decode_picture(stored.data).pixels, rng))
    if not views:
        return None
    return np.concatenate([encoder.embed_images(views[at : at + BATCH]) for at in range(0, len(views), BATCH)])


def held_out_queries(spaces: Sequence[str], readers: Sequence[SegmentReader], images: Ids, paragraphs: Ids,
                     encoders: Encoders) -> dict[str, Vectors | None]:
    """Return the queries that the indexes of some spaces are measured with.

    Args:
        spaces: "images", "captions" or "paragraphs".
        readers: all segments.
        images: ids of deleted images.
        paragraphs: ids of deleted paragraphs.
        encoders: the pack's encoders.
    """
    queries: dict[str, Vectors | None] = dict.fromkeys(spaces)
    of_images = [space for space in spaces if space != PARAGRAPHS]
    if encoders.image is not None and of_images:
        queries |= dict.fromkeys(of_images, embed_random_views(readers, images, encoders.image, HELD_OUT_QUERIES))
    if encoders.text is not None and PARAGRAPHS in spaces:
        queries[PARAGRAPHS] = embed_paragraph_queries(readers, paragraphs, encoders.text, HELD_OUT_QUERIES)
    return queries
