"""Words that stand in very many paragraphs: what is searched must not grow with the store."""

import pytest

from gog_edge.indexing.sources.base import ArticleDraft, RedirectDraft
from gog_edge.indexing.store_writer import StoreWriter
from gog_edge.retrieval.text.store import AFFORDABLE_PARAGRAPHS, Store

ARTICLES = AFFORDABLE_PARAGRAPHS // 4 + 100
SECTIONS = ("", "Capital", "River", "Economy")


def article(n):
    """Four paragraphs that all say 'city', half of which say 'capital'."""
    paragraphs = tuple((section, f"This city has a {'capital' if n % 2 else 'mill'} and a number, {n}, of its own.")
                       for section in SECTIONS)  # fmt: skip
    return ArticleDraft(f"Place {n}", paragraphs, "CC0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    writer = StoreWriter(folder / "words.sqlite")
    with writer.chunk(0):
        for n in range(ARTICLES):
            writer.add_article(article(n))
        writer.add_redirect(RedirectDraft("Old Place", "Place 7"))
    opened = Store.open(folder, [writer.finish("words.sqlite")])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def mostly_gone(store):
    """The same, of which only the last article is still there."""
    return Store(store._segments, range(1, ARTICLES))


def test_a_word_that_stands_everywhere_brings_paragraphs_without_being_ranked(store):
    assert store.frequency("city") == 4 * ARTICLES > AFFORDABLE_PARAGRAPHS
    matches = store.rank(["city"], 8)
    assert len(matches) == 8 and len({match.score for match in matches}) == 1


def test_a_word_that_stands_everywhere_finds_what_is_left(mostly_gone):
    for terms in (["city"], ["city", "place"]):
        matches = mostly_gone.rank(terms, 8)
        assert {match.article for match in matches} == {ARTICLES} and len(matches) == len(SECTIONS)


def test_of_common_words_paragraphs_with_all_of_them_come(store):
    matches = store.rank(["city", "place"], 8)
    assert len(matches) == 8
    texts = store.paragraphs([match.paragraph for match in matches]).values()
    assert all("city" in row.text and "Place" in row.title for row in texts)


def test_a_rare_word_is_ranked_and_common_ones_beside_it_are_left_out(store):
    matches = store.rank(["city", "4321"], 8)
    assert {row.title for row in store.paragraphs([match.paragraph for match in matches]).values()} == {"Place 4321"}


def test_within_an_article_the_section_counts_and_what_nobody_says_does_not(store):
    found = {match.paragraph: match.score for match in store.rank(["capital", "city", "unheard"], 4, 8)}
    rows = store.paragraphs(found)
    assert len(found) == 4 and rows[next(iter(found))].section == "Capital"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(store.rank(["city"], 2, 8)) == 2
    assert store.rank(["unheard"], 4, 8) == [] == store.rank([], 4, 8) == store.rank(["city"], 4, 10**9)


def test_leads_and_other_names(store):
    assert store.leads([1, 2, 10**9]) == {1: 1, 2: 5}
    (reader,) = store.readers
    assert reader.redirects("old", 3) == ["Old Place"] and reader.redirects("place 9", 3) == []
