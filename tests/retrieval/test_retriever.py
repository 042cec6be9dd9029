from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from little_world import GREEN, RED, YELLOW, bars, flag, write_little_pack
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import IMAGE_FEATURES
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever, RetrieverConfig
from gog_edge.types import ChannelRank, ImageQuery, TextQuery


def search_text(retriever, text):
    return retriever.search([TextQuery(text)])[0]


def search_picture(retriever, pixels, question=""):
    return retriever.search([ImageQuery(pixels, question)])[0]


def titles(result):
    return [evidence.titles for evidence in result.evidence]


# --- pictures -------------------------------------------------------------------------------------


def test_a_flag_finds_its_country_and_the_paragraph_that_answers(retriever):
    result = search_picture(retriever, flag("France"), "what is its currency?")
    best = result.evidence[0]
    assert best.titles == ("France",) and best.score == pytest.approx(1, abs=1e-4)
    assert best.passages[0].text == "The currency of France is the Euro."
    assert (best.passages[0].article, best.passages[0].section) == ("France", "Currency, money")
    assert (best.image.caption, best.image.licence, best.image.attribution) == ("Flag of France", "MIT", "us")
    assert all(evidence.passages == () for evidence in result.evidence[1:])
    scores = [evidence.score for evidence in result.evidence]
    assert scores == sorted(scores, reverse=True)


def test_without_a_matching_paragraph_the_lead_is_returned(retriever):
    for question in ("", "zzz qqq", '"*('):
        passages = search_picture(retriever, flag("Spain"), question).evidence[0].passages
        assert [passage.text for passage in passages] == ["Spain lies in Europe."]


def test_a_shared_flag_names_every_country_with_a_passage_of_each(retriever):
    best = search_picture(retriever, flag("Norway"), "what is the capital?").evidence[0]
    assert best.titles == ("Norway", "Svalbard")
    assert [passage.text for passage in best.passages][:2] == [
        "The capital of Norway is Oslo.",
        "The capital of Svalbard is Longyearbyen.",
    ]


def test_near_duplicate_flags_are_one_evidence(retriever):
    result = search_picture(retriever, flag("Romania"))
    assert sorted(result.evidence[0].titles) == ["Chad", "Romania"]
    named = [title for evidence in result.evidence for title in evidence.titles]
    assert len(named) == len(set(named))


def test_the_duplicate_threshold_can_be_set(tiny_encoder, little_pack):
    strict = Retriever(tiny_encoder, [little_pack], RetrieverConfig(duplicate_cosine=0.9999999))
    assert search_picture(strict, flag("Chad")).evidence[0].titles == ("Chad",)


def test_limits_are_respected(tiny_encoder, little_pack):
    config = RetrieverConfig(top_k=2, passages_per_article=1)
    small = Retriever(tiny_encoder, [little_pack], config)
    result = search_picture(small, flag("Norway"), "capital")
    assert len(result.evidence) == 2 and len(result.evidence[0].passages) == 1
    assert all(len(evidence.passages) <= 1 for evidence in search_text(small, "capital of Norway").evidence)
    no_passages = Retriever(tiny_encoder, [little_pack], RetrieverConfig(passages_per_article=0))
    assert search_picture(no_passages, flag("Norway"), "capital").evidence[0].passages == ()


def test_an_unknown_picture_has_a_lower_probability(retriever):
    known, unknown = flag("Italy"), bars((120, 0, 200), (0, 255, 255))
    assert search_picture(retriever, known).found > search_picture(retriever, unknown).found


# --- words ----------------------------------------------------------------------------------------


def test_the_paragraph_that_answers_comes_first(retriever):
    result = search_text(retriever, "capital of Spain")
    assert result.evidence[0].titles == ("Spain",)
    assert result.evidence[0].passages[0].text == "The capital of Spain is Madrid."
    assert 2 <= len(result.evidence[0].passages) <= 3
    assert all(len(evidence.passages) == 1 for evidence in result.evidence[1:])
    assert result.evidence[0].image.caption == "Flag of Spain"


def test_one_query_may_return_many_articles(retriever):
    result = search_text(retriever, "countries that use the Euro")
    euro = {passage.text for evidence in result.evidence for passage in evidence.passages[:1]}
    assert len(euro) >= 4 and all("Euro" in text for text in euro)


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("Which country has the capital Lisbon?", "Portugal"),
        ("PT", "Portugal"),
        ("capital of PT", "Portugal"),
        ("What money does the Portuguese Republic use?", "Portugal"),
        ("tchad", "Chad"),
        ("Guinea", "Guinea"),
        ("Papua New Guinea", "Papua New Guinea"),
        ("currency of Papua New Guinea", "Papua New Guinea"),
        ("SPAIN'S CURRENCIES", "Spain"),
        ("NDjamena N'Djamena", "Chad"),
        ("Which country borders Spain and has the capital Lisbon?", "Portugal"),
    ],
)
def test_names_redirects_and_facts_lead_to_the_article(retriever, query, title):
    assert search_text(retriever, query).evidence[0].titles == (title,)


