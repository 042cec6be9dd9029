"""The syntax that writes actions as tool calls: JSON objects between delimiters, as in the Hermes format of Qwen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.policy.dialect.actions import (
    MAX_ACTION_CHARS,
    ActionKind,
    ActionSpan,
    Corners,
    Delimiters,
    RawAction,
    any_of,
)

MAX_NUMBER = 9_999_999  # seven digits, as in tags
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy may call, with the action it stands for. Arguments that it lacks are empty."""

    name: str
    does: ActionKind
    about: str  # description in the prompt
    query: str = ""  # name of the argument with the words to search for
    box: str = ""  # name of the argument with the four numbers of a box
    image: str = ""  # name of the argument with the index of an image
    label: str = ""  # name of an argument that is written and ignored when read

    def __post_init__(self) -> None:
        needed = {"text_search": self.query, "gaze_search": self.box, "image_search": "none"}
        if not needed.get(self.does):
            raise DialectError(
                f"tool '{self.name}' does '{self.does}', which must be text_search with 'query', gaze_search with "
                "'box', or image_search"
            )

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a call, as it is listed in the prompt."""
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
class ToolCallSyntax:
    """Tool calls {"name", "arguments"} between delimiters: the table [tool_calls] of a dialect."""

    reason: Delimiters
    call: Delimiters
    skip_until: str  # all text up to the last occurrence is thinking; empty for none
    tools: tuple[Tool, ...]
    answer: Delimiters | None = None  # None: a turn without a call is the answer
    plain_lead: str = ""  # opens a forced answer where answers have no delimiters; not part of the answer

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if not names or len(set(names)) < len(names):
            raise DialectError(f"'tools' must have at least one tool, each with a unique name, got {names}")

    @property
    def delimiters(self) -> tuple[str, ...]:
        """Return every string that has a meaning in the syntax."""
        own = (*self.reason, *self.call, *(self.answer or ()), self.skip_until)
        return tuple(delimiter for delimiter in own if delimiter)

    @property
    def answer_open(self) -> str:
        """Return the text that opens an answer."""
        return self.answer[0] if self.answer else self.plain_lead

    def find_actions(self, text: str) -> Iterator[ActionSpan]:
        """Yield the actions in order; without any, and without delimiters for answers, the whole text is an answer."""
        openings = (self.call[0],) if self.answer is None else (self.call[0], self.answer[0])
        opening, at, found = any_of(openings), 0, False
        while (match := opening.search(text, at)) is not None:
            found = True
            is_call = match[0] == self.call[0]
            span = self._call_span(text, match.start(), match.end()) if is_call else self._answer_span(text, match)
            yield span
            at = span.end
        if not found and self.answer is None and text.strip():
            body = text.strip().removeprefix(self.plain_lead.strip()).strip()
            yield ActionSpan("answer", 0, len(text), body, closed=False)

    def _answer_span(self, text: str, match: re.Match[str]) -> ActionSpan:
        closing = self.answer[1] if self.answer else ""
        end = text.find(closing, match.end())
        body = text[match.end() : end if end >= 0 else len(text)].strip()
        return ActionSpan("answer", match.start(), end + len(closing) if end >= 0 else len(text), body, end >= 0)

    def _call_span(self, text: str, start: int, at: int) -> ActionSpan:
        """Return the span of a call: the first JSON value, whose strings may contain the closing delimiter."""
        padded = text[at : at + MAX_ACTION_CHARS]
        window = padded.lstrip()
        at += len(padded) - len(window)
        try:
            value, length = _DECODER.raw_decode(window)
        except (ValueError, RecursionError):
            value, length = None, None
        after_value = at + (length or 0)
        end = text.find(self.call[1], after_value)
        after = end + len(self.call[1]) if end >= 0 else len(text)
        if length is None:
            return ActionSpan("call", start, after, text[at : end if end >= 0 else len(text)].strip(), closed=end >= 0)
        return ActionSpan("call", start, after, window[:length], closed=True, value=value)

    def parse(self, span: ActionSpan) -> RawAction:
        """Return the action of a span.

        Raises:
            MalformedAction: the call is not valid JSON, names an unknown tool, or has wrong arguments.
        """
        if span.kind == "answer":
            return RawAction("answer", text=span.body)
        call = _object(span.value if span.closed else None, "the call", span.body)
        name, arguments = call.get("name"), call.get("arguments", {})
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            known = ", ".join(tool.name for tool in self.tools)
            raise MalformedAction(f"the tool {_excerpt(name)} does not exist; available tools are {known}")
        return _parse_call(tool, _object(arguments, "'arguments'", span.body))

    def render(self, action: RawAction, digits: int) -> str:
        """Return the text that `parse` reads as `action`; `digits`: decimals of box coordinates.

        Raises:
            DialectError: the dialect has no tool for the action.
        """
        if action.kind == "answer":
            opening, closing = self.answer or ("", "")
            return f"{opening}{action.text}{closing}"
        tool = next((tool for tool in self.tools if tool.does == action.kind), None)
        if tool is None:
            names = ", ".join(tool.name for tool in self.tools)
            raise DialectError(f"no tool of the dialect does '{action.kind}'; its tools are {names}")
        arguments: dict[str, Any] = {
            tool.query: action.text,
            tool.box: [_round(value, digits) for value in action.corners or ()],
            tool.label: "region",
            tool.image: action.image,
        }
        arguments.pop("", None)
        call = json.dumps({"name": tool.name, "arguments": arguments}, ensure_ascii=False)
        # Without "<", no string can contain a delimiter.
        return f"{self.call[0]}\n{call.replace('<', chr(92) + 'u003c')}\n{self.call[1]}"


def _parse_call(tool: Tool, arguments: Mapping[str, Any]) -> RawAction:
    image = _image_index(tool, arguments) if tool.image else None
    match tool.does:
        case "text_search":
            return RawAction("text_search", text=_string(arguments, tool.query))
        case "gaze_search":
            return RawAction("gaze_search", corners=_corners(arguments, tool.box), image=image)
        case _:
            return RawAction("image_search", image=image)


def _string(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise MalformedAction(f"'{name}' must be a string, got {_excerpt(value)}")
    if _SURROGATE.search(value):
        raise MalformedAction(f"'{name}' contains half of a surrogate pair: {_excerpt(value)}")
    return value.strip()


def _corners(arguments: Mapping[str, Any], name: str) -> Corners:
    value = arguments.get(name)
    if not isinstance(value, list):
        raise MalformedAction(f"'{name}' must be a list of four numbers, got {_excerpt(value)}")
    if len(value) != 4:
        raise MalformedAction(f"a box must have four numbers, got {len(value)}: {_excerpt(value)}")
    if not all(type(number) in (int, float) and abs(number) <= MAX_NUMBER for number in value):
        raise MalformedAction(f"'{name}' must contain numbers up to {MAX_NUMBER}, got {_excerpt(value)}")
    return float(value[0]), float(value[1]), float(value[2]), float(value[3])


def _image_index(tool: Tool, arguments: Mapping[str, Any]) -> int | None:
    """Return the index of an image; None when the argument is omitted."""
    if tool.image not in arguments:
        return None
    value = arguments[tool.image]
    integral = type(value) is int or (isinstance(value, float) and value.is_integer())
    if not integral or abs(value) > MAX_NUMBER:
        raise MalformedAction(f"'{tool.image}' must be the index of an image, got {_excerpt(value)}")
    return int(value)


def _object(value: Any, what: str, body: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedAction(f"{what} must be a JSON object, got '{body[:60]}'")
    return value


def _round(value: float, digits: int) -> int | float:
    return round(value, digits) if digits else round(value)


def _excerpt(value: Any) -> str:
    """Return the start of a value as JSON, for a message; surrogates are escaped."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 60 else text[:60] + " ..."


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; reject duplicate keys, as it is unknown which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return found


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_unique_keys)
