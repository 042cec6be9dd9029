"""Recording of a session's logits, and the similarity measure that all parity checks share."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import numpy as np

from gog_edge.engines.base import DecoderEngine, Floats, KvCache
from gog_edge.policy.model import Decoder


@dataclass(slots=True)
class LogitsRecorder:
    """A decoder engine that records the logits of every step of another engine."""

    engine: DecoderEngine
    steps: list[tuple[int, Floats]] = field(default_factory=list)  # (token index of the first row, [keep, vocab])

    @property
    def capacity(self) -> int:
        """Return how many tokens fit into a cache."""
        return self.engine.capacity

    def new_cache(self) -> KvCache:
        """Return an empty cache."""
        return self.engine.new_cache()

    def step(
        self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int, *, deepstack: Floats | None = None,
        keep: int = 1,
    ) -> Floats:
        """Run and record one step; see `DecoderEngine.step`."""
        logits = self.engine.step(cache, embeds, cos, sin, past, deepstack=deepstack, keep=keep)
        self.steps.append((past + len(embeds) - keep, logits.copy()))
        return logits

    def by_token(self) -> dict[int, Floats]:
        """Return logits [vocab] by the index of the token they follow; recomputed ones replace the earlier ones."""
        return {start + row: values for start, logits in self.steps for row, values in enumerate(logits)}


def record_logits(decoder: Decoder, engine: DecoderEngine | None = None) -> tuple[Decoder, LogitsRecorder]:
    """Return a copy of `decoder` whose engine is recorded, and the recorder; `engine` replaces the decoder's own."""
    recorder, twin = LogitsRecorder(engine or decoder.engine), copy(decoder)
    twin.engine, twin.capacity = recorder, min(decoder.capacity, recorder.capacity)
    return twin, recorder


def min_cosine_similarity(first: Floats, second: Floats) -> float:
    """Return the smallest cosine similarity of corresponding rows of two arrays [n, width]."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / np.maximum(norms, 1e-12)).min())
