"""The schema of a store, against the SQL of the first release, and the transactions of its writer."""

import sqlite3
from contextlib import closing

import pytest

from gog_edge.errors import PackError
from gog_edge.indexing.sources.base import ArticleRecord, RedirectRecord
from gog_edge.indexing.store_writer import COMMON_PARAGRAPHS, StoreWriter
from gog_edge.retrieval.text.segment import SegmentReader

# Schema 2 as it was first released. Packs of that version are read and updated, so it must not change.
REFERENCE = """
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


def article(number, text="A text."):
    paragraphs = (("History", text), ("History", f"Number {number}."))
    return ArticleRecord(f"Place {number}", paragraphs, "CC0", (f"P{number}",))


def write_store(path):
    writer = StoreWriter(path)
    with writer.chunk(0):
        for number in range(COMMON_PARAGRAPHS):
            writer.add_article(article(number, "A frequent term."))
        writer.add_redirect(RedirectRecord("Old place", "Place 7"))
    writer.finish(path.name)
    return path


def schema(path):
    """Describe tables, columns, indexes and views, independent of the wording of their SQL."""
    with closing(sqlite3.connect(path)) as db:
        tables = {name: (kind, columns, without_rowid) for _, name, kind, columns, without_rowid, _ in
                  db.execute("PRAGMA table_list") if name not in ("sqlite_schema", "sqlite_temp_schema")}
        columns = {name: db.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in tables}
        indexes = {
            name: sorted((unique, partial, [row[2] for row in db.execute(f"PRAGMA index_info('{index}')")])
                         for _, index, unique, _, partial in db.execute(f"PRAGMA index_list({name})"))
            for name in tables
        }  # fmt: skip
        settings = [db.execute(f"PRAGMA {name}").fetchone()
                    for name in ("user_version", "page_size", "journal_mode", "encoding", "auto_vacuum")]
    return tables, columns, indexes, settings


def test_the_schema_is_that_of_the_first_release(tmp_path):
    with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as reference:
        reference.executescript(REFERENCE)
    assert schema(write_store(tmp_path / "store.sqlite")) == schema(tmp_path / "reference.sqlite")


def test_the_word_index_equals_one_built_by_plain_sql(tmp_path):
    """Same rows in, same FTS5 results out: terms, ranks and stored counts."""
    write_store(tmp_path / "store.sqlite")
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db:
        db.execute("ATTACH ? AS reference", [str(tmp_path / "reference.sqlite")])
        tables = ("licences", "articles", "sections", "paragraphs")
        with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as reference:
            reference.executescript(REFERENCE)
        for table in tables:
            db.execute(f"INSERT INTO reference.{table} SELECT * FROM main.{table}")
        db.commit()
    with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as reference:
        reference.execute("INSERT INTO words(words) VALUES ('rebuild')")
        reference.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'row')")
        frequent = dict(reference.execute("SELECT term, doc FROM temp.vocabulary WHERE doc >= 256"))
        ranked = "SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank, rowid"
        queries = ("number", "place 7", "histories")
        expected = {query: reference.execute(ranked, [query]).fetchall() for query in queries}
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db:
        assert dict(db.execute("SELECT term, paragraphs FROM common")) == frequent and "frequent" in frequent
        assert {query: db.execute(ranked, [query]).fetchall() for query in expected} == expected
        assert all(expected.values())


def test_a_chunk_that_fails_leaves_no_rows(tmp_path):
    writer = StoreWriter(tmp_path / "store.sqlite")
    with writer.chunk(0):
        writer.add_article(article(0))
    with pytest.raises(RuntimeError), writer.chunk(1):
        writer.add_article(article(1))
        raise RuntimeError("power failure")
    assert (writer.chunks, writer.counts.articles, writer.counts.paragraphs) == (1, 1, 2)
    with writer.chunk(1):
        assert writer.add_article(article(2)) == 2
    writer.finish("store.sqlite")
    reader = SegmentReader.open(tmp_path / "store.sqlite")
    assert reader.article_keys([1, 2]) == {1: "Place 0", 2: "Place 2"} and reader.counts() == reader.count_rows()
    reader.check_integrity()
    reader.close()


def test_an_unfinished_store_is_continued(tmp_path):
    """Rows of complete chunks are kept, ids continue, and keys of earlier chunks are known."""
    writer = StoreWriter(tmp_path / "store.sqlite")
    with writer.chunk(0):
        writer.add_article(article(0))
    writer.close()
    writer = StoreWriter(tmp_path / "store.sqlite")
    assert writer.chunks == 1 and not writer.finished
    with writer.chunk(1):
        with pytest.raises(PackError, match="duplicate article key: 'Place 0'"):
            writer.add_article(article(0))
        assert writer.add_article(article(1)) == 2
    segment = writer.finish("store.sqlite")
    assert (segment.articles.last, segment.paragraphs.last, segment.counts.articles) == (2, 4, 2)
