"""Reciprocal rank fusion: scores of different channels do not compare, the places that they give do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.segment import Match, NameHit
from gog_edge.retrieval.text.store import ImageRow
from gog_edge.retrieval.text.words import raw_words, search_terms, spans
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import ChannelRank, Vectors

RRF_K = 60  # the usual constant (Cormack, Clarke, Buettcher 2009): the first few places count nearly alike
Key: TypeAlias = tuple[str, int]  # name of a pack, id of an article in it


@dataclass(frozen=True, slots=True)
class Ranking:
    """The articles that one channel found for one query."""

    channel: str
    ranks: Mapping[Key, int]  # from 1, best first; articles that share a picture share a rank
    weight: float = 1.0


def ranked(keys: Iterable[Key]) -> dict[Key, int]:
    """Rank from 1 by key, of keys in order; a key counts where it comes first."""
    return {key: rank for rank, key in enumerate(dict.fromkeys(keys), 1)}


def fuse(rankings: Iterable[Ranking], k: int = RRF_K) -> dict[Key, float]:
    """Articles with the sum of weight / (k + rank), best first; those of one score as the rankings bring them."""
    scores: dict[Key, float] = {}
    for ranking in rankings:
        for key, rank in ranking.ranks.items():
            scores[key] = scores.get(key, 0.0) + ranking.weight / (k + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def ranks_of(key: Key, rankings: Iterable[Ranking]) -> tuple[ChannelRank, ...]:
    """The best rank that each channel gives an article."""
    best: dict[str, int] = {}
    for ranking in rankings:
        rank = ranking.ranks.get(key)
        if rank is not None:
            best[ranking.channel] = min(rank, best.get(ranking.channel, rank))
    return tuple(ChannelRank(*pair) for pair in best.items())


def weighted(rankings: Iterable[Ranking], factor: float) -> list[Ranking]:
    """The same rankings with more or less to say."""
    return [replace(ranking, weight=factor * ranking.weight) for ranking in rankings]


IMAGE_TO_IMAGE = "image_to_image"
IMAGE_TO_CAPTION = "image_to_caption"
TEXT_TO_IMAGE = "text_to_image"
TEXT_TO_CAPTION = "text_to_caption"
WORDS = "words"
CANDIDATES = 24  # images compared with a query, in each pack
DEPTH = 6  # places of a ranking that count: what stands lower only resembles
SPARE = 2  # further groups of images that are looked up, for those that name nothing new


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A stored image near a query."""

    pack: Pack
    row: ImageRow
    score: float  # cosine

    @property
    def keys(self) -> list[Key]:
        """The articles that it stands in, the main one first."""
        return [(self.pack.name, article) for article in self.row.articles]


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """Stored images that show the same."""

    head: Candidate  # the nearest
    keys: tuple[Key, ...]  # the articles of all, best first


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What the pixels of a query may show."""

    things: tuple[Thing, ...]  # best first
    mean: float  # cosine of all candidates
    captions: Mapping[str, Mapping[Key, int]]  # by pack, of those whose captions were searched: articles by rank

    @property
    def ranking(self) -> Ranking:
        """Articles by the rank of the thing that shows them."""
        ranks: dict[Key, int] = {}
        for rank, thing in enumerate(self.things, 1):
            for key in thing.keys:
                ranks.setdefault(key, rank)
        return Ranking(IMAGE_TO_IMAGE, ranks)

    @property
    def features(self) -> tuple[float, ...]:
        """IMAGE_FEATURES of `retrieval.calibration`."""
        if not self.things:
            return (0.0, 0.0, 0.0, 0.0)
        best = self.things[0].head.score
        second = self.things[1].head.score if len(self.things) > 1 else 0.0
        places = [1 / ranks[key] for ranks in self.captions.values() for key in self.things[0].keys if key in ranks]
        return (best, best - second, best - self.mean, max(places, default=0.0))


@dataclass(frozen=True, slots=True, eq=False)
class _Near:
    """The images of all packs nearest to some queries, best first."""

    scores: NDArray[np.float32]  # [n, m] cosine; -inf where there is none
    ids: Ids  # [n, m]; -1 where there is none
    packs: NDArray[np.int64]  # [n, m] which pack it is of

    def __getitem__(self, rows: Sequence[int] | slice | tuple[slice, slice]) -> _Near:
        return _Near(self.scores[rows], self.ids[rows], self.packs[rows])


class Channels:
    """The vectors of some packs, searched with vectors: one search of each index for all queries."""

    def __init__(self, packs: Sequence[Pack], *, candidates: int = CANDIDATES,
                 duplicate_cosine: float | None = None) -> None:
        """`duplicate_cosine`: from where on two stored images show the same; None: what each pack says."""
        self._packs = [pack for pack in packs if len(pack.images.shards)]
        self._candidates = candidates
        self._dim = next((pack.manifest.encoder.dim for pack in self._packs if pack.manifest.encoder), 0)
        self._least = np.array([pack.manifest.duplicate_cosine if duplicate_cosine is None else duplicate_cosine
                                for pack in self._packs], dtype=np.float32)  # fmt: skip

    def look(self, views: Sequence[Vectors], *, captions: Callable[[Pack], bool], without: Ids | None = None,
             depth: int = DEPTH) -> list[Look]:
        """What some pictures show.

        Args:
            views: of each picture, the vectors [views, dim] of its framings; the one that matches best counts.
            captions: the packs whose captions are searched too.
            without: ids of images that are passed over, as if they were not there.
            depth: things and articles at most.
        """
        if not views or not self._packs:
            return [Look((), 0.0, {}) for _ in views]
        vectors = np.concatenate(views)
        near = self._search(vectors, without)
        starts = np.cumsum([0, *(len(own) for own in views)])
        tops = near.scores[:, 0] if near.scores.shape[1] else np.zeros(len(vectors))
        best = [int(start + np.argmax(tops[start:stop])) for start, stop in pairwise(starts)]
        things = self._things(near[best], depth)
        said = self._captions(vectors[best], captions, without, depth)
        means = [float(own[np.isfinite(own)].mean()) if np.isfinite(own).any() else 0.0 for own in near[best].scores]
        return [Look(tuple(own), mean, by_pack) for own, mean, by_pack in zip(things, means, said, strict=True)]

    def read(self, vectors: Vectors, depth: int = DEPTH) -> list[tuple[Ranking, ...]]:
        """Articles whose pictures, and whose captions, are near some texts [n, dim]."""
        if not len(vectors) or not self._packs:
            return [() for _ in vectors]
        pictures = self._articles(self._search(vectors, None)[:, :depth])
        captions = self._captions(vectors, lambda _: True, None, depth)
        return [(Ranking(TEXT_TO_IMAGE, own), *(Ranking(TEXT_TO_CAPTION, ranks) for ranks in said.values()))
                for own, said in zip(pictures, captions, strict=True)]

    def _search(self, vectors: Vectors, without: Ids | None) -> _Near:
        """Images of all packs in one order: one encoder made them all, so their cosines compare."""
        hits = [pack.images.search(vectors, self._candidates, without=without) for pack in self._packs]
        scores = np.concatenate([one.scores for one in hits], axis=1)
        ids = np.concatenate([one.ids for one in hits], axis=1)
        packs = np.concatenate([np.full(one.ids.shape, n, np.int64) for n, one in enumerate(hits)], axis=1)
        if len(hits) == 1:
            return _Near(scores, ids, packs)
        order = np.argsort(-scores, axis=1, kind="stable")
        return _Near(np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1),
                     np.take_along_axis(packs, order, axis=1))

    def _captions(self, vectors: Vectors, wanted: Callable[[Pack], bool], without: Ids | None,
                  depth: int) -> list[dict[str, dict[Key, int]]]:
        """For each vector, and each pack that is wanted, the articles whose captions are near, by rank."""
        found: list[dict[str, dict[Key, int]]] = [{} for _ in vectors]
        for n, pack in enumerate(self._packs):
            if wanted(pack) and len(pack.captions.shards):
                hits = pack.captions.search(vectors, depth, without=without)
                near = _Near(hits.scores, hits.ids, np.full(hits.ids.shape, n, np.int64))
                for own, ranks in zip(found, self._articles(near), strict=True):
                    own[pack.name] = ranks
        return found

    def _articles(self, near: _Near) -> list[dict[Key, int]]:
        """The articles that images stand in, by rank, of each query."""
        return [ranked(key for one in own for key in one.keys) for own in self._read(near)]

    # --- duplicates ---------------------------------------------------------------------------

    def _things(self, near: _Near, depth: int) -> list[list[Thing]]:
        """Near-identical images merged, best first, of each query; what names nothing new is dropped."""
        groups = [own[: depth + SPARE] for own in self._alike(near)]
        used = np.zeros(near.ids.shape, dtype=bool)
        for n, own in enumerate(groups):
            used[n, [place for group in own for place in group]] = True
        found = self._read(_Near(near.scores, np.where(used, near.ids, -1), near.packs))
        things = []
        for n, own in enumerate(groups):
            members = dict(zip(np.flatnonzero(used[n]).tolist(), found[n], strict=True))
            things.append(_new_things([[members[place] for place in group] for group in own])[:depth])
        return things

    def _alike(self, near: _Near) -> list[list[list[int]]]:
        """The places of each query's images, those together that are near-identical to the first of them."""
        vectors = self._stored(near)  # [n, m, dim]
        least = self._least[near.packs][:, :, None]
        alike = np.triu(vectors @ vectors.transpose(0, 2, 1) >= least, 1) & (near.ids >= 0)[:, None, :]
        return [_grouped(int((own >= 0).sum()), same) for own, same in zip(near.ids, alike, strict=True)]

    def _stored(self, near: _Near) -> NDArray[np.float32]:
        """The stored vectors [n, m, dim]; 0 where there is none."""
        found = np.zeros((*near.ids.shape, self._dim), dtype=np.float32)
        for n, pack in enumerate(self._packs):
            here = (near.packs == n) & (near.ids >= 0)
            ids, places = np.unique(near.ids[here], return_inverse=True)
            found[here] = pack.images.shards.take(pack.images.shards.first_rows(ids))[places]
        return found

    def _read(self, near: _Near) -> list[list[Candidate]]:
        """Images with what the stores say of them, best first, of each query; one look-up in each pack."""
        rows: dict[tuple[int, int], ImageRow] = {}
        for n, pack in enumerate(self._packs):
            ids = np.unique(near.ids[(near.packs == n) & (near.ids >= 0)]).tolist()
            rows |= {(n, image): row for image, row in pack.store.images(ids).items()}
        return [
            [Candidate(self._packs[pack], rows[pack, image], score)
             for pack, image, score in zip(packs, ids, scores, strict=True) if image >= 0]
            for packs, ids, scores in zip(near.packs.tolist(), near.ids.tolist(), near.scores.tolist(), strict=True)
        ]  # fmt: skip


