"""The search channels of a query and their fusion.

Image vectors and caption vectors are searched for pictures and for texts; for texts also words, by BM25, and vectors of
paragraphs. Each channel ranks articles; scores of different channels do not compare, so that only ranks are fused
(reciprocal rank fusion).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.pack import Pack, WordPack
from gog_edge.retrieval.text.segment import NameMatch, ParagraphMatch
from gog_edge.retrieval.text.store import ImageRow
from gog_edge.retrieval.text.tokens import name_spans, replace_spans, search_terms, split_units, tokenize
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import ChannelRank, Vectors

# Names of the channels, as results state them.
IMAGE_TO_IMAGE = "image_to_image"
IMAGE_TO_CAPTION = "image_to_caption"
TEXT_TO_IMAGE = "text_to_image"
TEXT_TO_CAPTION = "text_to_caption"
WORDS = "words"
TEXT_TO_PARAGRAPH = "text_to_paragraph"

RRF_K = 60  # the usual constant (Cormack, Clarke and Buettcher, SIGIR 2009)
ArticleKey: TypeAlias = tuple[str, int]  # pack name, article id


# --- reciprocal rank fusion -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ranking:
    """The articles that one channel found for one query."""

    channel: str
    ranks: Mapping[ArticleKey, int]  # from 1, best first; articles that share an image share a rank
    weight: float = 1.0


def rank_keys(keys: Iterable[ArticleKey]) -> dict[ArticleKey, int]:
    """Return the rank, from 1, of each distinct key by its first position."""
    return {key: rank for rank, key in enumerate(dict.fromkeys(keys), 1)}


def fuse(rankings: Iterable[Ranking], k: int = RRF_K) -> dict[ArticleKey, float]:
    """Return the sum of weight / (k + rank) per article, highest first; ties keep the order of the rankings."""
    scores: dict[ArticleKey, float] = {}
    for ranking in rankings:
        for key, rank in ranking.ranks.items():
            scores[key] = scores.get(key, 0.0) + ranking.weight / (k + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def channel_ranks(key: ArticleKey, rankings: Iterable[Ranking]) -> tuple[ChannelRank, ...]:
    """Return the best rank of an article in each channel that found it."""
    best: dict[str, int] = {}
    for ranking in rankings:
        rank = ranking.ranks.get(key)
        if rank is not None:
            best[ranking.channel] = min(rank, best.get(ranking.channel, rank))
    return tuple(ChannelRank(*pair) for pair in best.items())


def scale_weights(rankings: Iterable[Ranking], factor: float) -> list[Ranking]:
    """Return the rankings with their weights multiplied by `factor`."""
    return [replace(ranking, weight=factor * ranking.weight) for ranking in rankings]


# --- vector channels --------------------------------------------------------------------------

CANDIDATES = 24  # nearest images per query and pack
RANKING_DEPTH = 6  # ranks that count; lower ones are merely similar
EXTRA_GROUPS = 2  # groups read in addition, to replace those that add no article


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A stored image near a query."""

    pack: Pack
    row: ImageRow
    score: float  # cosine

    @property
    def keys(self) -> list[ArticleKey]:
        """Return the articles of the image, the main one first."""
        return [(self.pack.name, article) for article in self.row.articles]


@dataclass(frozen=True, slots=True, eq=False)
class MatchGroup:
    """Near-duplicate images that match a query."""

    best: Candidate
    keys: tuple[ArticleKey, ...]  # articles of all images, those of the best match first


@dataclass(frozen=True, slots=True, eq=False)
class ImageMatches:
    """The stored images and captions that match a picture."""

    groups: tuple[MatchGroup, ...]  # best first
    mean: float  # cosine of all candidates
    captions: Mapping[str, Mapping[ArticleKey, int]]  # by pack: ranks of the caption search, if there was one

    @property
    def ranking(self) -> Ranking:
        """Return the articles, each with the rank of its first group."""
        ranks: dict[ArticleKey, int] = {}
        for rank, group in enumerate(self.groups, 1):
            for key in group.keys:
                ranks.setdefault(key, rank)
        return Ranking(IMAGE_TO_IMAGE, ranks)

    @property
    def features(self) -> tuple[float, ...]:
        """Return the IMAGE_FEATURES of the calibration."""
        if not self.groups:
            return (0.0, 0.0, 0.0, 0.0)
        best = self.groups[0].best.score
        second = self.groups[1].best.score if len(self.groups) > 1 else 0.0
        agreement = [1 / ranks[key] for ranks in self.captions.values() for key in self.groups[0].keys if key in ranks]
        return (best, best - second, best - self.mean, max(agreement, default=0.0))


