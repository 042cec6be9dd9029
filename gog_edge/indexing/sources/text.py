"""Texts as they are stored and cited: clean, and in paragraphs of a length that a citation can point at."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_CHARACTERS = 1200
MAX_TITLE = 200  # characters: of a section's title, which stands beside each of its paragraphs

# Where a text may be cut, the best places first: between lines, after a sentence, after a clause, between words, and in
# scripts without spaces anywhere between two of their characters.
_BREAKS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n",
        # Three letters before the stop, for initials and short abbreviations end no sentence.
        r"(?<=\w{3}[.!?…؟۔।])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]?[^\Wa-z_])|(?<=[)\]”\"»][.!?…])\s+|(?<=[。！？])",
        r"(?<=[,;:،؛、，；：])\s+|(?<=[、，；：])",
        r"\s+",
        r"(?<=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])(?=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])",
    )
)
_SPACE = re.compile(r"\s")


def one_line(text: str) -> str:
    """White space made single spaces; soft hyphens, NUL and halves of surrogate pairs, which no store takes, gone."""
    text = " ".join(text.replace("\xad", "").replace("\0", "").split())
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def clean_lines(text: str) -> str:
    """Every line by `one_line`, empty ones left out."""
    return "\n".join(line for raw in text.splitlines() if (line := one_line(raw)))


def split_text(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut at the best place there is; a longer word stays whole."""
    start = 0
    while len(text) - start > limit:
        cut = _cut(text, start, start + limit)
        yield text[start:cut].strip()
        start = cut
    if rest := text[start:].strip():
        yield rest


def _cut(text: str, start: int, stop: int) -> int:
    for least in (start + (stop - start) // 4, start):  # rather a worse place than a very short piece
        for breaks in _BREAKS:
            ends = [found.end() for found in breaks.finditer(text, start, stop + 1) if least < found.start() <= stop]
            if ends:
                return ends[-1]
    after = _SPACE.search(text, stop)
    return after.end() if after else len(text)


def split_paragraphs(section: str, text: str) -> Iterator[tuple[str, str]]:
    """(section, paragraph) of each paragraph of a text whose lines are its paragraphs."""
    for line in text.splitlines():
        if cleaned := one_line(line):
            yield from ((section, piece) for piece in split_text(cleaned))
