"""A folder of pictures: a collection of one's own, each picture an article.

What is said of a picture stands in a table (any .csv or .tsv in the folder itself with a column `file`, besides it any
of title, caption, text, licence, attribution), else in a file beside it of the same name (`vase.jpg`, `vase.txt` or
`vase.md`: its first line the title, the rest paragraphs), else its name is its title. Folders within are sections.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import UNKNOWN, ArticleDraft, Chunk, ImageDraft, Item, Skipped
from gog_edge.indexing.sources.files import Reopened, changed_on, load_thumbnail
from gog_edge.indexing.sources.images import RULES, ThumbnailRules
from gog_edge.indexing.sources.text import one_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg"))
TABLES, SIDECARS = frozenset((".csv", ".tsv")), (".txt", ".md")
CHUNK_FILES = 64
MAX_TEXT_BYTES = 4 * 2**20
_DELIMITERS = ",;\t|"
_COLUMNS = ("file", "title", "caption", "text", "licence", "attribution")
Row = Mapping[str, str]  # by column


@dataclass(frozen=True)
class FolderSource(Reopened):
    """Pictures below a folder. `licence` holds where a table names none."""

    path: Path
    rules: ThumbnailRules = RULES
    licence: str = UNKNOWN

    def snapshot(self) -> Snapshot:
        """Raises SourceError when there is no picture, or a table that cannot be read.

        The hash is over the names and contents of all files.
        """
        if not self._files:
            raise SourceError(f"there is no picture in '{self.path}' ({', '.join(sorted(PICTURES))}); is it the right "
                              "folder?")
        digest = sha256()
        for name in (*self._files, *self._texts):
            digest.update(f"{name}\0{sha256_of(self.path / name)}\n".encode("utf-8", "surrogateescape"))
        newest = max(changed_on(self.path / name) for name in self._files)
        return Snapshot(self.path.resolve().name, newest, "", digest.hexdigest(), self.licence)

    def prepare(self, work: Path) -> None:
        """Nothing is to be sorted."""

    @property
    def size(self) -> int:
        """Files that are pictures, or that a table calls so."""
        return len(self._names)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Names of pictures, each with its row of the table."""
        for number in range(start, -(-self.size // CHUNK_FILES)):
            names = self._names[number * CHUNK_FILES : (number + 1) * CHUNK_FILES]
            yield Chunk(number, len(names), tuple((name, self._rows.get(name)) for name in names))

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """An article and an image to a picture."""
        rules = replace(self.rules, shortest=1)  # who puts a small picture there wants it
        for name, row in chunk.content:
            key = name.encode("utf-8", "replace").decode()  # names of files may be in any encoding
            if not (self.path / name).is_file():
                yield Skipped("file in the table is missing", key)
                continue
            image = load_thumbnail(self.path / name, key, rules)
            if isinstance(image, Skipped):
                yield image
            else:
                yield from self._items(key, row if row is not None else self._sidecar(name), image)

    def _items(self, key: str, row: Row, image: bytes) -> Iterator[Item]:
        title = one_line(row.get("title", "")) or _spoken(key)
        caption = one_line(row.get("caption", "")) or title
        licence = one_line(row.get("licence", "")) or self.licence
        section = " / ".join(one_line(part) for part in PurePosixPath(key).parent.parts)
        text = row.get("text", "").strip() or caption  # a picture without a text can be cited by its caption
        yield ArticleDraft(title, tuple(split_paragraphs(section, text)), licence, key=key)
        yield ImageDraft(image, caption, licence, one_line(row.get("attribution", "")), (key,), True)

    def _sidecar(self, name: str) -> Row:
        for suffix in SIDECARS:
            path = (self.path / name).with_suffix(suffix)
            if path.is_file():
                title, _, text = _read_text(path).strip().partition("\n")
                return {"title": title.lstrip("# "), "text": text}
        return {}

    @cached_property
    def _all(self) -> list[str]:
        """Every file, by its path below the folder, in an order that is the same on every machine."""
        return sorted(
            PurePosixPath(os.path.relpath(Path(folder) / name, self.path)).as_posix()
            for folder, _, names in os.walk(self.path)
            for name in names
            if not name.startswith(".")
        )

    @cached_property
    def _files(self) -> list[str]:
        return [name for name in self._all if PurePosixPath(name).suffix.lower() in PICTURES]

    @cached_property
    def _texts(self) -> list[str]:
        return [name for name in self._all if PurePosixPath(name).suffix.lower() in (*TABLES, *SIDECARS)]

    @cached_property
    def _names(self) -> list[str]:
        """Pictures that are there, then those that a table alone knows."""
        return list(dict.fromkeys((*self._files, *self._rows)))

    @cached_property
    def _rows(self) -> dict[str, Row]:
        tables = [name for name in self._texts if "/" not in name and PurePosixPath(name).suffix.lower() in TABLES]
        return {name: row for table in tables for name, row in read_table(self.path / table)}


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """(file, its row) of a table whose first line names its columns; nothing where none of them is `file`.

    Names of columns may be in any case; the delimiter is the one of `, ; tab |` that brings out a column `file`.
    """
    try:
        lines = _read_text(path, limit=None).splitlines(keepends=True)
        for delimiter in _DELIMITERS:
            rows = csv.reader(lines, delimiter=delimiter)
            header = [name.strip().lower().replace("license", "licence") for name in next(rows, [])]
            if "file" in header:
                yield from _named(header, rows)
                return
    except csv.Error as exc:
        raise SourceError(f"'{path}' is no table that can be read ({exc}); save it as CSV in UTF-8") from exc


def _named(header: list[str], rows: Iterator[list[str]]) -> Iterator[tuple[str, Row]]:
    for cells in rows:
        row = {name: cell for name, cell in zip(header, cells, strict=False) if name in _COLUMNS}
        name = row.get("file", "").strip().replace("\\", "/")
        if name and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts:
            yield PurePosixPath(name).as_posix(), row


def _read_text(path: Path, limit: int | None = MAX_TEXT_BYTES) -> str:
    """A text file as people save them: UTF-8, UTF-16 with its mark, else Windows' Latin."""
    with path.open("rb") as stream:
        data = stream.read(-1 if limit is None else limit)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _spoken(name: str) -> str:
    """A title from a file's name: `blue_vase-2.jpg` -> `blue vase-2`."""
    return one_line(PurePosixPath(name).stem.replace("_", " ")) or name
