"""A folder of images that were fetched by address, for the snapshots that hold addresses instead of pixels.

The image of an address is looked for as a file, first hit:
  1. named as the last part of the address, percent-decoded or as it stands, in the folder itself or, as Wikimedia's
     own servers do it, in the folder of the first and the first two digits of the name's MD5 (`a/ab/Name.jpg`);
  2. named by the MD5, SHA-1 or SHA-256 of the whole address in hex, with any of `SUFFIXES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from gog_edge.errors import SourceError
from gog_edge.indexing.drafts import Skipped
from gog_edge.indexing.sources.files import Reopened
from gog_edge.indexing.sources.thumbnails import RULES, ThumbnailRules, make_thumbnail

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".svg", ".tif", ".tiff", "")
MAX_BYTES = 32 * 2**20
REMEMBERED = 1024
NOT_GIVEN, MISSING = "no folder of images was given", "image is not in the folder"


@dataclass(frozen=True)
class ImageFolder(Reopened):
    """Thumbnails by address. Without a folder there is none, and each is Skipped."""

    folder: Path | None
    rules: ThumbnailRules = RULES

    def check(self) -> None:
        """SourceError when the folder is not there."""
        if self.folder is not None and not self.folder.is_dir():
            raise SourceError(f"there is no folder of images '{self.folder}'; name the one that they were fetched into")

    def thumbnail(self, address: str) -> bytes | Skipped:
        """The file to serve, or why there is none."""
        return self._remembered(address)

    @cached_property
    def _remembered(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(REMEMBERED)(self._load)

    def _load(self, address: str) -> bytes | Skipped:
        if self.folder is None:
            return Skipped(NOT_GIVEN, address)
        return next((load_thumbnail(path, address, self.rules) for name in names_of(address)
                     if _is_file(path := self.folder / name)), Skipped(MISSING, address))


def load_thumbnail(path: Path, what: str, rules: ThumbnailRules) -> bytes | Skipped:
    """The thumbnail of a file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return Skipped("image is too large", what)
        return make_thumbnail(path.read_bytes(), what, rules)
    except OSError:
        return Skipped("image cannot be read", what)


def names_of(address: str) -> Iterator[str]:
    """The names, relative to the folder, that the image of an address may have there; likely ones first."""
    last = address.partition("#")[0].partition("?")[0].rpartition("/")[2]
    for name in dict.fromkeys((PurePosixPath(unquote(last)).name, last)):
        if name and name != "..":
            yield name
            digits = hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
            yield f"{digits[0]}/{digits[:2]}/{name}"
    for algorithm in ("md5", "sha1", "sha256"):
        digest = hashlib.new(algorithm, address.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
        yield from (digest + suffix for suffix in SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name too long, or with bytes that no file has
