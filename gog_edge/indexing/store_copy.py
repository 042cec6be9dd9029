"""Writes one store from the live rows of several; `store_writer` writes from drafts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from gog_edge.indexing.store_writer import TABLES, WORD_INDEX
from gog_edge.retrieval.manifest import Counts
from gog_edge.retrieval.segment import STORE_SCHEMA
from gog_edge.retrieval.vectors import Ids

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
