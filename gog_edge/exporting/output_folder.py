"""Output folders that are replaced as a whole, and only when everything succeeded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gog_edge.errors import CheckpointError
from gog_edge.files import MODEL_MANIFEST, read_json


@contextmanager
def atomic_output_folder(out: Path, kind: str, manifest: str = MODEL_MANIFEST) -> Iterator[Path]:
    """Yield a temporary folder next to `out`, and rename it to `out` when the block succeeds.

    An error inside the block deletes the temporary folder and leaves `out` as it was.

    Args:
        out: a new or empty folder, or one whose `manifest` file names this `kind`.
        kind: value of "kind" in the manifest that the block writes.
        manifest: file name of that manifest.

    Raises:
        CheckpointError: `out` contains something else or cannot be written, or the memory does not suffice.
    """
    out = out.resolve()  # of a symbolic link, the target is replaced
    if out.exists() and not _is_replaceable(out, kind, manifest):
        raise CheckpointError(f"'{out}' exists and is not a folder of kind '{kind}'; choose another one or remove it")
    part, old = out.with_name(f"{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        _recover(out, old)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        _swap(part, out, old)
    except OSError as exc:
        moved = f"; the previous content is in '{old}'" if old.exists() else ""
        raise CheckpointError(f"cannot write '{part}' ({exc.strerror or exc}); nothing was kept{moved}") from exc
    except MemoryError as exc:
        raise CheckpointError(
            "this machine does not have enough memory; nothing was kept: close other programs, skip the parity check "
            "with --no-parity where the command has it, or use a larger machine"
        ) from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_disk_space(folder: Path, needed: int, what: str, remedy: str = "free some space") -> None:
    """Raise CheckpointError if the disk of an existing `folder` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"'{folder}' has {free / 1e9:.1f} GB free, {what} takes about {needed / 1e9:.1f} GB; {remedy}"
        )


def _swap(part: Path, out: Path, old: Path) -> None:
    """Rename `part` to `out`; the previous `out` is deleted only after that."""
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        with suppress(OSError):  # `old` may not exist, or another process has created `out` in the meantime
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path, old: Path) -> None:
    """Undo a swap that a crash interrupted: restore `old`, or delete it if the new folder is in place."""
    if not old.exists():
        return
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(old)
    else:
        old.rename(out)


def _is_replaceable(folder: Path, kind: str, manifest: str) -> bool:
    if not folder.is_dir():
        return False
    path = folder / manifest
    return not any(folder.iterdir()) or (path.is_file() and read_json(path, what=kind).get("kind") == kind)
