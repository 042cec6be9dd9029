"""How a generation comes into force: one writer at a time, files first, the manifest last, old files afterwards."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import FileEntry, describe_files, read_json, sync_files, write_array, write_json
from gog_edge.retrieval.manifest import (
    BUILD,
    GENERATIONS,
    MANIFEST,
    Manifest,
    Tombstones,
    command_of,
    generation_path,
    read_manifest,
)
from gog_edge.retrieval.vectors.shards import Ids

SETTINGS = f"{BUILD}/settings.json"  # of a build that can go on
LOCK = "LOCK"
OWN_FOLDERS = ("store", "vectors", "index", "tombstones", "reports")
_OWN_NAME = re.compile(r"\d{6}[-.].*")  # begins with its generation; nothing else in a pack is ever removed


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a pack's lock; PackError when another process writes it, or nobody may."""
    if folder.exists() and not folder.is_dir():
        raise PackError(f"'{folder}' is a file, and a pack is a folder; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("w")
    except OSError as exc:
        raise PackError(f"pack '{folder}' cannot be written ({exc.strerror}); copy it to where it can") from exc
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackError(f"pack '{folder}' is being written by another process; wait until it is done") from None
        yield


@contextmanager
def changing(folder: Path) -> Iterator[Manifest]:
    """Hold the lock of a pack that is there and finished, and tell its generation in force.

    Raises:
        PackError: there is no pack, another process writes it, or an unfinished build would be lost.
    """
    read_manifest(folder)  # before a lock file is made in a folder of another kind
    with writing(folder):
        if unfinished(folder) is not None:
            raise PackError(f"'{folder}' holds an unfinished build of its next generation; finish it with "
                            f"{command_of(folder)}, or remove '{folder / BUILD}'")
        yield read_manifest(folder)


def unfinished(folder: Path) -> dict[str, Any] | None:
    """The settings of a build that can go on; None where none was begun, or where it came into force all the same."""
    note = folder / SETTINGS
    if not note.is_file():
        return None
    begun = read_json(note, what="pack", error=PackError)
    manifest = current(folder)
    return None if manifest is not None and manifest.generation >= int(begun["generation"]) else begun


def current(folder: Path) -> Manifest | None:
    """The generation in force, or None where there is none yet."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def write_tombstones(folder: Path, generation: int, articles: Ids, images: Ids) -> Tombstones | None:
    """Files of what is no longer there; None where everything is."""
    if not len(articles) and not len(images):
        return None
    files = Tombstones(*(f"tombstones/{generation:06d}-{kind}.npy" for kind in ("articles", "images")))
    (folder / "tombstones").mkdir(exist_ok=True)
    write_array(folder / files.articles, np.sort(articles).astype(np.int64))
    write_array(folder / files.images, np.sort(images).astype(np.int64))
    return files


def write_report(folder: Path, generation: int, skipped: Sequence[tuple[str, int, list[str]]]) -> str | None:
    """A file that says what was skipped and why; None where nothing was."""
    if not skipped:
        return None
    name = f"reports/{generation:06d}.json"
    (folder / "reports").mkdir(exist_ok=True)
    write_json(folder / name, {"skipped": [{"reason": reason, "count": count, "examples": examples}
                                           for reason, count, examples in skipped]})  # fmt: skip
    return name


def commit(folder: Path, manifest: Manifest, parent: Manifest | None) -> Manifest:
    """Bring a generation into force and remove what is older than its parent. Returns it with its files' hashes."""
    known = {} if parent is None else {entry.path: entry for entry in parent.files}
    paths = sorted(set(manifest.paths))
    sync_files(folder / path for path in paths if path not in known)
    for parent_folder in {(folder / path).parent for path in paths if path not in known}:
        _sync_folder(parent_folder)
    fresh = {entry.path: entry for entry in describe_files(folder, [path for path in paths if path not in known])}
    whole = replace(manifest, files=tuple(known.get(path) or fresh[path] for path in paths))
    put_in_force(folder, whole)
    prune(folder)
    return whole


def put_in_force(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a generation, MANIFEST.json last."""
    (folder / GENERATIONS).mkdir(exist_ok=True)
    write_json(generation_path(folder, manifest.generation), manifest.to_json())
    _sync_folder(folder / GENERATIONS)
    write_json(folder / MANIFEST, manifest.to_json())
    _sync_folder(folder)


def prune(folder: Path) -> None:
    """Remove what is unfinished, and all that neither the generation in force, if there is one, nor its parent names.

    A generation that was written and did not come into force goes too: the next one takes its number and its names.
    """
    manifest = current(folder)
    numbers = () if manifest is None else (manifest.generation, manifest.parent)
    kept = {generation_path(folder, number) for number in numbers if number is not None}
    for path in (folder / GENERATIONS).glob("*.json"):
        if path not in kept:
            path.unlink()
    shutil.rmtree(folder / BUILD, ignore_errors=True)
    for path in unnamed(folder):
        path.unlink()


def unnamed(folder: Path) -> list[Path]:
    """Files of a pack's own folders that no generation names."""
    named = {entry.path for entry in _entries(folder)}
    return [
        path
        for own in OWN_FOLDERS
        for path in sorted((folder / own).glob("*"))
        if _OWN_NAME.fullmatch(path.name) and path.relative_to(folder).as_posix() not in named
    ]


def _entries(folder: Path) -> Iterator[FileEntry]:
    for path in [*sorted((folder / GENERATIONS).glob("*.json")), folder / MANIFEST]:
        if path.is_file():
            yield from (FileEntry(**entry) for entry in read_json(path, what="pack", error=PackError)["files"])


def _sync_folder(folder: Path) -> None:
    """A rename is kept by its folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
