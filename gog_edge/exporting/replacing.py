"""Folders that are replaced as a whole, and only when all went well."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gog_edge.errors import CheckpointError
from gog_edge.files import read_json


@contextmanager
def replacing(out: Path, kind: str, manifest: str = "manifest.json") -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end of the block; whatever goes wrong before leaves nothing of it.

    Args:
        out: a new or empty folder, or one whose `manifest` says that it is of this `kind`.
        kind: what the folder will be, as its manifest says it.
        manifest: name of that file.

    Raises:
        CheckpointError: `out` is something else, cannot be written, or the memory is too small for what was done.
    """
    if out.exists() and not _may_go(out, kind, manifest):
        raise CheckpointError(f"'{out}' exists and is no folder of kind '{kind}'; name another one or remove it")
    part = out.with_name(f"{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except OSError as exc:
        raise CheckpointError(f"'{part}' cannot be written ({exc.strerror or exc}); nothing was kept") from exc
    except MemoryError as exc:
        raise CheckpointError(
            "this machine has too little memory for it; nothing was kept: close other programs, leave out the parity "
            "check where there is --no-parity, or do it on a larger machine"
        ) from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _may_go(folder: Path, kind: str, manifest: str) -> bool:
    if not folder.is_dir():
        return False
    known = folder / manifest
    return not any(folder.iterdir()) or (known.is_file() and read_json(known, what=kind).get("kind") == kind)
