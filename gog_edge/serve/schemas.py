"""What crosses the network: request bodies in, JSON and events out. Nothing here computes or waits for a model."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import Request

from gog_edge.agent.events import Workflow
from gog_edge.config import Budget
from gog_edge.errors import PictureError, QuestionError, RequestError, TooLarge
from gog_edge.retrieval.retriever import MAX_K
from gog_edge.types import Box

MAX_QUERIES = 16  # in one search
MAX_BOXES = 32  # over all its queries
DEFAULT_K = 5
BODY_SLACK = 64 * 2**10  # bytes for everything in a body that is not the picture
_ASK_FIELDS = frozenset({"picture", "sample", "question", "workflow", "budget"})
_QUERY_FIELDS = frozenset({"text", "picture", "sample", "box", "boxes", "question"})
_SEARCH_FIELDS = frozenset({"queries", "fuse", "k"})


@dataclass(frozen=True, slots=True)
class PictureGiven:
    """A picture as it arrived: the bytes of a file, or the name of a sample."""

    data: bytes | None = None
    sample: str | None = None


@dataclass(frozen=True, slots=True)
class AskBody:
    """The body of POST /v1/ask."""

    picture: PictureGiven
    question: str
    workflow: Workflow
    budget: Budget


@dataclass(frozen=True, slots=True)
class SearchItem:
    """One query of POST /v1/search; its text and each of its boxes are searches of their own."""

    text: str | None
    picture: PictureGiven | None
    boxes: tuple[Box, ...]  # pixels of the upright picture; none: the whole picture
    question: str  # chooses the paragraphs


@dataclass(frozen=True, slots=True)
class SearchBody:
    """The body of POST /v1/search."""

    items: tuple[SearchItem, ...]
    fused: int | None  # how many things the one result of all searches has at most; None: a result for each search


# --- in -----------------------------------------------------------------------------------------


async def read_body(request: Request, picture_bytes: int) -> bytes:
    """The body, never holding more than a base64 picture of `picture_bytes` needs. Raises TooLarge."""
    limit = picture_bytes * 4 // 3 + BODY_SLACK
    too_large = TooLarge(f"the body is larger than {limit} bytes; send a picture of at most {picture_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse_ask(content_type: str, body: bytes, limits: Budget) -> AskBody:
    """Read the body of /v1/ask; a budget may only lower `limits`. Raises InputError."""
    values = _read_fields(content_type, body)
    _refuse_unknown(values, _ASK_FIELDS)
    picture = _picture(values)
    if picture is None:
        raise RequestError("there is neither 'picture' nor 'sample'; send one of them")
    return AskBody(picture, _text(values, "question"), _workflow(values), _budget(values.get("budget"), limits))


def parse_search(content_type: str, body: bytes) -> SearchBody:
    """Read the body of /v1/search: one query, or {"queries": [...], "fuse": bool, "k": int}. Raises InputError."""
    values = _read_fields(content_type, body)
    if "queries" not in values:
        return SearchBody((_search_item(values),), None)
    _refuse_unknown(values, _SEARCH_FIELDS)
    queries = values["queries"]
    if not isinstance(queries, list) or not 1 <= len(queries) <= MAX_QUERIES:
        raise RequestError(f"'queries' must be a list of 1 to {MAX_QUERIES} objects")
    items = tuple(_search_item(query) for query in queries)
    boxes = sum(len(item.boxes) for item in items)
    if boxes > MAX_BOXES:
        raise RequestError(f"there are {boxes} boxes; at most {MAX_BOXES} go into one search")
    return SearchBody(items, _fused(values))


def _fused(values: Mapping[str, Any]) -> int | None:
    fuse, k = values.get("fuse", False), values.get("k", DEFAULT_K)
    if type(fuse) is not bool:
        raise RequestError(f"'fuse' is {fuse!r}; send true for one result of all queries, or leave it out")
    if not fuse and "k" in values:
        raise RequestError("'k' is how many things one result of all queries has; it needs 'fuse': true")
    if type(k) is not int or not 1 <= k <= MAX_K:
        raise RequestError(f"'k' is {k!r}; whole numbers from 1 to {MAX_K} are taken")
    return k if fuse else None


def _search_item(values: Any) -> SearchItem:
    if not isinstance(values, dict):
        raise RequestError(f"a query must be an object, not {_kind(values)}")
    _refuse_unknown(values, _QUERY_FIELDS)
    text = _text(values, "text") if "text" in values else None
    question = _text(values, "question") if "question" in values else text or ""
    item = SearchItem(text, _picture(values), _boxes(values), question)
    if item.text is None and item.picture is None:
        raise RequestError("a query needs 'text', 'picture' or 'sample'")
    if item.boxes and item.picture is None:
        raise RequestError("a box needs a 'picture' or 'sample' to cut from")
    return item


def _boxes(values: Mapping[str, Any]) -> tuple[Box, ...]:
    if "box" in values and "boxes" in values:
        raise RequestError("there are both 'box' and 'boxes'; send one of them")
    if values.get("boxes") is None:
        return () if values.get("box") is None else (_box(values["box"]),)
    boxes = values["boxes"]
    if not isinstance(boxes, list) or not boxes:
        raise RequestError(f"'boxes' must be a list of boxes, not {_kind(boxes) if boxes != [] else 'an empty one'}")
    return tuple(_box(box) for box in boxes)


def _read_fields(content_type: str, body: bytes) -> dict[str, Any]:
    kind, options = parse_options_header(content_type)
    match kind:
        case b"application/json":
            return _read_json(body)
        case b"multipart/form-data":
            return _read_multipart(body, options.get(b"boundary", b""))
    raise RequestError(f"the body is '{content_type}'; send application/json or multipart/form-data")


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"the body is not JSON in UTF-8 ({exc})") from exc
    if not isinstance(values, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(values)}")
    return values


def _read_multipart(body: bytes, boundary: bytes) -> dict[str, Any]:
    """Fields and files as bytes: unlike Starlette's form, which guesses latin-1 where text is not UTF-8."""
    values: dict[str, Any] = {}

    def on_field(field: Field) -> None:
        values[_name(field.field_name)] = field.value or b""

    def on_file(file: File) -> None:
        file.file_object.seek(0)
        values[_name(file.field_name)] = file.file_object.read()

    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # never to disk: the body is in memory and bounded
    try:
        parser = FormParser("multipart/form-data", on_field, on_file, boundary=boundary, config=config)
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise RequestError(f"the body is not multipart/form-data ({exc})") from exc
    return values