@dataclass(frozen=True, slots=True, eq=False)
class _Neighbours:
    """The nearest images of n queries over all packs, best first; m per query."""

    scores: NDArray[np.float32]  # [n, m] cosine, padded with -inf
    ids: Ids  # [n, m], padded with -1
    packs: NDArray[np.int64]  # [n, m] index of the pack

    def __getitem__(self, rows: Sequence[int] | slice | tuple[slice, slice]) -> _Neighbours:
        return _Neighbours(self.scores[rows], self.ids[rows], self.packs[rows])


class VectorChannels:
    """The image and caption vectors of several packs; each index is searched once for all queries of a call."""

    def __init__(self, packs: Sequence[Pack], *, candidates: int = CANDIDATES,
                 duplicate_cosine: float | None = None) -> None:
        """Search the packs that have images.

        Args:
            packs: Packs of one encoder.
            candidates: Nearest images per query and pack.
            duplicate_cosine: Cosine from which two stored images count as duplicates; None: the value of each pack.
        """
        self._packs = [pack for pack in packs if len(pack.images.shards)]
        self._candidates = candidates
        self._dim = next((pack.manifest.encoder.dim for pack in self._packs if pack.manifest.encoder), 0)
        self._duplicate_cosines = np.array(
            [pack.manifest.duplicate_cosine if duplicate_cosine is None else duplicate_cosine for pack in self._packs],
            dtype=np.float32,
        )

    def match_images(self, views: Sequence[Vectors], *, captions: Callable[[Pack], bool], without: Ids | None = None,
                     depth: int = RANKING_DEPTH) -> list[ImageMatches]:
        """Return the stored images that match some pictures.

        Args:
            views: Per picture, the vectors [views, dim] of its framings; the one with the best match is used.
            captions: Whether to search the captions of a pack too.
            without: Ids of images to ignore.
            depth: Maximum number of groups, and of ranks in the caption channel.
        """
        if not views or not self._packs:
            return [ImageMatches((), 0.0, {}) for _ in views]
        vectors = np.concatenate(views)
        near = self._search(vectors, without)
        starts = np.cumsum([0, *(len(own) for own in views)])
        top = near.scores[:, 0] if near.scores.shape[1] else np.zeros(len(vectors))
        best = [int(start + np.argmax(top[start:stop])) for start, stop in pairwise(starts)]
        groups = self._match_groups(near[best], depth)
        by_caption = self._search_captions(vectors[best], captions, without, depth)
        means = [float(own[np.isfinite(own)].mean()) if np.isfinite(own).any() else 0.0 for own in near[best].scores]
        return [ImageMatches(tuple(own), mean, ranks)
                for own, mean, ranks in zip(groups, means, by_caption, strict=True)]

    def match_texts(self, vectors: Vectors, depth: int = RANKING_DEPTH) -> list[tuple[Ranking, ...]]:
        """Return, for each text vector of [n, dim], rankings of articles by their images and by their captions."""
        if not len(vectors) or not self._packs:
            return [() for _ in vectors]
        by_image = self._article_ranks(self._search(vectors, None)[:, :depth])
        by_caption = self._search_captions(vectors, lambda _: True, None, depth)
        return [(Ranking(TEXT_TO_IMAGE, own), *(Ranking(TEXT_TO_CAPTION, ranks) for ranks in captions.values()))
                for own, captions in zip(by_image, by_caption, strict=True)]

    def _search(self, vectors: Vectors, without: Ids | None) -> _Neighbours:
        """Merge the nearest images of all packs: cosines of one encoder compare."""
        hits = [pack.images.search(vectors, self._candidates, without=without) for pack in self._packs]
        scores = np.concatenate([one.scores for one in hits], axis=1)
        ids = np.concatenate([one.ids for one in hits], axis=1)
        packs = np.concatenate([np.full(one.ids.shape, n, np.int64) for n, one in enumerate(hits)], axis=1)
        if len(hits) == 1:
            return _Neighbours(scores, ids, packs)
        order = np.argsort(-scores, axis=1, kind="stable")
        return _Neighbours(np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1),
                           np.take_along_axis(packs, order, axis=1))

    def _search_captions(self, vectors: Vectors, selected: Callable[[Pack], bool], without: Ids | None,
                         depth: int) -> list[dict[str, dict[ArticleKey, int]]]:
        """Return, per vector and by name of each selected pack, the ranks of articles whose captions are near."""
        found: list[dict[str, dict[ArticleKey, int]]] = [{} for _ in vectors]
        for n, pack in enumerate(self._packs):
            if selected(pack) and len(pack.captions.shards):
                hits = pack.captions.search(vectors, depth, without=without)
                near = _Neighbours(hits.scores, hits.ids, np.full(hits.ids.shape, n, np.int64))
                for own, ranks in zip(found, self._article_ranks(near), strict=True):
                    own[pack.name] = ranks
        return found

    def _article_ranks(self, near: _Neighbours) -> list[dict[ArticleKey, int]]:
        """Return, per query, the articles of the images by rank."""
        return [rank_keys(key for one in own for key in one.keys) for own in self._candidates_of(near)]

    def _candidates_of(self, near: _Neighbours) -> list[list[Candidate]]:
        """Read the image rows, best first, per query. Each store is read once."""
        rows: dict[tuple[int, int], ImageRow] = {}
        for n, pack in enumerate(self._packs):
            ids = np.unique(near.ids[(near.packs == n) & (near.ids >= 0)]).tolist()
            known = pack.store.images(ids)
            if len(known) < len(ids):
                raise PackError(f"pack '{pack.name}': a vector is of an image that is missing; build the pack again")
            rows |= {(n, image): row for image, row in known.items()}
        return [
            [Candidate(self._packs[pack], rows[pack, image], score)
             for pack, image, score in zip(packs, ids, scores, strict=True) if image >= 0]
            for packs, ids, scores in zip(near.packs.tolist(), near.ids.tolist(), near.scores.tolist(), strict=True)
        ]  # fmt: skip

    # --- near-duplicates ----------------------------------------------------------------------

    def _match_groups(self, near: _Neighbours, depth: int) -> list[list[MatchGroup]]:
        """Return, per query, near-duplicates merged into groups, best first, without groups that add no article."""
        groups = [own[: depth + EXTRA_GROUPS] for own in self._group_by_vector(near)]
        used = np.zeros(near.ids.shape, dtype=bool)
        for n, own in enumerate(groups):
            used[n, [place for group in own for place in group]] = True
        found = self._candidates_of(_Neighbours(near.scores, np.where(used, near.ids, -1), near.packs))
        merged = []
        for n, own in enumerate(groups):
            members = dict(zip(np.flatnonzero(used[n]).tolist(), found[n], strict=True))
            merged.append(_with_new_articles([[members[place] for place in group] for group in own])[:depth])
        return merged

    def _group_by_vector(self, near: _Neighbours) -> list[list[list[int]]]:
        """Return, per query, groups of positions whose stored vectors are near-duplicates of the group's first."""
        vectors = self._stored_vectors(near)  # [n, m, dim]
        threshold = self._duplicate_cosines[near.packs][:, :, None]
        alike = np.triu(vectors @ vectors.transpose(0, 2, 1) >= threshold, 1) & (near.ids >= 0)[:, None, :]
        return [_group_positions(int((own >= 0).sum()), same) for own, same in zip(near.ids, alike, strict=True)]

    def _stored_vectors(self, near: _Neighbours) -> NDArray[np.float32]:
        """Return the stored vectors [n, m, dim], padded with 0."""
        found = np.zeros((*near.ids.shape, self._dim), dtype=np.float32)
        for n, pack in enumerate(self._packs):
            here = (near.packs == n) & (near.ids >= 0)
            ids, places = np.unique(near.ids[here], return_inverse=True)
            found[here] = pack.images.shards.take(pack.images.shards.first_rows(ids))[places]
        return found


