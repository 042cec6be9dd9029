"""What is no longer there after a generation, and what is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import full_disk_said
from gog_edge.indexing.commit import changing, commit, prune, write_tombstones
from gog_edge.indexing.index_planning import golden_image
from gog_edge.retrieval.manifest import Counts, Manifest
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.text.words import name_key, raw_words, search_terms
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import Ids

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


NEAR = 3  # names that are proposed in place of an unknown one
NEIGHBOURS = 2_000  # names that are compared with it
SAME_BEGINNING = 2  # characters


def remove(folder: Path, *, articles: Sequence[str] = (), images: Sequence[int] = ()) -> Manifest:
    """Take articles and images out of a pack; nothing is embedded or indexed again, the files shrink with `compact`.

    An image goes with the last article that shows it.

    Args:
        folder: the pack.
        articles: titles or keys.
        images: ids, as citations give them.

    Raises:
        PackError: a name or id is not there, a title is that of several articles, nothing would be left, the pack is
            being written, or the disk is full. The generation in force stays.
    """
    with changing(folder) as parent, full_disk_said(folder, PackError):
        prune(folder)
        before, buried = read_tombstones(folder, parent)
        store = Store.open(folder, parent.segments, before.tolist())
        try:
            gone = np.union1d(before, _ids(find_article(store, name) for name in articles))
            named = np.union1d(buried, _ids(_find_image(store, image, buried) for image in images))
            dead = dead_images(store.readers, gone, named)
            counts = live_counts(store.readers, gone, dead)
        finally:
            store.close()
        if not counts.articles:
            raise PackError(f"pack '{parent.name}': no article would be left; remove the folder '{folder}' instead")
        manifest = replace(
            parent,
            generation=parent.generation + 1,
            parent=parent.generation,
            tombstones=write_tombstones(folder, parent.generation + 1, gone, dead),
            counts=counts,
            golden=_golden(folder, parent, dead),
        )
        return commit(folder, manifest, parent)


def find_article(store: Store, name: str) -> int:
    """The live article of a key, or else of a title; PackError names near ones where there is none."""
    article = store.article(name)
    if article is not None:
        return article
    titled = [hit.article for hit in store.named([name_key(name)]) if not hit.redirect]
    if len(titled) > 1:
        keys = [key for reader in store.readers for key in reader.keys_of(titled).values()]
        raise PackError(f"'{name}' is the title of {len(titled)} articles; name one by its key: {_listed(keys)}")
    if titled:
        return titled[0]
    near = near_titles(store, name)
    raise PackError(f"there is no article '{name}' in this pack; "
                    + (f"near it are {_listed(near)}" if near else "give a title as citations write it"))


def near_titles(store: Store, name: str) -> list[str]:
    """Titles that a person may have meant: what it is another name of, those spelled alike, those with its words."""
    key = name_key(name)
    redirected = store.titles(hit.article for hit in store.named([key])).values()
    alike = [title for reader in store.readers for title in reader.names_from(key[:SAME_BEGINNING], NEIGHBOURS)]
    matches = store.rank(search_terms(raw_words(name)), NEAR)
    worded = store.titles(match.article for match in matches).values()
    spelled = {name_key(title): title for title in (*alike, *worded)}
    close = [spelled[match] for match in get_close_matches(key, spelled, NEAR) if store.named([match])]
    return list(dict.fromkeys((*redirected, *close, *worded)))[:NEAR]


def _find_image(store: Store, image: int, buried: Ids) -> int:
    if image in buried or image not in store.images([image]):
        raise PackError(f"there is no image {image} in this pack; citations and /v1/search give the ids of images")
    return image


def _golden(folder: Path, parent: Manifest, dead: Ids) -> int | None:
    """The parent's where it is still there: with fewer images around it, it only finds itself more surely."""
    if parent.golden is None or parent.golden not in dead:
        return parent.golden
    shards = open_shards(folder, parent.images, parent.encoder.dim if parent.encoder else 0)
    return golden_image(VectorIndex.open(folder, parent.images.index, shards, tombstones=dead), dead, None)


def _ids(values: Iterable[int]) -> Ids:
    return np.fromiter(values, dtype=np.int64)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
