"""Which passages an answer comes from."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from gog_edge.types import Citation, SearchResult

# Below this an answer that stands in no passage ("not in my snapshot") is not given a source it does not have.
LIKELY_FOUND = 0.5


def cite(answer: str, results: Sequence[SearchResult]) -> tuple[tuple[Citation, ...], float | None]:
    """The passages that carry the answer, and the chance that what they were found for is in the snapshot.

    The latest result that has a passage containing the answer gives all such passages. Where none does, the first
    passage of the last result stands for it, if that result was more likely found than not. The chance is that of
    the result cited from, else of the last one; None when nothing was searched.
    """
    wanted = plain(answer)
    for result in reversed(results):
        carrying = tuple(citation for citation in _citations(result) if _holds(citation, wanted))
        if carrying:
            return carrying, result.found
    if not results:
        return (), None
    last = results[-1]
    likely = bool(wanted) and last.found >= LIKELY_FOUND
    return (_citations(last)[:1] if likely else ()), last.found


def plain(text: str) -> str:
    """Lower case without accents, articles and punctuation; digits keep their decimal point."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_", " ", text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _citations(result: SearchResult) -> tuple[Citation, ...]:
    return tuple(Citation(passage, evidence.image) for evidence in result.evidence for passage in evidence.passages)


def _holds(citation: Citation, wanted: str) -> bool:
    return bool(wanted) and f" {wanted} " in f" {plain(citation.passage.text)} "
