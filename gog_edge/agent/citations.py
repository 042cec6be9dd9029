"""Which passages an answer cites.

A passage is a citation only if it contains the answer after normalisation. Anything else is at most *related*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gog_edge.retrieval.text.tokens import fold, ngram_size
from gog_edge.types import Citation, SearchResult

# Results less likely than this to show the subject have no related passage: "not in my snapshot" needs none.
MIN_RELATED_FOUND = 0.5
_THOUSANDS = re.compile(r"(?<=\d)[,\u066c](?=\d)")
_DECIMAL_POINT = re.compile(r"(?<=\d)[.\u066b](?=\d)")


@dataclass(frozen=True, slots=True)
class Sources:
    """The passages of an answer, and the calibrated probability of the result that they are from."""

    citations: tuple[Citation, ...] = ()  # the passages that contain the answer
    related: tuple[Citation, ...] = ()  # without citations: the first passage of the last result, if that is likely
    found: float | None = None  # None when nothing was searched


def find_sources(answer: str, results: Sequence[SearchResult]) -> Sources:
    """Return the sources of an answer among the results of an episode, which are in the order of the searches.

    All passages that contain the answer are cited from the latest result that has any. `found` is the probability of
    that result, otherwise of the last one.
    """
    wanted = normalize_answer(answer)
    for result in reversed(results):
        citations = tuple(citation for citation in _passages(result) if contains_answer(citation, wanted))
        if citations:
            return Sources(citations, found=result.found)
    if not results:
        return Sources()
    last = results[-1]
    likely = bool(wanted) and last.found >= MIN_RELATED_FOUND
    return Sources(related=_passages(last)[:1] if likely else (), found=last.found)


def normalize_answer(text: str) -> str:
    """Return the folded words of a text without articles and punctuation; numbers keep their decimal point.

    This extends the answer normalisation of SQuAD by the folding of the word search and by thousands separators.
    """
    folded = ".".join(map(fold, _DECIMAL_POINT.split(_THOUSANDS.sub("", text))))
    return " ".join(word for word in folded.split() if word not in ("a", "an", "the"))


def contains_answer(citation: Citation, answer: str) -> bool:
    """Return whether a passage contains a normalised, non-empty answer at word boundaries.

    In a script without blanks between words, an answer may begin and end anywhere.
    """
    if not answer:
        return False
    start, end = ("" if ngram_size(char) else boundary for char, boundary in ((answer[0], r"(?<!\S)"),
                                                                              (answer[-1], r"(?!\S)")))  # fmt: skip
    return re.search(start + re.escape(answer) + end, normalize_answer(citation.passage.text)) is not None


def _passages(result: SearchResult) -> tuple[Citation, ...]:
    return tuple(Citation(passage, evidence.image) for evidence in result.evidence for passage in evidence.passages)
