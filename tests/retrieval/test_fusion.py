import io

import numpy as np
import pytest
from little_world import BLUE, RED, SNAPSHOT, WHITE, bars, flag, png, write_little_pack
from PIL import Image

from gog_edge.errors import RequestError
from gog_edge.indexing.calibration import write_calibration
from gog_edge.indexing.generation import ArticleDraft, ImageDraft, PackWriter
from gog_edge.retrieval.fusion import RRF_K, Ranking, fuse, ranked, ranks_of, weighted
from gog_edge.retrieval.manifest import IMAGE_FEATURES, Calibration
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import MAX_K, MAX_QUERIES, Retriever
from gog_edge.types import Box, ChannelRank, ImageQuery, Region, TextQuery

A, B, C = ("pack", 1), ("pack", 2), ("other", 1)


def look(name, question="", **settings):
    return ImageQuery(flag(name), question, **settings)


def ranks(evidence):
    return {one.channel: one.rank for one in evidence.ranks}


# --- by rank ------------------------------------------------------------------------------------


def test_two_second_places_beat_one_first():
    fused = fuse([Ranking("x", ranked([A, B])), Ranking("y", ranked([C, B]))])
    assert list(fused) == [B, A, C]
    assert fused[B] == pytest.approx(2 / (RRF_K + 2)) and fused[A] == pytest.approx(1 / (RRF_K + 1))


def test_a_channel_counts_as_much_as_its_weight_says():
    first, second = Ranking("x", ranked([A, B])), Ranking("y", ranked([B, A]))
    assert list(fuse([first, *weighted([second], 0.5)])) == [A, B]
    assert list(fuse([first, *weighted([second], 2.0)])) == [B, A]


def test_articles_of_one_score_stay_in_order_and_a_key_counts_where_it_comes_first():
    assert ranked([B, A, B, C]) == {B: 1, A: 2, C: 3}
    assert list(fuse([Ranking("x", {A: 1, B: 1}), Ranking("y", {C: 1})])) == [A, B, C]


def test_the_best_rank_of_each_channel_is_told():
    rankings = [Ranking("x", {A: 3}), Ranking("x", {A: 2}), Ranking("y", {A: 7, B: 1})]
    assert ranks_of(A, rankings) == (ChannelRank("x", 2), ChannelRank("y", 7))
    assert ranks_of(C, rankings) == () and fuse([]) == {}


# --- one result of many queries -------------------------------------------------------------------


def test_crops_and_words_that_agree_come_first(retriever):
    alone = retriever.search_many([look("France"), look("Italy")])
    assert alone.evidence[0].titles == ("France",)
    result = retriever.search_many([look("France"), look("Italy")], [TextQuery("capital of Italy")])
    best = result.evidence[0]
    assert best.titles == ("Italy",) and best.passages[0].text == "The capital of Italy is Rome."
    assert ranks(best) == {"image_to_image": 1, "words": 1}
    assert ranks(result.evidence[1])["image_to_image"] == 1 and result.evidence[1].titles == ("France",)
    scores = [evidence.score for evidence in result.evidence]
    assert scores == sorted(scores, reverse=True) and scores[0] < 1 / RRF_K * 3


def test_every_thing_of_a_fused_result_is_cited(retriever):
    result = retriever.search_many([look("Spain"), look("Chad")], [TextQuery("currency of Guinea")], k=4)
    assert len(result.evidence) == 4
    for evidence in result.evidence:
        passage = evidence.passages[0]
        assert passage.article in evidence.titles and evidence.image.licence == "MIT" and evidence.ranks
        assert passage.span[1] - passage.span[0] == len(passage.text)
    assert all(len(evidence.passages) == 1 for evidence in result.evidence[1:])


def test_what_shares_a_picture_is_one_thing_named_first_by_who_was_asked_for(retriever):
    best = retriever.search_many([look("Norway")], [TextQuery("capital of Svalbard")]).evidence[0]
    assert best.titles == ("Svalbard", "Norway")
    assert best.passages[0].text == "The capital of Svalbard is Longyearbyen."


def test_what_was_found_comes_before_what_rankings_only_agree_about(retriever):
    """In so small a pack every flag stands in both rankings: Germany and others are fairly near to both."""
    result = retriever.search_many([look("Spain"), look("Italy")], [TextQuery("capital of Guinea")], k=4)
    assert {evidence.titles[0] for evidence in result.evidence[:3]} == {"Spain", "Italy", "Guinea"}
    assert all(ranks(evidence)["image_to_image"] > 1 for evidence in result.evidence[3:])


def test_questions_choose_the_paragraphs(retriever):
    best = retriever.search_many([look("Spain", "what is its capital?")]).evidence[0]
    assert best.passages[0].text == "The capital of Spain is Madrid."


def test_a_query_that_found_nothing_has_little_say(tiny_encoder, little_pack):
    result = Retriever(tiny_encoder, [little_pack]).search_many(
        [look("Germany")], [TextQuery("zzz qqq vvv Guinea")]
    )
    assert result.evidence[0].titles == ("Germany",)


def test_the_chance_is_that_of_the_likeliest(retriever):
    known, unknown = look("France"), ImageQuery(bars((120, 0, 200), (0, 255, 255)))
    each = [result.found for result in retriever.search([known, unknown])]
    assert retriever.search_many([unknown, known]).found == pytest.approx(max(each), abs=1e-6)


def test_one_crop_is_what_it_is_alone(retriever):
    for name in ("France", "Norway", "Chad"):
        alone, fused = retriever.search([look(name)])[0], retriever.search_many([look(name)])
        assert [one.titles for one in fused.evidence] == [one.titles for one in alone.evidence]
        assert fused.found == pytest.approx(alone.found, abs=1e-6)


