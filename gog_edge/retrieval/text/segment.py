"""One SQLite file of a pack, with FTS5: read-only, usable from several threads. `indexing.store_writer` writes it."""

from __future__ import annotations

import json
import queue
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import Counts
from gog_edge.retrieval.text.words import match_all, match_any

NEXT_NAMES = 64  # that are looked at for one that is another name
SECTION = 1  # column of the word index
STORE_SCHEMA = 2  # PRAGMA user_version of a finished store; 0 while it is written

# All are opened at once: later the file may have lost its name, when newer generations have taken the place of its own.
CONNECTIONS = 4
CACHE_KIB = 16_384  # of a connection; SQLite's own 2 MB lose the inner pages of a store of millions of rows
_RANK = (
    "SELECT f.rowid, p.article, -f.rank "
    "FROM (SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?) f "
    "JOIN paragraphs p ON p.id = f.rowid ORDER BY f.rank, f.rowid"
)

# An article's paragraphs have successive ids, which FTS5 can range over.
_WITHIN = "AND rowid BETWEEN (SELECT first FROM articles WHERE id = ?) AND (SELECT last FROM articles WHERE id = ?)"

# Without bm25(), which counts a word's paragraphs over the whole segment each time.
_PLACES = f"SELECT rowid, highlight(words, {SECTION}, '', char(1)) FROM words WHERE words MATCH ? {_WITHIN}"
_UNRANKED = (
    "SELECT f.rowid, p.article, 0.0 FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?) f "
    "JOIN paragraphs p ON p.id = f.rowid"
)
_SCORES = "SELECT rowid, -rank FROM words WHERE words MATCH ?"
_HOLDS = f"SELECT 1 FROM words WHERE words MATCH ? {_WITHIN} LIMIT 1"
_FREQUENCY = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ?)"
_GIVEN = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class NameHit:
    """An article that bears a name."""

    key: str
    name: str  # as written
    article: int
    redirect: bool  # another name of the article, not its title


@dataclass(frozen=True, slots=True)
class Match:
    """A paragraph that matches some words."""

    paragraph: int
    article: int
    score: float  # BM25, larger is better


@dataclass(frozen=True, slots=True)
class ParagraphRow:
    """A paragraph with what its citation needs."""

    id: int
    title: str
    section: str
    text: str
    licence: str
    start: int  # where it begins in the article's text: all paragraphs with an empty line between, in characters


@dataclass(frozen=True, slots=True)
class Link:
    """An image in an article; position 0 is the article that is most the image's own."""

    image: int
    article: int
    position: int
    caption: str


@dataclass(frozen=True, slots=True)
class PictureRow:
    """An image without its pixels and without its articles."""

    id: int
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """The file of an image, as it is served."""

    data: bytes
    media_type: str


