"""Writes one store from the live rows of several; `store_writer` writes from drafts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.files import full_disk_said, write_array
from gog_edge.indexing.commit import changing, commit, prune
from gog_edge.indexing.embedding import CAPTIONS, ShardPlan, distinct_captions, embed_captions
from gog_edge.indexing.generation import QUERIES, OnProgress, PackOptions
from gog_edge.indexing.index_planning import heldout_crops
from gog_edge.indexing.index_writer import build_index
from gog_edge.indexing.store_writer import TABLES, WORD_INDEX
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, Counts, Manifest, SearchTarget, Segment, Shard, Space, Span
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.segment import STORE_SCHEMA, SegmentReader
from gog_edge.retrieval.vectors.shards import Ids

# Ids stay; those of licences and sections, which no other file names, are given anew by what they say.
_COPIES = {
    "licences": "INSERT OR IGNORE INTO licences (name) SELECT name FROM old.licences ORDER BY id",
    "sections": "INSERT OR IGNORE INTO sections (title) SELECT title FROM old.sections ORDER BY id",
    "articles": (
        "INSERT INTO articles SELECT a.id, a.key, a.title, l.id, a.first, a.last, a.digest FROM old.articles a "
        "JOIN old.licences o ON o.id = a.licence JOIN licences l ON l.name = o.name "
        "WHERE a.id NOT IN gone ORDER BY a.id"
    ),
    "paragraphs": (
        "INSERT INTO paragraphs SELECT p.id, p.article, s.id, p.start, p.text FROM old.paragraphs p "
        "JOIN old.sections o ON o.id = p.section JOIN sections s ON s.title = o.title "
        "WHERE p.article NOT IN gone ORDER BY p.id"
    ),
    "names": "INSERT OR IGNORE INTO names SELECT * FROM old.names WHERE article NOT IN gone",
    "images": (
        "INSERT INTO images SELECT i.id, i.sha256, i.media_type, l.id, i.attribution, i.lead FROM old.images i "
        "JOIN old.licences o ON o.id = i.licence JOIN licences l ON l.name = o.name "
        "WHERE i.id NOT IN dead ORDER BY i.id"
    ),
    "pixels": "INSERT INTO pixels SELECT * FROM old.pixels WHERE image NOT IN dead ORDER BY image",
    # All captions are this one segment's own: none was embedded with an earlier one.
    "links": (
        "INSERT INTO links SELECT image, article, position, caption, 0 FROM old.links "
        "WHERE image NOT IN dead AND article NOT IN gone"
    ),
    "skipped": (
        "INSERT INTO skipped SELECT * FROM old.skipped WHERE true "
        "ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count"
    ),
}
OnCopy = Callable[[int, int], None]  # tables that are copied, tables in all


def copy_live(path: Path, stores: Sequence[Path], gone: Ids, dead: Ids, on_copy: OnCopy | None = None) -> Counts:
    """Write what is left of some segments, the oldest first, into one; returns its counts.

    Args:
        path: the new file; it is worth nothing until this returns, and is begun anew after a kill.
        stores: files of segments.
        gone: ids of articles that are left out, with their paragraphs, names and links.
        dead: ids of images that are left out, with their pixels and links.
        on_copy: is told (done, total) after each table of each segment.

    Raises:
        sqlite3.Error: the disk is full, or a segment is damaged.
    """
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}", uri=True)
    try:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)
        for table, ids in (("gone", gone), ("dead", dead)):
            connection.execute(f"CREATE TEMP TABLE {table} (id INTEGER PRIMARY KEY)")
            connection.executemany(f"INSERT INTO {table} VALUES (?)", ((int(number),) for number in ids))
        connection.commit()
        for number, store in enumerate(stores):
            _copy_segment(connection, store, number * len(_COPIES), len(stores) * len(_COPIES), on_copy)
        connection.executescript("BEGIN; DROP TABLE build_chunks; DROP TABLE build_redirects;" + WORD_INDEX + "COMMIT;")
        connection.execute(f"PRAGMA user_version = {STORE_SCHEMA}")
        connection.commit()
        return Counts(*connection.execute("SELECT articles, paragraphs, images FROM counted").fetchone())
    finally:
        connection.close()


def _copy_segment(connection: sqlite3.Connection, store: Path, done: int, total: int, on_copy: OnCopy | None) -> None:
    connection.execute("ATTACH ? AS old", [f"file:{quote(str(store.resolve()))}?mode=ro&immutable=1"])
    for step, sql in enumerate(_COPIES.values(), done + 1):
        connection.execute(sql)
        connection.commit()
        if on_copy is not None:
            on_copy(step, total)
    connection.execute("DETACH old")


TEXTS = "texts"  # a stage
SHARDS_IN_ONE = 4  # nothing is resumed shard by shard here: fewer files, and no more memory than a few hundred MB


def compact(folder: Path, encoder: Encoder | None, options: PackOptions | None = None,
            on_progress: OnProgress | None = None) -> Manifest:
    """Write a generation of one segment with the live rows under the same ids, and index it anew.

    Killed at any point it leaves the generation in force as it was; called again, it begins anew.

    Args:
        folder: the pack.
        encoder: its own: it embeds captions, and the new indexes are measured with looks at stored images. None for a
            pack of texts alone.
        options: rows of a shard, and what the search is to be; as the pack was built where left out.
        on_progress: is told (stage, done, total).

    Raises:
        PackError: another encoder, the pack is being written, or the disk is full. The generation in force stays.
    """
    with changing(folder) as parent, full_disk_said(folder, PackError):
        if parent.encoder != (None if encoder is None else encoder.fingerprint):
            raise PackError(f"pack '{parent.name}' was built with another encoder; use that one")
        prune(folder)
        (folder / BUILD).mkdir()
        gone, dead = read_tombstones(folder, parent)
        job = _Compaction(folder, parent, parent.generation + 1, gone, dead, options or PackOptions.of(parent),
                          on_progress)
        manifest = job.without_indexes(encoder)
        if encoder is not None:
            manifest = job.indexed(manifest, encoder)
        return commit(folder, manifest, parent)


Rows: TypeAlias = tuple[Ids, NDArray[np.float16]]  # [n] and [n, dim]


@dataclass(frozen=True, slots=True)
class _Compaction:
    folder: Path
    parent: Manifest
    number: int  # of the new generation
    gone: Ids
    dead: Ids
    options: PackOptions
    on_progress: OnProgress | None

    def without_indexes(self, encoder: Encoder | None) -> Manifest:
        segment = self._segment()
        images = self._space("images", self.parent.images.rows, self._live(self.parent.images))
        captions = self._space("captions", self.parent.captions.rows, self._captions(segment, encoder))
        return replace(
            self.parent, generation=self.number, parent=self.parent.generation, segments=(segment,), images=images,
            captions=captions, tombstones=None, counts=segment.counts,
            target=SearchTarget(self.options.memory, self.options.recall),
        )  # fmt: skip

    def _segment(self) -> Segment:
        """One file for all; its spans reach to the last id that was ever given, so that none is given twice."""
        earlier = self.parent.segments
        made, store = self.folder / BUILD / "store.sqlite", f"store/{self.number:06d}.sqlite"
        counts = copy_live(made, [self.folder / segment.store for segment in earlier], self.gone, self.dead,
                           lambda done, total: self._tell(TEXTS, done, total))
        made.replace(self.folder / store)
        articles, paragraphs, images = (
            Span(getattr(earlier[0], kind).first, getattr(earlier[-1], kind).last)
            for kind in ("articles", "paragraphs", "images")
        )
        return Segment(store, articles, paragraphs, images, counts)

    def _space(self, kind: str, rows: int, parts: Iterator[Rows]) -> Space:
        shards: list[Shard] = []
        done = 0
        for ids, vectors in _refilled(parts, SHARDS_IN_ONE * self.options.shard_rows):
            name = f"vectors/{self.number:06d}-{kind}-{len(shards):06d}"
            shard = Shard(f"{name}.npy", f"{name}.ids.npy", len(ids))
            write_array(self.folder / shard.ids, ids)
            write_array(self.folder / shard.vectors, vectors)
            shards.append(shard)
            done += len(ids)
            self._tell(f"{kind}' vectors", done, rows)
        return Space(tuple(shards))

    def _live(self, space: Space) -> Iterator[Rows]:
        """Each shard without the rows of dead images, in order: the first row of an id stays its first."""
        for shard in space.shards:
            ids = np.load(self.folder / shard.ids, allow_pickle=False)
            vectors = np.load(self.folder / shard.vectors, mmap_mode="r", allow_pickle=False)
            live = ~np.isin(ids, self.dead)
            yield ids[live], vectors[live]

    def _captions(self, segment: Segment, encoder: Encoder | None) -> Iterator[Rows]:
        """As they are; those of images whose captions were corrected, or went with an article, embedded anew."""
        space = self.parent.captions
        if encoder is None or not space.rows:
            return
        plan = ShardPlan(CAPTIONS, self.number, 0, segment.images.first, segment.images.last)
        reader = SegmentReader.open(self.folder / segment.store)
        try:
            said = np.fromiter((image for image, _ in distinct_captions(plan, reader)), dtype=np.int64)
            stale = _more_often(np.concatenate([ids for ids, _ in self._live(space)]), said)
            for ids, vectors in self._live(space):
                kept = ~np.isin(ids, stale)
                yield ids[kept], vectors[kept]
            wanted = frozenset(stale.tolist())
            captions = ((image, text) for image, text in distinct_captions(plan, reader) if image in wanted)
            for ids, fresh in embed_captions(captions, encoder):
                yield ids, fresh.astype(np.float16)
        finally:
            reader.close()

    def indexed(self, manifest: Manifest, encoder: Encoder) -> Manifest:
        reader = SegmentReader.open(self.folder / manifest.segments[0].store)
        try:
            queries = heldout_crops([reader], np.empty(0, np.int64), encoder, QUERIES)
        finally:
            reader.close()
        options, rows = self.options, manifest.images.rows + manifest.captions.rows
        spaces = []
        for kind, space in (("images", manifest.images), ("captions", manifest.captions)):
            share = None if options.memory is None else int(options.memory * space.rows / max(1, rows))
            entry = build_index(
                self.folder, f"index/{self.number:06d}-{kind}.faiss", open_shards(self.folder, space, encoder.dim),
                queries, memory=share, recall=options.recall, factory=options.factory, on_progress=self.on_progress,
            ) if space.rows else None  # fmt: skip
            spaces.append(replace(space, index=entry))
        return replace(manifest, images=spaces[0], captions=spaces[1])

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


def _more_often(ids: Ids, others: Ids) -> Ids:
    """Those of `ids` that stand there more often than in `others`, which are sorted."""
    distinct, counts = np.unique(ids, return_counts=True)
    first, last = (np.searchsorted(others, distinct, side) for side in ("left", "right"))
    return distinct[counts > last - first]


def _refilled(parts: Iterator[Rows], rows: int) -> Iterator[Rows]:
    """The same rows in shards of `rows`."""
    ids, vectors = np.empty(0, np.int64), np.empty((0, 0), np.float16)
    for more_ids, more in parts:
        ids, vectors = np.concatenate([ids, more_ids]), np.concatenate([vectors, more]) if len(vectors) else more
        while len(ids) >= rows:
            yield ids[:rows], vectors[:rows]
            ids, vectors = ids[rows:], vectors[rows:]
    if len(ids):
        yield ids, vectors
