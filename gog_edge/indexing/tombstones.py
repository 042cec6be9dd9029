"""Determines what a generation deletes, and deletes articles and images by name. Files shrink only in `compact`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as
from gog_edge.indexing.commit import commit_generation, modify_pack, prune, write_tombstones
from gog_edge.indexing.vectors.index_writer import golden_image
from gog_edge.retrieval.manifest import Counts, Manifest
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.text.tokens import name_key, search_terms, tokenize
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import Ids

BATCH = 5_000  # ids of one query to a store
MAX_SUGGESTIONS = 3  # titles that are suggested for an unknown name
MAX_COMPARED_TITLES = 2_000  # titles that an unknown name is compared with
COMMON_PREFIX = 2  # characters that these share with it


# --- what a generation deletes ------------------------------------------------------------------


def replaced_articles(new: SegmentReader, earlier: Sequence[SegmentReader], *, delete_missing: bool) -> Ids:
    """Return the sorted ids of earlier articles that the new segment replaces.

    Args:
        new: the new segment.
        earlier: the other segments of the pack.
        delete_missing: also return the articles that the snapshot of the new segment does not contain.
    """
    found: list[int] = []
    if delete_missing:
        unchanged = new.unchanged_articles()
        for reader in earlier:
            for keys in reader.key_batches(BATCH):
                again = new.articles_by_key(keys)
                found += [article for key, article in keys.items() if key in again or article not in unchanged]
    else:  # an addition may be small and the pack large
        for keys in new.key_batches(BATCH):
            found += [article for reader in earlier for article, _ in reader.articles_by_key(keys).values()]
    return np.array(sorted(found), dtype=np.int64)


def deleted_images(readers: Sequence[SegmentReader], articles: Ids, images: Ids,
                   new: SegmentReader | None = None) -> Ids:
    """Return the sorted ids of images that are deleted: those without a live article, and `images`.

    Args:
        readers: all segments.
        articles: ids of deleted articles.
        images: ids of images that are deleted already or by name.
        new: the new segment; images that its articles contain are live again.
    """
    candidates: set[int] = set()
    for batch in _batches(articles):
        candidates.update(link.image for reader in readers for link in reader.links_of_articles(batch))
    before = set(images.tolist())
    orphaned = candidates - before - _images_in_live_articles(readers, candidates - before, articles)
    restored = set() if new is None else _images_in_live_articles([new], before, articles)
    return np.array(sorted(orphaned | (before - restored)), dtype=np.int64)


def _images_in_live_articles(readers: Sequence[SegmentReader], images: Set[int], deleted_articles: Ids) -> set[int]:
    deleted = frozenset(deleted_articles.tolist())
    live: set[int] = set()
    for batch in _batches(np.array(sorted(images), dtype=np.int64)):
        links = (link for reader in readers for link in reader.links_of_images(batch))
        live.update(link.image for link in links if link.article not in deleted)
    return live


def live_counts(readers: Sequence[SegmentReader], articles: Ids, images: Ids) -> Counts:
    """Return the rows of all segments without deleted articles and images."""
    each = [reader.counts() for reader in readers]
    paragraphs = sum(reader.paragraph_count(batch) for batch in _batches(articles) for reader in readers)
    return Counts(
        sum(counts.articles for counts in each) - len(articles),
        sum(counts.paragraphs for counts in each) - paragraphs,
        sum(counts.images for counts in each) - len(images),
    )


def _batches(ids: Ids) -> Iterator[list[int]]:
    for at in range(0, len(ids), BATCH):
        yield ids[at : at + BATCH].tolist()


# --- deletion by name ---------------------------------------------------------------------------


def remove(folder: Path, *, articles: Sequence[str] = (), images: Sequence[int] = ()) -> Manifest:
    """Delete articles and images in a new generation that adds tombstones only.

    An image is deleted with the last article that contains it.

    Args:
        folder: the pack.
        articles: titles or keys.
        images: ids, as citations contain them.

    Raises:
        PackError: a name or id does not exist, a title is ambiguous, no article would remain, the pack is being
            written, or the disk is full. The current generation is unchanged.
    """
    with modify_pack(folder) as parent, full_disk_as(folder, PackError):
        prune(folder, parent)
        old_articles, old_images = read_tombstones(folder, parent)
        store = Store.open(folder, parent.segments, old_articles.tolist())
        try:
            all_articles = np.union1d(old_articles, _ids(find_article(store, name) for name in articles))
            by_id = np.union1d(old_images, _ids(_find_image(store, image, old_images) for image in images))
            all_images = deleted_images(store.readers, all_articles, by_id)
            counts = live_counts(store.readers, all_articles, all_images)
        finally:
            store.close()
        if not counts.articles:
            raise PackError(f"pack '{parent.name}': no article would remain; delete the folder '{folder}' instead")
        manifest = replace(
            parent,
            generation=parent.generation + 1,
            parent=parent.generation,
            tombstones=write_tombstones(folder, parent.generation + 1, all_articles, all_images),
            counts=counts,
            golden=_golden(folder, parent, all_images),
        )
        return commit_generation(folder, manifest, parent)


def find_article(store: Store, name: str) -> int:
    """Return the id of the live article with this key, or else with this title.

    Raises:
        PackError: there is none (similar titles are suggested), or the title is ambiguous (its keys are listed).
    """
    article = store.article_by_key(name)
    if article is not None:
        return article
    titled = [match.article for match in store.find_names([name_key(name)]) if not match.redirect]
    if len(titled) > 1:
        keys = [key for reader in store.readers for key in reader.article_keys(titled).values()]
        raise PackError(f"'{name}' is the title of {len(titled)} articles; give the key of one: {_quoted(keys)}")
    if titled:
        return titled[0]
    similar = similar_titles(store, name)
    raise PackError(f"the article '{name}' does not exist in this pack; "
                    + (f"similar titles: {_quoted(similar)}" if similar else "give a title as citations contain it"))


def similar_titles(store: Store, name: str) -> list[str]:
    """Return titles that may be meant: of a redirect of this name, of similar spelling, with the same words."""
    key = name_key(name)
    redirected = store.titles(match.article for match in store.find_names([key])).values()
    neighbours = [title for reader in store.readers
                  for title in reader.titles_with_prefix(key[:COMMON_PREFIX], MAX_COMPARED_TITLES)]
    matches = store.rank(search_terms(tokenize(name)), MAX_SUGGESTIONS)
    worded = store.titles(match.article for match in matches).values()
    spelled = {name_key(title): title for title in (*neighbours, *worded)}
    close = [spelled[match] for match in get_close_matches(key, spelled, MAX_SUGGESTIONS) if store.find_names([match])]
    return list(dict.fromkeys((*redirected, *close, *worded)))[:MAX_SUGGESTIONS]


def _find_image(store: Store, image: int, deleted: Ids) -> int:
    if image in deleted or image not in store.images([image]):
        raise PackError(f"the image {image} does not exist in this pack; take the id from a citation or from "
                        "/v1/search")
    return image


def _golden(folder: Path, parent: Manifest, deleted: Ids) -> int | None:
    """Return the parent's golden image if it is live: with fewer images around it still finds itself."""
    if parent.golden is None or parent.golden not in deleted:
        return parent.golden
    shards = open_shards(folder, parent.images, parent.dim_of("images"))
    index = VectorIndex.open(folder, parent.images.index, shards, tombstones=deleted)
    return golden_image(index, deleted, None)


def _ids(values: Iterable[int]) -> Ids:
    return np.fromiter(values, dtype=np.int64)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
