"""Cache the keys and values of the system prompt on disk, so that later starts of a large model need no prefill."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np

from gog_edge.engines.base import KvSnapshot
from gog_edge.errors import BackendError
from gog_edge.policy.session import Session

_ARRAYS = tuple(field.name for field in fields(KvSnapshot))
_log = logging.getLogger(__name__)


def prefill_cached(session: Session, folder: Path, kernels: str) -> None:
    """Compute the pending tokens of a new session, or load what an earlier start computed for the same tokens.

    `folder`: the cache folder of this model on this machine; when it does not exist (the model is small, or the folder
    cannot be created), everything is computed. `kernels`: what runs the weights, as in `PolicyModel.kernels`; cached
    values are only valid for the same kernels.
    """
    tokens = np.asarray(session.tokens, np.int64)
    entry = folder / f"prompt-{hashlib.sha256(kernels.encode() + tokens.tobytes()).hexdigest()[:16]}"
    if entry.is_dir():
        try:
            session.restore(_load(entry))
            return
        except (OSError, ValueError, BackendError) as exc:
            _log.warning("the cached prompt in '%s' cannot be used (%s); it is computed again", entry, exc)
            shutil.rmtree(entry, ignore_errors=True)
    session.prefill()
    if folder.is_dir():
        _save(session.snapshot(), entry)


def _load(entry: Path) -> KvSnapshot:
    return KvSnapshot(**{name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in _ARRAYS})


def _save(snapshot: KvSnapshot, entry: Path) -> None:
    part = entry.with_name(f"{entry.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        for name in _ARRAYS:
            np.save(part / f"{name}.npy", getattr(snapshot, name), allow_pickle=False)
        part.rename(entry)
    except OSError as exc:
        _log.warning("the prompt cannot be cached in '%s' (%s); every start computes it", entry, exc)
    finally:
        shutil.rmtree(part, ignore_errors=True)
