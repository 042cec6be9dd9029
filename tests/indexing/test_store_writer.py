"""The schema of a store, against the SQL of the first release, and the transactions of its writer."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.indexing.compact import copy_live_rows
from gog_edge.indexing.sources.base import ArticleRecord, Notice, RedirectRecord
from gog_edge.indexing.store_report import MAX_NOTICES
from gog_edge.indexing.store_writer import FirstIds, StoreWriter
from gog_edge.indexing.word_index import COMMON_PARAGRAPHS, is_english
from gog_edge.retrieval.text.segment import SegmentReader

# Schema 3 as it was first released. Packs of that version are read and updated, so it must not change.
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
    id INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, media_type TEXT NOT NULL, lead INTEGER NOT NULL
);
CREATE TABLE pixels (image INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE links (
    image INTEGER NOT NULL, article INTEGER NOT NULL, position INTEGER NOT NULL, caption TEXT NOT NULL,
    known INTEGER NOT NULL, licence INTEGER NOT NULL, attribution TEXT NOT NULL, PRIMARY KEY (image, article)
) WITHOUT ROWID;
CREATE TABLE skipped (
    reason TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL, examples TEXT NOT NULL,
    PRIMARY KEY (reason, kind)
);
CREATE TABLE items (kind TEXT PRIMARY KEY, present INTEGER NOT NULL, used INTEGER NOT NULL);
CREATE TABLE notices (text TEXT PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE kept (key TEXT PRIMARY KEY, article INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX links_by_article ON links(article, image);
CREATE VIRTUAL TABLE words USING fts5(title, section, text, content='', tokenize='porter ascii');
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.5, 1.0, 1.0)');
CREATE TABLE common (term TEXT PRIMARY KEY, paragraphs INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE counted AS SELECT (SELECT count(*) FROM articles) AS articles,
    (SELECT count(*) FROM paragraphs) AS paragraphs, (SELECT count(*) FROM images) AS images;
PRAGMA user_version = 3;
"""


def article(number, text="A text."):
    paragraphs = (("History", text), ("History", f"Number {number}."))
    return ArticleRecord(f"Place {number}", paragraphs, "CC0", (f"P{number}",))


def test_notices_that_are_not_stored_are_counted(tmp_path):
    stores = []
    for number in (1, 2):
        store = StoreWriter(tmp_path / f"{number}.sqlite")
        with store.chunk(0):
            for at in (*range(MAX_NOTICES + number + 2), 0):  # the last one repeats the first
                store.report.write(Notice(f"notice {at}"))
        stores.append(tmp_path / store.finish(f"{number}.sqlite").store)
        with closing(SegmentReader.open(stores[-1])) as reader:
            notices = reader.report()["notices"]
        assert notices == [*(f"notice {at}" for at in range(MAX_NOTICES)), f"{number + 2} more warnings"]
    copy_live_rows(tmp_path / "one.sqlite", stores, np.empty(0, np.int64), np.empty(0, np.int64))
    with closing(SegmentReader.open(tmp_path / "one.sqlite")) as reader:
        assert reader.report()["notices"] == [*(f"notice {at}" for at in range(MAX_NOTICES)), "7 more warnings"]


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


ENGLISH = "The city's museums, founded in 1871, hold a collection of 3.5 million well-known PAINTINGS: paint, painters?"
RANKED = "SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank, rowid"


def test_english_has_the_word_index_of_unicode61(tmp_path):
    """FTS5's own tokenizer over the original texts, as in schema 2, finds and ranks the same and counts the same."""
    writer = StoreWriter(tmp_path / "store.sqlite")
    with writer.chunk(0):
        for number in range(COMMON_PARAGRAPHS):
            writer.add_article(article(number, "A frequent term."))
        writer.add_article(article(1000, ENGLISH))
    writer.finish("store.sqlite")
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db, closing(sqlite3.connect(":memory:")) as plain:
        plain.execute("CREATE VIRTUAL TABLE words USING fts5(title, section, text, "
                      "tokenize='porter unicode61 remove_diacritics 2')")
        plain.execute("INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.5, 1.0, 1.0)')")
        plain.executemany("INSERT INTO words(rowid, title, section, text) VALUES (?, ?, ?, ?)", db.execute(
            "SELECT p.id, a.title, s.title, p.text FROM paragraphs p JOIN articles a ON a.id = p.article "
            "JOIN sections s ON s.id = p.section"))
        plain.execute("CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, row)")
        db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, words, row)")
        terms = "SELECT term, doc, cnt FROM vocabulary"
        assert db.execute(terms).fetchall() == plain.execute(terms).fetchall()
        frequent = dict(plain.execute("SELECT term, doc FROM vocabulary WHERE doc >= 256"))
        assert dict(db.execute("SELECT term, paragraphs FROM common")) == frequent and "frequent" in frequent
        for query in ("number", "place 7", "histories", "museum", "painting", "founding", "collections OR city"):
            expected = plain.execute(RANKED, [query]).fetchall()
            assert db.execute(RANKED, [query]).fetchall() == expected and expected


