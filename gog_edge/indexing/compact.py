"""Rewrites a pack of many generations as one segment without deleted rows. Ids stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as, write_array
from gog_edge.indexing import OnProgress
from gog_edge.indexing.commit import commit_generation, modify_pack, prune
from gog_edge.indexing.generation import SPACES, PackOptions
from gog_edge.indexing.store_writer import create_tables, finish_tables, open_database
from gog_edge.indexing.vectors.embedding import (
    CAPTIONS,
    Encoders,
    ShardPlan,
    check_encoders,
    distinct_captions,
    embed_captions,
    held_out_queries,
    memory_shares,
)
from gog_edge.indexing.vectors.index_writer import build_index
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, Counts, IdRange, IndexTarget, Manifest, Segment, Shard, Space
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.text.store import Store, paragraphs_of
from gog_edge.retrieval.vectors.shards import Ids

TEXTS = "texts"  # a stage
MERGED_SHARDS = 4  # shards that are merged into one: fewer files, while a shard fits into a few hundred MB of memory

# --- the store ----------------------------------------------------------------------------------

# Licences and sections get new ids, because no other file refers to them.
_COPIES = {
    "licences": "INSERT OR IGNORE INTO licences (name) SELECT name FROM old.licences ORDER BY id",
    "sections": "INSERT OR IGNORE INTO sections (title) SELECT title FROM old.sections ORDER BY id",
    "articles": (
        "INSERT INTO articles SELECT a.id, a.key, a.title, l.id, a.first, a.last, a.digest FROM old.articles a "
        "JOIN old.licences o ON o.id = a.licence JOIN licences l ON l.name = o.name "
        "WHERE a.id NOT IN deleted_articles ORDER BY a.id"
    ),
    "paragraphs": (
        "INSERT INTO paragraphs SELECT p.id, p.article, s.id, p.start, p.text FROM old.paragraphs p "
        "JOIN old.sections o ON o.id = p.section JOIN sections s ON s.title = o.title "
        "WHERE p.article NOT IN deleted_articles ORDER BY p.id"
    ),
    "names": "INSERT OR IGNORE INTO names SELECT * FROM old.names WHERE article NOT IN deleted_articles",
    "images": "INSERT INTO images SELECT * FROM old.images WHERE id NOT IN deleted_images ORDER BY id",
    "pixels": "INSERT INTO pixels SELECT * FROM old.pixels WHERE image NOT IN deleted_images ORDER BY image",
    # known = 0: there is no earlier segment that a caption could have been embedded with
    "links": (
        "INSERT INTO links SELECT k.image, k.article, k.position, k.caption, 0, l.id, k.attribution FROM old.links k "
        "JOIN old.licences o ON o.id = k.licence JOIN licences l ON l.name = o.name "
        "WHERE k.image NOT IN deleted_images AND k.article NOT IN deleted_articles"
    ),
    "skipped": (
        "INSERT INTO skipped SELECT * FROM old.skipped WHERE true "
        "ON CONFLICT (reason, kind) DO UPDATE SET count = count + excluded.count"
    ),
    "items": (
        "INSERT INTO items SELECT * FROM old.items WHERE true "
        "ON CONFLICT (kind) DO UPDATE SET present = present + excluded.present, used = used + excluded.used"
    ),
    "notices": (  # the row with an empty text counts the notices that were not stored
        "INSERT INTO notices SELECT * FROM old.notices WHERE true ON CONFLICT (text) DO UPDATE SET "
        "number = number + CASE WHEN text = '' THEN excluded.number ELSE 0 END"
    ),
}
OnCopy = Callable[[int, int], None]  # called with (tables copied, tables in total)


def copy_live_rows(path: Path, stores: Sequence[Path], articles: Ids, images: Ids,
                   on_copy: OnCopy | None = None) -> Counts:
    """Merge segments into one file without deleted rows, and return the number of its rows.

    Args:
        path: the new file. It is incomplete until this function returns; an existing file is overwritten.
        stores: files of the segments, oldest first.
        articles: ids of deleted articles, whose paragraphs, names and links are left out.
        images: ids of deleted images, whose pixels and links are left out.
        on_copy: called after each table of each segment.

    Raises:
        sqlite3.Error: the disk is full, or a segment is damaged.
    """
    path.unlink(missing_ok=True)
    db = open_database(f"file:{quote(str(path.resolve()))}", uri=True)
    try:
        # Without a journal: after a crash the file is written from the beginning.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        with db.atomic():
            create_tables(db)
            for table, ids in (("deleted_articles", articles), ("deleted_images", images)):
                db.execute(f"CREATE TEMP TABLE {table} (id INTEGER PRIMARY KEY)")
                db.conn.executemany(f"INSERT INTO {table} VALUES (?)", ((int(number),) for number in ids))
        for number, store in enumerate(stores):
            _copy_segment(db, store, number * len(_COPIES), len(stores) * len(_COPIES), on_copy)
        with db.atomic():
            finish_tables(db)
        return Counts(*db.execute("SELECT articles, paragraphs, images FROM counted").fetchone())
    finally:
        db.close()


def _copy_segment(db: Database, store: Path, done: int, total: int, on_copy: OnCopy | None) -> None:
    db.execute("ATTACH ? AS old", [f"file:{quote(str(store.resolve()))}?mode=ro&immutable=1"])
    for step, sql in enumerate(_COPIES.values(), done + 1):
        db.execute(sql)
        if on_copy is not None:
            on_copy(step, total)
    db.execute("DETACH old")


# --- the pack -----------------------------------------------------------------------------------

Rows: TypeAlias = tuple[Ids, NDArray[np.float16]]  # ids [n] and vectors [n, dim]


def compact(folder: Path, encoder: Encoder | None, options: PackOptions | None = None,
            on_progress: OnProgress | None = None, *, text_encoder: TextEncoder | None = None) -> Manifest:
    """Write a generation of one segment with all live rows under their ids, and build new indexes.

    If it is killed, the current generation is unchanged and the next call starts over.

    Args:
        folder: the pack.
        encoder: the pack's encoder. It embeds captions, and the queries that measure the new indexes. None for a pack
            without images.
        options: rows of a shard, and the target of the search; as the pack was built by default.
        on_progress: called with (stage, done, total).
        text_encoder: the pack's text encoder. It embeds the queries that measure the index of the paragraphs. None for
            a pack without vectors of paragraphs.

    Raises:
        PackError: an encoder differs, the pack is being written, or the disk is full. The current generation is
            unchanged.
    """
    with modify_pack(folder) as parent, full_disk_as(folder, PackError):
        encoders = Encoders(encoder, text_encoder)
        check_encoders(parent, encoders)
        Store.open(folder, parent.segments).close()  # raises for a segment of another schema
        prune(folder, parent)
        (folder / BUILD).mkdir()
        articles, images = read_tombstones(folder, parent)
        job = _Compaction(folder, parent, parent.generation + 1, articles, images, encoders,
                          options or PackOptions.from_manifest(parent), on_progress)
        return commit_generation(folder, job.build_indexes(job.write_rows()), parent)


@dataclass(frozen=True, slots=True)
class _Compaction:
    folder: Path
    parent: Manifest
    number: int  # of the new generation
    deleted_articles: Ids
    deleted_images: Ids
    encoders: Encoders
    options: PackOptions
    on_progress: OnProgress | None

    def write_rows(self) -> Manifest:
        """Write the segment and the shards, and return the manifest without indexes."""
        parent, segment = self.parent, self._write_segment()
        images = self._write_shards("images", parent.images.rows, self._live_rows(parent.images, self.deleted_images))
        captions = self._write_shards("captions", parent.captions.rows, self._caption_rows(segment))
        live = self._live_rows(parent.paragraphs, self._deleted_paragraphs())
        paragraphs = self._write_shards("paragraphs", parent.paragraphs.rows, live)
        return replace(
            parent, generation=self.number, parent=parent.generation, segments=(segment,), images=images,
            captions=captions, paragraphs=paragraphs, tombstones=None, counts=segment.counts,
            target=IndexTarget(self.options.memory, self.options.recall),
        )  # fmt: skip

    def _deleted_paragraphs(self) -> Ids:
        """Return the ids of the paragraphs of deleted articles."""
        readers = [SegmentReader.open(self.folder / segment.store) for segment in self.parent.segments]
        try:
            return paragraphs_of(readers, self.deleted_articles.tolist())
        finally:
            for reader in readers:
                reader.close()

    def _write_segment(self) -> Segment:
        """Merge the segments. The id ranges end with the last id ever assigned, so that no id is assigned twice."""
        earlier = self.parent.segments
        path, store = self.folder / BUILD / "store.sqlite", f"store/{self.number:06d}.sqlite"
        counts = copy_live_rows(path, [self.folder / segment.store for segment in earlier], self.deleted_articles,
                                self.deleted_images, lambda done, total: self._report(TEXTS, done, total))
        path.replace(self.folder / store)
        articles, paragraphs, images = (
            IdRange(getattr(earlier[0], kind).first, getattr(earlier[-1], kind).last)
            for kind in ("articles", "paragraphs", "images")
        )
        return Segment(store, articles, paragraphs, images, counts)

    def _write_shards(self, kind: str, rows: int, parts: Iterator[Rows]) -> Space:
        shards: list[Shard] = []
        done = 0
        for ids, vectors in _regroup(parts, MERGED_SHARDS * self.options.shard_rows):
            name = f"vectors/{self.number:06d}-{kind}-{len(shards):06d}"
            shard = Shard(f"{name}.npy", f"{name}.ids.npy", len(ids))
            write_array(self.folder / shard.ids, ids)
            write_array(self.folder / shard.vectors, vectors)
            shards.append(shard)
            done += len(ids)
            self._report(f"{kind}' vectors", done, rows)
        return Space(tuple(shards))

    def _live_rows(self, space: Space, deleted: Ids) -> Iterator[Rows]:
        """Yield each shard without the rows of deleted ids, in order."""
        for shard in space.shards:
            ids = np.load(self.folder / shard.ids, allow_pickle=False)
            vectors = np.load(self.folder / shard.vectors, mmap_mode="r", allow_pickle=False)
            live = ~np.isin(ids, deleted)
            yield ids[live], vectors[live]

    def _caption_rows(self, segment: Segment) -> Iterator[Rows]:
        """Yield the captions' vectors; images that have lost a caption are embedded again."""
        space, encoder = self.parent.captions, self.encoders.image
        if encoder is None or not space.rows:
            return
        plan = ShardPlan(CAPTIONS, self.number, 0, segment.images.first, segment.images.last)
        reader = SegmentReader.open(self.folder / segment.store)
        try:
            stored = np.fromiter((image for image, _ in distinct_captions(plan, reader)), dtype=np.int64)
            live = [ids for ids, _ in self._live_rows(space, self.deleted_images)]
            stale = _more_frequent(np.concatenate(live), stored)
            for ids, vectors in self._live_rows(space, self.deleted_images):
                valid = ~np.isin(ids, stale)
                yield ids[valid], vectors[valid]
            wanted = frozenset(stale.tolist())
            captions = ((image, text) for image, text in distinct_captions(plan, reader) if image in wanted)
            for ids, fresh in embed_captions(captions, encoder):
                yield ids, fresh.astype(np.float16)
        finally:
            reader.close()

    def build_indexes(self, manifest: Manifest) -> Manifest:
        """Build the index of each space that has vectors."""
        spaces: dict[str, Space] = {kind: getattr(manifest, kind) for kind in SPACES}
        shares = memory_shares({kind: space.rows for kind, space in spaces.items()}, self.encoders)
        none = np.empty(0, np.int64)
        reader = SegmentReader.open(self.folder / manifest.segments[0].store)
        try:
            queries = held_out_queries(list(shares), [reader], none, none, self.encoders)
        finally:
            reader.close()
        options = self.options
        for kind, share in shares.items():
            entry = build_index(
                self.folder, f"index/{self.number:06d}-{kind}.faiss",
                open_shards(self.folder, spaces[kind], self.encoders.dim_of(kind)), queries[kind],
                memory=None if options.memory is None else int(options.memory * share), recall=options.recall,
                factory=options.factory, on_progress=self.on_progress,
            )  # fmt: skip
            spaces[kind] = replace(spaces[kind], index=entry)
        return replace(manifest, images=spaces["images"], captions=spaces["captions"], paragraphs=spaces["paragraphs"])

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


def _more_frequent(ids: Ids, others: Ids) -> Ids:
    """Return the distinct ids that occur more often in `ids` than in `others`, which are sorted."""
    distinct, counts = np.unique(ids, return_counts=True)
    first, last = (np.searchsorted(others, distinct, side) for side in ("left", "right"))
    return distinct[counts > last - first]


def _regroup(parts: Iterator[Rows], rows: int) -> Iterator[Rows]:
    """Yield the same rows in parts of `rows`."""
    ids, vectors = np.empty(0, np.int64), np.empty((0, 0), np.float16)
    for more_ids, more in parts:
        ids, vectors = np.concatenate([ids, more_ids]), np.concatenate([vectors, more]) if len(vectors) else more
        while len(ids) >= rows:
            yield ids[:rows], vectors[:rows]
            ids, vectors = ids[rows:], vectors[rows:]
    if len(ids):
        yield ids, vectors