def _new_things(groups: Sequence[Sequence[Candidate]]) -> list[Thing]:
    things: list[Thing] = []
    named: set[Key] = set()
    for group in groups:
        keys = tuple(dict.fromkeys(key for one in group for key in one.keys))
        if not named.issuperset(keys):
            named.update(keys)
            things.append(Thing(group[0], keys))
    return things


def _grouped(count: int, alike: NDArray[np.bool_]) -> list[list[int]]:
    """Places 0..count - 1, each with those behind it that are alike [m, m] and not yet taken."""
    behind = {n: np.flatnonzero(alike[n]).tolist() for n in np.flatnonzero(alike.any(axis=1)).tolist()}
    if not behind:
        return [[n] for n in range(count)]
    taken: set[int] = set()
    groups: list[list[int]] = []
    for n in range(count):
        if n not in taken:
            groups.append([n, *(place for place in behind.get(n, ()) if place not in taken)])
            taken.update(groups[-1])
    return groups


PARAGRAPHS = 64  # paragraphs looked at per query, before grouping by article
RERANKED = 4  # articles whose whole text is compared with the query: facts of one thing stand in many paragraphs
NAMED_BONUS = 1.2  # factor on BM25 for an article that the query names in full: 'Guinea' before 'Papua New Guinea'
CODE_CHARS = 3  # names up to this length in capitals are codes ('PT', 'USA'): they count only as written


