"""Read one segment of a pack's store: an SQLite file with an FTS5 index, which `indexing.store_writer` writes."""

from __future__ import annotations

import json
import queue
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import Counts
from gog_edge.retrieval.text.tokens import fold, fts5_all, fts5_any, fts5_word, is_prefix

# PRAGMA user_version of a finished store; 0 while it is being written. Schema 2 had words that were folded otherwise.
STORE_SCHEMA = 3
REINDEXED_SCHEMA = 2  # that `gog-edge pack reindex` converts
MAX_NAMES_SCANNED = 64  # by `redirects_from`
# All connections are opened at once: the file may be deleted later, when newer generations have replaced this one.
CONNECTIONS = 4
CACHE_KIB = 16_384  # per connection; SQLite's default of 2 MB does not hold the inner pages of millions of rows
_RANK = (
    "SELECT f.rowid, p.article, -f.rank "
    "FROM (SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?) f "
    "JOIN paragraphs p ON p.id = f.rowid ORDER BY f.rank, f.rowid"
)
# The paragraphs of an article have consecutive ids, so that FTS5 can restrict a search to a range of rows.
_IN_ARTICLE = "AND rowid BETWEEN (SELECT first FROM articles WHERE id = ?) AND (SELECT last FROM articles WHERE id = ?)"
_MATCHES_IN_ARTICLE = f"SELECT rowid FROM words WHERE words MATCH ? {_IN_ARTICLE}"
_TEXTS_OF_ARTICLE = (
    "SELECT p.id, a.title, s.title, p.text FROM articles a JOIN paragraphs p ON p.id BETWEEN a.first AND a.last "
    "JOIN sections s ON s.id = p.section WHERE a.id = ?"
)
_UNRANKED = (
    "SELECT f.rowid, p.article, 0.0 FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?) f "
    "JOIN paragraphs p ON p.id = f.rowid"
)
_TERM_SCORES = "SELECT rowid, -rank FROM words WHERE words MATCH ?"
_FREQUENCY = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ?)"
_LINKS = (
    "SELECT image, article, position, caption, name, attribution FROM links JOIN licences ON licences.id = licence"
)
_IN_JSON = "IN (SELECT value FROM json_each(?))"  # a list of any length as one parameter


@dataclass(frozen=True, slots=True)
class NameMatch:
    """An article that has a title or redirect."""

    key: str
    name: str  # as written
    article: int
    redirect: bool  # False: the title


@dataclass(frozen=True, slots=True)
class ParagraphMatch:
    """A paragraph that matches a query."""

    paragraph: int
    article: int
    score: float  # BM25, larger is better


@dataclass(frozen=True, slots=True)
class ParagraphRow:
    """A paragraph with the fields of a citation."""

    id: int
    title: str
    section: str
    text: str
    licence: str
    start: int  # offset in the article's text (its paragraphs joined by an empty line), in characters


