"""Reads a folder of pictures, for example a museum's own collection; each picture becomes an article.

Titles, captions, texts, licences and attributions come from tables (CSV or JSON; `columns.toml` lists the names of
columns) and from text files of the same name (`vase.jpg`, `vase.txt` or `vase.md`: the first line is the title), else
the file name is the title. Subfolders become sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath

from gog_edge.errors import SourceError
from gog_edge.files import sha256_of
from gog_edge.indexing.sources.base import (
    UNKNOWN_LICENCE,
    ArticleRecord,
    Chunk,
    ImageRecord,
    Notice,
    Present,
    Record,
    Skipped,
    Used,
)
from gog_edge.indexing.sources.files import PickleFieldsMixin, modified_date
from gog_edge.indexing.sources.folder.catalogue import UNUSED_PICTURE, Catalogue, Entry, read_catalogue
from gog_edge.indexing.sources.folder.listing import FILE, PICTURE_SUFFIXES, TABLE_ROW, Listing, list_files
from gog_edge.indexing.sources.images import DEFAULT_THUMBNAILS, ThumbnailOptions, load_thumbnails
from gog_edge.indexing.sources.text import clean_line, split_paragraphs
from gog_edge.retrieval.manifest import Snapshot

CHUNK_FILES = 64


@dataclass(frozen=True)
class FolderSource(PickleFieldsMixin):
    """The pictures below a folder. `licence` is used where no table states one."""

    path: Path
    thumbnails: ThumbnailOptions = DEFAULT_THUMBNAILS
    licence: str = UNKNOWN_LICENCE
    columns: tuple[tuple[str, str], ...] = ()  # (field, column of the tables) given by the user
    encoding: str = ""  # of tables and texts, as in `decode_text`

    def snapshot(self) -> Snapshot:
        """Describe the folder; the hash covers the names and contents of all files that are read.

        Raises:
            SourceError: there is no picture, no table has a column that the user gives, or a table or text cannot be
                decoded as the user's encoding.
        """
        listing = self._listing
        if not listing.pictures:
            suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
            raise SourceError(f"'{self.path}' contains no picture ({suffixes}); check the path of the folder")
        if self.columns or self.encoding:
            self._check_columns()
        # What the user says about the tables changes the articles, and therefore the identity of the snapshot.
        given = (self.columns, self.encoding)
        digest = sha256(repr(given).encode() if any(given) else b"")
        for name in (*listing.pictures, *sorted((*listing.tables, *listing.texts))):
            digest.update(f"{name}\0{_hash(self.path / name)}\n".encode("utf-8", "surrogateescape"))
        newest = max(modified_date(self.path / name) for name in listing.pictures)
        return Snapshot(self.path.resolve().name, newest, "", digest.hexdigest(), self.licence)

    def prepare(self, work: Path) -> None:
        """Do nothing: the files are listed in order."""

    @property
    def size(self) -> int:
        """Return the number of files."""
        return self._listing.size

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield names of pictures with what the tables say about them; the first chunk accounts for all other files."""
        pictures = self._listing.pictures
        for number in range(start, -(-len(pictures) // CHUNK_FILES)):
            names = pictures[number * CHUNK_FILES : (number + 1) * CHUNK_FILES]
            entries = tuple((name, self._catalogue.entries[name]) for name in names)
            others = self.size - len(pictures) if number == 0 else 0
            yield Chunk(number, len(names) + others, (self._summary() if number == 0 else (), entries))

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield an article and its images for each picture; several if its rows describe several things."""
        summary, entries = chunk.content
        yield from summary
        thumbnails = replace(self.thumbnails, min_side=1)  # small pictures of a collection are not icons
        for name, entry in entries:
            yield from self._records(name, entry, thumbnails)

    def _records(self, name: str, entry: Entry, thumbnails: ThumbnailOptions) -> Iterator[Record]:
        images = load_thumbnails(self.path / name, entry.key, thumbnails)
        pages = [(number, image) for number, image in enumerate(images, 1) if not isinstance(image, Skipped)]
        skipped = [image for image in images if isinstance(image, Skipped)]
        if not pages:
            yield Skipped(skipped[0].reason, entry.key, FILE)
            yield from (Skipped("text of a picture that is not used", text, FILE) for text in entry.texts)
            yield from (Skipped(UNUSED_PICTURE, row, TABLE_ROW) for row in entry.rows)
            return
        for number, article in enumerate(entry.articles):
            key = entry.key if number == 0 else f"{entry.key}#{number + 1}"
            section = " / ".join(clean_line(part) for part in PurePosixPath(entry.key).parent.parts)
            licence = article.licence or self.licence
            text = article.text or article.caption  # a picture without a text is cited by its caption
            yield ArticleRecord(article.title, tuple(split_paragraphs(section, text)), licence, key=key)
            for page, image in pages:
                caption = article.caption if page == 1 else f"{article.caption}, page {page}"
                yield ImageRecord(image, caption, licence, article.attribution, (key,), page == 1)
        yield Used(FILE, entry.key, article=entry.key)
        yield from (Used(FILE, text, article=entry.key) for text in entry.texts)
        yield from (Used(TABLE_ROW, row, article=entry.key) for row in entry.rows)
        yield from skipped

    def _summary(self) -> tuple[Record, ...]:
        """Return what is said once: the files and rows that are present, and those that belong to no picture."""
        listing, catalogue = self._listing, self._catalogue
        return (Present(FILE, listing.size), Present(TABLE_ROW, catalogue.rows), *listing.skipped,
                *catalogue.skipped, *(Used(FILE, table) for table in catalogue.used_tables),
                *(Notice(text) for text in catalogue.notices))

    def _check_columns(self) -> None:
        catalogue = self._catalogue
        for _, column in self.columns:
            if not catalogue.has_column(column):
                seen = ", ".join(f"'{name}'" for name in catalogue.columns) or "none"
                raise SourceError(f"no table in '{self.path}' has a column '{column}'; the columns are: {seen}")

    @cached_property
    def _listing(self) -> Listing:
        return list_files(self.path)

    @cached_property
    def _catalogue(self) -> Catalogue:
        assigned: Mapping[str, str] = dict(self.columns)
        return read_catalogue(self.path, self._listing, assigned, self.encoding)


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return ""  # reported as a file that cannot be read
