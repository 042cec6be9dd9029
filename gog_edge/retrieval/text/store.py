"""The store of a pack: its SQLite segments read as one, with BM25 over all of them.

A paragraph must rank alike in whichever segment it is stored. FTS5 takes document frequencies from the segment alone;
in a small segment they are unlike those of the pack, and scores are corrected by the ratio of the two idf values.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nsmallest
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import Counts, Segment
from gog_edge.retrieval.text.segment import (
    ImageFile,
    ImageLink,
    NameMatch,
    ParagraphMatch,
    ParagraphRow,
    SegmentReader,
)

K1 = 1.2  # of BM25, as in FTS5
MIN_IDF = 1e-6  # FTS5's value for a term in half of the rows or more
MAX_CACHED_TERMS = 50_000
MAX_CACHED_IMAGES = 100_000  # rows without pixels, about 50 MB
# Paragraphs that BM25 may score for one query. Terms that occur in more of them say little and cost the most.
MAX_SCORED_PARAGRAPHS = 20_000
DOMINANT_SHARE = 0.95  # a segment with this share of the pack's paragraphs has the pack's idf values, near enough


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image without its pixels, with its links to live articles, the main one first."""

    id: int
    links: tuple[ImageLink, ...]
    titles: tuple[str, ...]  # of the linked articles

    @property
    def articles(self) -> tuple[int, ...]:
        """Return the ids of the articles."""
        return tuple(link.article for link in self.links)

    @property
    def caption(self) -> str:
        """Return the first caption."""
        return next((link.caption for link in self.links if link.caption), "")

    def link_to(self, article: int) -> ImageLink | None:
        """Return the link to an article, else to the main one: equal files may have other licences elsewhere."""
        return next((link for link in self.links if link.article == article), self.links[0] if self.links else None)


