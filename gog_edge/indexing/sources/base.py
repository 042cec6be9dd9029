"""The records that a pack is built from, and the protocol of the sources that read them from a snapshot.

Records and sources are pickled to worker processes: they hold plain data only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from gog_edge.indexing import OnProgress
from gog_edge.retrieval.manifest import Snapshot

UNKNOWN_LICENCE = "unknown"
_LICENCE_CHANGE = "2023-06-07"  # Wikimedia's terms of use: CC BY-SA 4.0 from this day on


@dataclass(frozen=True, slots=True)
class ArticleRecord:
    """An article. `key` identifies it within its snapshot: its path or address, or its title."""

    title: str
    paragraphs: tuple[tuple[str, str], ...]  # (section, text) in reading order, the lead section first
    licence: str
    redirects: tuple[str, ...] = ()  # alternative names
    key: str = ""  # empty: the title is the key

    @property
    def identity(self) -> str:
        """Return the key, or the title of an article without a key."""
        return self.key or self.title


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image. It may belong to several articles, of which the first is its main one."""

    data: bytes  # the file as it will be served: PNG, JPEG or WebP
    caption: str
    licence: str  # licence and attribution may differ between articles that show the same file
    attribution: str
    articles: tuple[str, ...]  # keys of its articles
    lead: bool = False  # shows the subject of its article; lead images may be embedded in tiles too


@dataclass(frozen=True, slots=True)
class RedirectRecord:
    """An alternative name of an article, stored apart from it. It may precede or follow its article."""

    name: str
    article: str  # key of the article
    kind: str = ""  # of item, if it counts as one: as used, or as skipped if its article is not in the pack


@dataclass(frozen=True, slots=True)
class Skipped:
    """A part of the snapshot that is left out of the pack.

    With a `kind`, it is an item that a `Present` record counts; without one, it is a part of an item.
    """

    reason: str  # short, and the same for all parts of a kind, so that they can be counted: "image does not decode"
    item: str  # path, address or title of the part
    kind: str = ""  # of item: "file", "table row", "page"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Present:
    """Items that the snapshot contains.

    Each of them is reported once, in the same chunk, as `Used`, `Skipped`, a `RedirectRecord` or a `SharedFile`.
    """

    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Used:
    """Items whose content is in the preceding records of the chunk.

    With an `article`, the key of one of these records, they count as skipped if the writer rejects that article or an
    image of it.
    """

    kind: str
    item: str  # path, address or title
    article: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class SharedFile:
    """An item that several articles may show, in other chunks too. It is counted once, when all chunks are written.

    One of these records is the item's own, and each article that refers to it yields another one. The item is used if
    one of these has no reason; otherwise it is skipped by the reason of an article, if there is one, or by its own.
    """

    item: str
    kind: str
    reason: str = ""  # empty: the article shows it
    article: str = ""  # key of the article; empty in the item's own record


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about the snapshot that its owner should know; each text is reported once."""

    text: str


Record: TypeAlias = ArticleRecord | ImageRecord | RedirectRecord | Skipped | Present | Used | SharedFile | Notice


def wikipedia_text_licence(date: str) -> str:
    """Return the licence of Wikipedia's texts on an ISO 8601 date (a year or a month is accepted too).

    Images have licences of their own, which snapshots do not contain.
    """
    return "CC BY-SA 4.0" if date >= _LICENCE_CHANGE[: len(date)] else "CC BY-SA 3.0"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a snapshot that one process parses at once. A resumed build continues with the next chunk."""

    number: int  # from 0, in order
    size: int  # in the unit of `Source.size`
    content: Any  # defined by the source and picklable: a range of entries, or lines


class Source(Protocol):
    """A reader of a snapshot. It is pickled to worker processes, so it opens its files on first use."""

    def snapshot(self) -> Snapshot:
        """Return name, date, UUID, hash and licence.

        Raises:
            SourceError: the file has another format, or is truncated.
        """
        ...

    def prepare(self, work: Path) -> None:
        """Write whatever must be sorted before the snapshot can be read in order into the folder `work`.

        Most sources do nothing here. A call that is killed can be repeated: it continues or starts over, and a
        partial result is never mistaken for a complete one.
        """
        ...

    @property
    def size(self) -> int:
        """Return the size of the snapshot in entries, bytes or files, for progress reports."""
        ...

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Yield the chunks from number `start` on. Every call yields the same chunks."""
        ...

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        """Yield the records of a chunk; content that cannot be used is yielded as `Skipped`.

        A source that yields `Present` records accounts for every item of that kind: items used and items skipped add
        up to the items present.

        Images follow their article within the same chunk, because an article is compared with its earlier version by
        text and images together.
        """
        ...


@runtime_checkable
class Verifiable(Protocol):
    """A source whose snapshot contains a checksum."""

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Read the whole snapshot and compare its checksum; `on_progress` is called with (stage, done, total).

        Raises:
            SourceError: it differs.
        """
        ...
