"""Folders that are replaced as a whole, and only when all went well."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gog_edge.errors import CheckpointError
from gog_edge.files import MODEL_MANIFEST, read_json


@contextmanager
def replacing(out: Path, kind: str, manifest: str = MODEL_MANIFEST) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end of the block; whatever goes wrong before leaves nothing of it.

    Args:
        out: a new or empty folder, or one whose `manifest` says that it is of this `kind`.
        kind: what the folder will be, as its manifest says it.
        manifest: name of that file.

    Raises:
        CheckpointError: `out` is something else, cannot be written, or the memory is too small for what was done.
    """
    out = out.resolve()  # a link stays, and what it leads to is replaced
    if out.exists() and not _may_go(out, kind, manifest):
        raise CheckpointError(f"'{out}' exists and is no folder of kind '{kind}'; name another one or remove it")
    part, old = out.with_name(f"{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        _tidy(out, old)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        _swap(part, out, old)
    except OSError as exc:
        moved = f"; what was there is in '{old}'" if old.exists() else ""
        raise CheckpointError(f"'{part}' cannot be written ({exc.strerror or exc}); nothing was kept{moved}") from exc
    except MemoryError as exc:
        raise CheckpointError(
            "this machine has too little memory for it; nothing was kept: close other programs, leave out the parity "
            "check where there is --no-parity, or do it on a larger machine"
        ) from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, out: Path, old: Path) -> None:
    """`part` in the place of `out`, which is gone only when the new one stands."""
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        with suppress(OSError):  # there may have been none, or something else stands there by now
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _tidy(out: Path, old: Path) -> None:
    """Put the old folder back that a crash left aside, or drop it where the new one stands."""
    if not old.exists():
        return
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old)
    else:
        old.rename(out)


def _may_go(folder: Path, kind: str, manifest: str) -> bool:
    if not folder.is_dir():
        return False
    known = folder / manifest
    return not any(folder.iterdir()) or (known.is_file() and read_json(known, what=kind).get("kind") == kind)
