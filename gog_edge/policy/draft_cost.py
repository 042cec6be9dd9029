"""Measure what draft tokens cost on this machine, once per model and device, and cache the result on disk.

The default costs of `DraftConfig` fit one machine. With wrong costs, speculation makes a large decoder slower.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gog_edge.engines.base import DecoderEngine, KvSnapshot
from gog_edge.errors import GogEdgeError
from gog_edge.files import read_json, write_json
from gog_edge.policy.decoding import DraftConfig
from gog_edge.policy.manifest import TextSpec
from gog_edge.policy.model import PolicyModel

DRAFT_LENGTHS = (1, 4, 8)  # timed in addition to steps of one token
PAST_TOKENS = 1500  # in the cache, as in the middle of an episode: attention to them is part of the cost
WARMUP_ROUNDS = 2  # engines compile kernels in the first round and may capture a graph in the second
MIN_ROUNDS, MAX_ROUNDS = 3, 15  # after the warm-up
TIME_LIMIT_S = 1.5  # no further round starts later than this
StepTimes: TypeAlias = Mapping[int, float]  # seconds of a step by its number of draft tokens; 0: one token
_log = logging.getLogger(__name__)


def load_draft_config(model: PolicyModel) -> DraftConfig:
    """Return a draft config with the costs of this model on this machine, measured now or by an earlier start.

    Without a cache folder every start measures. Small models, and contexts too short for the measurement, get the
    default config: drafts make no noticeable difference to them.
    """
    engine = model.decoder.engine
    past = min(PAST_TOKENS, engine.capacity - 1 - DRAFT_LENGTHS[-1])
    if model.is_small or past < 0:
        return DraftConfig()
    path = model.cache_dir / f"drafts-{_digest(model.device, past)}.json"
    cached = _load(path) if path.is_file() else None
    if cached is not None:
        return cached
    measured = fit_costs(time_steps(engine, model.manifest.text, past))
    _save(measured, path)
    return measured


def time_steps(
    engine: DecoderEngine, spec: TextSpec, past: int, clock: Callable[[], float] = time.perf_counter
) -> StepTimes:
    """Return the median seconds of steps with 0 and `DRAFT_LENGTHS` draft tokens after `past` tokens.

    The lengths are interleaved, so that other load on the machine affects all of them alike.
    """
    cache, lengths = engine.new_cache(), (0, *DRAFT_LENGTHS)
    # The values do not affect the time, but the memory must have been written: untouched pages need not be read.
    one = np.float32(1)
    states = np.broadcast_to(one, (2 * spec.layers, spec.kv_heads, past, spec.head_dim))
    cache.restore(KvSnapshot(states, *(np.broadcast_to(one, (past, spec.head_dim // 2)) for _ in range(2))))
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    started = clock()
    for number in range(WARMUP_ROUNDS + MAX_ROUNDS):
        if number >= WARMUP_ROUNDS + MIN_ROUNDS and clock() - started > TIME_LIMIT_S:
            break
        for length in lengths:
            embeds = np.ones((1 + length, spec.hidden), np.float32)
            cos = np.ones((1 + length, spec.head_dim // 2), np.float32)
            step_started = clock()
            engine.step(cache, embeds, cos, np.zeros_like(cos), past, keep=1 + length)
            seconds[length].append(clock() - step_started)
    return {length: float(np.median(times[WARMUP_ROUNDS:])) for length, times in seconds.items()}


def fit_costs(times: StepTimes) -> DraftConfig:
    """Return the config whose costs are the least-squares line through the relative step times, clipped at 0."""
    lengths = np.array([length for length in times if length])
    excess = np.array([times[length] / times[0] for length in lengths]) - 1
    token_cost = max(0.0, np.polyfit(lengths, excess, 1)[0])
    setup_cost = max(0.0, excess.mean() - token_cost * lengths.mean())
    if not setup_cost:
        token_cost = max(0.0, lengths @ excess / (lengths @ lengths))
    return DraftConfig(setup_cost=round(float(setup_cost), 3), token_cost=round(float(token_cost), 3))


def _digest(*values: object) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:16]


def _load(path: Path) -> DraftConfig | None:
    try:
        cached = read_json(path, what="draft costs")
        return DraftConfig(setup_cost=float(cached["setup"]), token_cost=float(cached["cost"]))
    except (GogEdgeError, OSError, KeyError, TypeError, ValueError) as exc:
        _log.warning("the cached draft costs in '%s' cannot be used (%s); they are measured again", path, exc)
        return None


def _save(config: DraftConfig, path: Path) -> None:
    try:
        write_json(path, {"setup": config.setup_cost, "cost": config.token_cost})
    except OSError as exc:
        _log.warning("the draft costs cannot be cached in '%s' (%s); every start measures them", path, exc)
