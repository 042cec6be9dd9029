"""Find the picture that a cell of a table names, among the names of a folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import PurePosixPath
from typing import TypeAlias
from urllib.parse import unquote

from gog_edge.indexing.sources.images import candidate_names

MISSING, AMBIGUOUS, OUTSIDE = ("file in the table is missing", "name in the table fits several files",
                               "name in the table leads outside of the folder")
NO_PICTURE, NO_NAME = "object in the table has no picture in the folder", "row of the table names no file"
_SEPARATORS = re.compile(r"[;|\n]")  # between several names in a cell
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|www\.|//", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[a-z]:[\\/]|~?[\\/]", re.IGNORECASE)
_WINDOWS = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)  # absolute names of Windows
_TURKISH = str.maketrans("İı", "ii")  # which have no common case folding with I and i
_MAX_NAME = 4096  # characters of a cell that may be a name
_MAX_COMPARED = 20_000  # names among which the nearest one is looked for


_Tier: TypeAlias = dict[str, tuple[str, ...]]  # names by one of their forms


@dataclass(frozen=True)
class Match:
    """The pictures that a cell names, or why there is none."""

    files: tuple[str, ...] = ()
    reason: str = ""
    near: tuple[str, ...] = ()  # the files that an ambiguous name fits


class FileNames:
    """The pictures of a folder by their names: exactly, by NFC, without case, without folder, without suffix."""

    def __init__(self, names: Iterable[str], suffixes: frozenset[str]) -> None:
        """Index the names of pictures, which are paths below the folder with forward slashes.

        Args:
            names: the pictures.
            suffixes: in lower case, of names that are complete: `a.jpg` does not fit `a.png`.
        """
        self._names, self._suffixes = tuple(names), suffixes
        self._exact: _Tier = {name: (name,) for name in self._names}
        self._tiers = [_group(self._names, form) for form in (_composed, _folded)]
        self._last = [_group(self._names, lambda name: _composed(_last(name))),
                      _group(self._names, lambda name: _folded(_last(name)))]
        self._stems = _group(self._names, lambda name: _folded(_stem(name)))
        self._last_stems = _group(self._names, lambda name: _folded(_last(_stem(name))))

    def find(self, cell: str, base: str = "") -> Match:
        """Return the pictures that a cell names; it may list several, separated by semicolons, bars or line ends.

        Args:
            cell: a path below the folder or below `base`, a name without its folder or suffix, or an address.
            base: the folder of the table, below the folder of the source.
        """
        match = self._find_one(cell, base)
        is_list = not match.files and len(cell) <= _MAX_NAME
        parts = [part for part in _SEPARATORS.split(cell) if part.strip()] if is_list else []
        if len(parts) > 1:
            found = [self._find_one(part, base) for part in parts]
            if files := tuple(dict.fromkeys(name for one in found for name in one.files)):
                return Match(files)
        return match

    def find_path(self, path: str) -> tuple[str, ...]:
        """Return the files of a path: exactly, else by NFC, else without case."""
        return self._lookup(path, [self._exact, *self._tiers])

    def find_number(self, cell: str) -> Match:
        """Return the picture that is called after an object's number, of which only letters and digits count."""
        wanted = _alphanumeric(cell)
        found = self._numbers.get(wanted, ()) if wanted else ()
        return Match(found) if len(found) == 1 else Match((), AMBIGUOUS if found else NO_PICTURE, found)

    def find_address(self, cell: str) -> Match:
        """Return the picture of an address: its last part, in any case, or a hash of the address."""
        for name in candidate_names(cell.strip()):
            found = self._lookup(name, self._last) if PurePosixPath(name).suffix.lower() in self._suffixes else ()
            if found:
                return Match(found) if len(found) == 1 else Match((), AMBIGUOUS, found)
        return Match((), NO_PICTURE)

    def nearest(self, cell: str) -> str | None:
        """Return the most similar name of a picture, or None if none is similar."""
        wanted = _folded(_last(_clean(cell)[:200]))
        known = {_folded(_last(name)): name for name in self._names[:_MAX_COMPARED]}
        similar = get_close_matches(wanted, known, 1, 0.75)
        return known[similar[0]] if similar else None

    def _find_one(self, cell: str, base: str) -> Match:
        name = cell.strip().strip("\"'").strip()
        if not name:
            return Match((), NO_NAME)
        if len(name) > _MAX_NAME:
            return Match((), MISSING)
        if _ADDRESS.match(name) and not name.lower().startswith("file:"):
            match = self.find_address(name)
            return match if match.files or match.near else Match((), MISSING)
        if _WINDOWS.match(name) and ".." not in PurePosixPath(_clean(unquote(name))).parts:
            found = self._below_other_folder(_clean(name))  # by its last part, as an address
            return Match(found) if len(found) == 1 else Match((), AMBIGUOUS if found else OUTSIDE, found)
        if name.lower().startswith("file:") or _leads_outside(name) or _leads_outside(unquote(name)):
            return Match((), OUTSIDE)
        for wanted in self._variants(name, base):
            found = self.find_path(wanted) or (self._lookup(wanted, [self._stems]) if self._is_stem(wanted) else ())
            if found:
                return Match(found) if len(found) == 1 else Match((), AMBIGUOUS, found)
        for wanted in dict.fromkeys((_clean(name), _clean(unquote(name)))):
            if found := self._below_other_folder(wanted):
                return Match(found) if len(found) == 1 else Match((), AMBIGUOUS, found)
        return Match((), MISSING)

    def _below_other_folder(self, wanted: str) -> tuple[str, ...]:
        """Return the pictures of this name in other folders, those with the same end of the path if there are any."""
        last = PurePosixPath(wanted).name
        found = self._lookup(last, self._last)
        if not found and self._is_stem(last):
            found = self._lookup(last, [self._last_stems])
        folders = _folders_of(wanted)
        if len(found) < 2 or not folders:
            return found
        shared = {name: _shared_length(folders, _folders_of(name)) for name in found}
        return tuple(name for name, length in shared.items() if length == max(shared.values()))

    def _variants(self, name: str, base: str) -> Iterator[str]:
        for plain in dict.fromkeys((name, _clean(name), _clean(unquote(name)))):
            if base:
                yield f"{base}/{plain}"
            yield plain

    def _is_stem(self, name: str) -> bool:
        return PurePosixPath(name).suffix.lower() not in self._suffixes

    def _lookup(self, name: str, tiers: list[_Tier]) -> tuple[str, ...]:
        forms = (str, _composed, _folded)[-len(tiers) :]
        return next((found for form, tier in zip(forms, tiers, strict=True) if (found := tier.get(form(name), ()))), ())

    @cached_property
    def _numbers(self) -> _Tier:
        return _group(self._names, lambda name: _alphanumeric(_last(_stem(name))))


def _group(names: Iterable[str], form: Callable[[str], str]) -> _Tier:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(form(name), []).append(name)
    return {key: tuple(own) for key, own in groups.items()}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    """Return a name by NFC, without case and invisible marks, with single spaces."""
    if name.isascii():
        return " ".join(name.lower().split())
    visible = "".join(char for char in unicodedata.normalize("NFC", name) if unicodedata.category(char) != "Cf")
    return unicodedata.normalize("NFC", " ".join(visible.translate(_TURKISH).casefold().split()))


def _alphanumeric(name: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


def _last(name: str) -> str:
    """Return the last part of a path; PurePosixPath is slow for many names."""
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"


def _clean(name: str) -> str:
    """Return a path with forward slashes, and without `.` and doubled slashes."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _leads_outside(name: str) -> bool:
    return bool(_ABSOLUTE.match(name)) or ".." in PurePosixPath(name.replace("\\", "/")).parts


def _folders_of(name: str) -> list[str]:
    """Return the folders of a path, the last one first."""
    return [_folded(part) for part in reversed(PurePosixPath(name).parent.parts)]


def _shared_length(one: list[str], other: list[str]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
