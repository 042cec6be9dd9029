"""Reciprocal rank fusion: scores of different channels do not compare, the places that they give do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from gog_edge.types import ChannelRank

RRF_K = 60  # the usual constant (Cormack, Clarke, Buettcher 2009): the first few places count nearly alike
Key: TypeAlias = tuple[str, int]  # name of a pack, id of an article in it


@dataclass(frozen=True, slots=True)
class Ranking:
    """The articles that one channel found for one query."""

    channel: str
    ranks: Mapping[Key, int]  # from 1, best first; articles that share a picture share a rank
    weight: float = 1.0


def ranked(keys: Iterable[Key]) -> dict[Key, int]:
    """Rank from 1 by key, of keys in order; a key counts where it comes first."""
    return {key: rank for rank, key in enumerate(dict.fromkeys(keys), 1)}


def fuse(rankings: Iterable[Ranking], k: int = RRF_K) -> dict[Key, float]:
    """Articles with the sum of weight / (k + rank), best first; those of one score as the rankings bring them."""
    scores: dict[Key, float] = {}
    for ranking in rankings:
        for key, rank in ranking.ranks.items():
            scores[key] = scores.get(key, 0.0) + ranking.weight / (k + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def ranks_of(key: Key, rankings: Iterable[Ranking]) -> tuple[ChannelRank, ...]:
    """The best rank that each channel gives an article."""
    best: dict[str, int] = {}
    for ranking in rankings:
        rank = ranking.ranks.get(key)
        if rank is not None:
            best[ranking.channel] = min(rank, best.get(ranking.channel, rank))
    return tuple(ChannelRank(*pair) for pair in best.items())


def weighted(rankings: Iterable[Ranking], factor: float) -> list[Ranking]:
    """The same rankings with more or less to say."""
    return [replace(ranking, weight=factor * ranking.weight) for ranking in rankings]
