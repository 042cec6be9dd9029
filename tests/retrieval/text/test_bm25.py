import pytest
from listed_source import ListedSource

from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.base import ArticleDraft
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.store import LEAST_IDF, idf


def prose(number):
    return ArticleDraft(f"Village {number}", (("", f"Village {number} lies by the river and has a mill."),), "CC0")


NEWS = ArticleDraft("Mill", (("", "A mill grinds corn; a windmill is turned by wind."),), "CC0")


def test_a_word_in_half_the_paragraphs_tells_next_to_nothing():
    assert idf(100, 60) == LEAST_IDF and idf(100, 1) > idf(100, 10) > idf(100, 40) > LEAST_IDF


@pytest.mark.parametrize("split", [False, True])
def test_a_paragraph_ranks_alike_in_a_segment_of_its_own(tmp_path, tiny_encoder, split):
    """In its own small segment every word of it is common; it must be valued as it is in the whole pack."""
    base = tuple((prose(number),) for number in range(60))
    first = base if split else (*base, (NEWS,))
    build_pack(ListedSource(first), tmp_path / "pack", name="mills", encoder=None, workers=1)
    if split:
        build_pack(ListedSource(((NEWS,),)), tmp_path / "pack", name="mills", encoder=None, workers=1, add=True)
    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    matches = pack.store.rank(("corn", "river"), 5)
    assert pack.store.titles([matches[0].article]) == {matches[0].article: "Mill"}
    assert matches[0].score > 2 * matches[1].score
    pack.close()


def pebble(number):
    """Of four words: many paragraphs say one of them three times, one says each once."""
    words = ("granite", "basalt", "marble", "slate")
    said = " ".join(words) if number == 150 else " ".join([words[number % 4]] * 3)
    return (ArticleDraft(f"Pebble {number}", (("", f"{said} lies here."),), "CC0"),)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_paragraph_with_all_words_is_found_beside_a_larger_segment(tmp_path, tiny_encoder, limit):
    """It is the best for no single word, in a segment nearly as large as the other."""
    base = tuple((prose(number),) for number in range(240))
    pebbles = tuple(pebble(number) for number in range(200))
    build_pack(ListedSource((*base, *pebbles), 50), tmp_path / "one", name="stones", encoder=None, workers=1)
    build_pack(ListedSource(base, 50), tmp_path / "two", name="stones", encoder=None, workers=1)
    build_pack(ListedSource(pebbles, 50), tmp_path / "two", name="stones", encoder=None, workers=1, add=True)
    one, two = (Pack.open(tmp_path / name, tiny_encoder) for name in ("one", "two"))
    assert len(two.store.readers) == 2
    found, wanted = ([(pack.store.titles([match.article])[match.article]) for match in
                      pack.store.rank(("granite", "basalt", "marble", "slate"), limit)] for pack in (two, one))
    assert found == wanted and found[0] == "Pebble 150"
    one.close()
    two.close()