@dataclass(frozen=True, slots=True)
class ImageLink:
    """An image in an article; position 0 is the image's main article."""

    image: int
    article: int
    position: int
    caption: str
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The encoded file of an image."""

    data: bytes
    media_type: str


_Types: TypeAlias = type | tuple[type, ...]
_LINK: tuple[_Types, ...] = (int, int, int, str, str, str)  # of the fields of ImageLink
_MATCH: tuple[_Types, ...] = (int, int, (int, float))  # of the fields of ParagraphMatch
# A view in place of a table may compute rows without end.
_FOREIGN = "SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index') LIMIT 1"


class SegmentReader:
    """A read-only segment with a few connections; may be used from several threads, also after its file is deleted.

    Every method raises PackError if it reads a damaged page.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connections: list[sqlite3.Connection] = []
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

    @classmethod
    def open(cls, path: Path) -> SegmentReader:
        """Open a store file.

        Raises:
            PackError: The file is not an SQLite database or has another schema.
        """
        reader = cls(path)
        try:
            reader._connect()
            version = reader._connections[0].execute("PRAGMA user_version").fetchone()[0]
            foreign = reader._connections[0].execute(_FOREIGN).fetchone()
        except sqlite3.Error as exc:
            reader.close()
            raise PackError(f"pack: '{path}' is not an SQLite database ({exc}); copy or build the pack again") from exc
        if version != STORE_SCHEMA:
            reader.close()
            raise PackError(f"pack: '{path}' must have store schema {STORE_SCHEMA}, got {version}; "
                            f"{_how_to_convert(path, version)}")
        if foreign is not None:
            reader.close()
            raise PackError(f"pack: '{path}' contains a {foreign[0]}, '{foreign[1]}', as no pack does; do not use it")
        return reader

    def close(self) -> None:
        """Close all connections. No read may be running."""
        for connection in self._connections:
            connection.close()

    def check_integrity(self) -> None:
        """Run SQLite's integrity check over every page. Raises PackError with the first problem."""
        problem = self._value("PRAGMA integrity_check(1)")
        if problem != "ok":
            raise PackError(f"pack: '{self._path}' is damaged ({problem}); copy or build the pack again")

    # --- rows ---------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Return the row counts stored when the segment was finished."""
        rows = self._rows("SELECT articles, paragraphs, images FROM counted")
        if len(rows) != 1:
            raise PackError(f"pack: '{self._path}' stores no row counts; copy or build the pack again")
        return Counts(*rows[0])

    def is_empty(self) -> bool:
        """Return whether the segment has no article, image or name."""
        tables = ("articles", "images", "names")
        return not any(self._value(f"SELECT EXISTS (SELECT 1 FROM {table})") for table in tables)

    def count_rows(self) -> Counts:
        """Count the rows."""
        return Counts(*(self._value(f"SELECT count(*) FROM {table}") for table in ("articles", "paragraphs", "images")))

    def image_ids(self) -> NDArray[np.int64]:
        """Return the ids of all images, sorted: [n] int64."""
        return self._ids("SELECT id FROM images ORDER BY id")

    def article_ids(self) -> NDArray[np.int64]:
        """Return the ids of all articles, sorted: [n] int64."""
        return self._ids("SELECT id FROM articles ORDER BY id")

    def paragraph_ids(self) -> NDArray[np.int64]:
        """Return the ids of all paragraphs, sorted: [n] int64."""
        return self._ids("SELECT id FROM paragraphs ORDER BY id")

    def lead_images(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the ids of lead images from `first` to `last`, sorted: [n] int64."""
        return self._ids("SELECT id FROM images WHERE lead AND id BETWEEN ? AND ? ORDER BY id", first, last)

    def image_file(self, image: int) -> ImageFile | None:
        """Return the stored file of an image, or None if the id is unknown."""
        rows = self._rows("SELECT data, media_type FROM pixels JOIN images ON id = image WHERE image = ?", image,
                          types=(bytes, str))
        return ImageFile(*rows[0]) if rows else None

    def image_files(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yield ids and encoded files of the images from `first` to `last`, in order."""
        with self._connection() as connection:
            sql = "SELECT image, data FROM pixels WHERE image BETWEEN ? AND ? ORDER BY image"
            yield from connection.execute(sql, (first, last))

    def known_images(self, ids: Iterable[int]) -> list[int]:
        """Return those of some ids that this segment has an image of."""
        return [row[0] for row in self._rows(f"SELECT id FROM images WHERE id {_IN_JSON}", _json(ids))]

    def links_of_images(self, images: Iterable[int]) -> list[ImageLink]:
        """Return this segment's links of images, which may be stored in other segments."""
        sql = f"{_LINKS} WHERE image {_IN_JSON} ORDER BY image, position"
        return [ImageLink(*row) for row in self._rows(sql, _json(images), types=_LINK)]

    def links_of_articles(self, articles: Iterable[int]) -> list[ImageLink]:
        """Return this segment's links of articles, by position."""
        sql = f"{_LINKS} WHERE article {_IN_JSON} ORDER BY position, image"
        return [ImageLink(*row) for row in self._rows(sql, _json(articles), types=_LINK)]

    def captions(self, after: tuple[int, int], count: int) -> list[ImageLink]:
        """Return the next `count` links after (image, article) whose captions are not embedded yet, in that order."""
        sql = f"{_LINKS} WHERE (image, article) > (?, ?) AND NOT known ORDER BY image, article LIMIT ?"
        return [ImageLink(*row) for row in self._rows(sql, *after, count, types=_LINK)]

    def titles(self, articles: Iterable[int]) -> dict[int, str]:
        """Return titles by article id; articles of other segments are skipped."""
        sql = f"SELECT id, title FROM articles WHERE id {_IN_JSON}"
        return dict(self._rows(sql, _json(articles), types=(int, str)))

    def paragraphs(self, ids: Iterable[int]) -> dict[int, ParagraphRow]:
        """Return paragraphs by id; paragraphs of other segments are skipped."""
        rows = self._rows(
            "SELECT p.id, a.title, s.title, p.text, l.name, p.start FROM paragraphs p "
            "JOIN articles a ON a.id = p.article JOIN sections s ON s.id = p.section "
            f"JOIN licences l ON l.id = a.licence WHERE p.id {_IN_JSON}",
            _json(ids), types=(int, str, str, str, str, int),
        )  # fmt: skip
        return {row[0]: ParagraphRow(*row) for row in rows}

    def articles_of(self, paragraphs: Iterable[int]) -> dict[int, int]:
        """Return the article of each paragraph: paragraph id -> article id."""
        sql = f"SELECT id, article FROM paragraphs WHERE id {_IN_JSON}"
        return dict(self._rows(sql, _json(paragraphs), types=(int, int)))

    def lead_paragraphs(self, articles: Iterable[int]) -> dict[int, int]:
        """Return the first paragraph of each article that has one: article id -> paragraph id."""
        sql = f"SELECT id, first FROM articles WHERE id {_IN_JSON} AND first <= last"
        return dict(self._rows(sql, _json(articles), types=(int, int)))

    def paragraph_ranges(self, articles: Iterable[int]) -> list[tuple[int, int]]:
        """Return the first and last paragraph of each article that has any; articles of other segments are skipped."""
        return self._rows(f"SELECT first, last FROM articles WHERE id {_IN_JSON} AND first <= last", _json(articles))

    def articles_by_key(self, keys: Iterable[str]) -> dict[str, tuple[int, bytes]]:
        """Return id and content digest of articles by key."""
        rows = self._rows(f"SELECT key, id, digest FROM articles WHERE key {_IN_JSON}", _json(keys))
        return {key: (article, digest) for key, article, digest in rows}

    def key_batches(self, batch: int) -> Iterator[dict[str, int]]:
        """Yield the ids of all articles by key, `batch` at a time."""
        with self._connection() as connection:
            cursor = connection.execute("SELECT key, id FROM articles ORDER BY id")
            while rows := cursor.fetchmany(batch):
                yield dict(rows)

    def article_keys(self, articles: Iterable[int]) -> dict[int, str]:
        """Return keys by article id."""
        return dict(self._rows(f"SELECT id, key FROM articles WHERE id {_IN_JSON}", _json(articles)))

    def unchanged_articles(self) -> frozenset[int]:
        """Return the articles of earlier segments that are unchanged in this segment's source."""
        return frozenset(row[0] for row in self._rows("SELECT article FROM kept"))

    def paragraph_count(self, articles: Iterable[int]) -> int:
        """Return the total number of paragraphs of some articles."""
        return int(self._value(f"SELECT coalesce(sum(last - first + 1), 0) FROM articles WHERE id {_IN_JSON}",
                               _json(articles)))

    def report(self) -> dict[str, list[Any]]:
        """Return what became of the snapshot's items, as JSON: "items" by kind, "skipped" by reason, and "notices"."""
        skipped = self._rows("SELECT reason, kind, count, examples FROM skipped ORDER BY count DESC, reason, kind")
        return {
            "items": [dict(zip(("kind", "present", "used"), row, strict=True))
                      for row in self._rows("SELECT kind, present, used FROM items ORDER BY kind")],
            "skipped": [{"reason": reason, "kind": kind, "count": count, "examples": json.loads(examples)}
                        for reason, kind, count, examples in skipped],
            # An empty text has the number of notices that were not stored.
            "notices": [text or f"{number} more warnings" for text, number in
                        self._rows("SELECT text, number FROM notices ORDER BY text = '', number")],
        }  # fmt: skip

    def image_by_digest(self, digest: bytes) -> int | None:
        """Return the id of the image whose file has this sha256, or None."""
        rows = self._rows("SELECT id FROM images WHERE sha256 = ?", digest)
        return int(rows[0][0]) if rows else None

    # --- search -------------------------------------------------------------------------------

    def find_names(self, keys: Iterable[str]) -> list[NameMatch]:
        """Return articles with a title or redirect of one of these keys (see `name_key`), titles first."""
        sql = f"SELECT key, name, article, redirect FROM names WHERE key {_IN_JSON} ORDER BY redirect, article"
        return [NameMatch(key, name, article, bool(redirect)) for key, name, article, redirect in
                self._rows(sql, _json(keys), types=(str, str, int, int))]

    def titles_with_prefix(self, start: str, limit: int) -> list[str]:
        """Return up to `limit` titles, as written, whose key (see `name_key`) begins with `start`."""
        sql = "SELECT name FROM names WHERE key >= ? AND key < ? AND NOT redirect ORDER BY key LIMIT ?"
        return [row[0] for row in self._rows(sql, start, start + "\U0010ffff", limit)]

    def redirects_from(self, key: str, count: int) -> list[str]:
        """Return up to `count` redirects, as written, among the next MAX_NAMES_SCANNED names from a `name_key` on."""
        near = f"SELECT name, redirect FROM names WHERE key >= ? ORDER BY key LIMIT {MAX_NAMES_SCANNED}"
        return [row[0] for row in self._rows(f"SELECT name FROM ({near}) WHERE redirect LIMIT ?", key, count)]

    def rank(self, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        """Return up to `limit` paragraphs with any of `terms` (see `search_terms`), best BM25 score first."""
        return [ParagraphMatch(*row) for row in self._rows(_RANK, fts5_any(terms), limit, types=_MATCH)]

    def term_scores(self, term: str) -> list[tuple[int, float]]:
        """Return (paragraph, BM25 score) of every paragraph with a term, in no order."""
        return self._rows(_TERM_SCORES, fts5_any([term]), types=(int, (int, float)))

    def first_with_all(self, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        """Return the first `limit` paragraphs with all of `terms`, with score 0."""
        return [ParagraphMatch(*row) for row in self._rows(_UNRANKED, fts5_all(terms), limit, types=_MATCH)]

    def section_matches(self, article: int, term: str) -> dict[int, bool]:
        """Return the paragraphs of an article with a term: paragraph id -> whether its section's title has it too."""
        if is_prefix(term):
            return {paragraph: term in section for paragraph, title, section, text in self._folded_texts(article)
                    if term in f"{title} {section} {text}"}
        expression = fts5_any([term])
        found, in_section = (self._rows(_MATCHES_IN_ARTICLE, match, article, article)
                             for match in (expression, f"section : ({expression})"))
        return {row[0]: row in in_section for row in found}

    def frequency(self, term: str) -> int:
        """Return the number of paragraphs with a term."""
        rows = self._rows("SELECT paragraphs FROM common WHERE term = ?", term)
        return int(rows[0][0]) if rows else int(self._value(_FREQUENCY, fts5_any([term])))

    def knows(self, word: str) -> bool:
        """Return whether any paragraph has a folded word; in a script without blanks, as part of any run."""
        return bool(self._rows("SELECT 1 FROM words WHERE words MATCH ? LIMIT 1", fts5_word(word)))

    def contains(self, article: int, term: str) -> bool:
        """Return whether an article, its title or a section title contains a term."""
        if is_prefix(term):
            return any(term in one for texts in self._folded_texts(article) for one in texts[1:])
        return bool(self._rows(f"{_MATCHES_IN_ARTICLE} LIMIT 1", fts5_any([term]), article, article))

    def stems(self) -> bool:
        """Return whether the words of the index have their English endings removed."""
        return bool(self._value("SELECT instr(sql, 'porter') FROM sqlite_master WHERE name = 'words'"))

    def _folded_texts(self, article: int) -> Iterator[tuple[int, str, str, str]]:
        """Yield id, title, section title and text of the paragraphs of an article, folded.

        For a part of an n-gram this is faster than FTS5, which merges the rows of all n-grams that begin with it.
        """
        for paragraph, *texts in self._rows(_TEXTS_OF_ARTICLE, article, types=(int, str, str, str)):
            title, section, text = map(fold, texts)
            yield paragraph, title, section, text

    # --- connections --------------------------------------------------------------------------

    def _ids(self, sql: str, *values: Any) -> NDArray[np.int64]:
        with self._connection() as connection:
            try:
                return np.fromiter((row[0] for row in connection.execute(sql, values)), dtype=np.int64)
            except (OverflowError, TypeError, ValueError) as exc:
                raise self._damage(f"an id is not a number: {exc}") from exc

    def _rows(self, sql: str, *values: Any, types: tuple[_Types, ...] = ()) -> list[Any]:
        """Return the rows of a query. Raises PackError if a value has not the type of its column in `types`."""
        with self._connection() as connection:
            rows = connection.execute(sql, values).fetchall()
        for row in rows if types else ():  # a column of SQLite holds any type
            if not all(map(isinstance, row, types)):
                raise self._damage(f"a row has values of the types {', '.join(type(one).__name__ for one in row)}")
        return rows

    def _damage(self, what: object) -> PackError:
        return PackError(f"pack: '{self._path}' is damaged ({what}); check it with `gog-edge pack verify`, and copy "
                         "or build the pack again")

    def _value(self, sql: str, *values: Any) -> Any:
        return self._rows(sql, *values)[0][0]

    def _connect(self) -> None:
        # immutable: a pack's files never change; SQLite then takes no locks and works on read-only media.
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
            raise  # a programming error, not damage
        except sqlite3.DatabaseError as exc:
            raise self._damage(exc) from exc
        finally:
            self._idle.put(connection)


def _json(values: Iterable[int] | Iterable[str]) -> str:
    return json.dumps([value if isinstance(value, str) else int(value) for value in values])


def _how_to_convert(store: Path, version: int) -> str:
    if version == REINDEXED_SCHEMA:
        return f"convert the pack with `gog-edge pack reindex {store.parent.parent}`, which embeds nothing again"
    return "update gog_edge, or build the pack again" if version > STORE_SCHEMA else "build the pack again"
