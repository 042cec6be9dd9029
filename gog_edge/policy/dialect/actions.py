"""What the numbers of a box mean: which image they lie on, and in which unit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NoReturn, TypeAlias, get_args

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.types import Box, Size

BoxFrame: TypeAlias = Literal["resized_px", "given_px", "rel1000", "rel1"]
FRAMES: tuple[BoxFrame, ...] = get_args(BoxFrame)
IN_WORDS = {  # for a prompt that asks for a box
    "resized_px": "in pixels of the picture",
    "given_px": "in pixels of the picture",
    "rel1000": "in thousandths of the picture's width and height",
    "rel1": "in shares of the picture's width and height, from 0 to 1",
}
Corners: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1 as the policy writes them


@dataclass(frozen=True, slots=True)
class View:
    """One image that the policy was shown: a part of the given picture, and the size it was seen in."""

    box: Box  # in pixels of the given picture
    resized: Size  # as the policy sees it

    def unit(self, box_frame: BoxFrame) -> tuple[float, float]:
        """Pixels of the given picture for one unit of a frame, in x and y; `given_px` counts the part's own pixels."""
        match box_frame:
            case "resized_px":
                return self.box.width / self.resized.width, self.box.height / self.resized.height
            case "rel1000":
                return self.box.width / 1000, self.box.height / 1000
            case "rel1":
                return self.box.width, self.box.height
            case _:
                return 1.0, 1.0

    def extent(self, box_frame: BoxFrame) -> tuple[float, float]:
        """The largest x and y that lie on this image, in units of a frame."""
        sx, sy = self.unit(box_frame)
        return self.box.width / sx, self.box.height / sy

    def to_given(self, corners: Corners, box_frame: BoxFrame) -> Box:
        """Corners on this image -> pixels of the given picture, not bounded."""
        sx, sy = self.unit(box_frame)
        x0, y0, x1, y1 = corners
        return Box(
            self.box.x0 + x0 * sx,
            self.box.y0 + y0 * sy,
            self.box.x0 + x1 * sx,
            self.box.y0 + y1 * sy,
        )

    def to_corners(self, box: Box, box_frame: BoxFrame) -> Corners:
        """Inverse of `to_given`."""
        sx, sy = self.unit(box_frame)
        left, top = self.box.x0, self.box.y0
        return (box.x0 - left) / sx, (box.y0 - top) / sy, (box.x1 - left) / sx, (box.y1 - top) / sy


@dataclass(frozen=True, slots=True)
class Frame:
    """The images of one dialogue that a box may be written on: the given picture, then the crops shown since."""

    given: Size  # the picture as the person gave it, upright
    resized: Size  # as the policy sees it
    crops: tuple[View, ...] = ()  # oldest first

    @property
    def whole(self) -> View:
        """The given picture."""
        return View(Box(0.0, 0.0, float(self.given.width), float(self.given.height)), self.resized)

    @property
    def views(self) -> tuple[View, ...]:
        """All images in the order in which they were shown."""
        return (self.whole, *self.crops)

    def showing(self, box: Box, resized: Size) -> Frame:
        """The frame once a crop of `box` (pixels of the given picture) was shown in the size `resized`."""
        return replace(self, crops=(*self.crops, View(box, resized)))


Kind: TypeAlias = Literal["answer", "text_search", "image_search", "gaze_search"]
Marks: TypeAlias = tuple[str, str]  # opening, closing
KINDS: tuple[Kind, ...] = ("answer", "text_search", "image_search", "gaze_search")
MAX_CHARS = 4096  # of one action
MAX_NUMBER = 9_999_999  # seven digits

# Whole numbers only: a part of 1e999 or of twenty digits must not pass for a number.
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,7}(?:\.\d{1,20})?(?!\w|\.\d)")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Said:
    """An action as it was written: a box is still numbers, an image still its index."""

    kind: Kind
    words: str = ""  # of an answer or a text search
    corners: Corners | None = None  # of a gaze, in the dialect's frame
    image: int | None = None  # as the policy counts; None: the given picture


@dataclass(frozen=True, slots=True)
class Span:
    """Where an action stands in a text."""

    kind: str  # the marks that it stands between
    start: int
    end: int  # behind its closing mark, or the text's end
    body: str
    closed: bool  # its end was seen: more text does not change it
    value: Any = None  # the JSON value of a call that could be read


