"""What the loop found, as text for the policy. What others wrote cannot speak as the dialect does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gog_edge.types import Evidence, Pixels, SearchResult

_TAG = re.compile(r"</?\w[\w|-]*>")
_LINE_END = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class ObservationTexts:
    """How search results are put to the policy; {question} in `open` and `close` is what the person asked."""

    open: str
    close: str
    item: str  # n, titles
    passage: str  # text
    strong: str
    weak: str
    cached: str
    nothing: str
    strong_from: float
    items: int
    passages: int
    titles: int
    show_crop: bool
    layout: Literal["image_text", "text_image"] = "image_text"  # what stands first inside the marks

    @property
    def marks(self) -> tuple[str, ...]:
        """The tags that open and close an observation."""
        return tuple(_TAG.findall(self.open + self.close))

    def wrap(self, body: str, crop: Pixels | None, question: str) -> tuple[str | Pixels, ...]:
        """An observation's text, and the crop at its place."""
        opening, closing = (text.replace("{question}", question) for text in (self.open, self.close))
        if crop is None or not self.show_crop:
            return (opening + body + closing,)
        if self.layout == "text_image":
            return opening + body, crop, closing
        return opening, crop, body + closing

    def body(self, result: SearchResult, marks: Iterable[str]) -> str:
        """What a search found, line by line; `marks` are the dialect's."""
        lines = [self.cached] if result.cached else []
        lines += self._lines(result, tuple(marks))
        return "".join(line + "\n" for line in lines)

    def _lines(self, result: SearchResult, marks: tuple[str, ...]) -> list[str]:
        if not result.evidence:
            return [self.nothing]
        strong = result.found >= self.strong_from
        lines = [self.strong if strong else self.weak]
        # What a weak match says about itself would only mislead: its names are enough to look again.
        left = self.passages if strong else 0
        for n, evidence in enumerate(result.evidence[: self.items], start=1):
            shown = evidence.passages[:left]
            left -= len(shown)
            lines.append(self._item(n, evidence, [passage.text for passage in shown], marks))
        return lines

    def _item(self, n: int, evidence: Evidence, passages: list[str], marks: tuple[str, ...]) -> str:
        titles = quoted(", ".join(evidence.titles[: self.titles]), marks)
        head = self.item.replace("{n}", str(n)).replace("{titles}", titles)
        if not passages:
            return head
        said = (self.passage.replace("{text}", quoted(text, marks)) for text in passages)
        return " ".join([head + ":", *said])


def quoted(text: str, marks: tuple[str, ...]) -> str:
    """What others wrote, on one line and with every mark broken: an article cannot close an observation, or act."""
    text = _LINE_END.sub(" ", text)
    return _any_mark(marks).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) if marks else text


@lru_cache(maxsize=64)
def _any_mark(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE)
