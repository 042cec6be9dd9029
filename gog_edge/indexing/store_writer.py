"""Writes a pack's SQLite store; `gog_edge.retrieval.store` reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlite_utils

from gog_edge.errors import PackError
from gog_edge.retrieval.store import STORE_SCHEMA, Counts
from gog_edge.retrieval.words import name_key

MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}  # by first bytes

_TABLES = """
CREATE TABLE licences (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE articles (
    id INTEGER PRIMARY KEY, title TEXT NOT NULL UNIQUE, licence INTEGER NOT NULL REFERENCES licences(id),
    first INTEGER NOT NULL, last INTEGER NOT NULL
);
CREATE TABLE sections (
    id INTEGER PRIMARY KEY, article INTEGER NOT NULL REFERENCES articles(id), title TEXT NOT NULL
);
CREATE TABLE paragraphs (
    id INTEGER PRIMARY KEY, article INTEGER NOT NULL REFERENCES articles(id),
    section INTEGER NOT NULL REFERENCES sections(id), text TEXT NOT NULL
);
CREATE TABLE names (
    key TEXT NOT NULL, article INTEGER NOT NULL REFERENCES articles(id), redirect INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (key, redirect, article)
) WITHOUT ROWID;
CREATE TABLE images (
    id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, media_type TEXT NOT NULL, caption TEXT NOT NULL,
    licence INTEGER NOT NULL REFERENCES licences(id), attribution TEXT NOT NULL, data BLOB NOT NULL
);
CREATE TABLE image_articles (
    image INTEGER NOT NULL REFERENCES images(id), article INTEGER NOT NULL REFERENCES articles(id),
    position INTEGER NOT NULL, PRIMARY KEY (image, article)
) WITHOUT ROWID;
"""
# The word index holds no text of its own: it can be rebuilt from this view at any time.
_WORDS = """
CREATE INDEX image_articles_by_article ON image_articles(article, image);
CREATE VIEW passages AS SELECT p.id AS id, a.title AS title, s.title AS section, p.text AS text
    FROM paragraphs p JOIN articles a ON a.id = p.article JOIN sections s ON s.id = p.section;
CREATE VIRTUAL TABLE words USING fts5(
    title, section, text, content='passages', content_rowid='id', tokenize='porter unicode61 remove_diacritics 2'
);
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.5, 1.0, 1.0)');
INSERT INTO words(words) VALUES ('rebuild');
INSERT INTO words(words) VALUES ('optimize');
"""


@dataclass(frozen=True, slots=True)
class ArticleDraft:
    """An article to be written; titles are unique within a pack."""

    title: str
    paragraphs: tuple[tuple[str, str], ...]  # (section, text) in reading order, the lead first
    licence: str
    redirects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageDraft:
    """An image to be written; one image may stand in several articles, the main one first."""

    png: bytes  # the file as it will be served: PNG, JPEG or WebP
    caption: str
    licence: str
    attribution: str
    titles: tuple[str, ...]


class StoreWriter:
    """Writes one new store. The same drafts in the same order give the same rows."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite_utils.Database(path)
        self._db.conn.execute("PRAGMA synchronous = OFF")  # a half-written store has no manifest and is never opened
        self._db.conn.executescript(_TABLES)
        self._db.conn.execute(f"PRAGMA user_version = {STORE_SCHEMA}")
        self._articles: dict[str, int] = {}
        self._licences: dict[str, int] = {}
        self._images: dict[str, int] = {}
        self._sections = 0
        self._paragraphs = 0

    @property
    def counts(self) -> Counts:
        """Rows written so far."""
        return Counts(len(self._articles), self._paragraphs, len(self._images))

    def add_article(self, draft: ArticleDraft) -> int:
        """Write an article and return its id; PackError when its title is empty or already there."""
        if not name_key(draft.title):
            raise PackError(f"article {draft.title!r} has a title without any word; name it or leave it out")
        if draft.title in self._articles:
            raise PackError(f"two articles are titled {draft.title!r}; merge them or make one a redirect")
        article = self._articles[draft.title] = len(self._articles) + 1
        first = self._paragraphs + 1
        row = {"id": article, "title": draft.title, "licence": self._licence(draft.licence), "first": first}
        self._db.table("articles").insert(row | {"last": self._paragraphs + len(draft.paragraphs)})
        self._add_paragraphs(article, draft.paragraphs)
        self._add_names(article, draft)
        return article

    def add_image(self, draft: ImageDraft) -> int | None:
        """Write an image and return its id, or None when the same file was written before: its articles join that one.

        Raises:
            PackError: it belongs to no article, to one that is not there (yet), or is no PNG, JPEG or WebP.
        """
        missing = [title for title in draft.titles if title not in self._articles]
        if missing or not draft.titles:
            raise PackError(f"image {draft.caption!r} belongs to articles {missing}, none such; add them first")
        digest = hashlib.sha256(draft.png).hexdigest()
        known = self._images.get(digest)
        if known is None:
            self._images[digest] = len(self._images) + 1
            self._db.table("images").insert({
                "id": self._images[digest], "sha256": digest, "media_type": media_type(draft.png),
                "caption": draft.caption, "licence": self._licence(draft.licence),
                "attribution": draft.attribution, "data": draft.png,
            })  # fmt: skip
        self._own(self._images[digest], draft.titles)
        return self._images[digest] if known is None else None

    def finish(self) -> Counts:
        """Build the word index, compact and close the file."""
        self._db.conn.commit()
        self._db.conn.executescript(_WORDS)
        self._db.conn.execute("VACUUM")
        self._db.close()
        return self.counts

    def close(self) -> None:
        """Give up: close the file as it is."""
        self._db.close()

    def _add_paragraphs(self, article: int, paragraphs: Iterable[tuple[str, str]]) -> None:
        rows, sections, before = [], [], None
        for section, text in paragraphs:
            if section != before:
                self._sections += 1
                sections.append({"id": self._sections, "article": article, "title": section})
                before = section
            self._paragraphs += 1
            rows.append({"id": self._paragraphs, "article": article, "section": self._sections, "text": text})
        self._db.table("sections").insert_all(sections)
        self._db.table("paragraphs").insert_all(rows)

    def _add_names(self, article: int, draft: ArticleDraft) -> None:
        keys = {name_key(draft.title): {"article": article, "redirect": 0, "name": draft.title}}
        for name in draft.redirects:
            if name_key(name):
                keys.setdefault(name_key(name), {"article": article, "redirect": 1, "name": name})
        self._db.table("names").insert_all({"key": key, **row} for key, row in keys.items())

    def _own(self, image: int, titles: Iterable[str]) -> None:
        articles = [self._articles[title] for title in titles]
        taken = self._db.conn.execute("SELECT count(*) FROM image_articles WHERE image = ?", [image]).fetchone()[0]
        self._db.table("image_articles").insert_all(
            ({"image": image, "article": article, "position": taken + n} for n, article in enumerate(articles)),
            ignore=True,
        )

    def _licence(self, name: str) -> int:
        if name not in self._licences:
            self._licences[name] = len(self._licences) + 1
            self._db.table("licences").insert({"id": self._licences[name], "name": name})
        return self._licences[name]


def media_type(data: bytes) -> str:
    """Media type of an image file by its first bytes; PackError for what a browser may not show."""
    for start, kind in MEDIA_TYPES.items():
        if data.startswith(start):
            return kind
    raise PackError(f"an image starts with bytes {data[:4]!r}; store PNG, JPEG or WebP")
