import pytest
from listed_source import ListedSource

from gog_edge.indexing.build import build_pack
from gog_edge.indexing.drafts import ArticleDraft
from gog_edge.retrieval.bm25 import LEAST_IDF, idf
from gog_edge.retrieval.pack import Pack


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
