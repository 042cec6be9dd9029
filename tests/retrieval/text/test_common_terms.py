"""Terms that occur in very many paragraphs: the time of a search must not grow with the store."""

import pytest

from gog_edge.indexing.sources.base import ArticleRecord, RedirectRecord
from gog_edge.indexing.store_writer import StoreWriter
from gog_edge.retrieval.text.store import MAX_SCORED_PARAGRAPHS, Store

ARTICLES = MAX_SCORED_PARAGRAPHS // 4 + 100
SECTIONS = ("", "Capital", "River", "Economy")


def article(n):
    """Return an article of four paragraphs that contain 'city' and, if n is odd, 'capital'."""
    paragraphs = tuple((section, f"This city has a {'capital' if n % 2 else 'mill'} and a number, {n}, of its own.")
                       for section in SECTIONS)  # fmt: skip
    return ArticleRecord(f"Place {n}", paragraphs, "CC0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    writer = StoreWriter(folder / "words.sqlite")
    with writer.chunk(0):
        for n in range(ARTICLES):
            writer.add_article(article(n))
        writer.add_redirect(RedirectRecord("Old Place", "Place 7"))
    opened = Store.open(folder, [writer.finish("words.sqlite")])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def mostly_deleted(store):
    """The same store with all articles but the last deleted."""
    return Store(list(zip(store._segments, store.readers, strict=True)), range(1, ARTICLES))


def test_a_term_in_all_paragraphs_returns_paragraphs_with_equal_scores(store):
    assert store.frequency("city") == 4 * ARTICLES > MAX_SCORED_PARAGRAPHS
    matches = store.rank(["city"], 8)
    assert len(matches) == 8 and len({match.score for match in matches}) == 1


def test_a_term_in_all_paragraphs_finds_the_live_ones(mostly_deleted):
    for terms in (["city"], ["city", "place"]):
        matches = mostly_deleted.rank(terms, 8)
        assert {match.article for match in matches} == {ARTICLES} and len(matches) == len(SECTIONS)


def test_several_frequent_terms_return_paragraphs_with_all_of_them(store):
    matches = store.rank(["city", "place"], 8)
    assert len(matches) == 8
    texts = store.paragraphs([match.paragraph for match in matches]).values()
    assert all("city" in row.text and "Place" in row.title for row in texts)


def test_a_rare_term_is_ranked_and_frequent_ones_are_ignored(store):
    matches = store.rank(["city", "4321"], 8)
    assert {row.title for row in store.paragraphs([match.paragraph for match in matches]).values()} == {"Place 4321"}


def test_within_an_article_a_term_in_the_section_title_counts_again(store):
    """Both terms are in more than half of the paragraphs, so that their idf is the minimum of 1e-6."""
    matches = store.rank_within(8, ["capital", "city", "unheard"], 4)
    rows = store.paragraphs([match.paragraph for match in matches])
    assert [rows[match.paragraph].section for match in matches] == ["Capital", "", "River", "Economy"]
    # One occurrence scores 1; two score 2 * 2.2 / (2 + 1.2) = 1.375.
    assert [match.score for match in matches] == pytest.approx([2.375e-6, 2e-6, 2e-6, 2e-6], rel=1e-9)


def test_within_an_article_a_rare_term_scores_its_idf(store):
    matches = store.rank_within(8, ["7"], 2)  # in 4 of 20,400 paragraphs: ln(20396.5 / 4.5)
    assert [match.score for match in matches] == pytest.approx([8.41904, 8.41904], abs=1e-5)
    assert store.rank_within(8, ["unheard"], 4) == store.rank_within(8, [], 4) == []
    assert store.rank_within(10**9, ["city"], 4) == []


def test_lead_paragraphs_and_redirects(store):
    assert store.lead_paragraphs([1, 2, 10**9]) == {1: 1, 2: 5}
    (reader,) = store.readers
    assert reader.redirects_from("old", 3) == ["Old Place"] and reader.redirects_from("place 9", 3) == []