def _with_new_articles(groups: Sequence[Sequence[Candidate]]) -> list[MatchGroup]:
    """Return the groups that have an article which no earlier group has."""
    kept: list[MatchGroup] = []
    seen: set[ArticleKey] = set()
    for group in groups:
        keys = tuple(dict.fromkeys(key for one in group for key in one.keys))
        if not seen.issuperset(keys):
            seen.update(keys)
            kept.append(MatchGroup(group[0], keys))
    return kept


def _group_positions(count: int, alike: NDArray[np.bool_]) -> list[list[int]]:
    """Return positions 0 to count - 1 in groups: each ungrouped position with the later ones alike [m, m] to it."""
    later = {n: np.flatnonzero(alike[n]).tolist() for n in np.flatnonzero(alike.any(axis=1)).tolist()}
    if not later:
        return [[n] for n in range(count)]
    grouped: set[int] = set()
    groups: list[list[int]] = []
    for n in range(count):
        if n not in grouped:
            groups.append([n, *(place for place in later.get(n, ()) if place not in grouped)])
            grouped.update(groups[-1])
    return groups


# --- word channel -----------------------------------------------------------------------------

MAX_PARAGRAPHS = 64  # per query, pack and channel, before they are grouped by article
RERANKED_ARTICLES = 4  # whose whole text is compared with the query: its terms may be in several paragraphs
NAME_BONUS = 1.2  # factor for an article whose full name is in the query: 'Guinea' before 'Papua New Guinea'
MAX_CODE_CHARS = 3  # names up to this length in capitals ('PT', 'USA') are codes and match only in capitals


