import io

import numpy as np
import pytest
from little_world import BLUE, RED, SNAPSHOT, WHITE, bars, flag, png, write_little_pack
from PIL import Image

from gog_edge.errors import RequestError
from gog_edge.indexing.calibration import write_calibration
from gog_edge.indexing.generation import PackWriter
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.retrieval.fusion import Ranking, channel_ranks, fuse, rank_keys, scale_weights
from gog_edge.retrieval.manifest import IMAGE_FEATURES, Calibration
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import MAX_K, MAX_QUERIES, Retriever
from gog_edge.types import Box, ChannelRank, ImageQuery, Region, TextQuery

A, B, C = ("pack", 1), ("pack", 2), ("other", 1)


def flag_query(name, question="", **settings):
    return ImageQuery(flag(name), question, **settings)


def ranks(evidence):
    return {one.channel: one.rank for one in evidence.ranks}


# --- reciprocal rank fusion ---------------------------------------------------------------------


def test_two_second_ranks_beat_one_first_rank():
    fused = fuse([Ranking("x", rank_keys([A, B])), Ranking("y", rank_keys([C, B]))])
    assert list(fused) == [B, A, C]
    assert fused[B] == pytest.approx(0.0322580645, abs=1e-10)  # 1/62 + 1/62
    assert fused[A] == fused[C] == pytest.approx(0.0163934426, abs=1e-10)  # 1/61


def test_scores_are_weighted_sums_of_reciprocal_ranks():
    first, second = Ranking("x", rank_keys([A, B])), Ranking("y", rank_keys([B, A]))
    fused = fuse([first, *scale_weights([second], 0.5)])
    assert list(fused) == [A, B]
    assert fused[A] == pytest.approx(0.0244579588, abs=1e-10)  # 1/61 + 0.5/62
    assert fused[B] == pytest.approx(0.0243257536, abs=1e-10)  # 1/62 + 0.5/61
    assert list(fuse([first, *scale_weights([second], 2.0)])) == [B, A]
    assert fuse([first], 1) == {A: 0.5, B: pytest.approx(0.3333333333)}


def test_equal_scores_keep_their_order_and_a_repeated_key_has_its_first_rank():
    assert rank_keys([B, A, B, C]) == {B: 1, A: 2, C: 3}
    assert list(fuse([Ranking("x", {A: 1, B: 1}), Ranking("y", {C: 1})])) == [A, B, C]


def test_the_best_rank_of_each_channel_is_reported():
    rankings = [Ranking("x", {A: 3}), Ranking("x", {A: 2}), Ranking("y", {A: 7, B: 1})]
    assert channel_ranks(A, rankings) == (ChannelRank("x", 2), ChannelRank("y", 7))
    assert channel_ranks(C, rankings) == () and fuse([]) == {}


# --- one result for many queries ----------------------------------------------------------------


def test_articles_that_crops_and_words_agree_on_come_first(retriever):
    pictures_only = retriever.search_many([flag_query("France"), flag_query("Italy")])
    assert pictures_only.evidence[0].titles == ("France",)
    result = retriever.search_many([flag_query("France"), flag_query("Italy")], [TextQuery("capital of Italy")])
    best = result.evidence[0]
    assert best.titles == ("Italy",) and best.passages[0].text == "The capital of Italy is Rome."
    assert ranks(best) == {"image_to_image": 1, "words": 1}
    assert ranks(result.evidence[1])["image_to_image"] == 1 and result.evidence[1].titles == ("France",)
    scores = [evidence.score for evidence in result.evidence]
    assert scores == sorted(scores, reverse=True)
    # Italy has rank 1 by words, 1 by its own picture and 3 by that of France; all three queries weigh about 1.
    assert scores[0] == pytest.approx(0.048657, abs=5e-6)  # 1/61 + 0.99991/61 + 0.99993/63


def test_every_evidence_of_a_fused_result_can_be_cited(retriever):
    result = retriever.search_many([flag_query("Spain"), flag_query("Chad")], [TextQuery("currency of Guinea")], k=4)
    assert len(result.evidence) == 4
    for evidence in result.evidence:
        passage = evidence.passages[0]
        assert passage.article in evidence.titles and evidence.image.licence == "MIT" and evidence.ranks
        assert passage.span[1] - passage.span[0] == len(passage.text)
    assert all(len(evidence.passages) == 1 for evidence in result.evidence[1:])


