"""What a reader of snapshots is: chunks that are cheap to list, parsed in any process, in the same order each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gog_edge.indexing.drafts import Item
from gog_edge.retrieval.manifest import Snapshot


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
