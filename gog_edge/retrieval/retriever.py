"""From articles in order to cited evidence, with one look-up of each kind a pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from gog_edge.config import GazeConfig
from gog_edge.errors import PackError, RequestError
from gog_edge.retrieval.encoder import CropCache, Encoder, crops_of
from gog_edge.retrieval.fusion import (
    CANDIDATES,
    DEPTH,
    IMAGE_TO_CAPTION,
    IMAGE_TO_IMAGE,
    RRF_K,
    WORDS,
    Candidate,
    Channels,
    Key,
    Look,
    Ranked,
    Ranking,
    Thing,
    fuse,
    rank_words,
    ranked,
    ranks_of,
    weighted,
)
from gog_edge.retrieval.manifest import FOUND
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.segment import ParagraphRow
from gog_edge.retrieval.text.store import ImageRow
from gog_edge.retrieval.text.words import raw_words, search_terms
from gog_edge.types import ChannelRank, Evidence, ImageQuery, ImageRef, Passage, Query, SearchResult, TextQuery, Vectors

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One thing that will be evidence."""

    keys: tuple[Key, ...]  # its articles, best first
    picture: Candidate | None  # the stored image that matched; None: the article's own
    score: float
    ranks: tuple[ChannelRank, ...]
    passages: int  # at most


@dataclass(frozen=True, slots=True)
class Reading:
    """How paragraphs are chosen."""

    matched: Mapping[Key, Sequence[int]]  # those that words have found, best first
    terms: Sequence[str]  # for the other articles


def evidence_of(packs: Mapping[str, Pack], claims: Sequence[Claim], reading: Reading) -> tuple[Evidence, ...]:
    """Evidence of claims, in their order."""
    chosen = _paragraphs(packs, claims, reading)
    titles: dict[Key, str] = {}
    images: dict[Key, ImageRef] = {}
    passages: dict[Key, Passage] = {}  # here a key's number is a paragraph's
    for name, pack in packs.items():
        own = [claim for claim in claims if any(owner == name for owner, _ in claim.keys)]
        if not own:
            continue
        titles |= _keyed(name, pack.store.titles(_numbers(name, (key for claim in own for key in claim.keys))))
        plain = _numbers(name, (claim.keys[0] for claim in own if claim.picture is None))
        images |= _keyed(name, _main_images(pack, plain))
        wanted = _numbers(name, (paragraph for said in chosen for paragraph in said))
        passages |= _keyed(name, {n: _passage(pack, row) for n, row in pack.store.paragraphs(wanted).items()})
    return tuple(
        Evidence(
            titles=tuple(dict.fromkeys(titles[key] for key in claim.keys)),
            passages=tuple(passages[paragraph] for paragraph in said),
            image=_ref(claim.picture.pack, claim.picture.row) if claim.picture else images.get(claim.keys[0]),
            score=claim.score,
            ranks=claim.ranks,
        )
        for claim, said in zip(claims, chosen, strict=True)
    )


def _paragraphs(packs: Mapping[str, Pack], claims: Sequence[Claim], reading: Reading) -> list[list[Key]]:
    """Paragraphs of each claim's articles; each article's best before any second one."""
    found: dict[Key, list[Key]] = {}
    for claim in claims:
        for name, article in claim.keys[: claim.passages]:
            ids = reading.matched.get((name, article)) or [
                match.paragraph for match in packs[name].store.rank(reading.terms, claim.passages, article)
            ]
            found[name, article] = [(name, paragraph) for paragraph in ids]
    for name, pack in packs.items():
        silent = [article for owner, article in found if owner == name and not found[owner, article]]
        leads = pack.store.leads(silent) if silent else {}
        found |= {(name, article): [(name, paragraph)] for article, paragraph in leads.items()}
    return [_in_turns([found[key] for key in claim.keys[: claim.passages]], claim.passages) for claim in claims]


def _in_turns(per_article: Sequence[Sequence[Key]], most: int) -> list[Key]:
    turns = [own[depth] for depth in range(most) for own in per_article if depth < len(own)]
    return turns[:most]


