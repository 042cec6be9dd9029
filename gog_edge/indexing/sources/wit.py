"""Google's WIT: .tsv.gz files of image-text rows of Wikipedia's pages in 108 languages, with the images' addresses.

Columns as in https://github.com/google-research-datasets/wit/blob/main/DATA.md, told by the header line. The rows of a
page stand apart, so that `prepare` brings those of one language into a SQLite file with an index over pages.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import UNKNOWN, ArticleDraft, Chunk, ImageDraft, Item, Skipped
from gog_edge.indexing.sources.files import ImageFolder, PackedFile, Reopened
from gog_edge.indexing.sources.text import one_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

LICENCE = "CC BY-SA 3.0"  # of the texts, as the dataset says
TAKEN = "2021"  # the year it came out; the day of Wikipedia in it is not told
NEEDED = ("language", "page_url", "image_url", "page_title")
KEPT = (*NEEDED, "hierarchical_section_title", "caption_reference_description", "caption_attribution_description",
        "caption_alt_text_description", "is_main_image", "attribution_passes_lang_id", "context_page_description",
        "context_section_description")  # fmt: skip
CHUNK_ROWS = 512
_BATCH = 20_000  # rows written at once
_READY = 1  # PRAGMA user_version of a file with all rows
_PATTERNS = ("*.tsv.gz", "*.tsv")
_TABLES = f"""
CREATE TABLE IF NOT EXISTS done (file TEXT PRIMARY KEY, lines INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, {", ".join(f"{name} TEXT NOT NULL" for name in KEPT)});
"""
_INSERT = f"INSERT INTO rows ({', '.join(KEPT)}) VALUES ({', '.join('?' * len(KEPT))})"


@dataclass
class WitSource(Reopened):
    """Articles of one language, or of all where `language` is empty, with their images where the folder has them."""

    path: Path  # a file, or a folder of them
    images: ImageFolder
    language: str = "en"
    licence: str = LICENCE
    spool: Path | None = None  # the sorted rows, once `prepare` has told where they are

    def snapshot(self) -> Snapshot:
        """Raises SourceError when a file lacks a column, or there is none."""
        self.images.check()
        files = wit_files(self.path)
        digest = sha256()
        for path in files:
            with PackedFile(path) as file:
                _columns(path, next(_rows(file), []))
            digest.update(sha256_of(path).encode())
        name = f"wit-{self.language or 'all'}"
        return Snapshot(name, TAKEN, "", digest.hexdigest(), self.licence)

    def prepare(self, work: Path) -> None:
        """Write `work`/wit-LANGUAGE.sqlite; killed, it goes on after the last rows that were committed."""
        spool = work / f"wit-{self.language or 'all'}.sqlite"
        work.mkdir(parents=True, exist_ok=True)
        self.spool = spool  # which the copies in other processes get too
        try:
            with closing(sqlite3.connect(spool)) as base:
                self._fill(base)
        except sqlite3.Error as exc:
            raise SourceError(f"'{spool}' cannot be written ({exc}); make room, or remove it and begin again") from exc

    def _fill(self, base: sqlite3.Connection) -> None:
        if base.execute("PRAGMA user_version").fetchone()[0] == _READY:
            return
        base.executescript(_TABLES)
        for path in wit_files(self.path):
            self._copy(base, path)
        base.execute("CREATE INDEX IF NOT EXISTS by_page ON rows (page_url)")
        base.execute(f"PRAGMA user_version = {_READY}")
        base.commit()

    def _copy(self, base: sqlite3.Connection, path: Path) -> None:
        """Rows of a file from where it was left, each batch and the place where it ends in one transaction."""
        found = base.execute("SELECT lines FROM done WHERE file = ?", (path.name,)).fetchone()
        begun = found[0] if found else 0
        batch: list[list[str]] = []
        number = 0
        with PackedFile(path) as file:
            rows = _rows(file)
            columns = _columns(path, next(rows, []))
            width = max(columns) + 1
            for number, row in enumerate(rows, 1):
                if number > begun and len(row) >= width and self.language in ("", row[columns[0]]):
                    batch.append([row[column] if column >= 0 else "" for column in columns])
                if number % _BATCH == 0 and number > begun:
                    _commit(base, path, number, batch)
        _commit(base, path, number, batch)

    @property
    def size(self) -> int:
        """Rows of the language; known once prepared."""
        with closing(self._open()) as base:
            return int(base.execute("SELECT count(*) FROM rows").fetchone()[0])

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Ranges of pages, of CHUNK_ROWS rows or somewhat more."""
        number, rows, first = 0, 0, ""
        with closing(self._open()) as base:
            for page, count in base.execute("SELECT page_url, count(*) FROM rows GROUP BY page_url ORDER BY page_url"):
                first, rows = (page, count) if rows == 0 else (first, rows + count)
                if rows >= CHUNK_ROWS:
                    if number >= start:
                        yield Chunk(number, rows, (first, page))
                    number, rows = number + 1, 0
        if rows and number >= start:
            yield Chunk(number, rows, (first, page))

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """A page's rows make an article, and an image each."""
        names = ", ".join(KEPT)
        query = f"SELECT {names} FROM rows WHERE page_url BETWEEN ? AND ? ORDER BY page_url, id"
        with closing(self._open()) as base:
            base.row_factory = sqlite3.Row
            for address, rows in groupby(base.execute(query, chunk.content), key=lambda row: str(row["page_url"])):
                yield from self._page(address, [dict(row) for row in rows])

    def _page(self, address: str, rows: Sequence[Mapping[str, str]]) -> Iterator[Item]:
        title = one_line(rows[0]["page_title"]) or address
        texts = dict.fromkeys([("", rows[0]["context_page_description"]), *(_section(row) for row in rows)])
        paragraphs = tuple(dict.fromkeys(paragraph for text in texts for paragraph in split_paragraphs(*text)))
        if not paragraphs:
            yield Skipped("article has no text", address)
            return
        yield ArticleDraft(title, paragraphs, self.licence, key=address)
        for row in rows:
            source = row["image_url"]
            image = self.images.thumbnail(source)
            lead = row["is_main_image"] == "true"
            if isinstance(image, Skipped):
                yield image
            else:
                yield ImageDraft(image, _caption(row), UNKNOWN, source, (address,), lead)

    def _open(self) -> sqlite3.Connection:
        if self.spool is None or not self.spool.is_file():
            raise SourceError("the rows of WIT are not sorted yet; call prepare() first")
        return sqlite3.connect(f"file:{quote(str(self.spool))}?mode=ro", uri=True)


