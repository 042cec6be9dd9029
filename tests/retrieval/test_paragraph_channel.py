"""The search of paragraphs by vectors: paraphrases, fusion with words, and packs with and without the channel."""

import logging

import numpy as np
import pytest
from listed_source import ListedSource
from tiny_text_encoder import write_tiny_text_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.retrieval.fusion import RRF_K, DenseRanking, fuse_paragraphs, match_paragraphs
from gog_edge.retrieval.manifest import Calibration
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.retrieval.retriever import Retriever, RetrieverConfig, text_probability
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.types import TextQuery

ARTICLES = {
    "Coins": ("money", "the spain"),
    "Crowds": ("people",),
    "Towns": ("spain of spain", "people of france"),
    "Maps": ("france in spain",),
}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return TextEncoder.open(write_tiny_text_encoder(tmp_path_factory.mktemp("text")), threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_encoder):
    groups = tuple((ArticleRecord(title, tuple(("Facts", text) for text in texts), "CC0"),)
                   for title, texts in ARTICLES.items())
    folder = tmp_path_factory.mktemp("packs") / "texts"
    build_pack(ListedSource(groups), folder, name="texts", encoder=None, workers=1, text_encoder=text_encoder)
    return folder


@pytest.fixture
def pack(folder, text_encoder):
    opened = Pack.open(folder, None, text_encoder=text_encoder)
    yield opened
    opened.close()


def search(encoder, pack, query, text_encoder=None, **config):
    return Retriever(encoder, [pack], RetrieverConfig(**config), text_encoder=text_encoder).search(
        [TextQuery(query, query)])[0]


def test_a_paraphrase_without_a_common_word_is_found(tiny_encoder, folder, pack, text_encoder):
    """'currency' is in no paragraph; its hidden state is that of 'money'."""
    assert pack.store.frequency("currency") == 0
    best = search(tiny_encoder, pack, "currency", text_encoder).evidence[0]
    assert best.titles == ("Coins",) and best.passages[0].text == "money"
    assert [(rank.channel, rank.rank) for rank in best.ranks] == [("text_to_paragraph", 1)]
    plain = Pack.open(folder, None)
    assert search(tiny_encoder, plain, "currency").evidence == ()
    plain.close()


def test_both_channels_are_fused_by_rank(tiny_encoder, pack, text_encoder):
    """Words and vectors rank Crowds before Towns; only vectors return the others."""
    found = search(tiny_encoder, pack, "people", text_encoder).evidence
    ranks = {one.titles[0]: {rank.channel: rank.rank for rank in one.ranks} for one in found}
    assert ranks["Crowds"] == {"words": 1, "text_to_paragraph": 1} and RRF_K == 60
    assert ranks["Towns"] == {"words": 2, "text_to_paragraph": 2}
    assert {tuple(ranks[title].items()) for title in ("Coins", "Maps")} == {(("text_to_paragraph", 3),),
                                                                           (("text_to_paragraph", 4),)}
    np.testing.assert_allclose([one.score for one in found], [2 / 61, 2 / 62, 1 / 63, 1 / 64])


@pytest.mark.parametrize("words, dense, fused", [
    ((1, 2), (2, 1), (1, 2)),  # 1/61 + 1/62 = 0.03252 each: the order of the words is kept
    ((1, 2, 3), (3,), (3, 1, 2)),  # 1/63 + 1/61 = 0.03227 before 1/61 = 0.01639 and 1/62 = 0.01613
    ((1, 2, 3, 4), (4, 3), (4, 3, 1, 2)),  # 1/64 + 1/61 = 0.03202 before 1/63 + 1/62 = 0.03200
    ((), (5, 6), (5, 6)),
    ((7,), (), (7,)),
])  # fmt: skip
def test_paragraphs_of_an_article_are_ordered_by_fused_ranks(words, dense, fused):
    assert fuse_paragraphs(words, dense) == fused


def test_lower_ranks_than_the_depth_do_not_count(tiny_encoder, pack, text_encoder):
    config = RetrieverConfig(text_depth=1, top_k=1)
    found = Retriever(tiny_encoder, [pack], config, text_encoder=text_encoder).search([TextQuery("people", "people")])
    assert [one.titles for one in found[0].evidence] == [("Crowds",)]
    deep = search(tiny_encoder, pack, "people", text_encoder, text_depth=1, top_k=3)  # at least top_k ranks
    assert len(deep.evidence) == 3


