"""What the words of a query mean to one pack: names, redirects, and articles by BM25."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.segment import Match, NameHit
from gog_edge.retrieval.words import raw_words, search_terms, spans

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