@dataclass(frozen=True, slots=True)
class Tags:
    """Opening and closing marks of each thing a policy can say."""

    reason: Marks
    answer: Marks
    text_search: Marks
    image_search: Marks
    whole_picture: str  # between the image_search marks: the whole picture
    box: str  # template with x0, y0, x1, y1; empty for a policy that cannot gaze
    lead: str  # between an opening mark and words; a space lets a word keep the tokens it has inside a sentence
    skip_until: str  # everything up to the last of these is thinking; empty for none

    def __post_init__(self) -> None:
        try:
            self.box.format(x0=0, y0=0, x1=0, y1=0)
        except (LookupError, ValueError, AttributeError) as exc:
            raise DialectError(f"box '{self.box}' is no template of {{x0}}, {{y0}}, {{x1}}, {{y1}} ({exc})") from exc

    @property
    def marks(self) -> tuple[str, ...]:
        """Every text that means something by itself."""
        own = (*self.reason, *self.answer, *self.text_search, *self.image_search, self.whole_picture, self.skip_until)
        return tuple(mark for mark in own if mark)

    @property
    def answer_open(self) -> str:
        """What opens an answer."""
        return self.answer[0]

    def spans(self, text: str) -> Iterator[Span]:
        """Actions in order; a missing closing mark ends at the text's end, marks inside another's words are words."""
        kinds: dict[str, str] = {}
        for kind in ("answer", "text_search", "image_search"):
            kinds.setdefault(getattr(self, kind)[0], kind)
        opening, at = _any_of(tuple(kinds)), 0
        while (found := opening.search(text, at)) is not None:
            kind = kinds[found[0]]
            closing = getattr(self, kind)[1]
            end = text.find(closing, found.end())
            closed = end >= 0
            body = text[found.end() : end if closed else len(text)].strip()
            at = end + len(closing) if closed else len(text)
            yield Span(kind, found.start(), at, body, closed)

    def read(self, span: Span) -> Said:
        """What a span says. Raises MalformedAction."""
        if span.kind == "image_search":
            return self._read_image_search(span.body)
        return Said("answer" if span.kind == "answer" else "text_search", words=span.body)

    def _read_image_search(self, body: str) -> Said:
        if body == self.whole_picture:
            return Said("image_search")
        if not self.box:
            raise MalformedAction(f"only '{self.whole_picture}' can be searched with, not '{body[:60]}'")
        numbers = [float(number) for number in _NUMBER.findall(body)]
        if len(numbers) != 4:
            raise MalformedAction(f"a box has four numbers, this has {len(numbers)}: '{body[:60]}'")
        return Said("gaze_search", corners=(numbers[0], numbers[1], numbers[2], numbers[3]))

    def write(self, said: Said, digits: int) -> str:
        """The text that is read as this. Raises DialectError for what cannot be said."""
        if said.kind in ("answer", "text_search"):
            opening, closing = self.answer if said.kind == "answer" else self.text_search
            return f"{opening}{self.lead}{said.words}{closing}"
        body = self.whole_picture
        if said.corners is not None:
            if not self.box:
                raise DialectError("tags without a box template cannot say a gaze; search with the whole picture")
            names = ("x0", "y0", "x1", "y1")
            body = self.box.format(
                **{name: f"{value:.{digits}f}" for name, value in zip(names, said.corners, strict=True)}
            )
        return f"{self.image_search[0]}{body}{self.image_search[1]}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy may call, and what the call means to us. "" for an argument it does not take."""

    name: str
    does: Kind
    about: str  # told to the policy
    query: str = ""  # argument that holds the words
    box: str = ""  # argument that holds four numbers
    image: str = ""  # argument that holds the index of an image
    label: str = ""  # argument that is written and not read

    def __post_init__(self) -> None:
        needed = {"text_search": self.query, "gaze_search": self.box, "image_search": "none"}
        if not needed.get(self.does):
            raise DialectError(f"tool '{self.name}' does '{self.does}'; name a known action and the argument it needs")

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a call, as the policy is told it."""
        numbers = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
        kinds: dict[str, dict[str, Any]] = {
            self.query: {"type": "string"},
            self.box: numbers,
            self.label: {"type": "string"},
            self.image: {"type": "integer"},
        }
        arguments = {name: kind for name, kind in kinds.items() if name}
        parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.about, "parameters": parameters},
        }


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """JSON objects {"name", "arguments"} between marks; the answer has marks too, or is what holds no call."""

    reason: Marks
    call: Marks
    skip_until: str  # everything up to the last of these is thinking; empty for none
    tools: tuple[Tool, ...]
    answer: Marks | None = None  # None: a turn without a call is the answer
    plain_lead: str = ""  # opens a forced answer where there are no answer marks; not part of the answer

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if not names or len(set(names)) < len(names):
            raise DialectError(f"tools are named {', '.join(names) or 'nowhere'}; give each a name of its own")

    @property
    def marks(self) -> tuple[str, ...]:
        """Every text that means something by itself."""
        own = (*self.reason, *self.call, *(self.answer or ()), self.skip_until)
        return tuple(mark for mark in own if mark)

    @property
    def answer_open(self) -> str:
        """What opens an answer."""
        return self.answer[0] if self.answer else self.plain_lead

    def spans(self, text: str) -> Iterator[Span]:
        """Actions in order; where nothing is marked and the dialect has no answer marks, the text is an answer."""
        openings = (self.call[0],) if self.answer is None else (self.call[0], self.answer[0])
        opening, at, found = _any_of(openings), 0, False
        while (mark := opening.search(text, at)) is not None:
            found = True
            is_call = mark[0] == self.call[0]
            span = self._call(text, mark.start(), mark.end()) if is_call else self._marked(text, mark)
            yield span
            at = span.end
        if not found and self.answer is None and text.strip():
            body = text.strip().removeprefix(self.plain_lead.strip()).strip()
            yield Span("answer", 0, len(text), body, closed=False)

    def _marked(self, text: str, mark: re.Match[str]) -> Span:
        closing = self.answer[1] if self.answer else ""
        end = text.find(closing, mark.end())
        body = text[mark.end() : end if end >= 0 else len(text)].strip()
        return Span("answer", mark.start(), end + len(closing) if end >= 0 else len(text), body, end >= 0)

    def _call(self, text: str, start: int, at: int) -> Span:
        """The first JSON value behind the mark: a closing mark inside one of its strings does not end it."""
        padded = text[at : at + MAX_CHARS]
        window = padded.lstrip()
        at += len(padded) - len(window)
        try:
            value, length = _DECODER.raw_decode(window)
        except (ValueError, RecursionError):
            value, length = None, None
        behind = at + (length or 0)
        end = text.find(self.call[1], behind)
        after = end + len(self.call[1]) if end >= 0 else len(text)
        if length is None:
            return Span("call", start, after, text[at : end if end >= 0 else len(text)].strip(), closed=end >= 0)
        return Span("call", start, after, window[:length], closed=True, value=value)

    def read(self, span: Span) -> Said:
        """What a span says. Raises MalformedAction."""
        if span.kind == "answer":
            return Said("answer", words=span.body)
        call = _object(span.value if span.closed else None, "the call", span.body)
        name, arguments = call.get("name"), call.get("arguments", {})
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            known = ", ".join(tool.name for tool in self.tools)
            raise MalformedAction(f"there is no tool {_shown(name)}; there are {known}")
        return _read_call(tool, _object(arguments, "'arguments'", span.body))

    def write(self, said: Said, digits: int) -> str:
        """The text that is read as this. Raises DialectError for what cannot be said."""
        if said.kind == "answer":
            opening, closing = self.answer or ("", "")
            return f"{opening}{said.words}{closing}"
        tool = next((tool for tool in self.tools if tool.does == said.kind), None)
        if tool is None:
            raise DialectError(f"no tool does '{said.kind}'; there are {', '.join(tool.name for tool in self.tools)}")
        arguments: dict[str, Any] = {
            tool.query: said.words,
            tool.box: [_number(value, digits) for value in said.corners or ()],
            tool.label: "region",
            tool.image: said.image,
        }
        arguments.pop("", None)
        call = json.dumps({"name": tool.name, "arguments": arguments}, ensure_ascii=False)
        # No mark can stand in a string that has no "<".
        return f"{self.call[0]}\n{call.replace('<', chr(92) + 'u003c')}\n{self.call[1]}"


Syntax: TypeAlias = Tags | ToolCalls


def _read_call(tool: Tool, arguments: Mapping[str, Any]) -> Said:
    image = _index(tool, arguments) if tool.image else None
    match tool.does:
        case "text_search":
            return Said("text_search", words=_words(arguments, tool.query))
        case "gaze_search":
            return Said("gaze_search", corners=_corners(arguments, tool.box), image=image)
        case _:
            return Said("image_search", image=image)


def _words(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise MalformedAction(f"'{name}' is {_shown(value)}, which is no text")
    if _SURROGATE.search(value):
        raise MalformedAction(f"'{name}' holds half a character")
    return value.strip()


def _corners(arguments: Mapping[str, Any], name: str) -> Corners:
    value = arguments.get(name)
    if not isinstance(value, list):
        raise MalformedAction(f"'{name}' is {_shown(value)}, which is no list of four numbers")
    if len(value) != 4:
        raise MalformedAction(f"a box has four numbers, this has {len(value)}: {_shown(value)}")
    if not all(type(number) in (int, float) and abs(number) <= MAX_NUMBER for number in value):
        raise MalformedAction(f"'{name}' holds what is no number up to {MAX_NUMBER}: {_shown(value)}")
    return float(value[0]), float(value[1]), float(value[2]), float(value[3])


def _index(tool: Tool, arguments: Mapping[str, Any]) -> int | None:
    """The index of an image; None where the argument is left out."""
    if tool.image not in arguments:
        return None
    value = arguments[tool.image]
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    if not whole or abs(value) > MAX_NUMBER:
        raise MalformedAction(f"'{tool.image}' is {_shown(value)}, which is no index of an image")
    return int(value)


def _object(value: Any, what: str, body: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedAction(f"{what} is no JSON object: '{body[:60]}'")
    return value


def _number(value: float, digits: int) -> int | float:
    return round(value, digits) if digits else round(value)


def _shown(value: Any) -> str:
    """A value for a message, cut short, half characters escaped."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "too deep"
    return text if len(text) <= 60 else text[:60] + " ..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys nobody can say which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)


@lru_cache(maxsize=64)
def _any_of(openings: tuple[str, ...]) -> re.Pattern[str]:
    """The leftmost of several texts, the longest where several begin."""
    return re.compile("|".join(re.escape(text) for text in sorted(openings, key=len, reverse=True)))