def test_articles_that_share_an_image_are_one_evidence_with_the_asked_one_first(retriever):
    best = retriever.search_many([flag_query("Norway")], [TextQuery("capital of Svalbard")]).evidence[0]
    assert best.titles == ("Svalbard", "Norway")
    assert best.passages[0].text == "The capital of Svalbard is Longyearbyen."


def test_found_articles_precede_articles_that_rankings_merely_agree_on(retriever):
    """In such a small pack every flag is in both rankings: Germany and others are fairly near to both pictures."""
    result = retriever.search_many([flag_query("Spain"), flag_query("Italy")], [TextQuery("capital of Guinea")], k=4)
    assert {evidence.titles[0] for evidence in result.evidence[:3]} == {"Spain", "Italy", "Guinea"}
    assert all(ranks(evidence)["image_to_image"] > 1 for evidence in result.evidence[3:])


def test_questions_choose_the_paragraphs(retriever):
    best = retriever.search_many([flag_query("Spain", "what is its capital?")]).evidence[0]
    assert best.passages[0].text == "The capital of Spain is Madrid."


def test_a_query_that_found_nothing_has_little_weight(tiny_encoder, little_pack):
    result = Retriever(tiny_encoder, [little_pack]).search_many(
        [flag_query("Germany")], [TextQuery("zzz qqq vvv Guinea")]
    )
    assert result.evidence[0].titles == ("Germany",)


def test_the_probability_is_the_highest_of_all_queries(retriever):
    known, unknown = flag_query("France"), ImageQuery(bars((120, 0, 200), (0, 255, 255)))
    each = [result.found for result in retriever.search([known, unknown])]
    assert retriever.search_many([unknown, known]).found == pytest.approx(max(each), abs=1e-6)


def test_the_fused_result_of_one_crop_is_its_own_result(retriever):
    for name in ("France", "Norway", "Chad"):
        single, fused = retriever.search([flag_query(name)])[0], retriever.search_many([flag_query(name)])
        assert [one.titles for one in fused.evidence] == [one.titles for one in single.evidence]
        assert fused.found == pytest.approx(single.found, abs=1e-6)


def test_vectors_give_the_result_of_their_pictures(retriever, tiny_encoder):
    names = ("France", "Italy", "Guinea")
    given = retriever.search_vectors(tiny_encoder.embed_images([flag(name) for name in names]))
    seen = retriever.search_many([flag_query(name) for name in names])
    assert [one.titles for one in given.evidence] == [one.titles for one in seen.evidence]
    assert given.found == pytest.approx(seen.found, abs=1e-5)


def test_no_queries_give_no_evidence(retriever):
    result = retriever.search_many([])
    assert (result.evidence, result.found) == ((), 0.0)
    assert retriever.search_many([], [TextQuery("?")]).evidence == ()


def test_the_size_of_a_request_is_limited(retriever):
    with pytest.raises(RequestError, match=f"at most {MAX_QUERIES}"):
        retriever.search_many([flag_query("Chad", views=(flag("Chad"),) * MAX_QUERIES)])
    with pytest.raises(RequestError, match=f"at most {MAX_QUERIES}"):
        retriever.search_many([], [TextQuery("a")] * (MAX_QUERIES + 1))
    for k in (0, -1, MAX_K + 1):
        with pytest.raises(RequestError, match=f"from 1 to {MAX_K}"):
            retriever.search_many([flag_query("Chad")], k=k)


def test_overlapping_crops_of_one_picture_are_embedded_once(tiny_encoder, little_pack, monkeypatch):
    calls = []
    plain = tiny_encoder.embed_images
    monkeypatch.setattr(tiny_encoder, "embed_images", lambda images: calls.append(len(images)) or plain(images))
    retriever = Retriever(tiny_encoder, [little_pack])
    boxes = [Box(0, 0, 60, 40), Box(1, 0, 60, 40), Box(0, 0, 30, 40)]
    crops = [flag_query("Spain", region=Region("hash", (box,))) for box in boxes]
    first = retriever.search_many(crops)
    assert calls == [2]
    assert retriever.search_many(crops) == first and calls == [2, 0]
    retriever.search([flag_query("Spain", region=Region("another", boxes[:1]))])
    assert calls == [2, 0, 1]