def test_articles_are_grouped_with_their_paragraphs(pack, text_encoder):
    (ranking,) = match_paragraphs(pack, text_encoder.embed_queries(["inhabitants"]))
    titles = pack.store.titles(article for article, _ in ranking.articles)
    assert [titles[article] for article, _ in ranking.articles][:2] == ["Crowds", "Towns"]
    towns = dict(ranking.articles)[next(article for article, title in titles.items() if title == "Towns")]
    rows = pack.store.paragraphs(towns)
    assert [rows[paragraph].text for paragraph in towns] == ["people of france", "spain of spain"]
    passages = text_encoder.embed_passages(["Crowds\nFacts\npeople", "Towns\nFacts\npeople of france"])
    first, second = passages @ text_encoder.embed_queries(["people"])[0]
    np.testing.assert_allclose(ranking.features, (first, first - second), atol=2e-3)  # stored as float16


def test_several_queries_are_embedded_at_once(tiny_encoder, pack, text_encoder, monkeypatch):
    calls, plain = [], text_encoder.embed_queries
    monkeypatch.setattr(text_encoder, "embed_queries", lambda texts: (calls.append(len(texts)), plain(texts))[1])
    retriever = Retriever(tiny_encoder, [pack], text_encoder=text_encoder)
    queries = [TextQuery("money", "money"), TextQuery("inhabitants", "")]
    found = [result.evidence[0].titles for result in retriever.search(queries)]
    assert found == [("Coins",), ("Crowds",)] and calls == [2]
    assert retriever.search_many([], queries, 1).evidence[0].titles == ("Coins",)  # its words are known


def test_a_pack_opened_without_its_text_encoder_is_searched_by_words(tiny_encoder, folder, caplog):
    with caplog.at_level(logging.WARNING):
        pack = Pack.open(folder, None)
    assert pack.paragraphs is None and "its text encoder 'tiny' is not given" in caplog.text
    assert len(caplog.records) == 1
    found = search(tiny_encoder, pack, "people").evidence
    assert [one.titles for one in found] == [("Crowds",), ("Towns",)]
    assert {rank.channel for one in found for rank in one.ranks} == {"words"}
    pack.close()


def test_another_text_encoder_is_refused(tmp_path, tiny_encoder, folder, pack):
    other = TextEncoder.open(write_tiny_text_encoder(tmp_path / "other", seed=1))
    with pytest.raises(PackError, match="with the text encoder 'tiny'.*weights_sha256 must be"):
        Pack.open(folder, None, text_encoder=other)
    for given in (other, None):
        with pytest.raises(PackError, match="another text encoder"):
            Retriever(tiny_encoder, [pack], text_encoder=given)


def test_a_text_encoder_that_computes_other_vectors_is_refused(folder, text_encoder, monkeypatch):
    plain = text_encoder.embed_passages
    monkeypatch.setattr(text_encoder, "embed_passages", lambda texts: -plain(texts))
    with pytest.raises(PackError, match="computes other vectors than the pack holds"):
        Pack.open(folder, None, text_encoder=text_encoder)


def test_a_registry_serves_the_channel(tiny_encoder, folder, text_encoder):
    packs = PackRegistry([folder], tiny_encoder, lambda path, encoder: Pack.open(path, encoder,
                         text_encoder=text_encoder), text_encoder=text_encoder)  # fmt: skip
    with packs.lease() as retriever:
        assert retriever.search([TextQuery("currency", "")])[0].evidence[0].titles == ("Coins",)
    packs.close()


def test_packs_with_and_without_the_channel_are_searched_together(tiny_encoder, pack, little_pack, text_encoder):
    retriever = Retriever(tiny_encoder, [pack, little_pack], text_encoder=text_encoder)
    paraphrase, words = retriever.search([TextQuery("currency", ""), TextQuery("capital of Spain", "")])
    assert ("Coins",) in [one.titles for one in paraphrase.evidence]
    assert ("Spain",) in [one.titles for one in words.evidence]


def test_a_calibration_with_missing_features_is_not_used(pack, monkeypatch):
    """Then the probability is the known coverage, coverage * (1 - unknown)."""
    calibration = Calibration(("x",) * 6, (0.0,) * 6, 0.0, 0.05, 0.0, 1.0, 20, 20)
    object.__setattr__(pack, "manifest", pack.manifest.with_calibration(None, calibration))
    assert text_probability(pack, (0.8, 0.25, 0.0, 0.0)) == pytest.approx(0.6)
    assert text_probability(pack, (0.8, 0.25, 0.0, 0.0, 0.9, 0.1)) == pytest.approx(0.5)


def test_no_query_has_no_match(pack):
    assert match_paragraphs(pack, np.empty((0, 16), np.float32)) == []
    assert DenseRanking().articles == ()