def _name(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")


def _refuse_unknown(values: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise RequestError(f"unknown field '{unknown[0]}'; known are {', '.join(sorted(known))}")


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as exc:
            raise QuestionError(f"'{name}' is not UTF-8 ({exc.reason} at byte {exc.start})") from exc
    if not isinstance(value, str):
        raise RequestError(f"'{name}' must be text, not {_kind(value)}")
    return value


def _picture(values: Mapping[str, Any]) -> PictureGiven | None:
    given = [name for name in ("picture", "sample") if name in values]
    if not given:
        return None
    if len(given) == 2:
        raise RequestError("there are both 'picture' and 'sample'; send one of them")
    if given == ["sample"]:
        return PictureGiven(sample=_text(values, "sample"))
    value = values["picture"]
    return PictureGiven(data=value if isinstance(value, bytes) else _from_base64(_text(values, "picture")))


def _from_base64(text: str) -> bytes:
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise PictureError(f"'picture' begins with '{head[:40]}'; send base64 or a data URI")
    try:
        return base64.b64decode(rest if comma else text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise PictureError(f"'picture' is not base64 ({exc}); send base64 or a data URI") from exc


def _workflow(values: Mapping[str, Any]) -> Workflow:
    text = _text(values, "workflow") or Workflow.GOG.value
    try:
        return Workflow(text)
    except ValueError:
        known = ", ".join(workflow.value for workflow in Workflow)
        raise RequestError(f"'workflow' is '{text}'; known are {known}") from None


def _budget(value: Any, limits: Budget) -> Budget:
    if isinstance(value, bytes):
        value = _read_json(value)
    if value is None:
        return limits
    if not isinstance(value, dict):
        raise RequestError(f"'budget' must be an object, not {_kind(value)}")
    names = [field.name for field in fields(Budget)]
    _refuse_unknown(value, names)
    most = {name: getattr(limits, name) for name in names}
    for name, wish in value.items():
        if type(wish) is not int or not 1 <= wish <= most[name]:
            raise RequestError(f"'budget' asks for {name} = {wish!r}; whole numbers from 1 to {most[name]} are taken")
    return Budget(**most | value)


def _box(value: Any) -> Box:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    if not numbers or not (value[0] < value[2] and value[1] < value[3]):
        raise RequestError(f"a box is {value!r}; send [x0, y0, x1, y1] in pixels with x0 < x1 and y0 < y1")
    return Box(*map(float, value))


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# --- out ----------------------------------------------------------------------------------------


def error_body(exc: Exception) -> dict[str, Any]:
    """The JSON of an error: its type and what to do about it."""
    return {"error": {"type": type(exc).__name__, "message": str(exc)}}


def sse(kind: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
