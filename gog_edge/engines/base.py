"""How a graph runs, whatever runs it: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]


class GraphEngine(Protocol):
    """A graph without state."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input of the graph by name, every output by name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The first n tokens of a cache, as plain arrays."""

    states: Floats  # [2 * layers, kv_heads, n, head_dim], in the decoder's own order
    cos: Floats  # [n, head_dim / 2]
    sin: Floats


class KvCache(Protocol):
    """Keys and values of one conversation, in a buffer of fixed capacity. Rewinding is a smaller `past`."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    def snapshot(self, length: int) -> Snapshot:
        """The first `length` tokens, to be kept in files."""

    def restore(self, kept: Snapshot) -> None:
        """Begin with the tokens of a snapshot."""

    def copy_from(self, other: KvCache, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same engine."""


class DecoderEngine(Protocol):
    """A decoder that appends to a cache in place. Several caches may be stepped from several threads."""

    @property
    def capacity(self) -> int:
        """Tokens that fit each cache."""

    def new_cache(self) -> KvCache:
        """An empty cache."""

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Append `T` tokens after the first `past` ones and return the logits of the last `keep` of them.

        embeds [T, hidden] float32; cos, sin [T, head_dim / 2] float32; deepstack [layers, T, hidden] float32, what
        the first layers add to pictures' tokens (None adds nothing); logits [keep, vocab] float32, valid until the
        cache's next step.
        """
