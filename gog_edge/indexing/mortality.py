"""What is no longer there after a generation, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np

from gog_edge.retrieval.manifest import Counts
from gog_edge.retrieval.segment import SegmentReader
from gog_edge.retrieval.vectors import Ids

BATCH = 5_000  # ids of one question to a store


def replaced(new: SegmentReader, earlier: Sequence[SegmentReader], *, only: bool) -> Ids:
    """Articles of earlier segments that `new` holds in another version; with `only`, or does not hold at all."""
    found: list[int] = []
    if only:
        kept = new.kept()
        for reader in earlier:
            for keys in reader.keys(BATCH):
                again = new.known(keys)
                found += [article for key, article in keys.items() if key in again or article not in kept]
    else:  # what is added may be little, and what was there much
        for keys in new.keys(BATCH):
            found += [article for reader in earlier for article, _ in reader.known(keys).values()]
    return np.array(sorted(found), dtype=np.int64)


def dead_images(readers: Sequence[SegmentReader], gone: Ids, dead: Ids, new: SegmentReader | None = None) -> Ids:
    """Images that are no longer there, sorted: in no live article, or removed by name.

    Those that were `dead` before stay so, unless the `new` segment shows them again.
    """
    doubtful: set[int] = set()
    for articles in _batches(gone):
        doubtful.update(link.image for reader in readers for link in reader.links_in(articles))
    buried = set(dead.tolist())
    still = doubtful - buried - _shown(readers, doubtful - buried, gone)
    again = set() if new is None else _shown([new], buried, gone)
    return np.array(sorted(still | (buried - again)), dtype=np.int64)


def _shown(readers: Sequence[SegmentReader], images: Set[int], gone: Ids) -> set[int]:
    """Those of some images that a live article shows."""
    nobody = frozenset(gone.tolist())
    alive: set[int] = set()
    for batch in _batches(np.array(sorted(images), dtype=np.int64)):
        links = (link for reader in readers for link in reader.links_of(batch))
        alive.update(link.image for link in links if link.article not in nobody)
    return alive


def live_counts(readers: Sequence[SegmentReader], gone: Ids, dead: Ids) -> Counts:
    """Rows of all segments, less those that are no longer there."""
    each = [reader.counts() for reader in readers]
    paragraphs = sum(reader.paragraph_count(articles) for articles in _batches(gone) for reader in readers)
    return Counts(
        sum(counts.articles for counts in each) - len(gone),
        sum(counts.paragraphs for counts in each) - paragraphs,
        sum(counts.images for counts in each) - len(dead),
    )


def _batches(ids: Ids) -> Iterator[list[int]]:
    for at in range(0, len(ids), BATCH):
        yield ids[at : at + BATCH].tolist()
