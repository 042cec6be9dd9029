"""Licences of texts and pictures whose snapshot does not name them."""

from __future__ import annotations

UNKNOWN = "unknown"
_CHANGED = "2023-06-07"  # the day of Wikimedia's new terms of use


def wikipedia_text(date: str) -> str:
    """The licence of Wikipedia's texts on an ISO 8601 date; its pictures have one each, and no snapshot tells it."""
    return "CC BY-SA 4.0" if date >= _CHANGED[: len(date)] else "CC BY-SA 3.0"
