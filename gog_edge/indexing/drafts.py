"""What a source gives and a pack is written from: articles, images and other names, as plain picklable data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


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
