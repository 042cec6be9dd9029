"""Writes one segment of a pack's store with sqlite-utils; `gog_edge.retrieval.text.segment` reads it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlite_utils import Database

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord, RedirectRecord, Skipped, Used
from gog_edge.indexing.store_report import MAX_EXAMPLES, ReportWriter
from gog_edge.indexing.word_index import OnRows, create_word_index
from gog_edge.retrieval.manifest import Counts, IdRange, Segment
from gog_edge.retrieval.text.segment import STORE_SCHEMA, SegmentReader
from gog_edge.retrieval.text.tokens import name_key

MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}  # by first bytes
PARAGRAPH_SEPARATOR = 2  # characters: the blank line between two paragraphs of an article's text
MAX_CACHED_IDS = 100_000  # of section titles and licences

# --- schema -------------------------------------------------------------------------------------

# Columns, and the primary key. All columns but a primary key of a single column are NOT NULL.
TABLES: dict[str, tuple[dict[str, type], str | tuple[str, ...] | None]] = {
    "licences": ({"id": int, "name": str}, "id"),
    "articles": ({"id": int, "key": str, "title": str, "licence": int, "first": int, "last": int, "digest": bytes},
                 "id"),
    "sections": ({"id": int, "title": str}, "id"),
    "paragraphs": ({"id": int, "article": int, "section": int, "start": int, "text": str}, "id"),
    "names": ({"key": str, "article": int, "redirect": int, "name": str}, ("key", "redirect", "article")),
    "images": ({"id": int, "sha256": bytes, "media_type": str, "lead": int}, "id"),
    "pixels": ({"image": int, "data": bytes}, "image"),
    # known: the caption was embedded with an earlier segment
    "links": ({"image": int, "article": int, "position": int, "caption": str, "known": int, "licence": int,
               "attribution": str}, ("image", "article")),
    # kind: of item; empty for parts of items
    "skipped": ({"reason": str, "kind": str, "count": int, "examples": str}, ("reason", "kind")),
    "items": ({"kind": str, "present": int, "used": int}, "kind"),
    "notices": ({"text": str, "number": int}, "text"),
    # kept: articles of earlier segments that this segment's snapshot contains unchanged
    "kept": ({"key": str, "article": int}, "key"),
    "build_chunks": ({"number": int}, "number"),
    "build_redirects": ({"key": str, "name": str, "article": str, "kind": str}, None),
    "build_files": ({"kind": str, "item": str, "rank": int, "reason": str}, ("kind", "item")),
}  # fmt: skip
UNIQUE_COLUMNS = {"licences": "name", "articles": "key", "sections": "title", "images": "sha256"}
WITHOUT_ROWID = ("names", "links", "kept", "build_files")
BUILD_TABLES = ("build_chunks", "build_redirects", "build_files")  # dropped when the segment is finished

_COUNTED = (
    "CREATE TABLE counted AS SELECT (SELECT count(*) FROM articles) AS articles, "
    "(SELECT count(*) FROM paragraphs) AS paragraphs, (SELECT count(*) FROM images) AS images"
)


def open_database(path: Path | str, *, uri: bool = False) -> Database:
    """Open a SQLite file for writing, with neither plugins nor settings of sqlite-utils."""
    return Database(sqlite3.connect(path, uri=uri), recursive_triggers=False, execute_plugins=False)


def create_tables(db: Database) -> None:
    """Create the tables of a segment, empty and without the word index."""
    for name, (columns, primary_key) in TABLES.items():
        _create_table(db, name, columns, primary_key)
    for name, column in UNIQUE_COLUMNS.items():
        db.table(name).create_index([column], unique=True)


def _create_table(db: Database, name: str, columns: dict[str, type], primary_key: str | tuple[str, ...] | None) -> None:
    required = [column for column in columns if column != primary_key]
    sql = db.create_table_sql(name, columns, pk=primary_key, not_null=required)
    # sqlite-utils has no option for WITHOUT ROWID, which saves a third of the size of these tables.
    db.execute(f"{sql.strip().rstrip(';')} WITHOUT ROWID" if name in WITHOUT_ROWID else sql)


def finish_tables(db: Database, *, stems: bool | None = None, on_rows: OnRows | None = None) -> None:
    """Build what readers use besides the rows: the word index and the counts. Call it in a transaction.

    Args:
        db: a segment with its rows.
        stems, on_rows: as in `create_word_index`.
    """
    db.table("links").create_index(["article", "image"], index_name="links_by_article")
    create_word_index(db, stems=stems, on_rows=on_rows)
    db.execute(_COUNTED)
    for name in BUILD_TABLES:
        db.table(name).drop()
    db.execute(f"PRAGMA user_version = {STORE_SCHEMA}")


# --- the writer ---------------------------------------------------------------------------------

_KEY_EXISTS = "SELECT (SELECT count(*) FROM articles WHERE key = ?) + (SELECT count(*) FROM kept WHERE key = ?)"
# A redirect to a redirect gets the target of that one.
_FOLLOW_REDIRECTS = (
    "UPDATE build_redirects AS r SET article = (SELECT b.article FROM build_redirects b WHERE b.name = r.article) "
    "WHERE EXISTS (SELECT 1 FROM build_redirects b WHERE b.name = r.article) "
    "AND NOT EXISTS (SELECT 1 FROM articles a WHERE a.key = r.article) "
    "AND NOT EXISTS (SELECT 1 FROM kept s WHERE s.key = r.article)"
)
_MAX_REDIRECTS = 4  # in a row
_RESOLVE_REDIRECTS = (
    "INSERT OR IGNORE INTO names (key, article, redirect, name) SELECT r.key, a.id, 1, r.name FROM build_redirects r "
    "JOIN articles a ON a.key = r.article WHERE NOT EXISTS "
    "(SELECT 1 FROM names n WHERE n.key = r.key AND n.article = a.id)"
)
_REDIRECTS_TO_EARLIER = "SELECT r.key, s.article, r.name FROM build_redirects r JOIN kept s ON s.key = r.article"
_UNRESOLVED = (
    "FROM build_redirects r WHERE NOT EXISTS (SELECT 1 FROM articles a WHERE a.key = r.article) "
    "AND NOT EXISTS (SELECT 1 FROM kept s WHERE s.key = r.article)"
)


@dataclass(frozen=True, slots=True)
class FirstIds:
    """The first ids that a segment assigns."""

    article: int = 1
    paragraph: int = 1
    image: int = 1

    @classmethod
    def after(cls, segment: Segment) -> FirstIds:
        """Return the ids that follow the last segment of a pack."""
        return cls(segment.articles.last + 1, segment.paragraphs.last + 1, segment.images.last + 1)


class RecordError(PackError):
    """A record that cannot be written; nothing of it was written."""

    def __init__(self, reason: str, item: str, advice: str) -> None:
        super().__init__(f"{reason}: {item!r}; {advice}")
        self.skipped = Skipped(reason, item)


class StoreWriter:
    """A writer of one segment. The same records in the same order give the same rows.

    Each `chunk` is a transaction: after a crash, all or none of its rows exist. Articles that an earlier segment
    contains unchanged are not written again.
    """

    def __init__(self, path: Path, *, first_ids: FirstIds | None = None, earlier: Sequence[SegmentReader] = (),
                 deleted: frozenset[int] = frozenset()) -> None:
        """Create the file, or continue with an unfinished one.

        Args:
            path: the SQLite file.
            first_ids: the first ids to assign.
            earlier: the other segments of the pack, oldest first.
            deleted: ids of articles of `earlier` that are deleted.
        """
        self._path, self._first, self._earlier, self._deleted = path, first_ids or FirstIds(), tuple(earlier), deleted
        self._db = open_database(path)
        with full_disk_as(path, PackError):
            if not self._value("SELECT count(*) FROM sqlite_master"):
                self._db.enable_wal()
                with self._db.atomic():
                    create_tables(self._db)
        self._db.execute("PRAGMA synchronous = NORMAL")
        self.report = ReportWriter(self._db)
        self._article = self._next_id("articles", self._first.article)
        self._paragraph = self._next_id("paragraphs", self._first.paragraph)
        self._image = self._next_id("images", self._first.image)
        self._pending: dict[str, list[tuple[object, ...]]] = {}  # rows by table, written by `_flush`
        self._ids: dict[tuple[str, str], int] = {}  # of section titles and licences

    @property
    def counts(self) -> Counts:
        """Return the number of rows written so far."""
        return Counts(self._article - self._first.article, self._paragraph - self._first.paragraph,
                      self._image - self._first.image)

    @property
    def chunks(self) -> int:
        """Return the number of chunks written so far."""
        return int(self._value("SELECT count(*) FROM build_chunks"))

    @property
    def finished(self) -> bool:
        """Return whether `finish` has built the word index, after which nothing can be added."""
        return self._value("PRAGMA user_version") == STORE_SCHEMA

    @contextmanager
    def chunk(self, number: int) -> Iterator[None]:
        """Write chunk `number` in one transaction, which is rolled back if the block raises."""
        ids = self._article, self._paragraph, self._image
        with full_disk_as(self._path, PackError):
            try:
                with self._db.atomic():
                    yield
                    self._flush()
                    self._db.execute("INSERT INTO build_chunks VALUES (?)", [number])
            except BaseException:
                self._article, self._paragraph, self._image = ids
                self._pending.clear()
                self._ids.clear()
                raise

    def close(self) -> None:
        """Close the file. Complete chunks remain."""
        self._db.close()

    # --- articles -----------------------------------------------------------------------------

    def add_article(self, record: ArticleRecord, images: Sequence[ImageRecord] = ()) -> int:
        """Write an article and return its id; an unchanged article keeps the id of its earlier segment.

        Args:
            record: the article.
            images: its images. They count as part of the article when it is compared with the earlier version.

        Raises:
            RecordError: the title has no word, or the key exists already.
        """
        if not name_key(record.title):
            raise RecordError("title has no word", record.title or record.key, "give it a title, or leave it out")
        if self._value(_KEY_EXISTS, record.identity, record.identity):
            raise RecordError("duplicate article key", record.identity, "merge the articles, or make one a redirect")
        digest = _digest(record, images)
        unchanged = self._unchanged(record.identity, digest)
        if unchanged is not None:
            return unchanged
        article, first = self._article, self._paragraph
        last = first + len(record.paragraphs) - 1
        row = (article, record.identity, record.title, self._licence(record.licence), first, last, digest)
        self._db.execute("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._article += 1
        self._add_paragraphs(article, record.paragraphs)
        self._add_names(article, record)
        return article

    def add_redirect(self, record: RedirectRecord) -> None:
        """Write a redirect, whose article may be added later. A name without a word is ignored."""
        if name_key(record.name):
            self._add_rows("build_redirects", [(name_key(record.name), record.name, record.article, record.kind)])

    def _unchanged(self, key: str, digest: bytes) -> int | None:
        """Return the id of the live article of this key if its digest is the same."""
        for reader in reversed(self._earlier):
            article, stored = reader.articles_by_key([key]).get(key, (0, b""))
            if article and article not in self._deleted:
                if stored == digest:
                    self._db.execute("INSERT OR IGNORE INTO kept VALUES (?, ?)", [key, article])
                    return article
                return None
        return None

    def _add_paragraphs(self, article: int, paragraphs: Iterable[tuple[str, str]]) -> None:
        start, rows = 0, []
        for section, text in paragraphs:
            rows.append((self._paragraph, article, self._id_of("sections", "title", section), start, text))
            self._paragraph += 1
            start += len(text) + PARAGRAPH_SEPARATOR
        self._add_rows("paragraphs", rows)

    def _add_names(self, article: int, record: ArticleRecord) -> None:
        names = {name_key(record.title): (0, record.title)}
        for name in record.redirects:
            if name_key(name):
                names.setdefault(name_key(name), (1, name))
        self._add_rows("names", ((key, article, redirect, name) for key, (redirect, name) in names.items()))

    # --- images -------------------------------------------------------------------------------

    def add_image(self, record: ImageRecord) -> int:
        """Write an image and return its id. A file that exists already is linked to the further articles.

        Raises:
            RecordError: it belongs to no article or to one that was not added, or is not a PNG, JPEG or WebP file.
        """
        articles = [self._find_article(key) for key in record.articles]
        missing = [key for key, article in zip(record.articles, articles, strict=True) if article is None]
        if missing or not record.articles:
            raise RecordError("image belongs to no article", ", ".join(missing) or record.caption,
                              "add the article first")
        kind = media_type(record.data)
        digest = hashlib.sha256(record.data).digest()
        image = self._find_image(digest)
        if image is None:
            image = self._image
            self._db.execute("INSERT INTO images VALUES (?, ?, ?, ?)", (image, digest, kind, int(record.lead)))
            self._add_rows("pixels", [(image, record.data)])
            self._image += 1
        self._link(image, [article for article in articles if article is not None], record)
        return image

    def _find_article(self, key: str) -> int | None:
        found = self._db.execute("SELECT id FROM articles WHERE key = ?", [key]).fetchone()
        if found:
            return int(found[0])
        for reader in reversed(self._earlier):
            article = reader.articles_by_key([key]).get(key, (0, b""))[0]
            if article and article not in self._deleted:
                return article
        return None

    def _find_image(self, digest: bytes) -> int | None:
        found = self._db.execute("SELECT id FROM images WHERE sha256 = ?", [digest]).fetchone()
        if found:
            return int(found[0])
        return next((image for reader in self._earlier if (image := reader.image_by_digest(digest)) is not None), None)

    def _link(self, image: int, articles: Sequence[int], record: ImageRecord) -> None:
        position = int(self._value("SELECT count(*) FROM links WHERE image = ?", image))
        embedded = self._embedded_captions(image)
        for number, article in enumerate(articles):
            if article < self._first.article:
                continue  # an unchanged article of an earlier segment has its links
            known = int((record.caption or self._title(article)) in embedded)
            row = (image, article, position + number, record.caption, known, self._licence(record.licence),
                   record.attribution)
            self._db.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _embedded_captions(self, image: int) -> set[str]:
        """Return the texts that were embedded as captions of an image with earlier segments."""
        if image >= self._first.image:
            return set()
        links = [link for reader in self._earlier for link in reader.links_of_images([image])]
        titles: dict[int, str] = {}
        for reader in self._earlier:
            titles |= reader.titles(link.article for link in links if not link.caption)
        return {link.caption or titles.get(link.article, "") for link in links}

    def _title(self, article: int) -> str:
        return str(self._db.execute("SELECT title FROM articles WHERE id = ?", [article]).fetchone()[0])

    # --- the end ------------------------------------------------------------------------------

    def finish(self, store: str) -> Segment:
        """Build the word index and close the file.

        Args:
            store: name of the file in the manifest.
        """
        with full_disk_as(self._path, PackError):
            with self._db.atomic():
                self._flush()
            if not self.finished:
                with self._db.atomic():
                    self._resolve_redirects()
                    self.report.count_files()
                self._db.disable_wal()  # a write-ahead log would contain the whole word index a second time
                with self._db.atomic():
                    finish_tables(self._db, stems=self._earlier[0].stems() if self._earlier else None)
            self._db.disable_wal()
            self._shrink()
        counts = self.counts
        self._db.close()
        return Segment(
            store,
            IdRange(self._first.article, self._article - 1),
            IdRange(self._first.paragraph, self._paragraph - 1),
            IdRange(self._first.image, self._image - 1),
            counts,
        )

    def _resolve_redirects(self) -> None:
        self._db.table("build_redirects").create_index(["name"], if_not_exists=True)
        for _ in range(_MAX_REDIRECTS):
            if not self._db.execute(_FOLLOW_REDIRECTS).rowcount:
                break
        self._db.execute(_RESOLVE_REDIRECTS)
        earlier = [(key, article, name) for key, article, name in self._db.execute(_REDIRECTS_TO_EARLIER)
                   if all(match.article != article for reader in self._earlier for match in reader.find_names([key]))]
        for row in earlier:
            self._db.execute("INSERT OR IGNORE INTO names (key, article, redirect, name) VALUES (?, ?, 1, ?)", row)
        missing = dict(self._db.execute(f"SELECT r.kind, count(*) {_UNRESOLVED} GROUP BY r.kind"))
        for kind, count in self._db.execute("SELECT kind, count(*) FROM build_redirects GROUP BY kind").fetchall():
            sql = f"SELECT r.name {_UNRESOLVED} AND r.kind = ? LIMIT {MAX_EXAMPLES}"
            names = [row[0] for row in self._db.execute(sql, [kind])] if kind in missing else []
            self.report.skip_all("redirect to a missing article", kind, missing.get(kind, 0), names)
            if kind:
                self.report.write(Used(kind, "", count=count - missing.get(kind, 0)))

    def _shrink(self) -> None:
        """Rewrite the file if more than a tenth of its pages is unused."""
        pages, unused = (int(self._value(f"PRAGMA {name}")) for name in ("page_count", "freelist_count"))
        if unused > pages // 10:
            self._db.vacuum()

    # --- rows ---------------------------------------------------------------------------------

    def _add_rows(self, table: str, rows: Iterable[tuple[object, ...]]) -> None:
        """Buffer rows of tables that are not queried while the chunk is written: inserting many at once is faster."""
        self._pending.setdefault(table, []).extend(rows)

    def _flush(self) -> None:
        for table, rows in self._pending.items():
            self._db.table(table).insert_all([tuple(TABLES[table][0]), *rows])
        self._pending.clear()

    def _licence(self, name: str) -> int:
        return self._id_of("licences", "name", name)

    def _id_of(self, table: str, column: str, text: str) -> int:
        """Return the id of a section title or licence, which is stored once."""
        if (table, text) not in self._ids:
            if len(self._ids) >= MAX_CACHED_IDS:
                self._ids.clear()
            found = self._db.execute(f"SELECT id FROM {table} WHERE {column} = ?", [text]).fetchone()
            insert = f"INSERT INTO {table} ({column}) VALUES (?)"
            number = found[0] if found else self._db.execute(insert, [text]).lastrowid
            self._ids[table, text] = int(number or 0)
        return self._ids[table, text]

    def _next_id(self, table: str, first: int) -> int:
        return max(first, self._value(f"SELECT coalesce(max(id), 0) + 1 FROM {table}"))

    def _value(self, sql: str, *values: object) -> int:
        return int(self._db.execute(sql, values).fetchone()[0])


def media_type(data: bytes) -> str:
    """Return the media type of an image file by its first bytes.

    Raises:
        RecordError: it is not a PNG, JPEG or WebP file.
    """
    for start, kind in MEDIA_TYPES.items():
        if data.startswith(start):
            return kind
    raise RecordError("unsupported image format", repr(data[:4]), "store PNG, JPEG or WebP")


def _digest(record: ArticleRecord, images: Sequence[ImageRecord]) -> bytes:
    """Return the sha256 of everything that is stored for an article, by which versions of it are compared."""
    article = [record.title, record.paragraphs, record.licence, record.redirects]
    shown = [(hashlib.sha256(image.data).hexdigest(), image.caption, image.licence, image.attribution)
             for image in images]
    return hashlib.sha256(json.dumps([article, shown], ensure_ascii=False).encode()).digest()
