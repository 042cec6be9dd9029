"""BM25 over several segments, compared with SQLite's own bm25() over one table."""

import sqlite3

import pytest
from listed_source import ListedSource

from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.store import MIN_IDF, idf

STONES = ("granite", "basalt", "marble", "slate")


def sqlite_bm25(articles, term, weights="0.5, 1.0, 1.0"):
    """Return bm25() of the articles with a term, by title, from a table with one row per article."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE words USING fts5(title, section, text, "
               "tokenize='porter unicode61 remove_diacritics 2')")
    db.executemany("INSERT INTO words VALUES (?, ?, ?)",
                   [(article.title, *article.paragraphs[0]) for article in articles])
    scores = dict(db.execute(f"SELECT title, -bm25(words, {weights}) FROM words WHERE words MATCH ?", [term]))
    db.close()
    return scores


def village(number):
    """Return an article of one paragraph with ten tokens, title included."""
    return ArticleRecord(f"Village {number}", (("", "This village lies by a river without mill"),), "CC0")


def pebble(number):
    """Return an article of ten tokens: most contain one stone three times, number 150 contains each once."""
    words = " ".join(STONES) if number == 150 else " ".join([STONES[number % 4]] * 3 + ["found"])
    return ArticleRecord(f"Pebble {number}", (("", f"{words} lies here by chance"),), "CC0")


def open_pack(folder, *builds):
    """Build a pack with a segment for each sequence of articles."""
    for number, articles in enumerate(builds):
        build_pack(ListedSource(tuple((article,) for article in articles), 50), folder, name="stones", encoder=None,
                   workers=1, add=number > 0)  # fmt: skip
    return Pack.open(folder, None)


def scores_by_title(pack, terms, limit):
    matches = pack.store.rank(terms, limit)
    titles = pack.store.titles([match.article for match in matches])
    return {titles[match.article]: match.score for match in matches}


@pytest.mark.parametrize(("rows", "containing", "expected"), [
    (100, 1, 4.1947), (100, 10, 2.1540), (100, 40, 0.4013), (100, 50, MIN_IDF), (100, 60, MIN_IDF),
])  # fmt: skip
def test_the_idf_is_that_of_sqlite(rows, containing, expected):
    """In a row of average length that contains a term once, bm25() is the idf."""
    articles = [ArticleRecord(str(n), (("", "rare" if n < containing else "other"),), "CC0") for n in range(rows)]
    assert idf(rows, containing) == pytest.approx(expected, abs=5e-5)
    for score in sqlite_bm25(articles, "rare").values():
        assert idf(rows, containing) == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_scores_equal_those_of_one_table_however_the_pack_is_split(tmp_path, segments):
    """All articles have the same length, so that the average length is the same in every segment."""
    articles = [*(village(n) for n in range(240)), *(pebble(n) for n in range(200))]
    bounds = {1: (0, 440), 2: (0, 240, 440), 3: (0, 240, 430, 440)}[segments]
    pack = open_pack(tmp_path / "pack", *(articles[a:b] for a, b in zip(bounds, bounds[1:], strict=False)))
    assert len(pack.store.readers) == segments
    for terms in (STONES, ("granite", "village"), ("mill",)):
        expected = {}
        for term in terms:
            for title, score in sqlite_bm25(articles, term).items():
                expected[title] = expected.get(title, 0.0) + score
        found = scores_by_title(pack, terms, 1000)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6)
    pack.close()


@pytest.mark.parametrize("limit", [1, 3])
def test_an_article_with_all_terms_is_found_that_is_the_best_for_none_of_them(tmp_path, limit):
    """It is in a segment nearly as large as the other one."""
    villages, pebbles = [village(n) for n in range(240)], [pebble(n) for n in range(200)]
    pack = open_pack(tmp_path / "pack", villages, pebbles)
    found = scores_by_title(pack, STONES, limit)
    assert len(found) == limit and next(iter(found)) == "Pebble 150"
    pack.close()


@pytest.mark.parametrize("split", [False, True])
def test_an_article_in_a_segment_of_its_own_has_the_weight_of_the_whole_pack(tmp_path, split):
    """In its own segment each of its terms is in every paragraph, which would give it no weight."""
    villages = [village(n) for n in range(60)]
    news = ArticleRecord("Mill", (("", "A mill grinds corn; a windmill is turned by wind."),), "CC0")
    pack = open_pack(tmp_path / "pack", villages, [news]) if split else open_pack(tmp_path / "pack", [*villages, news])
    found = list(scores_by_title(pack, ("corn", "river"), 5).items())
    assert found[0][0] == "Mill" and found[0][1] > 2 * found[1][1]
    pack.close()
