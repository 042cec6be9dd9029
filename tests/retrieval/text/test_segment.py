"""One file of a store, also damaged and hostile ones."""

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.retrieval.text.segment import CONNECTIONS, SegmentReader

STORE = "store/000001.sqlite"
PAGE = 4096
READS = [
    lambda reader: reader.rank(["capital"], 5),
    lambda reader: reader.first_with_all(["capital"], 5),
    lambda reader: reader.image_file(1),
    lambda reader: list(reader.image_files(1, 9)),
    lambda reader: reader.paragraphs(range(1, 40)),
    lambda reader: reader.find_names(["italy"]),
    lambda reader: reader.image_ids(),
    lambda reader: list(reader.key_batches(2)),
    lambda reader: reader.check_integrity(),
]


@pytest.fixture
def store(little_pack_folder, tmp_path):
    path = tmp_path / "damaged.sqlite"
    path.write_bytes((little_pack_folder / STORE).read_bytes())
    return path


def data_pages(path):
    """Return the numbers, from 0, of the pages without the schema, whose b-tree begins in the first page.

    See https://sqlite.org/fileformat.html, sections 1.6 and 2.6.
    """
    data = path.read_bytes()
    schema = {0}
    if data[100] == 5:  # an interior page: pointers to children in the cells and, to the last one, in the header
        cells = [int.from_bytes(data[at : at + 2], "big") for at in range(112, 112 + 2 * data[104], 2)]
        schema |= {int.from_bytes(data[at : at + 4], "big") - 1 for at in (*cells, 108)}
    return [page for page in range(len(data) // PAGE) if page not in schema]


def overwrite(path, pages, byte):
    data = bytearray(path.read_bytes())
    for page in pages:
        data[page * PAGE : (page + 1) * PAGE] = bytes([byte]) * PAGE
    path.write_bytes(data)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("byte", [0, 7, 255])
def test_damaged_pages_are_errors_that_name_the_file(store, read, byte):
    overwrite(store, data_pages(store), byte)
    reader = SegmentReader.open(store)
    for _ in range(CONNECTIONS + 1):  # each connection is returned
        with pytest.raises(PackError, match="damaged.sqlite' is damaged"):
            read(reader)
    reader.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_page_anywhere_gives_rows_or_an_error(store, seed):
    overwrite(store, [int(np.random.default_rng(seed).choice(data_pages(store)))], 7)
    reader = SegmentReader.open(store)
    errors = 0
    for read in READS:
        try:
            read(reader)
        except PackError as exc:
            errors += "damaged.sqlite" in str(exc)
    assert errors >= 1  # at least from `check_integrity`
    reader.close()


def test_a_truncated_store_is_refused(store):
    store.write_bytes(store.read_bytes()[: 3 * PAGE])
    with pytest.raises(PackError, match="damaged.sqlite"):
        SegmentReader.open(store)


@pytest.mark.parametrize("kind, sql", [
    # A view in place of a table may call functions that only a trusted schema may use, or never end.
    ("view", "CREATE VIEW counted AS SELECT load_extension('evil') articles, 0 paragraphs, 0 images"),
    ("view", "CREATE VIEW counted AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) "
             "articles, 0 paragraphs, 0 images FROM r"),
    ("trigger", "CREATE TRIGGER counted AFTER INSERT ON articles BEGIN DELETE FROM images; END"),
])  # fmt: skip
def test_a_store_with_views_or_triggers_is_refused(store, kind, sql):
    with sqlite3.connect(store) as db:
        db.execute("DROP TABLE counted")
        db.execute(sql)
    db.close()
    with pytest.raises(PackError, match=f"contains a {kind}, 'counted', as no pack does"):
        SegmentReader.open(store)


@pytest.mark.parametrize("change, read", [
    ("UPDATE articles SET title = x'ff'", lambda reader: reader.titles([1])),
    ("UPDATE names SET article = 'one'", lambda reader: reader.find_names(["france"])),
    ("UPDATE links SET position = 1.5", lambda reader: reader.links_of_articles([1])),
    ("UPDATE pixels SET data = 7", lambda reader: reader.image_file(1)),
    ("UPDATE paragraphs SET text = x'07'", lambda reader: reader.paragraphs([1])),
    ("UPDATE paragraphs SET article = NULL", lambda reader: reader.articles_of([1])),
    ("UPDATE paragraphs SET article = 'x'", lambda reader: reader.rank(["capital"], 5)),
    ("UPDATE articles SET first = 0.5", lambda reader: reader.lead_paragraphs([1])),
])  # fmt: skip
def test_values_of_other_types_are_refused(store, change, read):
    """A column of SQLite holds values of any type."""
    with sqlite3.connect(store) as db:
        db.execute(change.replace("NULL", "x''"))
    db.close()
    reader = SegmentReader.open(store)
    with pytest.raises(PackError, match="is damaged .*a row has values of the types"):
        read(reader)
    reader.close()


def test_a_store_without_row_counts_is_refused(tmp_path, little_pack_folder):
    path = shutil.copy(little_pack_folder / "store/000001.sqlite", tmp_path / "s.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM counted")
    db.close()
    reader = SegmentReader.open(Path(path))
    with pytest.raises(PackError, match="stores no row counts"):
        reader.counts()
    reader.close()