@dataclass(frozen=True, slots=True)
class WordRanking:
    """The articles of a pack for a text query, best first, each with its paragraphs, best first.

    The features are those that TEXT_FEATURES of the calibration names, with rarity as a normalised idf (see
    `_rarities`): coverage, the share of known terms, by rarity, that the best article contains; unknown, the share of
    terms that the pack does not contain; rarity, of the rarest term in the best article; named, 1 if the query contains
    the full name of an article.
    """

    articles: tuple[tuple[int, tuple[int, ...]], ...]
    features: tuple[float, ...]

    @property
    def coverage(self) -> float:
        """Return the share of the known terms, by rarity, that the best article contains."""
        return self.features[0]


@dataclass(frozen=True, slots=True)
class _ParsedQuery:
    """A text query with the names that one pack recognises in it."""

    terms: tuple[str, ...]  # with redirects replaced by titles
    named: tuple[int, ...]  # articles whose full name is in the query


def rank_articles(pack: WordPack, text: str) -> WordRanking:
    """Rank articles by the BM25 score of their best paragraph, then the first few by how many terms they contain."""
    query = _parse_query(pack, text)
    grouped: dict[int, list[ParagraphMatch]] = {}
    for match in pack.store.rank(query.terms, MAX_PARAGRAPHS):
        grouped.setdefault(match.article, []).append(match)
    for article in query.named:
        if article not in grouped:
            grouped[article] = pack.store.rank_within(article, query.terms, MAX_PARAGRAPHS)
    scores = {
        article: (matches[0].score if matches else 0.0) * (NAME_BONUS if article in query.named else 1.0)
        for article, matches in grouped.items()
    }
    order = sorted(scores, key=lambda article: (-scores[article], article))
    rarities = _rarities(pack, query.terms)
    contained = {
        article: [rarity for term, rarity in rarities.items() if pack.store.contains(article, term)]
        for article in order[:RERANKED_ARTICLES]
    }
    first = sorted(contained, key=lambda article: -scores[article] * sum(contained[article]))
    best = contained[first[0]] if first else []
    features = (
        sum(best) / max(sum(rarities.values()), 1e-9),
        1.0 - len(rarities) / max(len(query.terms), 1),
        max(best, default=0.0),
        float(bool(query.named)),
    )
    articles = [*first, *order[RERANKED_ARTICLES:]]
    return WordRanking(
        tuple((article, tuple(match.paragraph for match in grouped[article])) for article in articles), features
    )