def _main_images(pack: Pack, articles: Sequence[int]) -> dict[int, ImageRef]:
    mains = pack.live_main_images(articles) if articles else {}
    rows = pack.store.images(list(mains.values()))
    return {article: _ref(pack, rows[image]) for article, image in mains.items()}


def _numbers(name: str, keys: Iterable[Key]) -> list[int]:
    return list(dict.fromkeys(number for owner, number in keys if owner == name))


def _keyed(name: str, values: Mapping[int, T]) -> dict[Key, T]:
    return {(name, number): value for number, value in values.items()}


def _ref(pack: Pack, row: ImageRow) -> ImageRef:
    return ImageRef(pack.name, row.id, row.caption, row.licence, row.attribution)


def _passage(pack: Pack, row: ParagraphRow) -> Passage:
    span = row.start, row.start + len(row.text)
    return Passage(pack.name, row.title, row.section, row.id, row.text, row.licence, span)


MAX_QUERIES = 64  # crops and texts of one fused search
MAX_K = 50  # evidence of one fused search
LEAST_SAY = 0.01  # what a query that most likely found nothing still has to say in a fused search
_GAZE = GazeConfig()


@dataclass(frozen=True, slots=True)
class RetrieverConfig:
    """How much comes back, and how channels are joined."""

    top_k: int = 5  # evidence of one result
    passages_per_article: int = 3  # of the first evidence
    duplicate_cosine: float | None = None  # None: what each pack says
    rrf_k: int = RRF_K
    enough_coverage: float = 0.5  # words that explain less of a text query than this let pictures speak too
    cached_crops: int = 4_096  # vectors that are kept, some megabytes
    same_iou: float = _GAZE.same_iou  # crops that overlap this much have one vector


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What one query has brought, channel by channel."""

    question: str
    rankings: tuple[Ranking, ...]
    chance: float  # that what it looks for is in the snapshot
    sure: frozenset[Key]  # what counts as found: its first articles, where the chance is good enough
    things: tuple[Thing, ...] = ()
    matched: Mapping[Key, Sequence[int]] = field(default_factory=dict)  # paragraphs by BM25


class Retriever:
    """Searches one encoder's packs; may be used from several threads."""

    def __init__(self, encoder: Encoder, packs: Sequence[Pack], config: RetrieverConfig | None = None) -> None:
        """Packs must be of this encoder and of different names; PackError otherwise."""
        self.encoder = encoder
        self.config = config or RetrieverConfig()
        self.packs = {pack.name: pack for pack in packs}
        if len(self.packs) != len(packs):
            raise PackError("two packs bear the same name; citations could not tell them apart, open one of them")
        for pack in packs:
            if pack.manifest.encoder not in (None, encoder.fingerprint):
                raise PackError(f"pack '{pack.name}' was built with another encoder; build it again with this one")
        self._channels = Channels(packs, candidates=max(CANDIDATES, 4 * self.config.top_k),
                                  duplicate_cosine=self.config.duplicate_cosine)
        self._crops = CropCache(self.config.cached_crops, self.config.same_iou)

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """One result per query, in order. All pictures are embedded in one batch, all texts in another."""
        return tuple(self._alone(found) for found in self._find(queries, self.config.top_k))

    def search_many(self, crops: Sequence[ImageQuery], texts: Sequence[TextQuery] = (), k: int = 5) -> SearchResult:
        """One result of any number of queries, fused by rank.

        What a query has found, by its calibrated chance, comes before what rankings only agree about; among each, what
        several crops and words point at is first, and a query has the more to say the likelier it has found something.
        `found` is the chance of the likeliest: that at least something of what was searched for is in the snapshot. The
        calibrated rate of false accepts is that of one query: of n unknown things, up to n times as many let one pass.

        Args:
            crops: pictures or parts of them; where they say what they are cut from, those that overlap are embedded
                once.
            texts: words.
            k: evidence at most, 1..MAX_K.

        Raises:
            RequestError: more than MAX_QUERIES crops (with their views) or texts, or `k` out of range.
        """
        pictures = sum(1 + len(crop.views) for crop in crops)
        if pictures > MAX_QUERIES or len(texts) > MAX_QUERIES:
            raise RequestError(f"{pictures} crops (views included) and {len(texts)} texts; at most {MAX_QUERIES} of "
                               "each go into one search")
        if not 1 <= k <= MAX_K:
            raise RequestError(f"k is {k}; from 1 to {MAX_K} things are given")
        return self._together(self._find([*crops, *texts], k), k)

    def search_vectors(self, crops: Vectors, k: int = 5) -> SearchResult:
        """What `search_many` does after encoding: one fused result of crops [n, dim] that are vectors already."""
        return self._together(self._looked([vector[None] for vector in crops], [""] * len(crops), k), k)

    def look(self, queries: Sequence[ImageQuery]) -> list[Look]:
        """What some pictures may show, captions included: what a calibration for pictures is fitted to."""
        return self._channels.look(self._embed(queries), captions=lambda _: True)

    # --- each query ---------------------------------------------------------------------------

    def _find(self, queries: Sequence[Query], k: int) -> list[_Found]:
        images = [(n, query) for n, query in enumerate(queries) if isinstance(query, ImageQuery)]
        texts = [(n, query) for n, query in enumerate(queries) if isinstance(query, TextQuery)]
        looked = self._looked(self._embed([query for _, query in images]), [query.question for _, query in images], k)
        found = dict(zip([n for n, _ in images], looked, strict=True))
        found |= zip([n for n, _ in texts], self._read([query for _, query in texts], k), strict=True)
        return [found[n] for n in range(len(queries))]

    def _embed(self, queries: Sequence[ImageQuery]) -> list[Vectors]:
        """The vectors [views, dim] of each query's pixels and views."""
        crops = [crops_of(query) for query in queries]
        vectors = self._crops.embed([crop for own in crops for crop in own], self.encoder.embed_images)
        return np.split(vectors, np.cumsum([len(own) for own in crops])[:-1]) if crops else []

    def _looked(self, views: Sequence[Vectors], questions: Sequence[str], k: int) -> list[_Found]:
        looks = self._channels.look(views, captions=_asks_captions, depth=max(DEPTH, k))
        return [self._seen(look, question) for look, question in zip(looks, questions, strict=True)]

    def _seen(self, look: Look, question: str) -> _Found:
        if not look.things:
            return _Found(question, (), 0.0, frozenset())
        pack = look.things[0].head.pack
        captions = (Ranking(IMAGE_TO_CAPTION, ranks, _caption_weight(self.packs[name]))
                    for name, ranks in look.captions.items())
        rankings = (look.ranking, *(ranking for ranking in captions if ranking.weight))
        chance = _image_chance(pack, look.features)
        first = _first(rankings) if chance >= FOUND else frozenset()
        return _Found(question, rankings, chance, first, look.things)

    def _read(self, queries: Sequence[TextQuery], k: int) -> list[_Found]:
        explained = [[rank_words(pack, query.text) for pack in self.packs.values()] for query in queries]
        best = [max((one.coverage for one in per_pack), default=0.0) for per_pack in explained]
        unclear = [n for n, query in enumerate(queries)
                   if best[n] < self.config.enough_coverage and raw_words(query.text)]
        pictured = self._channels.read(self.encoder.embed_texts([queries[n].text for n in unclear]), max(DEPTH, k))
        seen = dict(zip(unclear, pictured, strict=True))
        return [self._worded(query.question, explained[n], seen.get(n, ())) for n, query in enumerate(queries)]

    def _worded(self, question: str, explained: Sequence[Ranked], seen: tuple[Ranking, ...]) -> _Found:
        packs = list(self.packs.values())
        matched = {(pack.name, article): paragraphs
                   for pack, one in zip(packs, explained, strict=True) for article, paragraphs in one.articles}
        words = [Ranking(WORDS, ranked((pack.name, article) for article, _ in one.articles))
                 for pack, one in zip(packs, explained, strict=True)]
        chances = [_text_chance(pack, one.features) for pack, one in zip(packs, explained, strict=True)]
        sure = (_first([own]) for own, chance in zip(words, chances, strict=True) if chance >= FOUND)
        rankings = (*seen, *words)
        return _Found(question, rankings, max(chances, default=0.0), frozenset().union(*sure), matched=matched)

    # --- answers ------------------------------------------------------------------------------

    def _alone(self, found: _Found) -> SearchResult:
        """The result of one query. What a picture only resembles is named and not quoted."""
        fused = fuse(found.rankings, self.config.rrf_k)
        further = 0 if found.things else 1
        claims = self._claims(fused, found.rankings, found.things, self.config.top_k, further)
        if [ranking.channel for ranking in found.rankings] == [IMAGE_TO_IMAGE]:
            claims = [replace(claim, score=claim.picture.score) for claim in claims if claim.picture]
        reading = Reading(found.matched, search_terms(raw_words(found.question)))
        return SearchResult(evidence_of(self.packs, claims, reading), found.chance)

    def _together(self, found: Sequence[_Found], k: int) -> SearchResult:
        surest = sorted(found, key=lambda one: -one.chance)
        rankings = [each for one in surest for each in weighted(one.rankings, max(one.chance, LEAST_SAY))]
        sure = frozenset[Key]().union(*(one.sure for one in found))
        fused = fuse(rankings, self.config.rrf_k)
        order = {key: fused[key] for key in sorted(fused, key=lambda key: key not in sure)}
        claims = self._claims(order, rankings, [thing for one in surest for thing in one.things], k, 1)
        questions = " ".join(dict.fromkeys(one.question for one in found))
        matched = {key: ids for one in reversed(surest) for key, ids in one.matched.items()}
        reading = Reading(matched, search_terms(raw_words(questions)))
        return SearchResult(evidence_of(self.packs, claims, reading), surest[0].chance if surest else 0.0)

    def _claims(self, fused: Mapping[Key, float], rankings: Sequence[Ranking], things: Iterable[Thing], k: int,
                further: int) -> list[Claim]:
        """The first k things: articles in order, those together that share a picture."""
        shows: dict[Key, Thing] = {}
        for thing in things:
            for key in thing.keys:
                shows.setdefault(key, thing)
        most = self.config.passages_per_article
        claims: list[Claim] = []
        named: set[Key] = set()
        for key, score in fused.items():
            if len(claims) == k:
                break
            if key not in named:
                shown = shows.get(key)
                keys = tuple(dict.fromkeys((key, *shown.keys))) if shown else (key,)
                named.update(keys)
                passages = min(further, most) if claims else most
                claims.append(Claim(keys, shown.head if shown else None, score, ranks_of(key, rankings), passages))
        return claims


def _first(rankings: Sequence[Ranking]) -> frozenset[Key]:
    """The articles that come first when rankings are fused."""
    fused = fuse(rankings)
    best = max(fused.values(), default=0.0)
    return frozenset(key for key, score in fused.items() if score == best)


def _asks_captions(pack: Pack) -> bool:
    calibration = pack.manifest.image_calibration
    return calibration is not None and calibration.asks_captions


def _caption_weight(pack: Pack) -> float:
    calibration = pack.manifest.image_calibration
    return calibration.caption_weight if calibration else 0.0


def _image_chance(pack: Pack, features: tuple[float, ...]) -> float:
    calibration = pack.manifest.image_calibration
    return calibration.chance(features) if calibration else min(1.0, max(0.0, features[0]))


def _text_chance(pack: Pack, features: tuple[float, ...]) -> float:
    calibration = pack.manifest.text_calibration
    return calibration.chance(features) if calibration else features[0] * (1.0 - features[1])
