"""The text and pictures of a pack: one SQLite file with FTS5, read-only, usable from several threads."""

from __future__ import annotations

import json
import queue
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.words import match_any

REMEMBERED_TERMS = 50_000
REMEMBERED_IMAGES = 100_000  # rows without pixels, about 50 MB
STORE_SCHEMA = 1  # PRAGMA user_version of a store


_RANK = (
    "SELECT f.rowid, p.article, -f.rank "
    "FROM (SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?) f "
    "JOIN paragraphs p ON p.id = f.rowid ORDER BY f.rank, f.rowid"
)
# An article's paragraphs have successive ids, which FTS5 can range over.
_WITHIN = "AND rowid BETWEEN (SELECT first FROM articles WHERE id = ?) AND (SELECT last FROM articles WHERE id = ?)"
_RANK_WITHIN = _RANK.replace("MATCH ?", f"MATCH ? {_WITHIN}")
_HOLDS = f"SELECT 1 FROM words WHERE words MATCH ? {_WITHIN} LIMIT 1"


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows a store holds."""

    articles: int
    paragraphs: int
    images: int


@dataclass(frozen=True, slots=True)
class NameHit:
    """An article that bears a name."""

    key: str
    name: str  # as written
    title: str
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


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image without its pixels; `articles` are ids, the main one first."""

    id: int
    caption: str
    licence: str
    attribution: str
    articles: tuple[int, ...]
    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """The file of an image, as it is served."""

    data: bytes
    media_type: str


