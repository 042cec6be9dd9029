"""What a source gives and a pack is written from: articles, images and other names, as plain picklable data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gog_edge.retrieval.manifest import Snapshot


@dataclass(frozen=True, slots=True)
class ArticleDraft:
    """An article to be written. `key` tells it from all others of its snapshot: its path or address, or its title."""

    title: str
    paragraphs: tuple[tuple[str, str], ...]  # (section, text) in reading order, the lead first
    licence: str
    redirects: tuple[str, ...] = ()  # other names
    key: str = ""  # the title where left out

    @property
    def identity(self) -> str:
        """The key, or the title where there is none."""
        return self.key or self.title


@dataclass(frozen=True, slots=True)
class ImageDraft:
    """An image to be written; one image may stand in several articles, the main one first."""

    data: bytes  # the file as it will be served: PNG, JPEG or WebP
    caption: str
    licence: str
    attribution: str
    articles: tuple[str, ...]  # their keys
    lead: bool = False  # shows what its article is about: such images may be indexed in tiles too


@dataclass(frozen=True, slots=True)
class RedirectDraft:
    """Another name of an article, told apart from it; it may come before or after its article."""

    name: str
    article: str  # key


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something of the snapshot that does not come into the pack."""

    reason: str  # short and the same for all alike, so that reasons can be counted: "image does not decode"
    what: str  # which one: its path, address or title


Item: TypeAlias = ArticleDraft | ImageDraft | RedirectDraft | Skipped
UNKNOWN = "unknown"
_CHANGED = "2023-06-07"  # the day of Wikimedia's new terms of use


def wikipedia_text(date: str) -> str:
    """The licence of Wikipedia's texts on an ISO 8601 date; its pictures have one each, and no snapshot tells it."""
    return "CC BY-SA 4.0" if date >= _CHANGED[: len(date)] else "CC BY-SA 3.0"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a snapshot that one process parses at once: the unit of resumption."""

    number: int  # from 0, in order
    size: int  # of the same unit as `Source.size`
    content: Any  # the source's own, picklable: a range of entries, or lines


class Source(Protocol):
    """A snapshot that can be read. It is pickled to other processes: files are opened when they are first needed."""

    def snapshot(self) -> Snapshot:
        """Name, date, uuid and hash; SourceError when this is no such file, or a truncated one."""
        ...

    def prepare(self, work: Path) -> None:
        """Sort what must be sorted before it can be read in order, into the folder `work`; nothing where that is done.

        Most need none of it. Killed and called again, it goes on or begins anew, and never takes a half for a whole.
        """
        ...

    @property
    def size(self) -> int:
        """How much there is, in entries, bytes or files: for progress."""
        ...

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The chunks from number `start` on; the same ones each time."""
        ...

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        """What a chunk holds: images after their article, in the same chunk: an article is known again by all of it.

        What cannot be used is Skipped with its reason.
        """
        ...
