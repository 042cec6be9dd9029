"""Search packs with pictures and texts, and return the best articles as evidence that can be cited."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from gog_edge.config import GazeConfig
from gog_edge.errors import PackError, RequestError
from gog_edge.retrieval.encoder import CropVectorCache, Encoder, query_crops
from gog_edge.retrieval.fusion import (
    CANDIDATES,
    IMAGE_TO_CAPTION,
    IMAGE_TO_IMAGE,
    RANKING_DEPTH,
    RRF_K,
    TEXT_TO_PARAGRAPH,
    WORDS,
    ArticleKey,
    Candidate,
    DenseRanking,
    ImageMatches,
    MatchGroup,
    Ranking,
    VectorChannels,
    WordRanking,
    channel_ranks,
    fuse,
    fuse_paragraphs,
    match_paragraphs,
    rank_articles,
    rank_keys,
    scale_weights,
)
from gog_edge.retrieval.manifest import FOUND_THRESHOLD, Calibration
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.segment import ParagraphRow
from gog_edge.retrieval.text.store import ImageRow
from gog_edge.retrieval.text.tokens import search_terms, tokenize
from gog_edge.types import ChannelRank, Evidence, ImageQuery, ImageRef, Passage, Query, SearchResult, TextQuery, Vectors

if TYPE_CHECKING:
    from gog_edge.retrieval.text.encoder import TextEncoder

MAX_QUERIES = 64  # pictures, views included, and texts of one fused search
MAX_K = 50  # evidence of one fused search
MIN_WEIGHT = 0.01  # in a fused search, of a query that most likely found nothing
_GAZE = GazeConfig()
_T = TypeVar("_T")
_ParagraphKey: TypeAlias = tuple[str, int]  # pack name, paragraph id


@dataclass(frozen=True, slots=True)
class RetrieverConfig:
    """How much evidence is returned and how channels are fused."""

    top_k: int = 5  # evidence per result
    passages_per_article: int = 3  # of the first evidence
    duplicate_cosine: float | None = None  # cosine from which images are duplicates; None: the value of each pack
    rrf_k: int = RRF_K
    # Ranks of words and of paragraph vectors that are fused if a pack has such vectors, or `top_k` if that is larger.
    # Deeper rankings let an article that both channels rank low precede one that a single channel ranks first.
    text_depth: int = 10
    min_word_coverage: float = 0.5  # a text query below it searches images and captions too
    cached_crops: int = 4_096  # crop vectors in the cache, a few megabytes
    same_iou: float = _GAZE.same_iou  # crops that overlap this much share a vector


@dataclass(frozen=True, slots=True, eq=False)
class _QueryResult:
    """What the channels returned for one query."""

    question: str
    rankings: tuple[Ranking, ...]
    probability: float  # that the subject of the query is in the packs
    found: frozenset[ArticleKey]  # articles that count as found: the first ones, if the probability is high enough
    groups: tuple[MatchGroup, ...] = ()
    paragraphs: Mapping[ArticleKey, Sequence[int]] = field(default_factory=dict)  # matches of the text channels


class Retriever:
    """Searches packs of one encoder; may be used from several threads."""

    def __init__(self, encoder: Encoder, packs: Sequence[Pack], config: RetrieverConfig | None = None, *,
                 text_encoder: TextEncoder | None = None) -> None:
        """Combine open packs.

        Args:
            encoder: The encoder of all packs.
            packs: Open packs.
            config: The settings.
            text_encoder: The text encoder of the packs whose paragraphs are searched by vectors too.

        Raises:
            PackError: Two packs have the same name, or a pack was built with another encoder.
        """
        self.encoder = encoder
        self.config = config or RetrieverConfig()
        self.packs: dict[str, Pack] = {}
        for pack in packs:
            if pack.name in self.packs:
                raise PackError(f"two packs have the same name '{pack.name}', so that citations would be ambiguous; "
                                "open only one of them")
            if pack.manifest.encoder not in (None, encoder.fingerprint):
                raise PackError(f"pack '{pack.name}' was built with another encoder; build it again with this one")
            if pack.paragraphs is not None and (text_encoder is None or
                                                pack.manifest.text_encoder != text_encoder.fingerprint):
                raise PackError(f"pack '{pack.name}' was opened with another text encoder; give the same one")
            self.packs[pack.name] = pack
        self._channels = VectorChannels(packs, candidates=max(CANDIDATES, 4 * self.config.top_k),
                                        duplicate_cosine=self.config.duplicate_cosine)
        has_paragraphs = any(pack.paragraphs is not None for pack in self.packs.values())
        self.text_encoder = text_encoder if has_paragraphs else None
        self._crops = CropVectorCache(self.config.cached_crops, self.config.same_iou)

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """Return one result per query, in order. Pictures are embedded in one batch, and so are texts."""
        return tuple(self._single(result) for result in self._run(queries, self.config.top_k))

    def search_many(self, crops: Sequence[ImageQuery], texts: Sequence[TextQuery] = (), k: int = 5) -> SearchResult:
        """Return one result for several queries, fused by rank.

        Articles that a query found, by its calibrated probability, precede the others; in each part, those that several
        queries agree on come first. A query's weight is its probability. `found` of the result is the highest
        probability: that the subject of at least one query is in the packs. The calibrated rate of false accepts holds
        per query; for n absent subjects the rate is up to n times as high.

        Args:
            crops: Pictures or parts of them. Overlapping regions of one picture are embedded once.
            texts: Text queries.
            k: Maximum number of evidence, 1 to MAX_K.

        Raises:
            RequestError: More than MAX_QUERIES pictures (views included) or texts, or `k` out of range.
        """
        pictures = sum(1 + len(crop.views) for crop in crops)
        if pictures > MAX_QUERIES or len(texts) > MAX_QUERIES:
            raise RequestError(f"a search takes at most {MAX_QUERIES} crops (views included) and {MAX_QUERIES} texts, "
                               f"got {pictures} and {len(texts)}")
        if not 1 <= k <= MAX_K:
            raise RequestError(f"'k' must be from 1 to {MAX_K}, got {k}")
        return self._fused(self._run([*crops, *texts], k), k)

    def search_vectors(self, crops: Vectors, k: int = 5) -> SearchResult:
        """Return the result of `search_many` for pictures that are embedded already: [n, dim]."""
        return self._fused(self._search_images([vector[None] for vector in crops], [""] * len(crops), k), k)

    def match_images(self, queries: Sequence[ImageQuery]) -> list[ImageMatches]:
        """Return the images and captions that match each picture, which a calibration is fitted to."""
        return self._channels.match_images(self._embed(queries), captions=lambda _: True)

    # --- one query ----------------------------------------------------------------------------

    def _run(self, queries: Sequence[Query], k: int) -> list[_QueryResult]:
        images = [(n, query) for n, query in enumerate(queries) if isinstance(query, ImageQuery)]
        texts = [(n, query) for n, query in enumerate(queries) if isinstance(query, TextQuery)]
        views = self._embed([query for _, query in images])
        by_image = self._search_images(views, [query.question for _, query in images], k)
        results = dict(zip([n for n, _ in images], by_image, strict=True))
        results |= zip([n for n, _ in texts], self._search_texts([query for _, query in texts], k), strict=True)
        return [results[n] for n in range(len(queries))]

    def _embed(self, queries: Sequence[ImageQuery]) -> list[Vectors]:
        """Return the vectors [views, dim] of each query: its pixels and its views."""
        crops = [query_crops(query) for query in queries]
        vectors = self._crops.embed([crop for own in crops for crop in own], self.encoder.embed_images)
        return np.split(vectors, np.cumsum([len(own) for own in crops])[:-1]) if crops else []

    def _search_images(self, views: Sequence[Vectors], questions: Sequence[str], k: int) -> list[_QueryResult]:
        depth = max(RANKING_DEPTH, k)
        matches = self._channels.match_images(views, captions=lambda pack: pack.uses_captions, depth=depth)
        return [self._image_result(own, question) for own, question in zip(matches, questions, strict=True)]

    def _image_result(self, matches: ImageMatches, question: str) -> _QueryResult:
        if not matches.groups:
            return _QueryResult(question, (), 0.0, frozenset())
        captions = (Ranking(IMAGE_TO_CAPTION, ranks, self.packs[name].caption_weight)
                    for name, ranks in matches.captions.items())
        rankings = (matches.ranking, *(ranking for ranking in captions if ranking.weight))
        probability = image_probability(matches.groups[0].best.pack, matches.features)
        found = _top_articles(rankings) if probability >= FOUND_THRESHOLD else frozenset()
        return _QueryResult(question, rankings, probability, found, matches.groups)

    def _search_texts(self, queries: Sequence[TextQuery], k: int) -> list[_QueryResult]:
        """Search words, and paragraphs by vectors; images and captions only for queries that words explain badly."""
        by_words = [[rank_articles(pack, query.text) for pack in self.packs.values()] for query in queries]
        coverage = [max((one.coverage for one in per_pack), default=0.0) for per_pack in by_words]
        unclear = [n for n, query in enumerate(queries)
                   if coverage[n] < self.config.min_word_coverage and tokenize(query.text)]
        vectors = self.encoder.embed_texts([queries[n].text for n in unclear])
        by_vector = dict(zip(unclear, self._channels.match_texts(vectors, max(RANKING_DEPTH, k)), strict=True))
        if self.text_encoder is not None:
            embedded = self.text_encoder.embed_queries([query.text for query in queries])
            dense = [match_paragraphs(pack, embedded) for pack in self.packs.values()]
            return [self._dense_text_result(query.question, by_words[n], [own[n] for own in dense],
                                            by_vector.get(n, ()), max(self.config.text_depth, k))
                    for n, query in enumerate(queries)]  # fmt: skip
        return [self._text_result(query.question, by_words[n], by_vector.get(n, ())) for n, query in enumerate(queries)]

    def _dense_text_result(self, question: str, by_words: Sequence[WordRanking], by_paragraph: Sequence[DenseRanking],
                           by_vector: tuple[Ranking, ...], depth: int) -> _QueryResult:
        """Return the result of a query whose paragraphs were searched by words and by vectors."""
        paragraphs: dict[ArticleKey, Sequence[int]] = {}
        rankings: list[Ranking] = []
        probability, found = 0.0, frozenset[ArticleKey]()
        for pack, words, dense in zip(self.packs.values(), by_words, by_paragraph, strict=True):
            own = [Ranking(channel, rank_keys((pack.name, article) for article, _ in articles[:depth]))
                   for channel, articles in ((WORDS, words.articles), (TEXT_TO_PARAGRAPH, dense.articles)) if articles]
            of_words, of_vectors = dict(words.articles), dict(dense.articles)
            paragraphs |= {key: fuse_paragraphs(of_words.get(key[1], ()), of_vectors.get(key[1], ()))
                           for ranking in own for key in ranking.ranks}
            features = words.features if pack.paragraphs is None else (*words.features, *dense.features)
            of_pack = text_probability(pack, features)
            probability = max(probability, of_pack)
            found |= _top_articles(own) if of_pack >= FOUND_THRESHOLD else frozenset()
            rankings += own
        return _QueryResult(question, (*by_vector, *rankings), probability, found, paragraphs=paragraphs)

    def _text_result(self, question: str, by_words: Sequence[WordRanking],
                     by_vector: tuple[Ranking, ...]) -> _QueryResult:
        packs = list(self.packs.values())
        paragraphs = {(pack.name, article): ids
                      for pack, one in zip(packs, by_words, strict=True) for article, ids in one.articles}
        words = [Ranking(WORDS, rank_keys((pack.name, article) for article, _ in one.articles))
                 for pack, one in zip(packs, by_words, strict=True)]
        probabilities = [text_probability(pack, one.features) for pack, one in zip(packs, by_words, strict=True)]
        found = (_top_articles([own]) for own, probability in zip(words, probabilities, strict=True)
                 if probability >= FOUND_THRESHOLD)
        return _QueryResult(question, (*by_vector, *words), max(probabilities, default=0.0),
                            frozenset().union(*found), paragraphs=paragraphs)

    # --- results ------------------------------------------------------------------------------

    def _single(self, result: _QueryResult) -> SearchResult:
        """Return the result of one query. For a picture, only the first evidence has passages."""
        fused = fuse(result.rankings, self.config.rrf_k)
        later_passages = 0 if result.groups else 1
        selected = self._select(fused, result.rankings, result.groups, self.config.top_k, later_passages)
        if [ranking.channel for ranking in result.rankings] == [IMAGE_TO_IMAGE]:
            selected = [replace(one, score=one.match.score) for one in selected if one.match]
        choice = _ParagraphChoice(result.paragraphs, search_terms(tokenize(result.question)))
        return SearchResult(_build_evidence(self.packs, selected, choice), result.probability)

    def _fused(self, results: Sequence[_QueryResult], k: int) -> SearchResult:
        """Return the result of several queries, as `search_many` describes it."""
        ordered = sorted(results, key=lambda one: -one.probability)
        rankings = [each for one in ordered for each in scale_weights(one.rankings, max(one.probability, MIN_WEIGHT))]
        found = frozenset[ArticleKey]().union(*(one.found for one in results))
        fused = fuse(rankings, self.config.rrf_k)
        order = {key: fused[key] for key in sorted(fused, key=lambda key: key not in found)}
        selected = self._select(order, rankings, [group for one in ordered for group in one.groups], k, 1)
        questions = " ".join(dict.fromkeys(one.question for one in results))
        paragraphs = {key: ids for one in reversed(ordered) for key, ids in one.paragraphs.items()}
        choice = _ParagraphChoice(paragraphs, search_terms(tokenize(questions)))
        return SearchResult(_build_evidence(self.packs, selected, choice), ordered[0].probability if ordered else 0.0)

    def _select(self, fused: Mapping[ArticleKey, float], rankings: Sequence[Ranking], groups: Iterable[MatchGroup],
                k: int, later_passages: int) -> list[_Selection]:
        """Return the first k results: articles in order, with those that share an image merged."""
        group_of: dict[ArticleKey, MatchGroup] = {}
        for group in groups:
            for key in group.keys:
                group_of.setdefault(key, group)
        passages = self.config.passages_per_article
        selected: list[_Selection] = []
        seen: set[ArticleKey] = set()
        for key, score in fused.items():
            if len(selected) == k:
                break
            if key not in seen:
                own = group_of.get(key)
                keys = _sharing_keys(key, own) if own else (key,)
                seen.update(keys)
                count = min(later_passages, passages) if selected else passages
                selected.append(_Selection(keys, own.best if own else None, score, channel_ranks(key, rankings), count))
        return selected


def _sharing_keys(key: ArticleKey, group: MatchGroup) -> tuple[ArticleKey, ...]:
    """Return an article and the others of a group of images, without those that show the best image under other terms.

    Articles of one evidence are cited with one licence and attribution of their image.
    """
    row = group.best.row
    terms = {(group.best.pack.name, link.article): (link.licence, link.attribution) for link in row.links}
    own = terms.get(key, next(iter(terms.values()), ("", "")))
    return tuple(dict.fromkeys((key, *(other for other in group.keys if terms.get(other, own) == own))))


def _top_articles(rankings: Sequence[Ranking]) -> frozenset[ArticleKey]:
    """Return the articles with the highest fused score."""
    fused = fuse(rankings)
    best = max(fused.values(), default=0.0)
    return frozenset(key for key, score in fused.items() if score == best)


# --- evidence assembly: one store query of each kind per pack ---------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Selection:
    """Articles that become one evidence."""

    keys: tuple[ArticleKey, ...]  # best first
    match: Candidate | None  # the stored image that matched; None: use the main image of the first article
    score: float
    ranks: tuple[ChannelRank, ...]
    passages: int  # maximum


@dataclass(frozen=True, slots=True)
class _ParagraphChoice:
    """How paragraphs of an article are chosen."""

    paragraphs: Mapping[ArticleKey, Sequence[int]]  # matches of the text channels, best first
    terms: Sequence[str]  # search terms for articles without such matches


def _build_evidence(packs: Mapping[str, Pack], selected: Sequence[_Selection],
                    choice: _ParagraphChoice) -> tuple[Evidence, ...]:
    chosen = _choose_paragraphs(packs, selected, choice)
    titles: dict[ArticleKey, str] = {}
    images: dict[ArticleKey, ImageRef] = {}
    passages: dict[_ParagraphKey, Passage] = {}
    for name, pack in packs.items():
        own = [one for one in selected if any(owner == name for owner, _ in one.keys)]
        if not own:
            continue
        titles |= _keyed(name, pack.store.titles(_ids(name, (key for one in own for key in one.keys))))
        images |= _keyed(name, _main_images(pack, _ids(name, (one.keys[0] for one in own if one.match is None))))
        rows = pack.store.paragraphs(_ids(name, (paragraph for keys in chosen for paragraph in keys)))
        passages |= _keyed(name, {number: _passage(pack, row) for number, row in rows.items()})
    for name, paragraph in (key for keys in chosen for key in keys if key not in passages):
        raise PackError(f"pack '{name}': the paragraph {paragraph} is missing from the store; build the pack again")
    return tuple(
        Evidence(
            titles=tuple(dict.fromkeys(titles[key] for key in one.keys)),
            passages=tuple(passages[paragraph] for paragraph in keys),
            image=_matched_image(one.match, one.keys) if one.match else images.get(one.keys[0]),
            score=one.score,
            ranks=one.ranks,
        )
        for one, keys in zip(selected, chosen, strict=True)
    )


def _choose_paragraphs(packs: Mapping[str, Pack], selected: Sequence[_Selection],
                       choice: _ParagraphChoice) -> list[list[_ParagraphKey]]:
    """Return the paragraphs of each selection: the best one of each of its articles before any second one."""
    found: dict[ArticleKey, list[_ParagraphKey]] = {}
    for one in selected:
        for name, article in one.keys[: one.passages]:
            ids = choice.paragraphs.get((name, article)) or [
                match.paragraph for match in packs[name].store.rank_within(article, choice.terms, one.passages)
            ]
            found[name, article] = [(name, paragraph) for paragraph in ids]
    for name, pack in packs.items():
        unmatched = [article for owner, article in found if owner == name and not found[owner, article]]
        leads = pack.store.lead_paragraphs(unmatched) if unmatched else {}
        found |= {(name, article): [(name, paragraph)] for article, paragraph in leads.items()}
    return [_round_robin([found[key] for key in one.keys[: one.passages]], one.passages) for one in selected]


def _round_robin(per_article: Sequence[Sequence[_ParagraphKey]], count: int) -> list[_ParagraphKey]:
    turns = [own[depth] for depth in range(count) for own in per_article if depth < len(own)]
    return turns[:count]


def _main_images(pack: Pack, articles: Sequence[int]) -> dict[int, ImageRef]:
    images = pack.main_images(articles) if articles else {}
    rows = pack.store.images(list(images.values()))
    return {article: _image_ref(pack, rows[image], article) for article, image in images.items()}


def _ids(name: str, keys: Iterable[tuple[str, int]]) -> list[int]:
    """Return the distinct ids of the keys of one pack."""
    return list(dict.fromkeys(number for owner, number in keys if owner == name))


def _keyed(name: str, values: Mapping[int, _T]) -> dict[tuple[str, int], _T]:
    return {(name, number): value for number, value in values.items()}


def _matched_image(match: Candidate, keys: Sequence[ArticleKey]) -> ImageRef:
    """Return the stored image that matched, as the first of some articles shows it."""
    article = next((article for name, article in keys if name == match.pack.name), -1)
    return _image_ref(match.pack, match.row, article)


def _image_ref(pack: Pack, row: ImageRow, article: int) -> ImageRef:
    link = row.link_to(article)
    licence, attribution = (link.licence, link.attribution) if link else ("", "")
    return ImageRef(pack.name, row.id, (link.caption if link else "") or row.caption, licence, attribution)


def _passage(pack: Pack, row: ParagraphRow) -> Passage:
    span = row.start, row.start + len(row.text)
    return Passage(pack.name, row.title, row.section, row.id, row.text, row.licence, span)


# --- calibrated probabilities -----------------------------------------------------------------


def image_probability(pack: Pack, features: Sequence[float]) -> float:
    """Return the probability that the subject of an image query is in a pack; without calibration, its clipped cosine.

    `features` are as IMAGE_FEATURES names them.
    """
    calibration = pack.manifest.image_calibration
    return predict_probability(calibration, features) if calibration else min(1.0, max(0.0, features[0]))


def text_probability(pack: Pack, features: Sequence[float]) -> float:
    """Return the probability that the subject of a text query is in a pack; without calibration, the known coverage.

    `features` are as TEXT_FEATURES names them, or DENSE_TEXT_FEATURES if paragraphs are searched by vectors. The known
    coverage is coverage * (1 - unknown); it is also used if the calibration needs features of paragraph vectors and the
    pack was opened without its text encoder.
    """
    calibration = pack.manifest.text_calibration
    if calibration is None or len(calibration.weights) != len(features):
        return features[0] * (1.0 - features[1])
    return predict_probability(calibration, features)


def predict_probability(calibration: Calibration, features: Sequence[float]) -> float:
    """Return the logistic function of the features."""
    logit = sum(map(mul, calibration.weights, features)) + calibration.bias
    return 1.0 / (1.0 + math.exp(-min(60.0, max(-60.0, logit))))