def test_vectors_find_what_their_pictures_find(retriever, tiny_encoder):
    names = ("France", "Italy", "Guinea")
    given = retriever.search_vectors(tiny_encoder.embed_images([flag(name) for name in names]))
    seen = retriever.search_many([look(name) for name in names])
    assert [one.titles for one in given.evidence] == [one.titles for one in seen.evidence]
    assert given.found == pytest.approx(seen.found, abs=1e-5)


def test_nothing_asked_nothing_found(retriever):
    result = retriever.search_many([])
    assert (result.evidence, result.found) == ((), 0.0)
    assert retriever.search_many([], [TextQuery("?")]).evidence == ()


def test_what_is_asked_for_is_bounded(retriever):
    with pytest.raises(RequestError, match=f"at most {MAX_QUERIES}"):
        retriever.search_many([look("Chad", views=(flag("Chad"),) * MAX_QUERIES)])
    with pytest.raises(RequestError, match=f"at most {MAX_QUERIES}"):
        retriever.search_many([], [TextQuery("a")] * (MAX_QUERIES + 1))
    for k in (0, -1, MAX_K + 1):
        with pytest.raises(RequestError, match=f"from 1 to {MAX_K}"):
            retriever.search_many([look("Chad")], k=k)


def test_overlapping_crops_of_one_picture_are_embedded_once(tiny_encoder, little_pack, monkeypatch):
    calls = []
    plain = tiny_encoder.embed_images
    monkeypatch.setattr(tiny_encoder, "embed_images", lambda images: calls.append(len(images)) or plain(images))
    retriever = Retriever(tiny_encoder, [little_pack])
    boxes = [Box(0, 0, 60, 40), Box(1, 0, 60, 40), Box(0, 0, 30, 40)]
    crops = [look("Spain", region=Region("hash", (box,))) for box in boxes]
    first = retriever.search_many(crops)
    assert calls == [2]
    assert retriever.search_many(crops) == first and calls == [2, 0]
    retriever.search([look("Spain", region=Region("another", boxes[:1]))])
    assert calls == [2, 0, 1]


# --- captions -------------------------------------------------------------------------------------


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)


@pytest.fixture
def captioned(tmp_path, tiny_encoder):
    """Things whose pictures say nothing and whose captions say which colours they have."""
    with PackWriter(tmp_path / "pack", name="captioned", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer:
        for name in ("Ruby", "Sapphire", "Chalk", "Emerald", "Coal", "Brick"):
            writer.add_article(ArticleDraft(name, (("", f"{name} is a stone."),), "CC0"))
        captions = {"Ruby": "red", "Sapphire": "blue", "Chalk": "white", "Emerald": "green", "Coal": "black"}
        for n, (name, caption) in enumerate(captions.items()):
            writer.add_image(ImageDraft(png(noise(n)), caption, "CC0", "us", (name,)))
        stream = io.BytesIO()
        Image.fromarray(bars((140, 90, 90))).save(stream, "PNG")
        writer.add_image(ImageDraft(stream.getvalue(), "of clay", "CC0", "us", ("Brick",)))
        writer.commit()
    return tmp_path / "pack"


def calibrated(folder, *, weight, agreement=0.0):
    fit = Calibration(IMAGE_FEATURES, (5.0, 0.0, 0.0, agreement), -2.0, 0.05, 0.05, 0.9, 40, 40, weight)
    write_calibration(folder, image=fit, text=None)


@pytest.mark.parametrize(("weight", "first"), [(0.0, "Brick"), (4.0, "Ruby")])
def test_captions_have_the_say_that_a_pack_has_measured(captioned, tiny_encoder, weight, first):
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
def test_captions_are_searched_only_where_they_count(captioned, tiny_encoder, monkeypatch, agreement, searches):
    calibrated(captioned, weight=0.0, agreement=agreement)
    pack = Pack.open(captioned, tiny_encoder)
    calls = []
    plain = type(pack.captions).search
    monkeypatch.setattr(type(pack.captions), "search", lambda self, *args, **kwargs: (
        calls.append(self is pack.captions), plain(self, *args, **kwargs))[1])
    Retriever(tiny_encoder, [pack]).search([ImageQuery(bars(RED)), ImageQuery(bars(BLUE, WHITE))])
    assert sum(calls) == searches
    pack.close()


def test_words_find_captions_too(captioned, tiny_encoder):
    pack = Pack.open(captioned, tiny_encoder)
    best = Retriever(tiny_encoder, [pack]).search([TextQuery("green")])[0].evidence[0]
    assert best.titles == ("Emerald",) and ranks(best)["text_to_caption"] == 1
    pack.close()


def test_a_pack_of_texts_alone_is_searched_by_words(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "texts", name="texts", snapshot=SNAPSHOT, encoder=None) as writer:
        writer.add_article(ArticleDraft("Spain", (("", "The capital of Spain is Madrid."),), "CC0"))
        writer.commit()
    write_little_pack(tmp_path / "little", tiny_encoder)
    texts, little = (Pack.open(tmp_path / name, tiny_encoder) for name in ("texts", "little"))
    words, picture, colour = Retriever(tiny_encoder, [texts]).search(
        [TextQuery("capital of Spain"), look("Spain"), TextQuery("red")]
    )
    assert words.evidence[0].passages[0].text == "The capital of Spain is Madrid." and words.evidence[0].image is None
    assert (picture.evidence, picture.found) == ((), 0.0) and colour.evidence == ()
    both = Retriever(tiny_encoder, [texts, little]).search_many([look("Spain")], [TextQuery("capital of Spain")])
    assert {passage.pack for evidence in both.evidence[:2] for passage in evidence.passages} == {"texts", "little"}
    texts.close()
    little.close()
