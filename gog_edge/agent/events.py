"""What a question turns into while it is answered: events for who watches, a record for who keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, TypeAlias

from gog_edge.types import (
    Action,
    Answer,
    Box,
    Citation,
    GazeSearch,
    ImageSearch,
    SearchResult,
    Size,
    TextSearch,
    Utterance,
)

_NAMES: dict[type, str] = {
    Answer: "answer",
    TextSearch: "text_search",
    ImageSearch: "image_search",
    GazeSearch: "gaze_search",
}


class Workflow(StrEnum):
    """Which actions the policy may take."""

    GOG = "gog"  # all of them
    FULL_IMAGE = "full_image"  # the whole picture is searched first; no gaze
    DIRECT = "direct"  # one answer, no search


def name_of(action: Action | None) -> str:
    """The action's name in events, traces and records."""
    return _NAMES[type(action)] if action else "malformed"


def box_json(box: Box | None) -> list[float] | None:
    """[x0, y0, x1, y1] in pixels of the given picture, to a hundredth."""
    return [round(edge, 2) for edge in (box.x0, box.y0, box.x1, box.y1)] if box else None


def citation_json(citation: Citation) -> dict[str, Any]:
    """The passage's fields, and the image's under `image`."""
    return {**asdict(citation.passage), "image": asdict(citation.image) if citation.image else None}


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: what the policy said, what was done, what came back."""

    index: int
    utterance: Utterance | None  # None for the search that a workflow makes by itself
    action: str  # "answer", "text_search", "image_search", "gaze_search", "malformed"
    box: Box | None = None  # as searched, in pixels of the given picture
    query: str | None = None
    note: str = ""  # what was mended, or why it was refused
    result: SearchResult | None = None
    search_ms: float = 0.0  # waited for
    hidden_ms: float = 0.0  # of the search, while the policy still spoke

    @property
    def ms(self) -> float:
        """Time of the whole turn."""
        spoken = self.utterance.prefill_ms + self.utterance.decode_ms if self.utterance else 0.0
        return spoken + self.search_ms

    def to_json(self) -> dict[str, Any]:
        """As in an answer record."""
        return {
            "action": self.action,
            "box": box_json(self.box),
            "query": self.query,
            "evidence": asdict(self.result)["evidence"] if self.result else [],
            "ms": round(self.ms, 2),
            "found": self.result.found if self.result else None,
            "cached": self.result.cached if self.result else False,
            "note": self.note,
        }

    def to_trace(self) -> dict[str, Any]:
        """With the raw text and the counts that a replay needs."""
        spoken = self.utterance
        return {
            "index": self.index,
            "text": spoken.text if spoken else None,
            "prompt_tokens": spoken.prompt_tokens if spoken else 0,
            "new_tokens": spoken.new_tokens if spoken else 0,
            "prefill_ms": round(spoken.prefill_ms, 2) if spoken else 0.0,
            "decode_ms": round(spoken.decode_ms, 2) if spoken else 0.0,
            "search_ms": round(self.search_ms, 2),
            "hidden_ms": round(self.hidden_ms, 2),
            **self.to_json(),
        }


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """The answer, where it comes from, and what it took."""

    answer: str  # empty only when the policy could not be made to answer
    found: float | None  # chance that the thing is in the snapshot; None when nothing was searched
    citations: tuple[Citation, ...]
    steps: tuple[Step, ...]
    timings_ms: dict[str, float]  # prefill, decode, search, total
    ended: str  # "answer", or what forced it: "turns", "tokens", "deadline", "searches", "context", or a notice
    trace: str | None = None  # path of the trace file

    def to_json(self) -> dict[str, Any]:
        """The object that `gog-edge ask --json` prints."""
        return {
            "answer": self.answer,
            "found": self.found,
            "citations": [citation_json(citation) for citation in self.citations],
            "steps": [step.to_json() for step in self.steps],
            "timings_ms": {stage: round(ms, 2) for stage, ms in self.timings_ms.items()},
            "ended": self.ended,
            "trace": self.trace,
        }


class _Event:
    """What watchers get: `kind` names it, `to_json` is what crosses a network."""

    __slots__ = ()
    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Kind and fields; sizes are [width, height], boxes [x0, y0, x1, y1], results and records are spread out."""
        value: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value |= _field_json(field.name, getattr(self, field.name))
        return value


def _field_json(name: str, value: Any) -> dict[str, Any]:
    match value:
        case Size(width, height):
            return {name: [width, height]}
        case Box():
            return {name: box_json(value)}
        case SearchResult():
            return asdict(value)
        case AnswerRecord():
            return value.to_json()
        case float():
            return {name: round(value, 2)}
    return {name: value}


@dataclass(frozen=True, slots=True)
class Started(_Event):
    """The episode is open."""

    kind = "started"
    question: str
    size: Size
    workflow: Workflow


@dataclass(frozen=True, slots=True)
class Spoke(_Event):
    """A piece of the policy's text, as it is decoded."""

    kind = "spoke"
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Acted(_Event):
    """The policy has decided; a search begins, or the answer follows."""

    kind = "acted"
    step: int
    action: str  # "answer", "text_search", "image_search", "gaze_search"
    box: Box | None = None  # as searched: mended, without the pad
    query: str | None = None
    note: str = ""  # what was mended


@dataclass(frozen=True, slots=True)
class Found(_Event):
    """A search has come back."""

    kind = "found"
    step: int
    result: SearchResult
    ms: float


@dataclass(frozen=True, slots=True)
class Refused(_Event):
    """What the policy said cannot be carried out."""

    kind = "refused"
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Answered(_Event):
    """The end of every episode."""

    kind = "answered"
    record: AnswerRecord


Event: TypeAlias = Started | Spoke | Acted | Found | Refused | Answered