@dataclass(frozen=True, slots=True)
class DenseRanking:
    """The articles of a pack whose paragraphs are nearest to a text query, best first, each with these paragraphs.

    The features are the last two of DENSE_TEXT_FEATURES of the calibration: similarity, the cosine of the best
    paragraph; similarity_margin, its difference to the best paragraph of another article.
    """

    articles: tuple[tuple[int, tuple[int, ...]], ...] = ()
    features: tuple[float, ...] = (0.0, 0.0)


def match_paragraphs(pack: Pack, vectors: Vectors) -> list[DenseRanking]:
    """Rank articles by the cosine of their best paragraph, for each vector of a text query in [n, dim]."""
    if pack.paragraphs is None or not len(vectors):
        return [DenseRanking() for _ in vectors]
    hits = pack.paragraphs.search(vectors, MAX_PARAGRAPHS)
    articles = pack.store.articles_of(np.unique(hits.ids[hits.ids >= 0]).tolist())
    found = []
    for ids, scores in zip(hits.ids.tolist(), hits.scores.tolist(), strict=True):
        grouped: dict[int, list[int]] = {}
        best: list[float] = []  # cosine of the first paragraph of each article
        for paragraph, score in zip(ids, scores, strict=True):
            if paragraph >= 0:
                own = grouped.setdefault(articles[paragraph], [])
                best += [] if own else [score]
                own.append(paragraph)
        first, second = [*best, 0.0, 0.0][:2]
        found.append(DenseRanking(tuple((one, tuple(own)) for one, own in grouped.items()), (first, first - second)))
    return found


def fuse_paragraphs(words: Sequence[int], dense: Sequence[int]) -> tuple[int, ...]:
    """Return the paragraphs of one article, found by words and by vectors, in the order of their fused ranks."""
    keys = ([("", paragraph) for paragraph in own] for own in (words, dense))
    return tuple(paragraph for _, paragraph in fuse(Ranking("", rank_keys(own)) for own in keys))


def _parse_query(pack: WordPack, text: str) -> _ParsedQuery:
    """Recognise titles and redirects in a query, longest first and without overlap; redirects become titles."""
    units = split_units(tokenize(text))
    spans = name_spans(units)
    names = [name for name in pack.store.find_names(spans) if _is_mentioned(name, text, len(units))]
    titles = pack.store.titles({name.article for name in names})
    named: dict[int, None] = {}
    replaced: dict[tuple[int, int], list[str]] = {}  # spans of names -> words that replace them
    for key in sorted({name.key for name in names}, key=lambda key: _longest_first(spans[key][0])):
        same_key = [name for name in names if name.key == key]
        same_key = [name for name in same_key if not name.redirect] or same_key
        for start, stop in spans[key]:
            if all(stop <= other[0] or other[1] <= start for other in replaced):
                named.update(dict.fromkeys(name.article for name in same_key))
                replaced[start, stop] = [word for name in same_key for word in tokenize(titles[name.article])]
    words = replace_spans(units, replaced, lambda term: pack.store.frequency(term) > 0)
    return _ParsedQuery(search_terms(words), tuple(named))


def _longest_first(span: tuple[int, int]) -> tuple[int, int]:
    start, stop = span
    return start - stop, start


def _is_mentioned(name: NameMatch, text: str, units: int) -> bool:
    """Return whether a name counts: a code ('IT') must be in capitals ('is it' is no match) or the whole query."""
    if len(name.name) > MAX_CODE_CHARS or not name.name.isupper() or units == 1:
        return True
    return re.search(rf"(?<!\w){re.escape(name.name)}(?!\w)", unicodedata.normalize("NFKC", text)) is not None


def _rarities(pack: WordPack, terms: Sequence[str]) -> dict[str, float]:
    """Return the idf of each term that the pack contains, relative to a term in no paragraph: 0 to 1."""
    size = pack.manifest.counts.paragraphs + 1.0
    counts = {term: pack.store.frequency(term) for term in terms}
    return {term: math.log(size / (count + 0.5)) / math.log(size / 0.5) for term, count in counts.items() if count}
