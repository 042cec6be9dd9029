"""Reads Google's WIT: .tsv.gz files of image-text rows from Wikipedia in 108 languages, with the images' addresses.

Columns: https://github.com/google-research-datasets/wit/blob/main/DATA.md. The rows of a page are not adjacent, so
`prepare` copies the rows of one language into a SQLite file with an index over pages.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    ImageRecord,
    Present,
    Record,
    Skipped,
    Used,
)
from gog_edge.indexing.sources.files import CompressedFile, PickleFieldsMixin
from gog_edge.indexing.sources.images import ImageFolder
from gog_edge.indexing.sources.text import clean_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

LICENCE = "CC BY-SA 3.0"  # of the texts, as stated by the data set
RELEASE_YEAR = "2021"  # the data set does not state the date of its Wikipedia dump
REQUIRED_COLUMNS = ("language", "page_url", "image_url", "page_title")
COLUMNS = (*REQUIRED_COLUMNS, "hierarchical_section_title", "caption_reference_description",
           "caption_attribution_description", "caption_alt_text_description", "is_main_image",
           "attribution_passes_lang_id", "context_page_description", "context_section_description")  # fmt: skip
ROW, IMAGE = "row", "image"  # kinds of items
MALFORMED, OTHER_LANGUAGE, NO_PAGE = ("row has another number of cells than the header", "row is in another language",
                                      "row has no address of a page")
CHUNK_ROWS = 512
_BATCH = 20_000  # rows of a transaction
_COMPLETE = 1  # PRAGMA user_version of a spool that contains all rows
_PATTERNS = ("*.tsv.gz", "*.tsv")
_TABLES = f"""
CREATE TABLE IF NOT EXISTS copied (file TEXT PRIMARY KEY, lines INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS left_out (
    file TEXT NOT NULL, reason TEXT NOT NULL, example TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (file, reason)
);
CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, {", ".join(f"{name} TEXT NOT NULL" for name in COLUMNS)});
"""
_LEAVE_OUT = (
    "INSERT INTO left_out VALUES (?, ?, ?, ?) ON CONFLICT (file, reason) DO UPDATE SET count = count + excluded.count"
)
_INSERT = f"INSERT INTO rows ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


@dataclass
class WitSource(PickleFieldsMixin):
    """The articles of one language, or of all if `language` is empty, with their images if the folder has them."""

    path: Path  # a file, or a folder of files
    images: ImageFolder
    language: str = "en"
    licence: str = LICENCE
    spool: Path | None = None  # the SQLite file that `prepare` writes

    def snapshot(self) -> Snapshot:
        """Describe the data set.

        Raises:
            SourceError: there is no file, or a file lacks a required column.
        """
        self.images.check()
        files = wit_files(self.path)
        digest = sha256()
        for path in files:
            with CompressedFile(path) as file:
                _column_positions(path, next(_rows(file), []))
            digest.update(sha256_of(path).encode())
        name = f"wit-{self.language or 'all'}"
        return Snapshot(name, RELEASE_YEAR, "", digest.hexdigest(), self.licence)

    def prepare(self, work: Path) -> None:
        """Write `work`/wit-LANGUAGE.sqlite; a repeated call continues after the last committed rows."""
        spool = work / f"wit-{self.language or 'all'}.sqlite"
        work.mkdir(parents=True, exist_ok=True)
        self.spool = spool  # pickled copies of this source need it
        try:
            with closing(sqlite3.connect(spool)) as connection:
                self._fill(connection)
        except sqlite3.Error as exc:
            raise SourceError(f"'{spool}' cannot be written ({exc}); make room on the disk, or delete the file, and "
                              "run the same command again") from exc

    def _fill(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA user_version").fetchone()[0] == _COMPLETE:
            return
        connection.executescript(_TABLES)
        for path in wit_files(self.path):
            self._copy_rows(connection, path)
        connection.execute("CREATE INDEX IF NOT EXISTS by_page ON rows (page_url)")
        connection.execute(f"PRAGMA user_version = {_COMPLETE}")
        connection.commit()

    def _copy_rows(self, connection: sqlite3.Connection, path: Path) -> None:
        """Copy the rows of a file from the last position on; each batch is committed together with its position."""
        found = connection.execute("SELECT lines FROM copied WHERE file = ?", (path.name,)).fetchone()
        done = found[0] if found else 0
        batch = _Batch([], {})
        number = 0
        with CompressedFile(path) as file:
            rows = _rows(file)
            header = next(rows, [])
            positions = _column_positions(path, header)
            width = max(positions) + 1
            for number, row in enumerate(rows, 1):
                if number <= done:
                    continue
                if not width <= len(row) <= len(header):
                    batch.leave_out(MALFORMED, f"line {number + 1}")
                elif self.language not in ("", row[positions[0]]):
                    batch.leave_out(OTHER_LANGUAGE, f"line {number + 1}: {row[positions[0]][:40]}")
                elif not row[positions[1]].strip():
                    batch.leave_out(NO_PAGE, f"line {number + 1}")
                else:
                    batch.rows.append([row[position] if position >= 0 else "" for position in positions])
                if number % _BATCH == 0:
                    _commit(connection, path, number, batch)
        _commit(connection, path, max(number, done), batch)

    @property
    def size(self) -> int:
        """Return the number of rows of the language. `prepare` must have been called."""
        with closing(self._open()) as connection:
            return int(connection.execute("SELECT count(*) FROM rows").fetchone()[0])

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield ranges of pages with at least CHUNK_ROWS rows."""
        number, rows, first = 0, 0, ""
        pages = "SELECT page_url, count(*) FROM rows GROUP BY page_url ORDER BY page_url"
        with closing(self._open()) as connection:
            for page, count in connection.execute(pages):
                first, rows = (page, count) if rows == 0 else (first, rows + count)
                if rows >= CHUNK_ROWS:
                    if number >= start:
                        yield Chunk(number, rows, (first, page))
                    number, rows = number + 1, 0
        if rows and number >= start:
            yield Chunk(number, rows, (first, page))

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article for each page, and an image for each of its rows; the first chunk counts all rows."""
        if chunk.number == 0:
            yield from self._left_out()
        query = f"SELECT {', '.join(COLUMNS)} FROM rows WHERE page_url BETWEEN ? AND ? ORDER BY page_url, id"
        with closing(self._open()) as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute(query, chunk.content)
            for address, page in groupby(rows, key=lambda row: str(row["page_url"])):
                yield from self._records(address, [dict(row) for row in page])

    def _records(self, address: str, rows: Sequence[Mapping[str, str]]) -> Iterator[Record]:
        yield Present(ROW, len(rows))
        title = clean_line(rows[0]["page_title"]) or address
        texts = dict.fromkeys([("", rows[0]["context_page_description"]), *(_section(row) for row in rows)])
        paragraphs = tuple(dict.fromkeys(paragraph for text in texts for paragraph in split_paragraphs(*text)))
        if not paragraphs:
            yield Skipped("article has no text", address, ROW, len(rows))
            return
        yield ArticleRecord(title, paragraphs, self.licence, key=address)
        yield Present(IMAGE, len(rows))
        for row in rows:
            source = row["image_url"]
            image = self.images.thumbnail(source)
            lead = row["is_main_image"] == "true"
            if isinstance(image, Skipped):
                yield replace(image, kind=IMAGE)
            else:
                yield ImageRecord(image, _caption(row), UNKNOWN_LICENCE, source, (address,), lead)
                yield Used(IMAGE, source, address)
        yield Used(ROW, address, address, len(rows))

    def _left_out(self) -> Iterator[Record]:
        with closing(self._open()) as connection:
            for reason, example, count in connection.execute("SELECT reason, example, count FROM left_out"):
                yield Present(ROW, count)
                yield Skipped(reason, example, ROW, count)

    def _open(self) -> sqlite3.Connection:
        if self.spool is None or not self.spool.is_file():
            raise SourceError("the rows of WIT are not sorted yet; call prepare() first")
        return sqlite3.connect(f"file:{quote(str(self.spool))}?mode=ro", uri=True)


def wit_files(path: Path) -> list[Path]:
    """Return the files of the data set, sorted by name.

    Raises:
        SourceError: there is none.
    """
    files = [path] if path.is_file() else sorted(found for pattern in _PATTERNS for found in path.glob(pattern))
    if not files:
        raise SourceError(f"'{path}' contains no .tsv or .tsv.gz file; give a file of WIT, or a folder of them")
    return files


def is_wit(header: str) -> bool:
    """Return whether a header line contains the required columns of WIT."""
    return set(REQUIRED_COLUMNS) <= set(header.rstrip("\r\n").split("\t"))


def _rows(file: CompressedFile) -> Iterator[list[str]]:
    # WIT does not quote: a line is a row, and quotation marks are plain characters.
    for line in file.lines():
        yield line.decode("utf-8", "replace").rstrip("\r\n").split("\t")


def _column_positions(path: Path, header: Sequence[str]) -> list[int]:
    """Return the position of each of COLUMNS in the header, -1 for optional columns that are missing."""
    if missing := [name for name in REQUIRED_COLUMNS if name not in header]:
        raise SourceError(f"the first line of '{path}' lacks the column '{missing[0]}'; give a file of WIT")
    return [header.index(name) if name in header else -1 for name in COLUMNS]


@dataclass(frozen=True)
class _Batch:
    """Rows of a file that are written in one transaction, and those that are left out, by reason."""

    rows: list[list[str]]
    left_out: dict[str, tuple[str, int]]  # an example, and the number of rows

    def leave_out(self, reason: str, example: str) -> None:
        first, count = self.left_out.get(reason, (example, 0))
        self.left_out[reason] = first, count + 1


def _commit(connection: sqlite3.Connection, path: Path, lines: int, batch: _Batch) -> None:
    """Write a batch together with the position in its file."""
    with connection:
        connection.executemany(_INSERT, batch.rows)
        connection.executemany(_LEAVE_OUT, [(path.name, reason, *own) for reason, own in batch.left_out.items()])
        connection.execute("INSERT OR REPLACE INTO copied VALUES (?, ?)", (path.name, lines))
    batch.rows.clear()
    batch.left_out.clear()


def _section(row: Mapping[str, str]) -> tuple[str, str]:
    """Return (section, text) of a row. The section path begins with the page's title, which alone means the lead."""
    path = [part for raw in row["hierarchical_section_title"].split(" / ") if (part := clean_line(raw))]
    if path and path[0] == clean_line(row["page_title"]):
        path = path[1:]
    return " / ".join(path), row["context_section_description"]


def _caption(row: Mapping[str, str]) -> str:
    """Return the caption in the page, else the alt text, else the description of the image in this language."""
    for name in ("caption_reference_description", "caption_alt_text_description"):
        if caption := clean_line(row[name]):
            return caption
    return clean_line(row["caption_attribution_description"]) if row["attribution_passes_lang_id"] == "true" else ""
