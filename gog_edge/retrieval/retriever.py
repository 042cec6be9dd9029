"""Many queries in, cited evidence out: one embedding batch, every pack, fusion by rank, a calibrated chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import PackError
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.ranking import Ranked, rank_words
from gog_edge.retrieval.store import ImageRow
from gog_edge.retrieval.words import raw_words, search_terms
from gog_edge.types import Evidence, ImageQuery, ImageRef, Passage, Query, SearchResult, TextQuery, Vectors

CANDIDATES = 24  # images looked at per query and pack, before merging
_Key: TypeAlias = tuple[str, int]  # name of a pack, id of an article in it


@dataclass(frozen=True, slots=True)
class RetrieverConfig:
    """How much comes back, and how channels are joined."""

    top_k: int = 5  # evidence of one result
    passages_per_article: int = 3  # of the first evidence
    duplicate_cosine: float | None = None  # None: what each pack says
    rrf_k: int = 60
    enough_coverage: float = 0.5  # words that explain less of a text query than this let pictures speak too


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A stored image near a query."""

    pack: Pack
    row: ImageRow
    score: float  # cosine
    vector: NDArray[np.float32]  # [dim]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Stored images that show the same thing, nearest first."""

    members: tuple[_Candidate, ...]
    titles: tuple[str, ...]

    @property
    def head(self) -> _Candidate:
        return self.members[0]

    @property
    def articles(self) -> list[tuple[Pack, int]]:
        """The articles of all members, best first, each once."""
        found = {(member.pack.name, article): member.pack for member in self.members for article in member.row.articles}
        return [(pack, article) for (_, article), pack in found.items()]


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
            if pack.manifest.encoder != encoder.fingerprint:
                raise PackError(f"pack '{pack.name}' was built with another encoder; build it again with this one")

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """One result per query, in order. All pictures are embedded in one batch, all texts in another."""
        images = [(n, query) for n, query in enumerate(queries) if isinstance(query, ImageQuery)]
        texts = [(n, query) for n, query in enumerate(queries) if isinstance(query, TextQuery)]
        results = dict(zip([n for n, _ in images], self._image_results([query for _, query in images]), strict=True))
        results |= zip([n for n, _ in texts], self._text_results([query for _, query in texts]), strict=True)
        return tuple(results[n] for n in range(len(queries)))

    def image_features(self, queries: Sequence[ImageQuery]) -> NDArray[np.float64]:
        """What a calibration for pictures is fitted to: [n, len(IMAGE_FEATURES)]."""
        return np.array([_image_features(*found) for found in self._look(queries)], dtype=np.float64)

    def text_features(self, queries: Sequence[TextQuery]) -> NDArray[np.float64]:
        """What a calibration for words is fitted to, of the pack that explains each best: [n, len(TEXT_FEATURES)]."""
        rows = [max(rank_words(pack, query.text).features for pack in self.packs.values()) for query in queries]
        return np.array(rows, dtype=np.float64)

    # --- pictures -----------------------------------------------------------------------------

    def _image_results(self, queries: Sequence[ImageQuery]) -> list[SearchResult]:
        return [
            self._image_result(query, groups, mean)
            for query, (groups, mean) in zip(queries, self._look(queries), strict=True)
        ]

    def _look(self, queries: Sequence[ImageQuery]) -> list[tuple[list[_Group], float]]:
        """For each query: what its pixels may show, best first, and the mean cosine of all candidates."""
        views = [(query.pixels, *query.views) for query in queries]
        found = iter(self._nearest(self.encoder.embed_images([pixels for one in views for pixels in one])))
        nearest = [max((next(found) for _ in one), key=lambda hits: hits[0].score if hits else -1.0) for one in views]
        means = [float(np.mean([one.score for one in found])) if found else 0.0 for found in nearest]
        return [(self._groups(found), mean) for found, mean in zip(nearest, means, strict=True)]

    def _nearest(self, vectors: Vectors) -> list[list[_Candidate]]:
        """For each vector the nearest images of all packs: one encoder made them all, so their cosines compare."""
        found: list[list[_Candidate]] = [[] for _ in vectors]
        if not len(vectors):
            return found
        for pack in self.packs.values():
            hits = pack.index.search(vectors, max(CANDIDATES, 4 * self.config.top_k))
            ids = np.unique(hits.ids[hits.ids >= 0])
            rows = pack.store.images(ids.tolist())
            stored = dict(zip(ids.tolist(), pack.index.take(ids), strict=True))
            for n, candidates in enumerate(found):
                candidates += [
                    _Candidate(pack, rows[image], score, stored[image])
                    for image, score in zip(hits.ids[n].tolist(), hits.scores[n].tolist(), strict=True)
                    if image >= 0
                ]
        return [sorted(candidates, key=lambda one: -one.score) for candidates in found]

    def _groups(self, candidates: Sequence[_Candidate]) -> list[_Group]:
        """Near-identical candidates merged, best first; a group that names nothing new is dropped."""
        if not candidates:
            return []
        vectors = np.stack([one.vector for one in candidates])
        least = np.array([self._duplicate_cosine(one.pack) for one in candidates])
        alike = np.triu(vectors @ vectors.T >= least[:, None], 1)  # [n, n], a candidate with those behind it
        taken: set[int] = set()
        groups: list[_Group] = []
        named: set[str] = set()
        for n in range(len(candidates)):
            if n in taken:
                continue
            same = [n, *(i for i in np.flatnonzero(alike[n]).tolist() if i not in taken)]
            taken.update(same)
            members = tuple(candidates[i] for i in same)
            titles = tuple(dict.fromkeys(title for member in members for title in member.row.titles))
            if not named.issuperset(titles):
                named.update(titles)
                groups.append(_Group(members, titles))
        return groups

    def _duplicate_cosine(self, pack: Pack) -> float:
        own = self.config.duplicate_cosine
        return pack.manifest.duplicate_cosine if own is None else own

    def _image_result(self, query: ImageQuery, groups: Sequence[_Group], mean: float) -> SearchResult:
        if not groups:
            return SearchResult((), 0.0)
        evidence = [
            Evidence(
                titles=group.titles,
                passages=self._about(group, query.question) if rank == 0 else (),
                image=_image_ref(group.head.pack, group.head.row),
                score=group.head.score,
            )
            for rank, group in enumerate(groups[: self.config.top_k])
        ]
        return SearchResult(tuple(evidence), _image_chance(groups[0].head.pack, _image_features(groups, mean)))

    def _about(self, group: _Group, question: str) -> tuple[Passage, ...]:
        """Paragraphs of what a picture shows that bear on the question; each article's best before any second one."""
        terms = search_terms(raw_words(question))
        limit = self.config.passages_per_article
        per_article: list[tuple[Passage, ...]] = []
        for pack, article in group.articles[:limit]:
            ids = [match.paragraph for match in pack.store.rank(terms, limit, article)]
            per_article.append(_passages(pack, ids or _lead(pack, article)))
        turns = [found[depth] for depth in range(limit) for found in per_article if depth < len(found)]
        return tuple(turns[:limit])

    # --- words --------------------------------------------------------------------------------

    def _text_results(self, queries: Sequence[TextQuery]) -> list[SearchResult]:
        ranked = [[rank_words(pack, query.text) for pack in self.packs.values()] for query in queries]
        best = [max((one.coverage for one in per_pack), default=0.0) for per_pack in ranked]
        least = self.config.enough_coverage
        seen = [n for n, query in enumerate(queries) if best[n] < least and raw_words(query.text)]
        nearest = self._nearest(self.encoder.embed_texts([queries[n].text for n in seen]))
        pictures = {n: self._pictured(found) for n, found in zip(seen, nearest, strict=True)}
        return [self._text_result(ranked[n], pictures.get(n, {})) for n in range(len(queries))]

    def _pictured(self, candidates: Sequence[_Candidate]) -> dict[_Key, int]:
        """Articles whose pictures look like the words, by rank from 1: (pack, article) -> rank."""
        articles = dict.fromkeys((one.pack.name, article) for one in candidates for article in one.row.articles)
        return {article: rank for rank, article in enumerate(articles, 1)}

    def _text_result(self, ranked: Sequence[Ranked], pictured: dict[_Key, int]) -> SearchResult:
        """Join what packs and channels found: by rank, since BM25 of two packs and cosines do not compare."""
        fused = {key: 1.0 / (self.config.rrf_k + rank) for key, rank in pictured.items()}
        matched: dict[_Key, tuple[int, ...]] = {}
        for pack, one in zip(self.packs.values(), ranked, strict=True):
            for rank, (article, paragraphs) in enumerate(one.articles, 1):
                key = pack.name, article
                fused[key] = fused.get(key, 0.0) + 1.0 / (self.config.rrf_k + rank)
                matched[key] = paragraphs
        best = sorted(fused, key=lambda key: -fused[key])[: self.config.top_k]
        limits = [self.config.passages_per_article, *[min(1, self.config.passages_per_article)] * len(best)]
        chosen = {
            key: (matched.get(key) or _lead(self.packs[key[0]], key[1]))[:limit]
            for key, limit in zip(best, limits, strict=False)
        }
        chances = [_text_chance(pack, one.features) for pack, one in zip(self.packs.values(), ranked, strict=True)]
        return SearchResult(self._article_evidence(chosen, fused), max(chances, default=0.0))

    def _article_evidence(self, chosen: dict[_Key, tuple[int, ...]], scores: dict[_Key, float]) -> tuple[Evidence, ...]:
        """Evidence of articles with the given paragraphs, in the order given; one look-up of each kind a pack."""
        built: dict[_Key, Evidence] = {}
        for name, pack in self.packs.items():
            articles = [article for owner, article in chosen if owner == name]
            titles, mains = pack.store.titles(articles), pack.live_main_images(articles)
            images = pack.store.images(list(mains.values()))
            found = _passages(pack, [paragraph for article in articles for paragraph in chosen[name, article]])
            passages = {passage.paragraph: passage for passage in found}
            for article in articles:
                image = _image_ref(pack, images[mains[article]]) if article in mains else None
                said = tuple(passages[paragraph] for paragraph in chosen[name, article])
                built[name, article] = Evidence((titles[article],), said, image, scores[name, article])
        return tuple(built[key] for key in chosen)


