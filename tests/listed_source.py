"""A source whose records are a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from little_world import SNAPSHOT, articles, images

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import ArticleRecord, Chunk, ImageRecord, Record, RedirectRecord
from gog_edge.retrieval.manifest import Snapshot


@dataclass(frozen=True)
class ListedSource:
    """Groups of records that stay in one chunk: an article with its images."""

    groups: tuple[tuple[Record, ...], ...]
    per_chunk: int = 2
    breaks_at: int = -1  # number of a chunk whose parsing fails
    about: Snapshot = SNAPSHOT

    def snapshot(self) -> Snapshot:
        return self.about

    def prepare(self, work: Path) -> None:
        pass

    @property
    def size(self) -> int:
        return len(self.groups)

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        for number, at in enumerate(range(0, len(self.groups), self.per_chunk)):
            if number >= start:
                part = self.groups[at : at + self.per_chunk]
                yield Chunk(number, len(part), part)

    def parse(self, chunk: Chunk) -> Iterator[Record]:
        if chunk.number == self.breaks_at:
            raise SourceError(f"chunk {chunk.number} of the list is damaged; copy it again")
        for group in chunk.content:
            yield from group


def little_groups(skip: Sequence[str] = ()) -> tuple[tuple[Record, ...], ...]:
    """Return the little world: each country with its flag; Svalbard has that of Norway."""
    flags: dict[str, ImageRecord] = {image.articles[0]: image for image in images()}
    groups: list[tuple[Record, ...]] = []
    for article in articles():
        if article.title in skip:
            continue
        shown = flags.get("Norway" if article.title == "Svalbard" else article.title)
        own = () if shown is None else (ImageRecord(shown.data, shown.caption, shown.licence, "us", (article.title,)),)
        groups.append((article, *own))
    return (*groups, (RedirectRecord("Hispania", "Spain"), RedirectRecord("Atlantis", "Plato")))


def with_news(groups: tuple[tuple[Record, ...], ...], title: str, text: str) -> tuple[tuple[Record, ...], ...]:
    """Return the groups with one more paragraph in an article."""

    def edit(record: Record) -> Record:
        if isinstance(record, ArticleRecord) and record.title == title:
            return ArticleRecord(record.title, (*record.paragraphs, ("News", text)), record.licence, record.redirects)
        return record

    return tuple(tuple(edit(record) for record in group) for group in groups)