def test_the_schema_has_no_view_no_trigger_and_no_function_of_ours(tmp_path):
    with closing(sqlite3.connect(write_store(tmp_path / "store.sqlite"))) as db:
        assert {kind for (kind,) in db.execute("SELECT type FROM sqlite_master")} == {"table", "index"}
        db.execute("PRAGMA trusted_schema = OFF")
        assert db.execute(RANKED, ["frequent"]).fetchall()
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(("texts", "english"), [
    (["Die Räte rieten von der Reise ab, und das ist nicht gut."], False),
    (["The councils advised against the journey."], True), (["Red vase", "Blue bowl, 1920"], True), ([], True),
    (["La ville est au bord de la mer, et le port est grand."], False), (["Αθήνα, πρωτεύουσα της Ελλάδας"], True),
    (["El río nace en los montes y llega al mar."], False), (["Şehir ve köy bir yol ile bağlıdır."], False),
    (["The river Le Loir and the Loire of France: the one is not the other."], True),
])  # fmt: skip
def test_english_endings_are_removed_in_english_only(tmp_path, texts, english):
    assert is_english(texts) == english
    writer = StoreWriter(tmp_path / "store.sqlite")
    with writer.chunk(0):
        for number, text in enumerate(texts):
            writer.add_article(article(number, text))
    writer.finish("store.sqlite")
    reader = SegmentReader.open(tmp_path / "store.sqlite")
    assert reader.stems() == english
    reader.close()


def test_a_later_segment_removes_endings_as_the_first_one_does(tmp_path):
    writer = StoreWriter(tmp_path / "first.sqlite")
    with writer.chunk(0):
        writer.add_article(article(0, "The paintings of the museum."))
    first = writer.finish("first.sqlite")
    with closing(SegmentReader.open(tmp_path / "first.sqlite")) as earlier:
        writer = StoreWriter(tmp_path / "second.sqlite", first_ids=FirstIds.after(first), earlier=[earlier])
        with writer.chunk(0):
            writer.add_article(article(1, "Die Bilder sind in der Stadt, und das Haus ist alt."))
        writer.finish("second.sqlite")
    with closing(SegmentReader.open(tmp_path / "second.sqlite")) as second:
        assert second.stems()


def test_counts_of_parts_of_ngrams(tmp_path):
    """A character, or two of an alphabet, is the beginning of n-grams; counts of frequent ones are stored."""
    writer = StoreWriter(tmp_path / "store.sqlite")
    with writer.chunk(0):
        for number in range(COMMON_PARAGRAPHS):
            writer.add_article(ArticleRecord(f"国{number}", (("", "東京は ไทย。"), ("", "大阪 กา"),), "CC0"))
    writer.finish("store.sqlite")
    with closing(SegmentReader.open(tmp_path / "store.sqlite")) as reader:
        counts = {"国": 2, **dict.fromkeys(("東", "京", "は", "ไ", "ท", "ไท", "ทย", "大", "阪", "กา", "า"), 1)}
        with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db:
            stored = dict(db.execute("SELECT term, paragraphs FROM common"))
        assert {term: stored[term] / COMMON_PARAGRAPHS for term in counts} == counts
        for term, times in counts.items():
            assert reader.frequency(term) == times * COMMON_PARAGRAPHS == len(reader.term_scores(term))
        assert reader.contains(1, "国") and reader.contains(1, "東") and not reader.contains(1, "都")
        assert reader.section_matches(1, "京") == {1: False} and reader.section_matches(1, "国") == {1: False, 2: False}


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