# --- small parts --------------------------------------------------------------------------------


def _image_features(groups: Sequence[_Group], mean: float) -> tuple[float, ...]:
    """IMAGE_FEATURES: the best cosine, how far the next thing is behind it, and how far the candidates' mean is."""
    if not groups:
        return (0.0, 0.0, 0.0)
    best = groups[0].head.score
    second = groups[1].head.score if len(groups) > 1 else 0.0
    return (best, best - second, best - mean)


def _image_chance(pack: Pack, features: tuple[float, ...]) -> float:
    calibration = pack.manifest.image_calibration
    return calibration.chance(features) if calibration else min(1.0, max(0.0, features[0]))


def _text_chance(pack: Pack, features: tuple[float, ...]) -> float:
    calibration = pack.manifest.text_calibration
    return calibration.chance(features) if calibration else features[0] * (1.0 - features[1])


def _lead(pack: Pack, article: int) -> tuple[int, ...]:
    first = pack.store.lead(article)
    return () if first is None else (first,)


def _image_ref(pack: Pack, row: ImageRow) -> ImageRef:
    return ImageRef(pack.name, row.id, row.caption, row.licence, row.attribution)


def _passages(pack: Pack, ids: Sequence[int]) -> tuple[Passage, ...]:
    rows = pack.store.paragraphs(ids)
    return tuple(Passage(pack.name, rows[i].title, rows[i].section, i, rows[i].text, rows[i].licence) for i in ids)
