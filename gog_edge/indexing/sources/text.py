"""Cleans texts and splits them into paragraphs short enough to be cited."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_CHARACTERS = 1200  # of a paragraph
MAX_TITLE = 200  # characters of a section title, which is stored with each of its paragraphs

# English titles of sections without citable text. HTML sections in other languages become empty by the selectors of
# `html`.
SKIPPED_SECTIONS = frozenset(
    (
        "references", "external links", "see also", "notes", "bibliography", "further reading", "footnotes",
        "citations", "sources", "notes and references", "references and notes", "notes and citations", "works cited",
        "explanatory notes", "general references", "external link", "reference", "related pages", "other websites",
    )
)  # fmt: skip
# Where a text may be split, in order of preference: between lines, after a sentence, after a clause, between words, and
# in scripts without spaces between any two characters.
_BREAKS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n",
        # At least three letters before the full stop: initials and short abbreviations do not end a sentence.
        r"(?<=\w{3}[.!?…؟۔।])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]?[^\Wa-z_])|(?<=[)\]”\"»][.!?…])\s+|(?<=[。！？])",
        r"(?<=[,;:،؛、，；：])\s+|(?<=[、，；：])",
        r"\s+",
        r"(?<=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])(?=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])",
    )
)
_SPACE = re.compile(r"\s")


def clean_line(text: str) -> str:
    """Collapse white space to single spaces and remove what SQLite cannot store or display.

    Removed are soft hyphens, NUL characters and unpaired surrogates.
    """
    text = " ".join(text.replace("\xad", "").replace("\0", "").split())
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def clean_lines(text: str) -> str:
    """Apply `clean_line` to every line and remove empty lines."""
    return "\n".join(line for raw in text.splitlines() if (line := clean_line(raw)))


def text_value(value: Any) -> str:
    """Return a JSON value if it is a text, else an empty one: `str()` would cite "None" or the brackets of a list."""
    return value if isinstance(value, str) else ""


def split_text(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Yield pieces of at most `limit` characters, split at the most suitable place. Words are never split."""
    start = 0
    while len(text) - start > limit:
        cut = _split_position(text, start, start + limit)
        yield text[start:cut].strip()
        start = cut
    if rest := text[start:].strip():
        yield rest


def _split_position(text: str, start: int, stop: int) -> int:
    # A less suitable place is better than a very short piece: the first quarter is considered last.
    for minimum in (start + (stop - start) // 4, start):
        for breaks in _BREAKS:
            ends = [match.end() for match in breaks.finditer(text, start, stop + 1) if minimum < match.start() <= stop]
            if ends:
                return ends[-1]
    after = _SPACE.search(text, stop)
    return after.end() if after else len(text)


def split_paragraphs(section: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield (section, paragraph) for each line of a text, long lines in several pieces."""
    for line in text.splitlines():
        if cleaned := clean_line(line):
            yield from ((section, piece) for piece in split_text(cleaned))