class Store:
    """The segments of a pack, without deleted articles; may be read from several threads."""

    def __init__(self, segments: Sequence[tuple[Segment, SegmentReader]], deleted: Collection[int] = ()) -> None:
        """Combine open segments, the oldest first; `deleted` are ids of articles."""
        self._segments = [segment for segment, _ in segments]
        self._readers = [reader for _, reader in segments]
        self._deleted = frozenset(deleted)
        self._paragraphs = sum(segment.counts.paragraphs for segment in self._segments)
        # First and last id of each segment, by kind. Ids rise from segment to segment.
        self._ranges: dict[str, tuple[list[int], list[int]]] = {}
        for kind in ("articles", "paragraphs", "images"):
            ranges = [getattr(segment, kind) for segment in self._segments]
            self._ranges[kind] = [one.first for one in ranges], [one.last for one in ranges]
        self._images: dict[int, ImageRow] = {}  # cache
        self._frequencies: dict[str, tuple[int, ...]] = {}  # cache: per segment, by term

    @classmethod
    def open(cls, folder: Path, segments: Sequence[Segment], deleted: Collection[int] = ()) -> Store:
        """Open every segment below a pack's folder. Raises PackError as `SegmentReader.open` does."""
        opened: list[tuple[Segment, SegmentReader]] = []
        try:
            for segment in segments:
                opened.append((segment, SegmentReader.open(folder / segment.store)))
        except BaseException:
            for _, reader in opened:
                reader.close()
            raise
        return cls(opened, deleted)

    @property
    def readers(self) -> list[SegmentReader]:
        """Return the readers of all segments, the oldest first."""
        return self._readers

    def close(self) -> None:
        """Close all connections. No read may be running."""
        for reader in self._readers:
            reader.close()

    # --- rows ---------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Return the row counts of all segments, deleted rows included."""
        each = [segment.counts for segment in self._segments]
        return Counts(*(sum(getattr(one, name) for one in each) for name in Counts.__slots__))

    def image_ids(self) -> NDArray[np.int64]:
        """Return the ids of all images, deleted ones included, sorted: [n] int64."""
        return np.concatenate([np.empty(0, np.int64), *(reader.image_ids() for reader in self._readers)])

    def image_file(self, image: int) -> ImageFile | None:
        """Return the stored file of an image, or None if the id is unknown."""
        reader = self._reader_of("images", image)
        return reader.image_file(image) if reader else None

    def images(self, ids: Collection[int]) -> dict[int, ImageRow]:
        """Return images by id, with their live articles. Rows are cached: an open pack does not change."""
        cache = self._images
        found = {image: cache[image] for image in ids if image in cache}
        missing = [image for image in ids if image not in found]
        if missing:
            found |= self._read_images(missing)
            if len(cache) > MAX_CACHED_IMAGES:
                cache = self._images = {}  # a new dict: other threads may still read the old one
            cache.update(found)
        return found

    def _read_images(self, ids: Sequence[int]) -> dict[int, ImageRow]:
        links: dict[int, list[ImageLink]] = {
            image: [] for reader, own in self._split("images", ids) for image in reader.known_images(own)}
        for link in (link for reader in self._readers for link in reader.links_of_images(links)):
            if link.article not in self._deleted:
                links[link.image].append(link)
        for own in links.values():
            own.sort(key=lambda link: link.position)  # merges segments; a stable sort keeps the order within each
        titles = self.titles({link.article for own in links.values() for link in own})
        return {image: ImageRow(image, tuple(own), tuple(titles[link.article] for link in own))
                for image, own in links.items()}

    def main_images(self, articles: Iterable[int], without: Collection[int] = ()) -> dict[int, int]:
        """Return the main image of each article, skipping images in `without`: article id -> image id."""
        wanted = list(articles)
        found: dict[int, ImageLink] = {}
        for link in (link for reader in self._readers for link in reader.links_of_articles(wanted)):
            best = found.get(link.article)
            if link.image not in without and (best is None or link.position < best.position):
                found[link.article] = link
        return {article: link.image for article, link in found.items()}

    def article_by_key(self, key: str) -> int | None:
        """Return the id of the live article with a key, or None."""
        found = (reader.articles_by_key([key]).get(key) for reader in reversed(self._readers))
        return next((one[0] for one in found if one is not None and one[0] not in self._deleted), None)

    def titles(self, articles: Iterable[int]) -> dict[int, str]:
        """Return titles by article id. Raises PackError for an article that the store does not have."""
        found: dict[int, str] = {}
        wanted = list(articles)
        for reader, own in self._split("articles", wanted):
            found |= reader.titles(own)
        if missing := [article for article in wanted if article not in found]:
            raise PackError(f"pack: an image, a name or a paragraph belongs to article {missing[0]}, which is missing "
                            "from the store; build the pack again")  # fmt: skip
        return found

    def paragraphs(self, ids: Iterable[int]) -> dict[int, ParagraphRow]:
        """Return paragraphs by id."""
        found: dict[int, ParagraphRow] = {}
        for reader, own in self._split("paragraphs", ids):
            found |= reader.paragraphs(own)
        return found

    def paragraph_ids(self) -> NDArray[np.int64]:
        """Return the ids of all paragraphs, deleted ones included, sorted: [n] int64."""
        return np.concatenate([np.empty(0, np.int64), *(reader.paragraph_ids() for reader in self._readers)])

    def deleted_paragraphs(self) -> NDArray[np.int64]:
        """Return the sorted ids of the paragraphs of deleted articles."""
        return paragraphs_of(self._readers, self._deleted)

    def articles_of(self, paragraphs: Iterable[int]) -> dict[int, int]:
        """Return the article of each paragraph: paragraph id -> article id."""
        found: dict[int, int] = {}
        for reader, own in self._split("paragraphs", paragraphs):
            found |= reader.articles_of(own)
        return found

    def lead_paragraphs(self, articles: Iterable[int]) -> dict[int, int]:
        """Return the first paragraph of each article that has one: article id -> paragraph id."""
        found: dict[int, int] = {}
        for reader, own in self._split("articles", articles):
            found |= reader.lead_paragraphs(own)
        return found

    # --- search -------------------------------------------------------------------------------

    def find_names(self, keys: Collection[str]) -> list[NameMatch]:
        """Return live articles with a title or redirect of one of these keys (see `name_key`), titles first."""
        found = [name for reader in self._readers for name in reader.find_names(keys)]
        return sorted((name for name in found if name.article not in self._deleted),
                      key=lambda name: (name.redirect, name.article))

    def rank(self, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        """Return up to `limit` paragraphs with any of `terms` (see `search_terms`), best BM25 score first.

        The most frequent terms are ignored if scoring them would visit more than MAX_SCORED_PARAGRAPHS. If all terms
        are that frequent, paragraphs with all of them are returned, or else with the rarest one, in no order.
        """
        scored = self._scorable(terms)
        if not scored:
            return self._first_with_all(terms, limit)
        each = (self._rank_segment(segment, scored, limit) for segment in range(len(self._segments)))
        return sorted(chain.from_iterable(each), key=lambda match: (-match.score, match.paragraph))[:limit]

    def rank_within(self, article: int, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        """Return up to `limit` paragraphs of one article with any of `terms`, best first.

        The score is BM25 with b = 0 and a term frequency of one, or two if the section's title has the term too: length
        and repetition say little among the paragraphs of one article. FTS5's bm25() would count each term over the
        whole segment.
        """
        reader = self._reader_of("articles", article)
        if reader is None:
            return []
        scores: dict[int, float] = {}
        for term, weight in self._idfs(terms).items():
            for paragraph, in_title in reader.section_matches(article, term).items():
                count = 1 + in_title
                scores[paragraph] = scores.get(paragraph, 0.0) + weight * count * (K1 + 1) / (count + K1)
        best = sorted(scores, key=lambda paragraph: (-scores[paragraph], paragraph))[:limit]
        return [ParagraphMatch(paragraph, article, scores[paragraph]) for paragraph in best]

    def frequency(self, term: str) -> int:
        """Return the number of paragraphs that contain a term, deleted ones included. Results are cached."""
        return sum(self._segment_frequencies(term))

    def knows(self, word: str) -> bool:
        """Return whether any paragraph, deleted ones included, has a folded word (see `SegmentReader.knows`)."""
        return any(reader.knows(word) for reader in self._readers)

    def contains(self, article: int, term: str) -> bool:
        """Return whether an article, its title or a section title contains a term."""
        reader = self._reader_of("articles", article)
        return reader.contains(article, term) if reader else False

    def _scorable(self, terms: Sequence[str]) -> list[str]:
        """Return the rarest terms that BM25 can score; none if even the rarest occurs in too many paragraphs."""
        scored: list[str] = []
        visited = 0
        for term in sorted(terms, key=self.frequency):
            visited += self.frequency(term)
            if visited > MAX_SCORED_PARAGRAPHS:
                break
            scored.append(term)
        return scored if any(self.frequency(term) for term in scored) else []

    def _rank_segment(self, segment: int, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        """Rank the live paragraphs of one segment with the idf values of the whole pack."""
        reader, own = self._readers[segment], self._segments[segment].counts.paragraphs
        if own >= DOMINANT_SHARE * self._paragraphs:  # the fast path: FTS5 ranks by itself
            return self._live(partial(reader.rank, terms), limit)
        in_segment = {term: self._segment_frequencies(term)[segment] for term in terms}
        factors = {term: idf(self._paragraphs, self.frequency(term)) / idf(own, count)
                   for term, count in in_segment.items() if count}
        return self._live(partial(_rank_scaled, reader, factors), limit)

    def _first_with_all(self, terms: Sequence[str], limit: int) -> list[ParagraphMatch]:
        weights = self._idfs(terms)
        for wanted in (list(weights), sorted(weights, key=self.frequency)[:1]):
            score = sum(weights[term] for term in wanted)
            readers = self._readers if wanted else []
            found = [match for reader in readers for match in self._live(partial(reader.first_with_all, wanted), limit)]
            if found:
                return [replace(match, score=score) for match in found[:limit]]
        return []

    def _live(self, fetch: Callable[[int], list[ParagraphMatch]], limit: int) -> list[ParagraphMatch]:
        """Return the first `limit` matches of live articles; `fetch` returns as many matches as it is asked for."""
        count = limit
        while True:
            matches = fetch(count)
            live = [match for match in matches if match.article not in self._deleted]
            if len(live) >= limit or len(matches) < count:
                return live[:limit]
            count *= 2

    def _idfs(self, terms: Sequence[str]) -> dict[str, float]:
        """Return the idf of each term that occurs in the pack."""
        return {term: idf(self._paragraphs, self.frequency(term)) for term in terms if self.frequency(term)}

    def _segment_frequencies(self, term: str) -> tuple[int, ...]:
        counts = self._frequencies.get(term)
        if counts is None:
            counts = tuple(reader.frequency(term) for reader in self._readers)
            if len(self._frequencies) > MAX_CACHED_TERMS:
                self._frequencies = {}
            self._frequencies[term] = counts
        return counts

    # --- segments by id -----------------------------------------------------------------------

    def _reader_of(self, kind: str, number: int) -> SegmentReader | None:
        """Return the reader of the segment whose id range of `kind` includes an id, or None."""
        first, last = self._ranges[kind]
        segment = bisect_right(first, number) - 1
        return self._readers[segment] if segment >= 0 and number <= last[segment] else None

    def _split(self, kind: str, ids: Iterable[int]) -> Iterator[tuple[SegmentReader, list[int]]]:
        """Group ids by the segment that has them; unknown ids are dropped."""
        groups: dict[int, tuple[SegmentReader, list[int]]] = {}
        for number in ids:
            reader = self._reader_of(kind, number)
            if reader is not None:
                groups.setdefault(id(reader), (reader, []))[1].append(number)
        yield from groups.values()


def paragraphs_of(readers: Iterable[SegmentReader], articles: Collection[int]) -> NDArray[np.int64]:
    """Return the sorted ids of the paragraphs of some articles: [n] int64."""
    ranges = sorted(each for reader in readers for each in reader.paragraph_ranges(articles)) if articles else []
    return np.concatenate([np.empty(0, np.int64), *(np.arange(first, last + 1) for first, last in ranges)])


def idf(rows: int, containing: int) -> float:
    """Return the inverse document frequency of a term in `containing` of `rows` paragraphs, as FTS5's bm25() does.

    The formula is given at https://sqlite.org/fts5.html#the_bm25_function, the minimum in FTS5's source (fts5_aux.c).
    """
    value = math.log((rows - containing + 0.5) / (containing + 0.5))
    return value if value > 0 else MIN_IDF


def _rank_scaled(reader: SegmentReader, factors: Mapping[str, float], limit: int) -> list[ParagraphMatch]:
    """Return a segment's best paragraphs, with each term's part of the BM25 score multiplied by its factor.

    Every paragraph with a term is visited, in contrast to `SegmentReader.rank`: the segment's own order may differ.
    """
    scores: dict[int, float] = {}
    for term, factor in factors.items():
        for paragraph, score in reader.term_scores(term):
            scores[paragraph] = scores.get(paragraph, 0.0) + factor * score
    best = nsmallest(limit, scores, key=lambda paragraph: (-scores[paragraph], paragraph))
    articles = reader.articles_of(best)
    return [ParagraphMatch(paragraph, articles[paragraph], scores[paragraph]) for paragraph in best]