class Store:
    """Reads a store. Connections are pooled: each call borrows one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._images: dict[int, ImageRow] = {}
        self._frequencies: dict[str, int] = {}

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store file.

        Raises:
            PackError: not such a file, or written for another schema.
        """
        store = cls(path)
        try:
            version = store._value("PRAGMA user_version")
        except sqlite3.Error as exc:
            raise PackError(f"pack: '{path}' is no SQLite store ({exc}); copy or build the pack again") from exc
        if version != STORE_SCHEMA:
            store.close()
            raise PackError(f"pack: '{path}' has store schema {version}, wanted {STORE_SCHEMA}; build it again")
        return store

    def close(self) -> None:
        """Close all idle connections."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

    # --- what there is ------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Rows of the store."""
        return Counts(*(self._value(f"SELECT count(*) FROM {table}") for table in ("articles", "paragraphs", "images")))

    def image_ids(self) -> NDArray[np.int64]:
        """Ids of all images, sorted: [n] int64."""
        return np.array([row[0] for row in self._rows("SELECT id FROM images ORDER BY id")], dtype=np.int64)

    def picture(self, image: int) -> StoredPicture | None:
        """The stored file of an image, or None where there is no such image."""
        if not 0 <= image < 2**63:  # SQLite takes no larger ones, and ids come from addresses
            return None
        rows = self._rows("SELECT data, media_type FROM images WHERE id = ?", image)
        return StoredPicture(*rows[0]) if rows else None

    def images(self, ids: Collection[int]) -> dict[int, ImageRow]:
        """Images by id, with their articles. Rows are remembered: nothing changes while a pack is open."""
        known = self._images
        found = {image: known[image] for image in ids if image in known}
        missing = [image for image in ids if image not in found]
        if missing:
            found |= self._read_images(missing)
            if len(known) > REMEMBERED_IMAGES:
                known = self._images = {}  # a new one: other threads may still read the old
            known.update(found)
        return found

    def _read_images(self, ids: Iterable[int]) -> dict[int, ImageRow]:
        wanted = _json(ids)
        rows = self._rows(
            "SELECT images.id, caption, licences.name, attribution FROM images JOIN licences ON licences.id = licence "
            "WHERE images.id IN (SELECT value FROM json_each(?))",
            wanted,
        )
        owners: dict[int, list[tuple[int, str]]] = {row[0]: [] for row in rows}
        for image, article, title in self._rows(
            "SELECT image, article, title FROM image_articles JOIN articles ON articles.id = article "
            "WHERE image IN (SELECT value FROM json_each(?)) ORDER BY image, position",
            wanted,
        ):
            owners[image].append((article, title))
        return {
            row[0]: ImageRow(
                id=row[0],
                caption=row[1],
                licence=row[2],
                attribution=row[3],
                articles=tuple(article for article, _ in owners[row[0]]),
                titles=tuple(title for _, title in owners[row[0]]),
            )
            for row in rows
        }

    def main_images(self, articles: Iterable[int], without: Iterable[int] = ()) -> dict[int, int]:
        """The image of each article that is most its own: article id -> image id; never one of `without`."""
        rows = self._rows(
            "SELECT article, image FROM image_articles WHERE article IN (SELECT value FROM json_each(?)) "
            "AND image NOT IN (SELECT value FROM json_each(?)) ORDER BY position DESC, image DESC",
            _json(articles),
            _json(without),
        )
        return dict(rows)

    def titles(self, articles: Iterable[int]) -> dict[int, str]:
        """Titles by article id."""
        return dict(
            self._rows("SELECT id, title FROM articles WHERE id IN (SELECT value FROM json_each(?))", _json(articles))
        )

    def paragraphs(self, ids: Iterable[int]) -> dict[int, ParagraphRow]:
        """Paragraphs by id."""
        rows = self._rows(
            "SELECT p.id, a.title, s.title, p.text, l.name FROM paragraphs p JOIN articles a ON a.id = p.article "
            "JOIN sections s ON s.id = p.section JOIN licences l ON l.id = a.licence "
            "WHERE p.id IN (SELECT value FROM json_each(?))",
            _json(ids),
        )
        return {row[0]: ParagraphRow(*row) for row in rows}

    # --- search -------------------------------------------------------------------------------

    def named(self, keys: Iterable[str]) -> list[NameHit]:
        """Articles whose title or redirect has one of these keys (see `name_key`), titles before redirects."""
        rows = self._rows(
            "SELECT key, name, title, article, redirect FROM names JOIN articles ON articles.id = article "
            "WHERE key IN (SELECT value FROM json_each(?)) ORDER BY redirect, article",
            _json(keys),
        )
        return [NameHit(key, name, title, article, bool(redirect)) for key, name, title, article, redirect in rows]

    def rank(self, terms: Sequence[str], limit: int, article: int | None = None) -> list[Match]:
        """Paragraphs that hold any of `terms` (as `search_terms` gives them) by BM25, of one article or of all."""
        if not terms:
            return []
        values: list[Any] = [match_any(terms)]
        if article is not None:
            values += [article, article]
        rows = self._rows(_RANK if article is None else _RANK_WITHIN, *values, limit)
        return [Match(*row) for row in rows]

    def lead(self, article: int) -> int | None:
        """The first paragraph of an article, or None where it has none."""
        rows = self._rows("SELECT first FROM articles WHERE id = ? AND first <= last", article)
        return int(rows[0][0]) if rows else None

    def frequency(self, term: str) -> int:
        """How many paragraphs hold a term, counted up to 100,000; counts are remembered."""
        count = self._frequencies.get(term)
        if count is None:
            sql = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT 100000)"
            count = int(self._value(sql, match_any([term])))
            if len(self._frequencies) > REMEMBERED_TERMS:
                self._frequencies = {}
            self._frequencies[term] = count
        return count

    def holds(self, article: int, term: str) -> bool:
        """Whether an article (title and sections included) holds a term."""
        return bool(self._rows(_HOLDS, match_any([term]), article, article))

    # --- connections --------------------------------------------------------------------------

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(sql, values).fetchall()

    def _value(self, sql: str, *values: Any) -> Any:
        return self._rows(sql, *values)[0][0]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            # immutable: a pack's files never change, so SQLite may skip locks and works on read-only media.
            source = f"file:{quote(str(self._path.resolve()))}?mode=ro&immutable=1"
            connection = sqlite3.connect(source, uri=True, check_same_thread=False)
        try:
            yield connection
        finally:
            self._idle.put(connection)


def _json(values: Iterable[int] | Iterable[str]) -> str:
    return json.dumps([value if isinstance(value, str) else int(value) for value in values])
