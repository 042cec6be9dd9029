"""Converts a pack of an earlier version: its segments are written again with the words of today's folding.

Ids, texts, pictures, vectors and indexes stay as they are; nothing is embedded. Each finished segment is kept if the
conversion is interrupted, and the manifest is written last.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from sqlite_utils import Database

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as, is_disk_full, read_json, sync_files, verify_files, write_json
from gog_edge.indexing import OnProgress
from gog_edge.indexing.calibration import MIN_QUERIES, QUERIES, fit_calibration, held_out_text_queries
from gog_edge.indexing.commit import commit_generation, modify_pack, prune
from gog_edge.indexing.store_writer import create_tables, finish_tables, open_database
from gog_edge.retrieval.fusion import rank_articles
from gog_edge.retrieval.manifest import BUILD, TEXT_FEATURES, Calibration, Manifest, Segment
from gog_edge.retrieval.pack import read_tombstones
from gog_edge.retrieval.text.segment import REINDEXED_SCHEMA, SegmentReader
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.text.tokens import fold, name_key

COPYING, INDEXING = "copying texts and pictures", "indexing words"  # stages
STALE_NAMES = 0.05  # share of names with other words than before from which the text calibration is fitted again
_MARKER = f"{BUILD}/reindex.json"  # of an unfinished conversion

# From schema 2, in which licence and attribution belonged to an image instead of its place in an article.
_COPIES = (
    "INSERT INTO licences (id, name) SELECT id, name FROM old.licences",
    "INSERT OR IGNORE INTO licences (name) SELECT DISTINCT licence FROM terms ORDER BY licence",
    "INSERT INTO articles (id, key, title, licence, first, last, digest) "
    "SELECT id, key, title, licence, first, last, digest FROM old.articles ORDER BY id",
    "INSERT INTO sections (id, title) SELECT id, title FROM old.sections",
    "INSERT INTO paragraphs (id, article, section, start, text) "
    "SELECT id, article, section, start, text FROM old.paragraphs ORDER BY id",
    "INSERT INTO images (id, sha256, media_type, lead) "
    "SELECT id, sha256, media_type, lead FROM old.images ORDER BY id",
    "INSERT INTO pixels (image, data) SELECT image, data FROM old.pixels ORDER BY image",
    "INSERT INTO links (image, article, position, caption, known, licence, attribution) "
    "SELECT k.image, k.article, k.position, k.caption, k.known, l.id, t.attribution "
    "FROM old.links k JOIN terms t ON t.image = k.image JOIN licences l ON l.name = t.licence",
    "INSERT INTO skipped (reason, kind, count, examples) SELECT reason, '', count, examples FROM old.skipped",
    "INSERT INTO kept (key, article) SELECT key, article FROM old.kept",
)
# A link may be to an image of an earlier segment.
_TERMS = (
    "INSERT OR IGNORE INTO terms SELECT i.id, l.name, i.attribution FROM {schema}.images i "
    "JOIN {schema}.licences l ON l.id = i.licence WHERE i.id IN (SELECT image FROM old.links)"
)
# Titles first: a redirect with the key of its own title is left out.
_NAMES = "SELECT name, article, redirect FROM old.names WHERE redirect = ? ORDER BY key, article"
_ADD_NAME = (
    "INSERT OR IGNORE INTO names (key, article, redirect, name) SELECT ?1, ?2, ?3, ?4 "
    "WHERE NOT (?3 AND EXISTS (SELECT 1 FROM names WHERE key = ?1 AND redirect = 0 AND article = ?2))"
)


def reindex(folder: Path, on_progress: OnProgress | None = None) -> Manifest:
    """Write a generation whose segments have the words of today's folding. A pack that has them is left unchanged.

    If words of its titles changed, a text calibration without paragraph vectors is fitted again; one with them needs
    the text encoder (`calibration.calibrate_pack`).

    Args:
        folder: the pack.
        on_progress: called with (stage, done, total).

    Raises:
        PackError: there is no pack, it is of an unknown version, damaged or being written, or the disk is full. The
            current generation is unchanged, and finished segments are kept for the next call.
    """
    with modify_pack(folder) as parent, full_disk_as(folder, PackError):
        old = [segment for segment in parent.segments if _schema(folder / segment.store) == REINDEXED_SCHEMA]
        if not old:
            Store.open(folder, parent.segments).close()  # raises for an unknown schema
            return parent
        number = parent.generation + 1
        _start_or_resume(folder, parent)
        paths = {segment.store for segment in old}
        verify_files(folder, [entry for entry in parent.files if entry.path in paths], what="pack", error=PackError,
                     full=True)
        job = _Conversion(folder, parent.segments, sum(segment.counts.paragraphs for segment in old), on_progress)
        stores = {one: f"store/{number:06d}-{at:03d}.sqlite" if len(old) > 1 else f"store/{number:06d}.sqlite"
                  for at, one in enumerate(old)}  # fmt: skip
        done = 0
        for segment, store in stores.items():
            job.convert(segment, store, done, stores[old[0]])
            done += segment.counts.paragraphs
        segments = tuple(replace(one, store=stores[one]) if one in stores else one for one in parent.segments)
        manifest = replace(parent, generation=number, parent=parent.generation, segments=segments)
        return commit_generation(folder, replace(manifest, text_calibration=_calibration(folder, manifest)), parent)


def _schema(store: Path) -> int:
    with _as_damage(store), closing(sqlite3.connect(_address(store), uri=True)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def _start_or_resume(folder: Path, parent: Manifest) -> None:
    marker = {"reindexed": parent.generation}
    if not (folder / _MARKER).is_file() or read_json(folder / _MARKER, what="pack", error=PackError) != marker:
        prune(folder, parent)
        (folder / BUILD).mkdir()
        write_json(folder / _MARKER, marker)


@dataclass(frozen=True, slots=True)
class _Words:
    """A pack of which only words are searched."""

    store: Store
    manifest: Manifest


def _calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """Return the text calibration of a converted pack: the known one, unless its names have other words now."""
    known = manifest.text_calibration
    if known is None or manifest.text_encoder is not None:
        return known
    articles, _ = read_tombstones(folder, manifest)
    with closing(Store.open(folder, manifest.segments, articles.tolist())) as store:
        present, absent = held_out_text_queries(store, manifest, QUERIES)
        # Folded names in ASCII have the words of schema 2.
        changed = sum(not fold(name).isascii() for name in present)
        if len(present) < MIN_QUERIES or changed < STALE_NAMES * len(present):
            return known
        features = [rank_articles(_Words(store, manifest), text).features for text in (*present, *absent)]
    return fit_calibration(features, [1] * len(present) + [0] * len(absent), names=TEXT_FEATURES,
                           target_false_accept=known.target_false_accept)


@dataclass(frozen=True, slots=True)
class _Conversion:
    folder: Path
    segments: Sequence[Segment]  # of the pack, the oldest first
    paragraphs: int  # of all segments to convert
    on_progress: OnProgress | None

    def convert(self, segment: Segment, store: str, done: int, first: str) -> None:
        """Write one segment, unless an interrupted conversion did.

        Args:
            segment: of the pack.
            store: path of the new file.
            done: paragraphs of the segments before.
            first: path of the first new file. All segments remove English endings, or none, as that one does.
        """
        if (self.folder / store).is_file():
            return
        path = self.folder / BUILD / "store.sqlite"
        path.unlink(missing_ok=True)
        with _as_damage(self.folder / segment.store):
            db = open_database(f"file:{quote(str(path.resolve()))}", uri=True)
            try:
                # Without a journal: after a crash the file is written from the beginning.
                db.execute("PRAGMA journal_mode = OFF")
                db.execute("PRAGMA synchronous = OFF")
                with db.atomic():
                    create_tables(db)
                self._copy(db, segment)
                with db.atomic():
                    finish_tables(db, stems=None if store == first else self._stems(first),
                                  on_rows=lambda rows: self._report(INDEXING, done + rows, self.paragraphs))
            finally:
                db.close()
        sync_files([path])
        path.replace(self.folder / store)
        self._report(INDEXING, done + segment.counts.paragraphs, self.paragraphs)

    def _copy(self, db: Database, segment: Segment) -> None:
        """Copy all rows; names get their new keys."""
        db.execute("ATTACH ? AS old", [_address(self.folder / segment.store)])
        db.execute("CREATE TEMP TABLE terms (image INTEGER PRIMARY KEY, licence TEXT, attribution TEXT)")
        for one in self.segments[: self.segments.index(segment) + 1]:
            db.execute("ATTACH ? AS earlier", [_address(self.folder / one.store)])
            db.execute(_TERMS.format(schema="earlier"))
            db.execute("DETACH earlier")
        steps = len(_COPIES) + 1
        with db.atomic():
            for step, sql in enumerate(_COPIES, 1):
                db.execute(sql)
                self._report(COPYING, step, steps)
            db.conn.executemany(_ADD_NAME, _renamed(db))
        self._report(COPYING, steps, steps)
        db.execute("DROP TABLE terms")
        db.execute("DETACH old")

    def _stems(self, store: str) -> bool:
        with closing(SegmentReader.open(self.folder / store)) as reader:
            return reader.stems()

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


def _renamed(db: Database) -> Iterator[tuple[str, int, int, str]]:
    """Yield all names that have a word, with their keys."""
    for redirects in (0, 1):
        for name, article, redirect in db.execute(_NAMES, [redirects]):
            if key := name_key(name):
                yield key, article, redirect, name


def _address(store: Path) -> str:
    return f"file:{quote(str(store.resolve()))}?mode=ro&immutable=1"


@contextmanager
def _as_damage(store: Path) -> Iterator[None]:
    """Raise PackError for what SQLite reports about a damaged segment."""
    try:
        yield
    except sqlite3.Error as exc:
        if is_disk_full(exc):
            raise
        raise PackError(f"pack: '{store}' is damaged ({exc}); copy or build the pack again") from exc