def wit_files(path: Path) -> list[Path]:
    """The files of a dataset in their order; SourceError when there is none."""
    files = [path] if path.is_file() else sorted(found for pattern in _PATTERNS for found in path.glob(pattern))
    if not files:
        raise SourceError(f"there is no .tsv or .tsv.gz file at '{path}'; name a file of WIT, or a folder of them")
    return files


def is_wit(header: str) -> bool:
    """Whether a first line names the columns of WIT."""
    return set(NEEDED) <= set(header.rstrip("\r\n").split("\t"))


def _rows(file: PackedFile) -> Iterator[list[str]]:
    # Quotes are as any other character there: a line is a row, whatever is in it.
    for line in file.lines():
        yield line.decode("utf-8", "replace").rstrip("\r\n").split("\t")


def _columns(path: Path, header: Sequence[str]) -> list[int]:
    """Where the columns that are kept stand, -1 for those that are not there."""
    if missing := [name for name in NEEDED if name not in header]:
        raise SourceError(f"'{path}' has no column '{missing[0]}' in its first line; is it a file of WIT?")
    return [header.index(name) if name in header else -1 for name in KEPT]


def _commit(base: sqlite3.Connection, path: Path, lines: int, batch: list[list[str]]) -> None:
    with base:
        base.executemany(_INSERT, batch)
        base.execute("INSERT OR REPLACE INTO done VALUES (?, ?)", (path.name, lines))
    batch.clear()


def _section(row: Mapping[str, str]) -> tuple[str, str]:
    """(section, text) of a row; the path of a section begins with the page's title, which alone means the lead."""
    path = [part for raw in row["hierarchical_section_title"].split(" / ") if (part := one_line(raw))]
    if path and path[0] == one_line(row["page_title"]):
        path = path[1:]
    return " / ".join(path), row["context_section_description"]


def _caption(row: Mapping[str, str]) -> str:
    """What the page says of an image, else what stands in for it, else what its own page says in this language."""
    for name in ("caption_reference_description", "caption_alt_text_description"):
        if caption := one_line(row[name]):
            return caption
    return one_line(row["caption_attribution_description"]) if row["attribution_passes_lang_id"] == "true" else ""
