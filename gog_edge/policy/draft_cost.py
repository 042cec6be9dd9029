"""What drafts cost where a decoder runs: measured at its first start, and kept beside the prompt for later ones."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gog_edge.engines.base import DecoderEngine, Snapshot
from gog_edge.errors import GogEdgeError
from gog_edge.files import read_json, write_json
from gog_edge.policy.decoding import DraftConfig
from gog_edge.policy.manifest import TextSpec
from gog_edge.policy.model import PolicyModel

GUESSES = (1, 4, 8)  # in the steps that are timed beside steps of one token
PAST = 1500  # tokens before them, as in the middle of an episode: attention to these is a part of the price
WARM = 2  # rounds that count for nothing: engines compile kernels in the first and may capture the second
FEWEST, MOST = 3, 15  # rounds that count
SECONDS = 1.5  # after so long no further round is begun
Times = Mapping[int, float]  # seconds of a step by its guesses, 0 for a step of one token
_log = logging.getLogger(__name__)


def drafts_here(model: PolicyModel) -> DraftConfig:
    """Drafts at the price that a step of this model has here: kept by an earlier start, or measured and kept now.

    Where it cannot be kept, every start measures. A small model drafts at the usual price, as does one whose cache has
    no room for a draft: whatever it is, it takes no time that anybody would notice.
    """
    engine = model.decoder.engine
    past = min(PAST, engine.capacity - 1 - GUESSES[-1])
    if model.small or past < 0:
        return DraftConfig()
    path = model.cache / f"drafts-{_key(model.runs_on, past)}.json"
    kept = _read(path) if path.is_file() else None
    if kept is not None:
        return kept
    measured = at_price(time_steps(engine, model.manifest.text, past))
    _keep(measured, path)
    return measured


def time_steps(
    engine: DecoderEngine, spec: TextSpec, past: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Median seconds of each kind of step after `past` tokens; kinds take turns, as others may use the box meanwhile.

    What the cache holds makes no difference to the time, as long as it holds something: memory that was never written
    need not be read.
    """
    cache, kinds = engine.new_cache(), (0, *GUESSES)
    one = np.float32(1)
    states = np.broadcast_to(one, (2 * spec.layers, spec.kv_heads, past, spec.head_dim))
    cache.restore(Snapshot(states, *(np.broadcast_to(one, (past, spec.head_dim // 2)) for _ in range(2))))
    taken: dict[int, list[float]] = {guesses: [] for guesses in kinds}
    started = clock()
    for number in range(WARM + MOST):
        if number >= WARM + FEWEST and clock() - started > SECONDS:
            break
        for guesses in kinds:
            embeds = np.ones((1 + guesses, spec.hidden), np.float32)
            cos = np.ones((1 + guesses, spec.head_dim // 2), np.float32)
            begun = clock()
            engine.step(cache, embeds, cos, np.zeros_like(cos), past, keep=1 + guesses)
            taken[guesses].append(clock() - begun)
    return {guesses: float(np.median(seconds[WARM:])) for guesses, seconds in taken.items()}


def at_price(times: Times) -> DraftConfig:
    """Drafts at the price on the straight line that is nearest to the steps' times; no part of it is below zero."""
    guesses = np.array([count for count in times if count])
    dearer = np.array([times[count] / times[0] for count in guesses]) - 1
    cost = max(0.0, np.polyfit(guesses, dearer, 1)[0])
    setup = max(0.0, dearer.mean() - cost * guesses.mean())
    if not setup:
        cost = max(0.0, guesses @ dearer / (guesses @ guesses))
    return DraftConfig(setup=round(float(setup), 3), cost=round(float(cost), 3))


def _key(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def _read(path: Path) -> DraftConfig | None:
    try:
        kept = read_json(path, what="price of drafts")
        return DraftConfig(setup=float(kept["setup"]), cost=float(kept["cost"]))
    except (GogEdgeError, OSError, KeyError, TypeError, ValueError) as exc:
        _log.warning("the price of drafts kept in '%s' cannot be used (%s): it is measured again", path, exc)
        return None


def _keep(config: DraftConfig, path: Path) -> None:
    try:
        write_json(path, {"setup": config.setup, "cost": config.cost})
    except OSError as exc:
        _log.warning("the price of drafts cannot be kept in '%s' (%s): every start measures it", path, exc)
