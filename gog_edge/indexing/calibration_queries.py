"""Queries that a pack can answer and that it cannot, made of the pack itself: no outside data is needed.

What it cannot answer are looks at its own pictures, searched as if all that it has of their articles were not there,
and the names that it could have, by its own titles' letters, and has not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gog_edge.indexing.heldout import BATCH, look_at, sample_images
from gog_edge.picture import decode_picture
from gog_edge.retrieval.channels import Channels, Look
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import Key
from gog_edge.retrieval.manifest import Manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.store import ImageRow, Store
from gog_edge.retrieval.vectors import Ids
from gog_edge.retrieval.words import name_key, raw_words
from gog_edge.types import Vectors

MOST_ARTICLES = 16  # an image that stands in more of them is nobody's own: an icon, a flag beside a name
NEIGHBOURS = 64  # stored images among which near-duplicates of one are looked for
TITLES = 20_000  # whose letters are counted
PARAGRAPHS = 8  # of an article, whose sections are asked for
MOST_LETTERS = 14  # of a coined word
TRIES = 50  # to coin a name that is not taken


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Looks at things that are there and that are not; those of the same picture stand side by side."""

    present: list[Look]
    shows: list[frozenset[Key]]  # the articles of each of them
    absent: list[Look]


def held_out_looks(pack: Pack, encoder: Encoder, count: int, seed: int = 0) -> HeldOut:
    """Looks at up to `count` stored images (see `heldout.look_at`), in an order of chance.

    Each is searched as it is; where its articles have other images, also as if the image itself were not there; and as
    if all images of its articles and of near-duplicates' articles were not there: what is left is truly another thing.
    """
    found = HeldOut([], [], [])
    if not len(pack.images.shards):
        return found
    rng = np.random.default_rng([seed, 17])
    gone = np.array(sorted(pack.gone_images), dtype=np.int64)
    ids = rng.permutation(sample_images(pack.store.readers, gone, count, seed)).tolist()
    rows = pack.store.images(ids)
    channels = Channels([pack])
    own = [rows[image] for image in ids if 0 < len(rows[image].articles) <= MOST_ARTICLES]
    for row, vector in zip(own, _looks(pack, encoder, own, rng), strict=True):
        shows = frozenset((pack.name, article) for article in row.articles)
        siblings = _images_of(pack.store, row.articles)
        alone = siblings <= {row.id} | pack.gone_images
        for without in [None] if alone else [None, np.array([row.id], dtype=np.int64)]:
            found.present.append(_look(channels, vector, without))
            found.shows.append(shows)
        found.absent.append(_look(channels, vector, _family(pack, row, siblings)))
    return found


def _look(channels: Channels, vector: Vectors, without: Ids | None) -> Look:
    return channels.look([vector[None]], captions=lambda _: True, without=without)[0]


def _looks(pack: Pack, encoder: Encoder, rows: Sequence[ImageRow], rng: np.random.Generator) -> Iterator[Vectors]:
    for at in range(0, len(rows), BATCH):
        stored = [pack.store.picture(row.id) for row in rows[at : at + BATCH]]
        looks = [look_at(decode_picture(one.data).pixels, rng) for one in stored if one is not None]
        yield from encoder.embed_images(looks)


def _images_of(store: Store, articles: Collection[int]) -> set[int]:
    return {link.image for reader in store.readers for link in reader.links_in(articles)}


def _family(pack: Pack, row: ImageRow, siblings: set[int]) -> Ids:
    """An image, those of its articles, and near-duplicates with those of theirs: ids, sorted."""
    place = pack.images.shards.first_rows(np.array([row.id], dtype=np.int64))
    hits = pack.images.search(pack.images.shards.take(place), NEIGHBOURS)
    near = hits.ids[0][(hits.scores[0] >= pack.manifest.duplicate_cosine) & (hits.ids[0] >= 0)].tolist()
    articles = {article for one in pack.store.images(near).values() for article in one.articles}
    return np.array(sorted({row.id, *near} | siblings | _images_of(pack.store, articles)), dtype=np.int64)


# --- words --------------------------------------------------------------------------------------


def held_out_texts(store: Store, manifest: Manifest, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Up to `count` queries that name an article, and as many of the same form with a name that is nobody's.

    A query is a title or another name, a title with a section's, or a caption that holds the title.
    """
    rng = np.random.default_rng([seed, 19])
    articles = _sample_articles(manifest, max(count, TITLES), rng)
    titles = store.titles(articles)
    coin = Coiner(list(titles.values()))
    present: list[str] = []
    absent: list[str] = []
    for article in articles[:count]:
        title = titles[article]
        name = coin.name(store, rng)
        if name is None or all(hit.article != article for hit in store.named([name_key(title)])):
            continue  # every sound is taken, or the article is gone
        forms = [title, *_longer_forms(store, article, title), *_redirect_near(store, title)]
        asked = forms[int(rng.integers(len(forms)))]
        present.append(asked)
        absent.append(asked.replace(title, name) if title in asked else name)
    return present, absent


def _sample_articles(manifest: Manifest, count: int, rng: np.random.Generator) -> list[int]:
    """Ids of articles of all segments, each once, in an order of chance; some may be gone."""
    spans = [segment.articles for segment in manifest.segments]
    sizes = [span.last - span.first + 1 for span in spans]
    starts = np.cumsum([0, *sizes])
    places = rng.choice(starts[-1], min(count, int(starts[-1])), replace=False)
    owners = np.searchsorted(starts, places, side="right") - 1
    return [spans[owner].first + int(place - starts[owner]) for owner, place in zip(owners, places, strict=True)]


def _longer_forms(store: Store, article: int, title: str) -> list[str]:
    first = store.leads([article]).get(article)
    rows = store.paragraphs(range(first, first + PARAGRAPHS)).values() if first else ()
    sections = dict.fromkeys(row.section for row in rows if row.title == title and row.section)
    captions = (link.caption for reader in store.readers for link in reader.links_in([article]))
    return [*(f"{title} {section}" for section in sections),
            *[caption for caption in captions if title in caption and caption != title][:1]]


def _redirect_near(store: Store, title: str) -> list[str]:
    """Another name of some article, from that place in the alphabet."""
    names = [name for reader in store.readers for name in reader.redirects(name_key(title), 1)]
    live = [name for name in names if store.named([name_key(name)])]
    return live[:1]


class Coiner:
    """Makes names that sound like a pack's own: each letter follows the two before it as it does in the titles."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._follow: dict[str, list[str]] = {}
        self._lengths = [len(raw_words(title)) for title in titles]
        for word in (word for title in titles for word in raw_words(title)):
            letters = f"\n\n{word}\n"
            for at in range(2, len(letters)):
                self._follow.setdefault(letters[at - 2 : at], []).append(letters[at])

    def name(self, store: Store, rng: np.random.Generator) -> str | None:
        """A name that no article bears and that holds a word which the pack never uses; None where none comes."""
        for _ in range(TRIES if self._follow else 0):
            words = [self._word(rng) for _ in range(max(1, self._lengths[int(rng.integers(len(self._lengths)))]))]
            name = " ".join(words)
            if not store.named([name_key(name)]) and any(store.frequency(word.lower()) == 0 for word in words):
                return name
        return None

    def _word(self, rng: np.random.Generator) -> str:
        word = "\n\n"
        while len(word) < 2 + MOST_LETTERS:
            following = self._follow[word[-2:]]
            word += following[int(rng.integers(len(following)))]
            if word[-1] == "\n":
                break
        return word.strip()
