"""Interfaces that every inference engine implements: a stateless graph, a decoder, and the decoder's KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gog_edge.errors import BackendError
from gog_edge.tables import Count, Dimension

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]
Cache = TypeVar("Cache", bound="KvCache")

PREFILL_CHUNK = 512  # tokens of a prefill step: bounds the scratch memory at no cost in speed
FOREIGN_CACHE = "this cache belongs to another engine; use a cache from the decoder's own new_cache()"


class GraphEngine(Protocol):
    """A graph without state, such as a vision tower."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once. `feeds` maps every input name to its array; the result maps every output name."""


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """The first `n` tokens of a KV cache, as arrays that can be saved to files."""

    states: Floats  # [2 * layers, kv_heads, n, head_dim], in the decoder's order of keys and values
    cos: Floats  # [n, head_dim / 2]
    sin: Floats  # [n, head_dim / 2]


class KvCache(Protocol):
    """Keys and values of one conversation, in a buffer of fixed capacity.

    A cache has no length of its own: each step names how many tokens precede it, so a smaller `past` rewinds.
    """

    @property
    def capacity(self) -> int:
        """Return the number of tokens that fit."""

    def snapshot(self, length: int) -> KvSnapshot:
        """Copy the first `length` tokens."""

    def restore(self, snapshot: KvSnapshot) -> None:
        """Write the tokens of a snapshot at the start of this cache."""

    def copy_from(self, other: KvCache, length: int) -> None:
        """Copy the first `length` tokens of another cache of the same engine."""


class DecoderEngine(Protocol):
    """A decoder that appends to a KV cache in place. Different caches may be stepped from different threads."""

    @property
    def capacity(self) -> int:
        """Return the number of tokens that fit each cache."""

    def new_cache(self) -> KvCache:
        """Return an empty cache."""

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append `T` tokens after the first `past` tokens and return the logits of the last `keep` of them.

        Args:
            cache: a cache of this engine.
            embeds: [T, hidden] float32, token embeddings.
            cos, sin: [T, head_dim / 2] float32, rotary position tables.
            past: number of tokens in the cache that precede the new ones; later ones are overwritten.
            deepstack: [layers, T, hidden] float32, added to the outputs of the first layers; None adds nothing.
            keep: number of rows of logits to return.

        Returns:
            [keep, vocab] float32, valid until the next step of the same cache.

        Raises:
            BackendError: the tokens do not fit, the cache belongs to another engine, or the device failed.
        """


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The dimensions of a decoder that its engines need."""

    hidden: Dimension  # width of the embeddings
    layers: Dimension  # transformer blocks, each with keys and values
    kv_heads: Dimension
    head_dim: Dimension
    vocab: Dimension  # length of the logits
    deepstack: Count  # layers whose outputs visual features are added to; 0 for architectures without DeepStack


def check_step(cache: KvCache, kind: type[Cache], past: int, count: int) -> Cache:
    """Return the cache of a step as the class of its engine, for engines that were built for a fixed context.

    Raises:
        BackendError: the cache belongs to another engine, or `count` tokens after the first `past` do not fit it.
    """
    if not isinstance(cache, kind):
        raise BackendError(FOREIGN_CACHE)
    if past + count > cache.capacity:
        raise BackendError(
            f"{past} + {count} tokens do not fit a cache of {cache.capacity}; build engines with a larger --context"
        )
    return cache


def check_snapshot(snapshot: KvSnapshot, states: int, kv_heads: int, head_dim: int, capacity: int) -> None:
    """Raise BackendError if a snapshot is not of a decoder with `states` keys and values, or exceeds `capacity`."""
    length = len(snapshot.cos)
    expected = (states, kv_heads, length, head_dim)
    if snapshot.states.shape != expected or length > capacity:
        raise BackendError(
            f"the snapshot has shape {snapshot.states.shape}, but this cache expects {expected} and at most "
            f"{capacity} tokens; remove the snapshot's files"
        )
