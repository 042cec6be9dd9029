"""How a graph runs, whatever runs it: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]


class GraphEngine(Protocol):
    """A graph without state."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input of the graph by name, every output by name."""


class KvCache(Protocol):
    """Keys and values of one conversation, in a buffer of fixed capacity. Rewinding is a smaller `past`."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    def copy_from(self, other: KvCache, length: int) -> None:
        """Take over the first `length` tokens of another cache of the same engine."""


class DecoderEngine(Protocol):
    """A decoder that appends to a cache in place. Several caches may be stepped from several threads."""

    @property
    def capacity(self) -> int:
        """Tokens that fit each cache."""

    def new_cache(self) -> KvCache:
        """An empty cache."""

    def step(self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int) -> Floats:
        """Append `T` tokens after the first `past` ones and return the last one's logits.

        embeds [T, hidden] float32; cos, sin [T, head_dim / 2] float32; logits [vocab] float32, valid until the
        cache's next step.
        """
