"""Tokenize queries and names for the full-text index. Any text is accepted; the result is safe in an FTS5 expression.

Tokens of queries, names and stored words must be folded alike: FTS5 itself runs with `unicode61 remove_diacritics 2`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_QUERY_CHARS = 4_000  # further characters are ignored
MAX_QUERY_WORDS = 96  # and further words
MAX_TERMS = 32  # distinct search terms of a query
MAX_NAME_WORDS = 8  # longest title or redirect that is recognised inside a query
_WORD = re.compile(r"[^\W_]+")
_STOP_WORDS = (
    "a about all also am an and any are as at be been being both but by can could did do does doing for from had has "
    "have having he her here him his how i if in into is it its itself let me my no not of on or our please s she "
    "should so some such t tell than that the their them then there these they this those to too us use used uses "
    "using very was we were what when where which who whom whose why will with would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


def tokenize(text: str) -> list[str]:
    """Return the words of a text without diacritics (é -> e) and with their case, at most MAX_QUERY_WORDS."""
    plain = unicodedata.normalize("NFD", text[:MAX_QUERY_CHARS])
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return _WORD.findall(plain)[:MAX_QUERY_WORDS]


def name_key(text: str) -> str:
    """Return the lookup key of a title or redirect: its words in lower case, joined by spaces; '' for '???'."""
    return " ".join(tokenize(text)).lower()


def search_terms(words: Iterable[str]) -> tuple[str, ...]:
    """Return up to MAX_TERMS distinct lower-case words without stop words, in order; stop words if there are no others.
    """
    unique = list(dict.fromkeys(word.lower() for word in words))
    return tuple([word for word in unique if word not in STOP_WORDS] or unique)[:MAX_TERMS]


def word_spans(words: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Return every run of up to MAX_NAME_WORDS words: its name key -> half-open ranges of word positions."""
    lower = [word.lower() for word in words]
    found: dict[str, list[tuple[int, int]]] = {}
    for start in range(len(lower)):
        for stop in range(start + 1, min(start + MAX_NAME_WORDS, len(lower)) + 1):
            found.setdefault(" ".join(lower[start:stop]), []).append((start, stop))
    return found


def fts5_any(terms: Sequence[str]) -> str:
    """Return the FTS5 expression "any of these". Terms consist of word characters, so quotes cannot be escaped."""
    return " OR ".join(f'"{term}"' for term in terms)


def fts5_all(terms: Sequence[str]) -> str:
    """Return the FTS5 expression "all of these"."""
    return " AND ".join(f'"{term}"' for term in terms)
