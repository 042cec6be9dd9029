"""Words of a query or a name, normalised the same way everywhere; hostile text comes out harmless."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_TERMS = 32  # distinct words of one query that are searched for
MAX_NAME_WORDS = 8  # longest title or redirect that is recognised inside a query
MAX_QUERY_WORDS = 96  # words of one query that are looked at
MAX_QUERY_CHARS = 4_000
_WORD = re.compile(r"[^\W_]+")
_STOP_WORDS = (
    "a about all also am an and any are as at be been being both but by can could did do does doing for from had has "
    "have having he her here him his how i if in into is it its itself let me my no not of on or our please s she "
    "should so some such t tell than that the their them then there these they this those to too us use used uses "
    "using very was we were what when where which who whom whose why will with would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


def raw_words(text: str) -> list[str]:
    """The words of a text without marks (é -> e), their case kept; at most MAX_QUERY_WORDS."""
    plain = unicodedata.normalize("NFD", text[:MAX_QUERY_CHARS])
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return _WORD.findall(plain)[:MAX_QUERY_WORDS]


def name_key(text: str) -> str:
    """What a title or redirect is looked up by: its words, lower case, single spaces. Empty for '???'."""
    return " ".join(raw_words(text)).lower()


def search_terms(words: Iterable[str]) -> tuple[str, ...]:
    """Distinct lower-case words that carry meaning, in order, at most MAX_TERMS; all of them if none does."""
    unique = list(dict.fromkeys(word.lower() for word in words))
    return tuple([word for word in unique if word not in STOP_WORDS] or unique)[:MAX_TERMS]


def match_any(terms: Sequence[str]) -> str:
    """An FTS5 expression for 'any of these'. Terms are words of `raw_words`, so no quoting can be escaped from."""
    return " OR ".join(f'"{term}"' for term in terms)


def match_all(terms: Sequence[str]) -> str:
    """An FTS5 expression for 'all of these'."""
    return " AND ".join(f'"{term}"' for term in terms)


def spans(words: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Every run of up to MAX_NAME_WORDS words: its key -> the half-open word ranges where it stands."""
    lower = [word.lower() for word in words]
    found: dict[str, list[tuple[int, int]]] = {}
    for start in range(len(lower)):
        for stop in range(start + 1, min(start + MAX_NAME_WORDS, len(lower)) + 1):
            found.setdefault(" ".join(lower[start:stop]), []).append((start, stop))
    return found