class SegmentReader:
    """Reads one segment, also when its file is removed meanwhile. Each call borrows one of a few connections.

    Every call raises PackError where it comes upon damaged pages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connections: list[sqlite3.Connection] = []
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

    @classmethod
    def open(cls, path: Path) -> SegmentReader:
        """Open a store file.

        Raises:
            PackError: not such a file, or written for another schema.
        """
        reader = cls(path)
        try:
            reader._connect()
            version = reader._connections[0].execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as exc:
            reader.close()
            raise PackError(f"pack: '{path}' is no SQLite store ({exc}); copy or build the pack again") from exc
        if version != STORE_SCHEMA:
            reader.close()
            raise PackError(f"pack: '{path}' has store schema {version}, wanted {STORE_SCHEMA}; build it again")
        return reader

    def close(self) -> None:
        """Close all connections; nobody may be reading."""
        for connection in self._connections:
            connection.close()

    def check(self) -> None:
        """Let SQLite look at every page; PackError with what it finds."""
        said = self._value("PRAGMA integrity_check(1)")
        if said != "ok":
            raise PackError(f"pack: '{self._path}' is damaged ({said}); copy or build the pack again")

    # --- what there is ------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Rows, as they were counted when the segment was finished."""
        rows = self._rows("SELECT articles, paragraphs, images FROM counted")
        if len(rows) != 1:
            raise PackError(f"pack: '{self._path}' does not say how many rows it has; copy or build the pack again")
        return Counts(*rows[0])

    def is_empty(self) -> bool:
        """Whether it brings nothing: no article, image or name."""
        tables = ("articles", "images", "names")
        return not any(self._value(f"SELECT EXISTS (SELECT 1 FROM {table})") for table in tables)

    def recount(self) -> Counts:
        """Rows, counted now."""
        return Counts(*(self._value(f"SELECT count(*) FROM {table}") for table in ("articles", "paragraphs", "images")))

    def image_ids(self) -> NDArray[np.int64]:
        """Ids of all images, sorted: [n] int64."""
        return self._ids("SELECT id FROM images ORDER BY id")

    def article_ids(self) -> NDArray[np.int64]:
        """Ids of all articles, sorted: [n] int64."""
        return self._ids("SELECT id FROM articles ORDER BY id")

    def lead_images(self, first: int, last: int) -> NDArray[np.int64]:
        """Ids within a range of images that show what their article is about, sorted: [n] int64."""
        return self._ids("SELECT id FROM images WHERE lead AND id BETWEEN ? AND ? ORDER BY id", first, last)

    def picture(self, image: int) -> StoredPicture | None:
        """The stored file of an image, or None where there is no such image."""
        rows = self._rows("SELECT data, media_type FROM pixels JOIN images ON id = image WHERE image = ?", image)
        return StoredPicture(*rows[0]) if rows else None

    def pictures(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Ids and files of a range of images, in order, one at a time."""
        with self._connection() as connection:
            sql = "SELECT image, data FROM pixels WHERE image BETWEEN ? AND ? ORDER BY image"
            yield from connection.execute(sql, (first, last))

    def picture_rows(self, ids: Iterable[int]) -> list[PictureRow]:
        """Images that are here, of those asked for."""
        sql = ("SELECT images.id, licences.name, attribution FROM images JOIN licences ON licences.id = licence "
               f"WHERE images.id {_GIVEN}")
        return [PictureRow(*row) for row in self._rows(sql, _json(ids))]

    def links_of(self, images: Iterable[int]) -> list[Link]:
        """What this segment says of the articles that images stand in; the images may be another segment's."""
        sql = f"SELECT image, article, position, caption FROM links WHERE image {_GIVEN} ORDER BY image, position"
        return [Link(*row) for row in self._rows(sql, _json(images))]

    def links_in(self, articles: Iterable[int]) -> list[Link]:
        """The images that this segment gives to articles, those that are most an article's own first."""
        sql = f"SELECT image, article, position, caption FROM links WHERE article {_GIVEN} ORDER BY position, image"
        return [Link(*row) for row in self._rows(sql, _json(articles))]

    def captions(self, after: tuple[int, int], count: int) -> list[Link]:
        """The next links behind (image, article), in that order, less those whose caption was embedded before."""
        sql = ("SELECT image, article, position, caption FROM links WHERE (image, article) > (?, ?) AND NOT known "
               "ORDER BY image, article LIMIT ?")
        return [Link(*row) for row in self._rows(sql, *after, count)]

    def titles(self, articles: Iterable[int]) -> dict[int, str]:
        """Titles by id, of the articles that are here."""
        return dict(self._rows(f"SELECT id, title FROM articles WHERE id {_GIVEN}", _json(articles)))

    def paragraphs(self, ids: Iterable[int]) -> dict[int, ParagraphRow]:
        """Paragraphs by id, of those that are here."""
        rows = self._rows(
            "SELECT p.id, a.title, s.title, p.text, l.name, p.start FROM paragraphs p "
            "JOIN articles a ON a.id = p.article JOIN sections s ON s.id = p.section "
            f"JOIN licences l ON l.id = a.licence WHERE p.id {_GIVEN}",
            _json(ids),
        )
        return {row[0]: ParagraphRow(*row) for row in rows}

    def articles_of(self, paragraphs: Iterable[int]) -> dict[int, int]:
        """The article of each paragraph that is here."""
        return dict(self._rows(f"SELECT id, article FROM paragraphs WHERE id {_GIVEN}", _json(paragraphs)))

    def leads(self, articles: Iterable[int]) -> dict[int, int]:
        """The first paragraph of each article that is here and has one."""
        return dict(self._rows(f"SELECT id, first FROM articles WHERE id {_GIVEN} AND first <= last", _json(articles)))

    def known(self, keys: Iterable[str]) -> dict[str, tuple[int, bytes]]:
        """Id and digest by key, of the articles that are here."""
        rows = self._rows(f"SELECT key, id, digest FROM articles WHERE key {_GIVEN}", _json(keys))
        return {key: (article, digest) for key, article, digest in rows}

    def keys(self, batch: int) -> Iterator[dict[str, int]]:
        """Ids by key of all articles, a batch at a time."""
        with self._connection() as connection:
            cursor = connection.execute("SELECT key, id FROM articles ORDER BY id")
            while rows := cursor.fetchmany(batch):
                yield dict(rows)

    def keys_of(self, articles: Iterable[int]) -> dict[int, str]:
        """Keys by id, of the articles that are here."""
        return dict(self._rows(f"SELECT id, key FROM articles WHERE id {_GIVEN}", _json(articles)))

    def kept(self) -> frozenset[int]:
        """Articles of earlier segments that the source of this one holds unchanged."""
        return frozenset(row[0] for row in self._rows("SELECT article FROM kept"))

    def paragraph_count(self, articles: Iterable[int]) -> int:
        """How many paragraphs some articles have together, of those that are here."""
        return int(self._value(f"SELECT coalesce(sum(last - first + 1), 0) FROM articles WHERE id {_GIVEN}",
                               _json(articles)))

    def skipped(self) -> list[tuple[str, int, list[str]]]:
        """What was left out when this segment was written: reason, how many, some of them; the most first."""
        rows = self._rows("SELECT reason, count, examples FROM skipped ORDER BY count DESC, reason")
        return [(reason, count, json.loads(examples)) for reason, count, examples in rows]

    def image_with(self, digest: bytes) -> int | None:
        """The image whose file has this sha256."""
        rows = self._rows("SELECT id FROM images WHERE sha256 = ?", digest)
        return int(rows[0][0]) if rows else None

    # --- search -------------------------------------------------------------------------------

    def named(self, keys: Iterable[str]) -> list[NameHit]:
        """Articles whose title or redirect has one of these keys (see `name_key`), titles before redirects."""
        sql = f"SELECT key, name, article, redirect FROM names WHERE key {_GIVEN} ORDER BY redirect, article"
        return [NameHit(key, name, article, bool(redirect)) for key, name, article, redirect in
                self._rows(sql, _json(keys))]

    def names_from(self, start: str, limit: int) -> list[str]:
        """Titles whose key (see `name_key`) begins with `start`, as written; at most `limit`."""
        sql = "SELECT name FROM names WHERE key >= ? AND key < ? AND NOT redirect ORDER BY key LIMIT ?"
        return [row[0] for row in self._rows(sql, start, start + "\U0010ffff", limit)]

    def redirects(self, key: str, count: int) -> list[str]:
        """Other names of articles, as written, from a key (see `name_key`) on: those among the next few names."""
        near = f"SELECT name, redirect FROM names WHERE key >= ? ORDER BY key LIMIT {NEXT_NAMES}"
        return [row[0] for row in self._rows(f"SELECT name FROM ({near}) WHERE redirect LIMIT ?", key, count)]

    def rank(self, terms: Sequence[str], limit: int) -> list[Match]:
        """Paragraphs that hold any of `terms` (as `search_terms` gives them) by BM25: the more, the longer."""
        return [Match(*row) for row in self._rows(_RANK, match_any(terms), limit)]

    def scores(self, term: str) -> list[tuple[int, float]]:
        """Every paragraph that holds a term, and its BM25, in no order."""
        return self._rows(_SCORES, match_any([term]))

    def first_holding(self, terms: Sequence[str], limit: int) -> list[Match]:
        """The first paragraphs that hold all of `terms`, without a score."""
        return [Match(*row) for row in self._rows(_UNRANKED, match_all(terms), limit)]

    def places(self, article: int, term: str) -> dict[int, int]:
        """The paragraphs of an article that hold a term, and how often it stands in their section's title."""
        rows = self._rows(_PLACES, match_any([term]), article, article)
        return {paragraph: section.count("\x01") for paragraph, section in rows}

    def frequency(self, term: str) -> int:
        """How many paragraphs hold a term."""
        rows = self._rows("SELECT paragraphs FROM common WHERE term = ?", term)
        return int(rows[0][0]) if rows else int(self._value(_FREQUENCY, match_any([term])))

    def holds(self, article: int, term: str) -> bool:
        """Whether an article (title and sections included) holds a term."""
        return bool(self._rows(_HOLDS, match_any([term]), article, article))

    # --- connections --------------------------------------------------------------------------

    def _ids(self, sql: str, *values: Any) -> NDArray[np.int64]:
        with self._connection() as connection:
            return np.fromiter((row[0] for row in connection.execute(sql, values)), dtype=np.int64)

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(sql, values).fetchall()

    def _value(self, sql: str, *values: Any) -> Any:
        return self._rows(sql, *values)[0][0]

    def _connect(self) -> None:
        # immutable: a pack's files never change, so SQLite may skip locks and works on read-only media.
        source = f"file:{quote(str(self._path.resolve()))}?mode=ro&immutable=1"
        for _ in range(CONNECTIONS):
            connection = sqlite3.connect(source, uri=True, check_same_thread=False)
            self._connections.append(connection)
            connection.execute("PRAGMA trusted_schema = OFF")  # a pack may come from anywhere
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._idle.put(connection)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = self._idle.get()
        try:
            yield connection
        except sqlite3.ProgrammingError:
            raise  # a fault of ours
        except sqlite3.DatabaseError as exc:
            raise PackError(f"pack: '{self._path}' is damaged ({exc}); verify the pack, and copy or build it again "
                            "if it is") from exc
        finally:
            self._idle.put(connection)


def _json(values: Iterable[int] | Iterable[str]) -> str:
    return json.dumps([value if isinstance(value, str) else int(value) for value in values])
