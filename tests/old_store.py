"""Packs as the release before `gog-edge pack reindex` wrote them: stores of schema 2."""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from contextlib import closing
from pathlib import Path

from gog_edge.files import describe_files
from gog_edge.retrieval.manifest import MANIFEST, generation_path, read_manifest

SCHEMA = """
CREATE TABLE licences (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE articles (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, title TEXT NOT NULL, licence INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, digest BLOB NOT NULL
);
CREATE TABLE sections (id INTEGER PRIMARY KEY, title TEXT NOT NULL UNIQUE);
CREATE TABLE paragraphs (
    id INTEGER PRIMARY KEY, article INTEGER NOT NULL, section INTEGER NOT NULL, start INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE TABLE names (
    key TEXT NOT NULL, article INTEGER NOT NULL, redirect INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (key, redirect, article)
) WITHOUT ROWID;
CREATE TABLE images (
    id INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, media_type TEXT NOT NULL, licence INTEGER NOT NULL,
    attribution TEXT NOT NULL, lead INTEGER NOT NULL
);
CREATE TABLE pixels (image INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE links (
    image INTEGER NOT NULL, article INTEGER NOT NULL, position INTEGER NOT NULL, caption TEXT NOT NULL,
    known INTEGER NOT NULL, PRIMARY KEY (image, article)
) WITHOUT ROWID;
CREATE TABLE skipped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL, examples TEXT NOT NULL);
CREATE TABLE kept (key TEXT PRIMARY KEY, article INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX links_by_article ON links(article, image);
CREATE VIEW passages AS SELECT p.id AS id, a.title AS title, s.title AS section, p.text AS text
    FROM paragraphs p JOIN articles a ON a.id = p.article JOIN sections s ON s.id = p.section;
CREATE VIRTUAL TABLE words USING fts5(
    title, section, text, content='passages', content_rowid='id', tokenize='porter unicode61 remove_diacritics 2'
);
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.5, 1.0, 1.0)');
CREATE TABLE common (term TEXT PRIMARY KEY, paragraphs INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE counted AS SELECT (SELECT count(*) FROM articles) AS articles,
    (SELECT count(*) FROM paragraphs) AS paragraphs, (SELECT count(*) FROM images) AS images;
PRAGMA user_version = 2;
"""
# From the tables of today, in the database "new"; licence and attribution of an image were those of its first place.
_COPIES = (
    "INSERT INTO licences SELECT id, name FROM new.licences",
    "INSERT INTO articles SELECT id, key, title, licence, first, last, digest FROM new.articles",
    "INSERT INTO sections SELECT id, title FROM new.sections",
    "INSERT INTO paragraphs SELECT id, article, section, start, text FROM new.paragraphs",
    "INSERT OR IGNORE INTO names SELECT old_key(name), article, redirect, name FROM new.names",
    "INSERT INTO images SELECT i.id, i.sha256, i.media_type, k.licence, k.attribution, i.lead FROM new.images i "
    "JOIN new.links k ON k.image = i.id AND k.position = 0",
    "INSERT INTO pixels SELECT image, data FROM new.pixels",
    "INSERT INTO links SELECT image, article, position, caption, known FROM new.links",
    "INSERT INTO skipped SELECT reason, count, examples FROM new.skipped",
    "INSERT INTO kept SELECT key, article FROM new.kept",
    "INSERT INTO words(words) VALUES ('rebuild')",
)


def old_key(name: str) -> str:
    """Return the key of a name in schema 2."""
    plain = "".join(char for char in unicodedata.normalize("NFD", name) if not unicodedata.combining(char))
    return " ".join(re.findall(r"[^\W_]+", plain)).lower()


def downgrade(folder: Path) -> None:
    """Replace the stores of a pack by stores of schema 2 with the same rows."""
    for segment in read_manifest(folder).segments:
        path = folder / segment.store
        new = path.rename(path.with_suffix(".new"))
        with closing(sqlite3.connect(path)) as db:
            db.create_function("old_key", 1, old_key)
            db.executescript(SCHEMA.replace("INSERT INTO words", f"ATTACH '{new}' AS new;\nINSERT INTO words"))
            for sql in _COPIES:
                db.execute(sql)
            db.execute("DELETE FROM counted")
            db.execute("INSERT INTO counted SELECT articles, paragraphs, images FROM new.counted")
            db.commit()
        new.unlink()
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    raw["files"] = [entry.to_json() for entry in describe_files(folder, [entry["path"] for entry in raw["files"]])]
    for path in (folder / MANIFEST, generation_path(folder, raw["generation"])):
        path.write_text(json.dumps(raw), encoding="utf-8")
