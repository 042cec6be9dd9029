"""The events of an episode, the steps it consists of, and the answer record it ends with."""

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
    """The actions that are open to the policy."""

    GOG = "gog"  # all actions
    FULL_IMAGE = "full_image"  # the whole picture is searched first; gazing is refused
    DIRECT = "direct"  # one answer without a search


def action_name(action: Action | None) -> str:
    """Return the name of an action in events, traces and records; "malformed" for None."""
    return _NAMES[type(action)] if action else "malformed"


def box_json(box: Box | None) -> list[float] | None:
    """Return [x0, y0, x1, y1] in pixels of the given picture, rounded to two decimals."""
    return [round(edge, 2) for edge in (box.x0, box.y0, box.x1, box.y1)] if box else None


def citation_json(citation: Citation) -> dict[str, Any]:
    """Return the fields of the passage, and those of the image under "image"."""
    return {**asdict(citation.passage), "image": asdict(citation.image) if citation.image else None}


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of an episode: the generated text, the action taken and its result."""

    index: int
    utterance: Utterance | None  # None for the search that the workflow FULL_IMAGE begins with
    action: str  # "answer", "text_search", "image_search", "gaze_search", "malformed"
    box: Box | None = None  # as searched, in pixels of the given picture
    query: str | None = None
    note: str = ""  # how the box was corrected, or why the action was refused
    result: SearchResult | None = None
    search_ms: float = 0.0  # time spent waiting for the search
    hidden_ms: float = 0.0  # time that the search ran while the policy was still generating

    @property
    def ms(self) -> float:
        """Return the duration of the turn: prefill, decoding and waiting for the search."""
        generation = self.utterance.prefill_ms + self.utterance.decode_ms if self.utterance else 0.0
        return generation + self.search_ms

    def to_json(self) -> dict[str, Any]:
        """Return the step as it appears in an answer record."""
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
        """Return the step as it appears in a trace: with the raw text and the token counts that a replay needs."""
        turn = self.utterance
        return {
            "index": self.index,
            "text": turn.text if turn else None,
            "prompt_tokens": turn.prompt_tokens if turn else 0,
            "new_tokens": turn.new_tokens if turn else 0,
            "prefill_ms": round(turn.prefill_ms, 2) if turn else 0.0,
            "decode_ms": round(turn.decode_ms, 2) if turn else 0.0,
            "search_ms": round(self.search_ms, 2),
            "hidden_ms": round(self.hidden_ms, 2),
            **self.to_json(),
        }


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """The answer with its sources, steps and timings."""

    answer: str  # empty only when the policy could not be made to answer
    found: float | None  # calibrated probability that the subject is in the snapshot; None when nothing was searched
    citations: tuple[Citation, ...]  # the passages that contain the answer
    steps: tuple[Step, ...]
    timings_ms: dict[str, float]  # prefill, decode, search, total
    ended: str  # "answer", or what forced it: "turns", "tokens", "deadline", "searches", "context", or a notice
    trace: str | None = None  # path of the trace file
    related: tuple[Citation, ...] = ()  # without citations: the best passage of a likely result

    def to_json(self) -> dict[str, Any]:
        """Return the object that `gog-edge ask --json` prints and POST /v1/ask answers with."""
        return {
            "answer": self.answer,
            "found": self.found,
            "citations": [citation_json(citation) for citation in self.citations],
            "related": [citation_json(citation) for citation in self.related],
            "steps": [step.to_json() for step in self.steps],
            "timings_ms": {stage: round(ms, 2) for stage, ms in self.timings_ms.items()},
            "ended": self.ended,
            "trace": self.trace,
        }


class _Event:
    """Base of all events: `kind` names an event, `to_json` returns what is sent over the network."""

    __slots__ = ()
    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Return the kind and the fields.

        Sizes become [width, height] and boxes [x0, y0, x1, y1]; the fields of results and records are merged in.
        """
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
    """The episode has begun."""

    kind = "started"
    question: str
    size: Size
    workflow: Workflow


@dataclass(frozen=True, slots=True)
class Spoke(_Event):
    """A piece of generated text, as it is decoded."""

    kind = "spoke"
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Acted(_Event):
    """The policy has chosen an action: a search starts, or the answer follows."""

    kind = "acted"
    step: int
    action: str  # "answer", "text_search", "image_search", "gaze_search"
    box: Box | None = None  # as searched: corrected, without padding
    query: str | None = None
    note: str = ""  # how the box was corrected


@dataclass(frozen=True, slots=True)
class Found(_Event):
    """A search has returned."""

    kind = "found"
    step: int
    result: SearchResult
    ms: float


@dataclass(frozen=True, slots=True)
class Refused(_Event):
    """The turn contained no action that can be carried out."""

    kind = "refused"
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Answered(_Event):
    """The episode has ended; always the last event."""

    kind = "answered"
    record: AnswerRecord


Event: TypeAlias = Started | Spoke | Acted | Found | Refused | Answered
