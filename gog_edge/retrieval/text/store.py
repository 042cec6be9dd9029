"""BM25 over several segments: a small segment's own word counts would value its words wrongly."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nsmallest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gog_edge.retrieval.manifest import Counts, Segment
from gog_edge.retrieval.text.segment import Link, Match, NameHit, ParagraphRow, SegmentReader, StoredPicture

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


REMEMBERED_TERMS = 50_000
REMEMBERED_IMAGES = 100_000  # rows without pixels, about 50 MB

# Paragraphs that one query may make BM25 look at: a word that stands everywhere tells little and costs most.
AFFORDABLE_PARAGRAPHS = 20_000
NEARLY_ALL = 0.95  # of the pack's paragraphs: words are worth in such a segment what they are worth in the pack


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image without its pixels; `articles` are ids, the main one first."""

    id: int
    caption: str
    licence: str
    attribution: str
    articles: tuple[int, ...]
    titles: tuple[str, ...]


class Store:
    """Reads the segments of a pack; usable from several threads."""

    def __init__(self, segments: Sequence[tuple[Segment, SegmentReader]], gone: Collection[int] = ()) -> None:
        """`gone`: ids of articles that are no longer there."""
        self._segments = list(segments)
        self._gone = frozenset(gone)
        self._images: dict[int, ImageRow] = {}
        self._frequencies: dict[str, tuple[int, ...]] = {}  # of each segment

    @classmethod
    def open(cls, folder: Path, segments: Sequence[Segment], gone: Collection[int] = ()) -> Store:
        """Open every segment below a pack's folder. Raises PackError as `SegmentReader.open` does."""
        readers: list[tuple[Segment, SegmentReader]] = []
        try:
            for segment in segments:
                readers.append((segment, SegmentReader.open(folder / segment.store)))
        except BaseException:
            for _, reader in readers:
                reader.close()
            raise
        return cls(readers, gone)

    @property
    def readers(self) -> list[SegmentReader]:
        """One for each segment, the oldest first."""
        return [reader for _, reader in self._segments]

    def close(self) -> None:
        """Close all connections; nobody may be reading."""
        for reader in self.readers:
            reader.close()

    # --- what there is ------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Rows of all segments, dead ones included."""
        each = [segment.counts for segment, _ in self._segments]
        return Counts(*(sum(getattr(one, name) for one in each) for name in Counts.__slots__))

    def image_ids(self) -> NDArray[np.int64]:
        """Ids of all images, sorted, dead ones included: [n] int64."""
        return np.concatenate([np.empty(0, np.int64), *(reader.image_ids() for reader in self.readers)])

    def picture(self, image: int) -> StoredPicture | None:
        """The stored file of an image, or None where there is no such image."""
        reader = self._holding("images", image)
        return reader.picture(image) if reader else None

    def images(self, ids: Collection[int]) -> dict[int, ImageRow]:
        """Images by id, with their live articles. Rows are remembered: nothing changes while a pack is open."""
        known = self._images
        found = {image: known[image] for image in ids if image in known}
        missing = [image for image in ids if image not in found]
        if missing:
            found |= self._read_images(missing)
            if len(known) > REMEMBERED_IMAGES:
                known = self._images = {}  # a new one: other threads may still read the old
            known.update(found)
        return found

    def _read_images(self, ids: Sequence[int]) -> dict[int, ImageRow]:
        rows = [row for reader, own in self._split("images", ids) for row in reader.picture_rows(own)]
        links: dict[int, list[Link]] = {row.id: [] for row in rows}
        for link in self._live(link for reader in self.readers for link in reader.links_of(links)):
            links[link.image].append(link)
        for own in links.values():
            own.sort(key=lambda link: link.position)  # of all segments: the same when they are one
        titles = self.titles({link.article for own in links.values() for link in own})
        return {
            row.id: ImageRow(
                id=row.id,
                caption=next((link.caption for link in links[row.id] if link.caption), ""),
                licence=row.licence,
                attribution=row.attribution,
                articles=tuple(link.article for link in links[row.id]),
                titles=tuple(titles[link.article] for link in links[row.id]),
            )
            for row in rows
        }

    def main_images(self, articles: Iterable[int], without: Collection[int] = ()) -> dict[int, int]:
        """The image of each article that is most its own: article id -> image id; never one of `without`."""
        wanted = list(articles)
        found: dict[int, Link] = {}
        for link in (link for reader in self.readers for link in reader.links_in(wanted)):
            best = found.get(link.article)
            if link.image not in without and (best is None or link.position < best.position):
                found[link.article] = link
        return {article: link.image for article, link in found.items()}

    def article(self, key: str) -> int | None:
        """The live article of a key, or None where there is none."""
        found = (reader.known([key]).get(key) for reader in reversed(self.readers))
        return next((one[0] for one in found if one is not None and one[0] not in self._gone), None)

    def titles(self, articles: Iterable[int]) -> dict[int, str]:
        """Titles by article id."""
        found: dict[int, str] = {}
        for reader, own in self._split("articles", articles):
            found |= reader.titles(own)
        return found

    def paragraphs(self, ids: Iterable[int]) -> dict[int, ParagraphRow]:
        """Paragraphs by id."""
        found: dict[int, ParagraphRow] = {}
        for reader, own in self._split("paragraphs", ids):
            found |= reader.paragraphs(own)
        return found

    def leads(self, articles: Iterable[int]) -> dict[int, int]:
        """The first paragraph of each article that has one."""
        found: dict[int, int] = {}
        for reader, own in self._split("articles", articles):
            found |= reader.leads(own)
        return found

    # --- search -------------------------------------------------------------------------------

    def named(self, keys: Collection[str]) -> list[NameHit]:
        """Live articles whose title or redirect has one of these keys (see `name_key`), titles before redirects."""
        hits = [hit for reader in self.readers for hit in reader.named(keys) if hit.article not in self._gone]
        return sorted(hits, key=lambda hit: (hit.redirect, hit.article))

    def rank(self, terms: Sequence[str], limit: int, article: int | None = None) -> list[Match]:
        """Paragraphs that hold any of `terms` (as `search_terms` gives them) by BM25, of one article or of all.

        Over all articles, the commonest of many terms are left out where they would make the search slow. Where all are
        that common, paragraphs that hold all of them come, or else the rarest, in no order.
        """
        if not terms:
            return []
        if article is not None:
            reader = self._holding("articles", article)
            return rank_within(reader, article, self._worths(terms), limit) if reader else []
        affordable = self._affordable(terms)
        if not affordable:
            return self._first_holding(terms, limit)
        found = [match for place in range(len(self._segments)) for match in self._rank_live(place, affordable, limit)]
        return sorted(found, key=lambda match: (-match.score, match.paragraph))[:limit]

    def _affordable(self, terms: Sequence[str]) -> list[str]:
        """The rarest terms whose paragraphs can be looked at; none where even the rarest stands in too many."""
        kept: list[str] = []
        spent = 0
        for term in sorted(terms, key=self.frequency):
            spent += self.frequency(term)
            if spent > AFFORDABLE_PARAGRAPHS:
                break
            kept.append(term)
        return kept if any(self.frequency(term) for term in kept) else []

    def _first_holding(self, terms: Sequence[str], limit: int) -> list[Match]:
        worths = self._worths(terms)
        for wanted in (list(worths), sorted(worths, key=self.frequency)[:1]):
            score = sum(worths[term] for term in wanted)
            readers = self.readers if wanted else []
            found = [match for reader in readers
                     for match in self._live_matches(partial(reader.first_holding, wanted), limit)]
            live = [replace(match, score=score) for match in found]
            if live:
                return live[:limit]
        return []

    def _worths(self, terms: Sequence[str]) -> dict[str, float]:
        """The idf of each term that the pack holds."""
        rows = self.counts().paragraphs
        return {term: idf(rows, self.frequency(term)) for term in terms if self.frequency(term)}

    def _rank_live(self, place: int, terms: Sequence[str], limit: int) -> list[Match]:
        reader = self.readers[place]
        rows, own = self.counts().paragraphs, self._segments[place][0].counts.paragraphs
        if own >= NEARLY_ALL * rows:  # it values words as the whole pack does, and ranks them quickest
            return self._live_matches(partial(reader.rank, terms), limit)
        held = [(term, self._frequencies_of(term)[place]) for term in terms]
        factors = {term: idf(rows, self.frequency(term)) / idf(own, count) for term, count in held if count}
        return self._live_matches(partial(rank_by, reader, factors), limit)

    def _live_matches(self, find: Callable[[int], list[Match]], limit: int) -> list[Match]:
        """The first that are still there, of what `find` gives when it is asked for so many."""
        asked = limit
        while True:
            matches = find(asked)
            live = [match for match in matches if match.article not in self._gone]
            if len(live) >= limit or len(matches) < asked:
                return live[:limit]
            asked *= 2

    def frequency(self, term: str) -> int:
        """How many paragraphs hold a term, dead ones included; counts are remembered."""
        return sum(self._frequencies_of(term))

    def _frequencies_of(self, term: str) -> tuple[int, ...]:
        counts = self._frequencies.get(term)
        if counts is None:
            counts = tuple(reader.frequency(term) for reader in self.readers)
            if len(self._frequencies) > REMEMBERED_TERMS:
                self._frequencies = {}
            self._frequencies[term] = counts
        return counts

    def holds(self, article: int, term: str) -> bool:
        """Whether an article (title and sections included) holds a term."""
        reader = self._holding("articles", article)
        return reader.holds(article, term) if reader else False

    # --- segments -----------------------------------------------------------------------------

    def _live(self, links: Iterable[Link]) -> Iterator[Link]:
        return (link for link in links if link.article not in self._gone)

    def _holding(self, kind: str, number: int) -> SegmentReader | None:
        """The segment whose span of `kind` has this id: spans rise from segment to segment."""
        place = bisect_right(self._segments, number, key=lambda pair: int(getattr(pair[0], kind).first)) - 1
        if place < 0:
            return None
        segment, reader = self._segments[place]
        return reader if number in getattr(segment, kind) else None

    def _split(self, kind: str, ids: Iterable[int]) -> Iterator[tuple[SegmentReader, list[int]]]:
        """Ids by the segment that holds them; others are left out."""
        groups: dict[int, tuple[SegmentReader, list[int]]] = {}
        for number in ids:
            reader = self._holding(kind, number)
            if reader is not None:
                groups.setdefault(id(reader), (reader, []))[1].append(number)
        yield from groups.values()
