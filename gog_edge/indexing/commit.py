"""Commits the generations of a pack: one writer at a time, files first, the manifest last, cleanup afterwards."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import describe_files, read_json, sync_files, write_array, write_json
from gog_edge.retrieval.manifest import (
    BUILD,
    GENERATIONS,
    MANIFEST,
    Manifest,
    Tombstones,
    generation_path,
    read_manifest,
    resume_command,
)
from gog_edge.retrieval.vectors.shards import Ids

SETTINGS = f"{BUILD}/settings.json"  # of an unfinished build
LOCK = "LOCK"
PACK_FOLDERS = ("store", "vectors", "index", "tombstones", "reports")
_PACK_FILE = re.compile(r"\d{6}[-.].*")  # begins with the generation; no other file of a pack is ever deleted


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a pack, whose folder is created if necessary.

    Raises:
        PackError: another process holds the lock, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise PackError(f"'{folder}' is a file, but a pack is a folder; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("w")
    except OSError as exc:
        raise PackError(f"pack '{folder}' cannot be written ({exc.strerror}); copy it to a writable folder") from exc
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"pack '{folder}' is being written by another process; wait until it finishes") from None
        yield


@contextmanager
def modify_pack(folder: Path) -> Iterator[Manifest]:
    """Hold the lock of an existing pack and yield the manifest of its current generation.

    Raises:
        PackError: there is no pack, another process writes it, or a build of its next generation is unfinished.
    """
    if not (folder / MANIFEST).is_file():
        read_manifest(folder)  # raises; called before a lock file is created in a folder that is not a pack
    with write_lock(folder):
        manifest = read_manifest(folder)
        if unfinished_build(folder, manifest) is not None:
            raise PackError(f"'{folder}' contains an unfinished build of its next generation; complete it with "
                            f"{resume_command(folder)}, or delete '{folder / BUILD}'")
        yield manifest


def current_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the current generation, or None before the first commit."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def unfinished_build(folder: Path, current: Manifest | None) -> dict[str, Any] | None:
    """Return the settings of a build that can be resumed; None if there is none or it was committed.

    Args:
        folder: the pack.
        current: its manifest, as `current_manifest` returns it.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    settings = read_json(path, what="pack", error=PackError)
    return None if current is not None and current.generation >= int(settings["generation"]) else settings


def write_tombstones(folder: Path, generation: int, articles: Ids, images: Ids) -> Tombstones | None:
    """Write the ids of deleted articles and images; return None if nothing is deleted."""
    if not len(articles) and not len(images):
        return None
    files = Tombstones(*(f"tombstones/{generation:06d}-{kind}.npy" for kind in ("articles", "images")))
    (folder / "tombstones").mkdir(exist_ok=True)
    write_array(folder / files.articles, np.sort(articles).astype(np.int64))
    write_array(folder / files.images, np.sort(images).astype(np.int64))
    return files


def write_report(folder: Path, generation: int, report: Mapping[str, Sequence[Any]]) -> str | None:
    """Write what became of the snapshot's items and return the name of the file; None if there is nothing to tell."""
    if not any(report.values()):
        return None
    name = f"reports/{generation:06d}.json"
    (folder / "reports").mkdir(exist_ok=True)
    write_json(folder / name, report)
    return name


def commit_generation(folder: Path, manifest: Manifest, parent: Manifest | None) -> Manifest:
    """Make a generation the current one, and delete the files that only generations before its parent use.

    Returns:
        The manifest with size and sha256 of every file.
    """
    hashed = {} if parent is None else {entry.path: entry for entry in parent.files}
    paths = sorted(set(manifest.paths))
    new = [path for path in paths if path not in hashed]
    sync_files(folder / path for path in new)
    for new_folder in {(folder / path).parent for path in new}:
        _sync_folder(new_folder)
    hashed |= {entry.path: entry for entry in describe_files(folder, new)}
    complete = replace(manifest, files=tuple(hashed[path] for path in paths))
    publish_manifest(folder, complete)
    prune(folder, complete)
    return complete


def publish_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a generation, MANIFEST.json last."""
    (folder / GENERATIONS).mkdir(exist_ok=True)
    write_json(generation_path(folder, manifest.generation), manifest.to_json())
    _sync_folder(folder / GENERATIONS)
    write_json(folder / MANIFEST, manifest.to_json())
    _sync_folder(folder)


def prune(folder: Path, current: Manifest | None) -> None:
    """Delete unfinished work and all files of the pack that neither the current generation nor its parent uses.

    A generation that was written but not committed is deleted too, because the next one has the same number and file
    names.

    Args:
        folder: the pack.
        current: its manifest; None before the first commit.
    """
    numbers = () if current is None else (current.generation, current.parent)
    manifests = [generation_path(folder, number) for number in numbers if number is not None]
    for path in (folder / GENERATIONS).glob("*.json"):
        if path not in manifests:
            path.unlink()
    shutil.rmtree(folder / BUILD, ignore_errors=True)
    used = set() if current is None else {entry.path for entry in current.files}
    for path in manifests[1:]:
        if path.is_file():  # packs may be copied without it
            used |= {str(entry["path"]) for entry in read_json(path, what="pack", error=PackError)["files"]}
    for path in _pack_files(folder):
        if path.relative_to(folder).as_posix() not in used:
            path.unlink()


def _pack_files(folder: Path) -> Iterator[Path]:
    for name in PACK_FOLDERS:
        yield from (path for path in sorted((folder / name).glob("*")) if _PACK_FILE.fullmatch(path.name))


def _sync_folder(folder: Path) -> None:
    """Flush a folder, without which a rename may be lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
