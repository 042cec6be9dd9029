"""What each way of searching says about a query: pictures by pictures and captions, words by both and by BM25."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gog_edge.retrieval.fusion import Key, Ranking, ranked
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.store import ImageRow
from gog_edge.retrieval.vectors import Ids
from gog_edge.types import Vectors

IMAGE_TO_IMAGE = "image_to_image"
IMAGE_TO_CAPTION = "image_to_caption"
TEXT_TO_IMAGE = "text_to_image"
TEXT_TO_CAPTION = "text_to_caption"
WORDS = "words"
CANDIDATES = 24  # images looked at per query and pack, before merging


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A stored image near a query."""

    pack: Pack
    row: ImageRow
    score: float  # cosine
    vector: NDArray[np.float32]  # [dim]

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


class Channels:
    """The vectors of some packs, searched with vectors: one search of each index for all queries."""

    def __init__(self, packs: Sequence[Pack], *, candidates: int = CANDIDATES,
                 duplicate_cosine: float | None = None) -> None:
        """`duplicate_cosine`: from where on two stored images show the same; None: what each pack says."""
        self._packs = [pack for pack in packs if len(pack.images.shards)]
        self._candidates, self._duplicate = candidates, duplicate_cosine

    def look(self, views: Sequence[Vectors], *, captions: Callable[[Pack], bool],
             without: Ids | None = None) -> list[Look]:
        """What some pictures show.

        Args:
            views: of each picture, the vectors [views, dim] of its framings; the one that matches best counts.
            captions: the packs whose captions are searched too.
            without: ids of images that are passed over, as if they were not there.
        """
        owner = np.repeat(np.arange(len(views)), [len(own) for own in views])
        vectors = np.concatenate(views) if views else np.empty((0, 0), np.float32)
        found = self.near(vectors, without)
        best: list[int] = []  # row of each picture's best view
        for n in range(len(views)):
            rows = np.flatnonzero(owner == n).tolist()
            best.append(max(rows, key=lambda row: found[row][0].score if found[row] else -2.0))
        said = self._captions(vectors[best], captions, without)
        return [
            Look(tuple(self._things(found[row])), float(np.mean([one.score for one in found[row]] or [0.0])), said[n])
            for n, row in enumerate(best)
        ]

    def near(self, vectors: Vectors, without: Ids | None = None) -> list[list[Candidate]]:
        """For each vector the nearest images of all packs: one encoder made them all, so their cosines compare."""
        found: list[list[Candidate]] = [[] for _ in vectors]
        for pack in self._packs if len(vectors) else []:
            hits = pack.images.search(vectors, self._candidates, without=without)
            ids = np.unique(hits.ids[hits.ids >= 0])
            rows = pack.store.images(ids.tolist())
            stored = dict(zip(ids.tolist(), pack.images.shards.take(pack.images.shards.first_rows(ids)), strict=True))
            for n, candidates in enumerate(found):
                candidates += [
                    Candidate(pack, rows[image], score, stored[image])
                    for image, score in zip(hits.ids[n].tolist(), hits.scores[n].tolist(), strict=True)
                    if image >= 0
                ]
        return [sorted(candidates, key=lambda one: -one.score) for candidates in found]

    def read(self, vectors: Vectors) -> list[tuple[Ranking, ...]]:
        """Articles whose pictures, and whose captions, are near some texts."""
        pictures = [Ranking(TEXT_TO_IMAGE, ranked(key for one in found for key in one.keys))
                    for found in self.near(vectors)]
        captions = self._captions(vectors, lambda _: True, None)
        return [(own, *(Ranking(TEXT_TO_CAPTION, ranks) for ranks in said.values()))
                for own, said in zip(pictures, captions, strict=True)]

    def _captions(self, vectors: Vectors, wanted: Callable[[Pack], bool],
                  without: Ids | None) -> list[dict[str, dict[Key, int]]]:
        """For each vector, and each pack that is wanted, the articles whose captions are near, by rank."""
        found: list[dict[str, dict[Key, int]]] = [{} for _ in vectors]
        for pack in self._packs if len(vectors) else []:
            if wanted(pack) and len(pack.captions.shards):
                for own, ranks in zip(found, self._by_caption(pack, vectors, without), strict=True):
                    own[pack.name] = ranks
        return found

    def _by_caption(self, pack: Pack, vectors: Vectors, without: Ids | None) -> list[dict[Key, int]]:
        hits = pack.captions.search(vectors, self._candidates, without=without)
        rows = pack.store.images(np.unique(hits.ids[hits.ids >= 0]).tolist())
        return [
            ranked((pack.name, article) for image in own if image >= 0 for article in rows[image].articles)
            for own in hits.ids.tolist()
        ]

    def _things(self, candidates: Sequence[Candidate]) -> list[Thing]:
        """Near-identical candidates merged, best first; what names nothing new is dropped."""
        things: list[Thing] = []
        named: set[Key] = set()
        for same in self._alike(candidates):
            keys = tuple(dict.fromkeys(key for one in same for key in one.keys))
            if not named.issuperset(keys):
                named.update(keys)
                things.append(Thing(same[0], keys))
        return things

    def _alike(self, candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
        """Each candidate with those behind it that are near-identical to it and not yet taken."""
        if not candidates:
            return
        vectors = np.stack([one.vector for one in candidates])
        least = np.array([self._duplicate_cosine(one.pack) for one in candidates], dtype=np.float32)
        alike = np.triu(vectors @ vectors.T >= least[:, None], 1)  # [n, n]
        behind = {n: np.flatnonzero(alike[n]).tolist() for n in np.flatnonzero(alike.any(axis=1)).tolist()}
        taken: set[int] = set()
        for n, one in enumerate(candidates):
            if n not in taken:
                same = [i for i in behind.get(n, ()) if i not in taken]
                taken.update(same)
                yield [one, *(candidates[i] for i in same)]

    def _duplicate_cosine(self, pack: Pack) -> float:
        return pack.manifest.duplicate_cosine if self._duplicate is None else self._duplicate

