"""A snapshot that is a list of drafts, in chunks of so many articles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from little_world import SNAPSHOT, articles, images

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import ArticleDraft, Chunk, ImageDraft, Item, RedirectDraft
from gog_edge.retrieval.manifest import Snapshot


@dataclass(frozen=True)
class ListedSource:
    """Groups of items that stay together: an article and what belongs to it."""

    groups: tuple[tuple[Item, ...], ...]
    per_chunk: int = 2
    breaks_at: int = -1  # number of a chunk that cannot be read
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

    def parse(self, chunk: Chunk) -> Iterator[Item]:
        if chunk.number == self.breaks_at:
            raise SourceError(f"chunk {chunk.number} of the list is torn; copy it again")
        for group in chunk.content:
            yield from group


def little_groups(skip: Sequence[str] = ()) -> tuple[tuple[Item, ...], ...]:
    """The little world: each country with its flag; Svalbard flies Norway's."""
    flags: dict[str, ImageDraft] = {image.articles[0]: image for image in images()}
    groups: list[tuple[Item, ...]] = []
    for article in articles():
        if article.title in skip:
            continue
        shown = flags.get("Norway" if article.title == "Svalbard" else article.title)
        own = () if shown is None else (ImageDraft(shown.data, shown.caption, shown.licence, "us", (article.title,)),)
        groups.append((article, *own))
    return (*groups, (RedirectDraft("Hispania", "Spain"), RedirectDraft("Atlantis", "Plato")))


def changed(groups: tuple[tuple[Item, ...], ...], title: str, text: str) -> tuple[tuple[Item, ...], ...]:
    """The same, with one more paragraph in an article."""

    def edit(item: Item) -> Item:
        if isinstance(item, ArticleDraft) and item.title == title:
            return ArticleDraft(item.title, (*item.paragraphs, ("News", text)), item.licence, item.redirects)
        return item

    return tuple(tuple(edit(item) for item in group) for group in groups)
