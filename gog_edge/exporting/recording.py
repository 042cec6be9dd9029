"""What two sides of a comparison have in common: logits recorded as a session computes them, and how alike they are."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import numpy as np

from gog_edge.engines.base import DecoderEngine, Floats, KvCache
from gog_edge.policy.model import Decoder


@dataclass(slots=True)
class Recorder:
    """A decoder engine that remembers the logits of every step."""

    engine: DecoderEngine
    steps: list[tuple[int, Floats]] = field(default_factory=list)  # index of the token the first row follows; rows

    @property
    def capacity(self) -> int:
        """Tokens that fit each cache."""
        return self.engine.capacity

    def new_cache(self) -> KvCache:
        """An empty cache."""
        return self.engine.new_cache()

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """See `DecoderEngine`."""
        logits = self.engine.step(cache, embeds, cos, sin, past, deepstack=deepstack, keep=keep)
        self.steps.append((past + len(embeds) - keep, logits.copy()))
        return logits

    def by_token(self) -> dict[int, Floats]:
        """Logits [vocab] by the index of the token that they follow; of what was computed again, the newest."""
        return {start + row: values for start, logits in self.steps for row, values in enumerate(logits)}


def recorded(decoder: Decoder, engine: DecoderEngine | None = None) -> tuple[Decoder, Recorder]:
    """The same decoder on an engine that is recorded: its own, or another."""
    recorder, twin = Recorder(engine or decoder.engine), copy(decoder)
    twin.engine, twin.capacity = recorder, min(decoder.capacity, recorder.capacity)
    return twin, recorder


def least_cosine(first: Floats, second: Floats) -> float:
    """The least cosine of any row [n, width] to its counterpart."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