def test_a_code_matches_only_in_capitals(retriever):
    assert search_text(retriever, "IT currency").evidence[0].titles == ("Italy",)
    assert search_text(retriever, "is it in Africa").evidence[0].titles != ("Italy",)


def test_a_query_of_unknown_words_searches_images(retriever):
    assert search_text(retriever, "blue").evidence[0].image is not None
    assert any("Norway" in group for group in titles(search_text(retriever, "red red blue")))


@pytest.mark.parametrize(
    "text", ["", "?", '"', 'a" OR "b', "NEAR(", "x\x00y", "🇪🇸", "a" * 10_000, "b " * 5_000, "*", "\ud83c"]
)
def test_hostile_text_is_plain_text(retriever, text):
    result = search_text(retriever, text)
    assert 0 <= result.found <= 1
    search_picture(retriever, flag("Spain"), text)


def test_a_query_without_words_has_no_evidence(retriever):
    assert search_text(retriever, "?! ...").evidence == ()


# --- several at once ------------------------------------------------------------------------------


def test_the_results_of_a_batch_equal_those_of_single_queries(retriever):
    queries = [
        TextQuery("capital of Spain"),
        ImageQuery(flag("France"), "currency"),
        TextQuery("blue"),
        ImageQuery(flag("Chad")[::2, ::2]),
        TextQuery("?"),
    ]
    assert retriever.search([]) == ()
    for got, single in zip(retriever.search(queries), [retriever.search([query])[0] for query in queries], strict=True):
        assert titles(got) == titles(single)
        assert [evidence.passages for evidence in got.evidence] == [evidence.passages for evidence in single.evidence]
        assert got.found == pytest.approx(single.found, abs=1e-5)


def test_all_pictures_of_a_call_are_embedded_in_one_batch(tiny_encoder, little_pack, monkeypatch):
    calls = []
    plain = tiny_encoder.embed_images
    monkeypatch.setattr(tiny_encoder, "embed_images", lambda images: calls.append(len(images)) or plain(images))
    Retriever(tiny_encoder, [little_pack]).search([ImageQuery(flag(name)) for name in ("Spain", "Chad", "Italy")])
    assert calls == [3]


def test_many_threads_may_search(retriever):
    queries = [ImageQuery(flag("France"), "currency"), TextQuery("capital of Italy"), TextQuery("Euro")] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda query: retriever.search([query])[0], queries))
    assert [titles(result) for result in results[3:6]] == [titles(result) for result in results[:3]]
    assert results[0].evidence[0].titles == ("France",) and results[1].evidence[0].titles == ("Italy",)


# --- several packs --------------------------------------------------------------------------------


def test_several_packs_are_searched_and_duplicates_are_one_evidence(tiny_encoder, little_pack, tmp_path):
    write_little_pack(tmp_path / "again", tiny_encoder, name="again")
    again = Pack.open(tmp_path / "again", tiny_encoder)
    both = Retriever(tiny_encoder, [little_pack, again])
    result = search_picture(both, flag("Norway"), "capital")
    assert titles(result).count(("Norway", "Svalbard")) == 1
    words = search_text(both, "capital of Spain")
    assert [evidence.passages[0].pack for evidence in words.evidence[:2]] == ["little", "again"]
    assert titles(words)[:2] == [("Spain",), ("Spain",)]
    again.close()


def test_packs_must_differ_in_name_and_share_the_encoder(tiny_encoder, little_pack, tmp_path):
    with pytest.raises(PackError, match="same name"):
        Retriever(tiny_encoder, [little_pack, little_pack])
    other = Encoder.open(write_tiny_encoder(tmp_path / "other", seed=2), threads=1)
    with pytest.raises(PackError, match="another encoder"):
        Retriever(other, [little_pack])


def test_without_packs_there_is_no_evidence(tiny_encoder):
    empty = Retriever(tiny_encoder, [])
    assert [result.evidence for result in empty.search([TextQuery("Spain"), ImageQuery(flag("Spain"))])] == [(), ()]


def test_features_distinguish_present_from_absent_pictures(retriever):
    known, unknown = retriever.match_images([ImageQuery(flag("Guinea")), ImageQuery(bars(RED, YELLOW, GREEN, GREEN))])
    assert len(known.features) == len(IMAGE_FEATURES) and np.isfinite(known.features).all()
    assert known.features[0] > unknown.features[0]


def test_ranks_name_the_channels_that_found_an_article(retriever):
    by_picture, by_text = search_picture(retriever, flag("France")), search_text(retriever, "capital of Spain")
    assert [one.ranks for one in by_picture.evidence] == [
        (ChannelRank("image_to_image", n),) for n in range(1, len(by_picture.evidence) + 1)
    ]
    assert by_text.evidence[0].ranks == (ChannelRank("words", 1),)
    unclear = {one.channel for one in search_text(retriever, "blue").evidence[0].ranks}
    assert unclear == {"text_to_image", "text_to_caption"}
