"""BM25 over several segments: a small segment's own word counts would value its words wrongly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import nsmallest

from gog_edge.retrieval.segment import Match, SegmentReader

K1 = 1.2  # FTS5's own
LEAST_IDF = 1e-6  # what FTS5 takes where a word stands in half the rows or more


def idf(rows: int, holding: int) -> float:
    """How much a word tells that `holding` of `rows` paragraphs hold, as FTS5's bm25() reckons it.

    The formula is that of https://sqlite.org/fts5.html#the_bm25_function.
    """
    value = math.log((rows - holding + 0.5) / (holding + 0.5))
    return value if value > 0 else LEAST_IDF


def rank_by(reader: SegmentReader, factors: Mapping[str, float], limit: int) -> list[Match]:
    """A segment's best paragraphs, the part of each word in BM25 times its factor: what it is worth elsewhere.

    Every paragraph that holds a word counts, whatever the segment's own order: for words that stand in few.
    """
    found: dict[int, float] = {}
    for term, factor in factors.items():
        for paragraph, score in reader.scores(term):
            found[paragraph] = found.get(paragraph, 0.0) + factor * score
    best = nsmallest(limit, found, key=lambda paragraph: (-found[paragraph], paragraph))
    articles = reader.articles_of(best)
    return [Match(paragraph, articles[paragraph], found[paragraph]) for paragraph in best]


def rank_within(reader: SegmentReader, article: int, worths: Mapping[str, float], limit: int) -> list[Match]:
    """An article's best paragraphs for words of given worth, in time that does not grow with the segment.

    bm25() would count each word over the whole segment. Here a word counts once, and again for each time that it stands
    in the section's title: lengths and repetitions tell little among the paragraphs of one article.
    """
    found: dict[int, float] = {}
    for term, worth in worths.items():
        for paragraph, in_section in reader.places(article, term).items():
            count = 1 + in_section
            found[paragraph] = found.get(paragraph, 0.0) + worth * count * (K1 + 1) / (count + K1)
    best = sorted(found, key=lambda paragraph: (-found[paragraph], paragraph))[:limit]
    return [Match(paragraph, article, found[paragraph]) for paragraph in best]
