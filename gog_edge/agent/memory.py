"""What an episode has searched already, so that looking twice costs nothing."""

from __future__ import annotations

from dataclasses import replace

from gog_edge.types import Box, SearchResult


class Memory:
    """Results by box (the whole picture is a box too) and by words."""

    def __init__(self, same_iou: float) -> None:
        self._same_iou = same_iou
        self._looks: list[tuple[Box, SearchResult]] = []
        self._words: dict[str, SearchResult] = {}

    def recall(self, key: Box | str) -> SearchResult | None:
        """The earlier result of (nearly) the same search, marked as cached; None when there is none."""
        if isinstance(key, str):
            known = self._words.get(_plain(key))
        else:
            same = (result for box, result in self._looks if box.iou(key) >= self._same_iou)
            known = next(same, None)
        return replace(known, cached=True) if known else None

    def keep(self, key: Box | str, result: SearchResult) -> None:
        """Remember what a search brought back."""
        if isinstance(key, str):
            self._words[_plain(key)] = result
        else:
            self._looks.append((key, result))


def _plain(words: str) -> str:
    return " ".join(words.casefold().split())
