"""The records that a pack is built from, and the protocol of the sources that read them from a snapshot.

Records and sources are pickled to worker processes: they hold plain data only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

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
    licence: str
    attribution: str
    articles: tuple[str, ...]  # keys of its articles
    lead: bool = False  # shows the subject of its article; lead images may be embedded in tiles too


@dataclass(frozen=True, slots=True)
class RedirectRecord:
    """An alternative name of an article, stored apart from it. It may precede or follow its article."""

    name: str
    article: str  # key of the article


@dataclass(frozen=True, slots=True)
class Skipped:
    """A part of the snapshot that is left out of the pack."""

    reason: str  # short, and the same for all parts of a kind, so that they can be counted: "image does not decode"
    item: str  # path, address or title of the part


Record: TypeAlias = ArticleRecord | ImageRecord | RedirectRecord | Skipped


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

        Images follow their article within the same chunk, because an article is compared with its earlier version by
        text and images together.
        """
        ...
