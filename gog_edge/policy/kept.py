"""The prompt's keys and values, computed at the first start and mapped at every later one."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Snapshot
from gog_edge.errors import BackendError
from gog_edge.policy.session import Session

_ARRAYS = tuple(field.name for field in fields(Snapshot))
_log = logging.getLogger(__name__)


def prefill_kept(session: Session, cache: Path, form: str) -> None:
    """Compute what waits in a new session, or take what an earlier start computed of the same tokens.

    `cache` belongs to this model on this processor; where it is not there (the model is small, or its folder cannot
    be written), everything is computed.
    """
    tokens = np.asarray(session.tokens, np.int64)
    folder = cache / f"prompt-{hashlib.sha256(form.encode() + tokens.tobytes()).hexdigest()[:16]}"
    if folder.is_dir():
        try:
            session.adopt(Snapshot(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}))
            return
        except (OSError, ValueError, BackendError) as exc:
            _log.warning("the prompt kept in '%s' cannot be used (%s): it is computed again", folder, exc)
            shutil.rmtree(folder, ignore_errors=True)
    session.prefill()
    if cache.is_dir():
        _keep(session.snapshot(), folder)


def _keep(snapshot: Snapshot, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        for name in _ARRAYS:
            np.save(part / f"{name}.npy", getattr(snapshot, name), allow_pickle=False)
        part.rename(folder)
    except OSError as exc:
        _log.warning("the prompt cannot be kept in '%s' (%s): every start computes it again", folder, exc)
    finally:
        shutil.rmtree(part, ignore_errors=True)