@dataclass(frozen=True, slots=True)
class Ranked:
    """The articles of a pack for a text query, best first, each with its paragraphs, best first."""

    articles: tuple[tuple[int, tuple[int, ...]], ...]
    features: tuple[float, ...]  # TEXT_FEATURES

    @property
    def coverage(self) -> float:
        """Share of the known words of the query, by rarity, that the best article holds."""
        return self.features[0]


@dataclass(frozen=True, slots=True)
class _Read:
    """A text query as one pack understands it."""

    terms: tuple[str, ...]  # redirects replaced by titles
    named: tuple[int, ...]  # articles named in full


def rank_words(pack: Pack, text: str) -> Ranked:
    """Articles by the BM25 of their best paragraph, the first few by how much of the query the whole article covers."""
    read = _read(pack, text)
    grouped: dict[int, list[Match]] = {}
    for match in pack.store.rank(read.terms, PARAGRAPHS):
        grouped.setdefault(match.article, []).append(match)
    for article in read.named:
        if article not in grouped:
            grouped[article] = pack.store.rank(read.terms, PARAGRAPHS, article)
    weights = {
        article: (matches[0].score if matches else 0.0) * (NAMED_BONUS if article in read.named else 1.0)
        for article, matches in grouped.items()
    }
    order = sorted(weights, key=lambda article: (-weights[article], article))
    rarities = _rarities(pack, read.terms)
    held = {article: _held(pack, article, rarities) for article in order[:RERANKED]}
    first = sorted(held, key=lambda article: -weights[article] * sum(held[article]))
    features = _text_features(read, rarities, held[first[0]] if first else [])
    ranked = [(article, tuple(match.paragraph for match in grouped[article])) for article in first + order[RERANKED:]]
    return Ranked(tuple(ranked), features)


