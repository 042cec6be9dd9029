"""List the files of a folder by what they are: pictures, tables, texts, and those that are not read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.folder.tables import CSV_SUFFIXES, JSON_SUFFIXES
from gog_edge.indexing.sources.formats import HEAD_BYTES, PICTURE_SUFFIXES, is_picture, unreadable_reason

FILE, TABLE_ROW = "file", "table row"  # kinds of items
TABLES, SIDECARS = (*CSV_SUFFIXES, *JSON_SUFFIXES), (".txt", ".md")
HIDDEN, LINK, BROKEN_LINK, SPECIAL = ("hidden or system file", "link to a folder, or out of the folder",
                                      "link leads to a missing file", "not a regular file")
EMPTY, NOT_READ, NO_PICTURE_FILE = "file is empty", "file or folder cannot be read", "file is not a picture"
SPREADSHEET = "spreadsheet is not read; save it as CSV"
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers", ".fods", ".xlsb")
_SYSTEM_NAMES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "iconcache.db", "icon\r", "folder.htt"))
_SYSTEM_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information"))


@dataclass(frozen=True)
class Listing:
    """The files below a folder, by their paths with forward slashes, each in one of the fields, sorted by name."""

    pictures: tuple[str, ...]
    tables: tuple[str, ...]
    texts: tuple[str, ...]  # files that may belong to a picture
    skipped: tuple[Skipped, ...]
    size: int  # number of files, and of folders that cannot be read


def list_files(root: Path) -> Listing:
    """List a folder in the same order on every machine. Links to folders are not followed."""
    pictures, tables, texts = list[str](), list[str](), list[str]()
    skipped: list[Skipped] = []
    names = sorted(_walk(root, skipped))
    size = len(names) + len(skipped)
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if reason := _unusable(root, name):
            skipped.append(Skipped(reason, shown_name(name), FILE))
        elif suffix in TABLES:
            tables.append(name)
        elif suffix in SIDECARS:
            texts.append(name)
        elif suffix in PICTURE_SUFFIXES:
            pictures.append(name)
        elif suffix in _SPREADSHEETS:
            skipped.append(Skipped(SPREADSHEET, shown_name(name), FILE))
        elif not (reason := unreadable_reason(suffix)) and _begins_like_a_picture(root / name):
            pictures.append(name)
        else:
            skipped.append(Skipped(reason or NO_PICTURE_FILE, shown_name(name), FILE))
    return Listing(tuple(pictures), tuple(tables), tuple(texts), tuple(sorted(skipped, key=lambda one: one.item)), size)


def shown_name(name: str) -> str:
    """Return a path as text: bytes that are not UTF-8, from older systems, are taken as Windows-1252."""
    if name.isascii():
        return name
    return "".join(bytes([ord(char) - 0xDC00]).decode("cp1252", "replace") if "\udc80" <= char <= "\udcff" else char
                   for char in name)


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[str]:
    def failed(error: OSError) -> None:
        skipped.append(Skipped(NOT_READ, shown_name(_below(root, Path(error.filename or root))), FILE))

    for folder, folders, names in os.walk(root, onerror=failed):
        for name in (*names, *(one for one in folders if (Path(folder) / one).is_symlink())):
            yield _below(root, Path(folder) / name)


def _below(root: Path, path: Path) -> str:
    return PurePosixPath(os.path.relpath(path, root)).as_posix()


def _unusable(root: Path, name: str) -> str:
    """Return why a file is not read, whatever it contains; empty if nothing speaks against it."""
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts) or parts[-1].lower() in _SYSTEM_NAMES \
            or any(part.lower() in _SYSTEM_FOLDERS for part in parts[:-1]):
        return HIDDEN
    path = root / name
    try:
        if path.is_symlink():
            if not path.exists():
                return BROKEN_LINK
            if path.is_dir() or not path.resolve().is_relative_to(root.resolve()):
                return LINK
        status = path.stat()
    except (OSError, RuntimeError):  # RuntimeError: links that lead to each other
        return NOT_READ
    if not stat.S_ISREG(status.st_mode):
        return SPECIAL
    is_table = PurePosixPath(name).suffix.lower() in TABLES  # of which an empty one is reported by its reader
    return "" if status.st_size or is_table else EMPTY


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return is_picture(stream.read(HEAD_BYTES))
    except OSError:
        return False
