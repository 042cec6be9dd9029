"""Reads a folder of pictures, for example a museum's own collection; each picture becomes an article.

Titles, captions, texts, licences and attributions come from a table (a .csv or .tsv in the folder itself with a column
`file`), else from a text file of the same name (`vase.jpg`, `vase.txt` or `vase.md`: the first line is the title), else
the file name is the title. Subfolders become sections.
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
from gog_edge.indexing.sources.base import UNKNOWN_LICENCE, ArticleRecord, Chunk, ImageRecord, Record, Skipped
from gog_edge.indexing.sources.files import PickleFieldsMixin, modified_date
from gog_edge.indexing.sources.images import DEFAULT_THUMBNAILS, ThumbnailOptions, load_thumbnail
from gog_edge.indexing.sources.text import clean_line, split_paragraphs
from gog_edge.picture import SUFFIXES
from gog_edge.retrieval.manifest import Snapshot

PICTURES = frozenset((*SUFFIXES, ".svg"))
TABLES, SIDECARS = frozenset((".csv", ".tsv")), (".txt", ".md")
CHUNK_FILES = 64
MAX_TEXT_BYTES = 4 * 2**20
_DELIMITERS = ",;\t|"
_COLUMNS = ("file", "title", "caption", "text", "licence", "attribution")
Row = Mapping[str, str]  # cell by column name


@dataclass(frozen=True)
class FolderSource(PickleFieldsMixin):
    """The pictures below a folder. `licence` is used where the table does not state one."""

    path: Path
    thumbnails: ThumbnailOptions = DEFAULT_THUMBNAILS
    licence: str = UNKNOWN_LICENCE

    def snapshot(self) -> Snapshot:
        """Describe the folder; the hash covers the names and contents of all its files.

        Raises:
            SourceError: there is no picture, or a table cannot be read.
        """
        if not self._files:
            raise SourceError(f"'{self.path}' contains no picture ({', '.join(sorted(PICTURES))}); check the path of "
                              "the folder")
        digest = sha256()
        for name in (*self._files, *self._texts):
            digest.update(f"{name}\0{sha256_of(self.path / name)}\n".encode("utf-8", "surrogateescape"))
        newest = max(modified_date(self.path / name) for name in self._files)
        return Snapshot(self.path.resolve().name, newest, "", digest.hexdigest(), self.licence)

    def prepare(self, work: Path) -> None:
        """Do nothing: the files are listed in order."""

    @property
    def size(self) -> int:
        """Return the number of pictures, missing files of the table included."""
        return len(self._names)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield names of pictures, each with its row of the table."""
        for number in range(start, -(-self.size // CHUNK_FILES)):
            names = self._names[number * CHUNK_FILES : (number + 1) * CHUNK_FILES]
            yield Chunk(number, len(names), tuple((name, self._rows.get(name)) for name in names))

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article and an image for each picture."""
        thumbnails = replace(self.thumbnails, min_side=1)  # small pictures of a collection are not icons
        for name, row in chunk.content:
            key = name.encode("utf-8", "replace").decode()  # file names may be in any encoding
            if not (self.path / name).is_file():
                yield Skipped("file in the table is missing", key)
                continue
            image = load_thumbnail(self.path / name, key, thumbnails)
            if isinstance(image, Skipped):
                yield image
            else:
                yield from self._records(key, row if row is not None else self._sidecar(name), image)

    def _records(self, key: str, row: Row, image: bytes) -> Iterator[Record]:
        title = clean_line(row.get("title", "")) or _title_from_name(key)
        caption = clean_line(row.get("caption", "")) or title
        licence = clean_line(row.get("licence", "")) or self.licence
        section = " / ".join(clean_line(part) for part in PurePosixPath(key).parent.parts)
        text = row.get("text", "").strip() or caption  # a picture without a text is cited by its caption
        yield ArticleRecord(title, tuple(split_paragraphs(section, text)), licence, key=key)
        yield ImageRecord(image, caption, licence, clean_line(row.get("attribution", "")), (key,), True)

    def _sidecar(self, name: str) -> Row:
        for suffix in SIDECARS:
            path = (self.path / name).with_suffix(suffix)
            if path.is_file():
                title, _, text = _read_text(path).strip().partition("\n")
                return {"title": title.lstrip("# "), "text": text}
        return {}

    @cached_property
    def _all(self) -> list[str]:
        """Return all files by their path below the folder, in the same order on every machine."""
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
        """Return the pictures that exist, then those that appear in the table only."""
        return list(dict.fromkeys((*self._files, *self._rows)))

    @cached_property
    def _rows(self) -> dict[str, Row]:
        tables = [name for name in self._texts if "/" not in name and PurePosixPath(name).suffix.lower() in TABLES]
        return {name: row for table in tables for name, row in read_table(self.path / table)}


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file, row) of a table with a header line; nothing if no column is named `file`.

    Column names are case-insensitive. The delimiter is the one of `, ; tab |` that yields a column `file`.

    Raises:
        SourceError: the table is malformed.
    """
    try:
        lines = _read_text(path, limit=None).splitlines(keepends=True)
        for delimiter in _DELIMITERS:
            rows = csv.reader(lines, delimiter=delimiter)
            header = [name.strip().lower().replace("license", "licence") for name in next(rows, [])]
            if "file" in header:
                yield from _rows_by_file(header, rows)
                return
    except csv.Error as exc:
        raise SourceError(f"the table '{path}' cannot be read ({exc}); save it as CSV in UTF-8") from exc


def _rows_by_file(header: list[str], rows: Iterator[list[str]]) -> Iterator[tuple[str, Row]]:
    """Yield (file, row); rows whose file lies outside of the folder are ignored."""
    for cells in rows:
        row = {name: cell for name, cell in zip(header, cells, strict=False) if name in _COLUMNS}
        name = row.get("file", "").strip().replace("\\", "/")
        if name and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts:
            yield PurePosixPath(name).as_posix(), row


def _read_text(path: Path, limit: int | None = MAX_TEXT_BYTES) -> str:
    """Decode a text file: UTF-8, UTF-16 with a byte order mark, else Windows-1252."""
    with path.open("rb") as stream:
        data = stream.read(-1 if limit is None else limit)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _title_from_name(name: str) -> str:
    """Return a title for a file name: `blue_vase-2.jpg` -> `blue vase-2`."""
    return clean_line(PurePosixPath(name).stem.replace("_", " ")) or name