def _read(pack: Pack, text: str) -> _Read:
    """Find names in a query: the longest first, none inside another; redirects become titles."""
    words = raw_words(text)
    places = spans(words)
    hits = [hit for hit in pack.store.named(places) if _as_written(hit, words, places)]
    titles = pack.store.titles({hit.article for hit in hits})
    used: set[int] = set()
    named: dict[int, None] = {}
    replaced: dict[int, list[str]] = {}  # first word of a span -> words that stand for it
    for key in sorted({hit.key for hit in hits}, key=lambda key: (-key.count(" "), places[key][0])):
        bearers = [hit for hit in hits if hit.key == key]
        bearers = [hit for hit in bearers if not hit.redirect] or bearers
        for start, stop in places[key]:
            if used.isdisjoint(range(start, stop)):
                used.update(range(start, stop))
                named.update(dict.fromkeys(hit.article for hit in bearers))
                replaced[start] = [word for hit in bearers for word in raw_words(titles[hit.article])]
    terms: list[str] = []
    for place, word in enumerate(words):
        terms += replaced.get(place, [] if place in used else [word])
    return _Read(search_terms(terms), tuple(named))


def _as_written(hit: NameHit, words: Sequence[str], places: dict[str, list[tuple[int, int]]]) -> bool:
    """Codes count only in capitals ('IT is a country', not 'is it'), or when they are all that was asked."""
    if len(hit.name) > CODE_CHARS or not hit.name.isupper() or len(words) == 1:
        return True
    return any(" ".join(words[start:stop]) == hit.name for start, stop in places[hit.key])


def _rarities(pack: Pack, terms: Sequence[str]) -> dict[str, float]:
    """How rare each term is in the pack, from 0 (everywhere) to 1 (once); terms that it never uses are left out."""
    size = pack.manifest.counts.paragraphs + 1.0
    counts = {term: pack.store.frequency(term) for term in terms}
    return {term: math.log(size / (count + 0.5)) / math.log(size / 0.5) for term, count in counts.items() if count}


def _held(pack: Pack, article: int, rarities: dict[str, float]) -> list[float]:
    """The rarities of the terms that an article holds."""
    return [rarity for term, rarity in rarities.items() if pack.store.holds(article, term)]


def _text_features(read: _Read, rarities: dict[str, float], held: Sequence[float]) -> tuple[float, ...]:
    """TEXT_FEATURES of a query whose best article holds terms of the rarities `held`.

    coverage: share of the known words, by rarity, that it holds. unknown: share of words that the pack never uses.
    rarity: of the rarest word that it holds. named: an article is named in full.
    """
    return (
        sum(held) / max(sum(rarities.values()), 1e-9),
        1.0 - len(rarities) / max(len(read.terms), 1),
        max(held, default=0.0),
        float(bool(read.named)),
    )