# --- captions -------------------------------------------------------------------------------------


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)


@pytest.fixture
def captioned(tmp_path, tiny_encoder):
    """A pack of stones with pictures of noise and captions that name their colour."""
    with PackWriter(tmp_path / "pack", name="captioned", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer:
        for name in ("Ruby", "Sapphire", "Chalk", "Emerald", "Coal", "Brick"):
            writer.add_article(ArticleRecord(name, (("", f"{name} is a stone."),), "CC0"))
        captions = {"Ruby": "red", "Sapphire": "blue", "Chalk": "white", "Emerald": "green", "Coal": "black"}
        for n, (name, caption) in enumerate(captions.items()):
            writer.add_image(ImageRecord(png(noise(n)), caption, "CC0", "us", (name,)))
        stream = io.BytesIO()
        Image.fromarray(bars((140, 90, 90))).save(stream, "PNG")
        writer.add_image(ImageRecord(stream.getvalue(), "of clay", "CC0", "us", ("Brick",)))
        writer.commit()
    return tmp_path / "pack"


def calibrated(folder, *, weight, agreement=0.0):
    fit = Calibration(IMAGE_FEATURES, (5.0, 0.0, 0.0, agreement), -2.0, 0.05, 0.05, 0.9, 40, 40, weight)
    write_calibration(folder, image=fit, text=None)


@pytest.mark.parametrize(("weight", "first"), [(0.0, "Brick"), (4.0, "Ruby")])
def test_captions_have_the_weight_of_the_calibration(captioned, tiny_encoder, weight, first):
    calibrated(captioned, weight=weight)
    pack = Pack.open(captioned, tiny_encoder)
    red = ImageQuery(bars(RED))
    result = Retriever(tiny_encoder, [pack]).search([red])[0]
    assert result.evidence[0].titles == (first,)
    assert ("image_to_caption" in ranks(result.evidence[0])) == (weight > 0)
    scores = [evidence.score for evidence in result.evidence]
    assert scores == sorted(scores, reverse=True)
    pack.close()


@pytest.mark.parametrize(("agreement", "searches"), [(0.0, 0), (1.0, 1)])
def test_captions_are_searched_only_if_needed(captioned, tiny_encoder, monkeypatch, agreement, searches):
    calibrated(captioned, weight=0.0, agreement=agreement)
    pack = Pack.open(captioned, tiny_encoder)
    calls = []
    plain = type(pack.captions).search
    monkeypatch.setattr(type(pack.captions), "search", lambda self, *args, **kwargs: (
        calls.append(self is pack.captions), plain(self, *args, **kwargs))[1])
    Retriever(tiny_encoder, [pack]).search([ImageQuery(bars(RED)), ImageQuery(bars(BLUE, WHITE))])
    assert sum(calls) == searches
    pack.close()


def test_a_text_query_finds_captions_too(captioned, tiny_encoder):
    pack = Pack.open(captioned, tiny_encoder)
    best = Retriever(tiny_encoder, [pack]).search([TextQuery("green")])[0].evidence[0]
    assert best.titles == ("Emerald",) and ranks(best)["text_to_caption"] == 1
    pack.close()


def test_a_pack_without_images_is_searched_by_words(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "texts", name="texts", snapshot=SNAPSHOT, encoder=None) as writer:
        writer.add_article(ArticleRecord("Spain", (("", "The capital of Spain is Madrid."),), "CC0"))
        writer.commit()
    write_little_pack(tmp_path / "little", tiny_encoder)
    texts, little = (Pack.open(tmp_path / name, tiny_encoder) for name in ("texts", "little"))
    words, picture, colour = Retriever(tiny_encoder, [texts]).search(
        [TextQuery("capital of Spain"), flag_query("Spain"), TextQuery("red")]
    )
    assert words.evidence[0].passages[0].text == "The capital of Spain is Madrid." and words.evidence[0].image is None
    assert (picture.evidence, picture.found) == ((), 0.0) and colour.evidence == ()
    both = Retriever(tiny_encoder, [texts, little]).search_many([flag_query("Spain")], [TextQuery("capital of Spain")])
    assert {passage.pack for evidence in both.evidence[:2] for passage in evidence.passages} == {"texts", "little"}
    texts.close()
    little.close()
