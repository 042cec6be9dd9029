"""The request and response bodies of the HTTP API, and how request bodies are read.

The response models describe the responses in /openapi.json. Answers and search results are not validated against them
at run time: they are large, and serialised from dataclasses of the same fields.
"""

from __future__ import annotations

import base64
import binascii
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as FormField
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.requests import Request

from gog_edge.agent.events import Workflow
from gog_edge.config import Budget, Limits
from gog_edge.errors import PictureError, QuestionError, RequestError, TooLarge
from gog_edge.retrieval.retriever import MAX_K
from gog_edge.types import Box, Evidence, ImageRef, PackState, Passage

MAX_QUERIES = 16  # in one search
MAX_BOXES = 32  # over all queries of one search
DEFAULT_K = 5
BODY_SLACK = 64 * 2**10  # bytes of a body in addition to the picture

B = TypeVar("B", bound="_RequestBody")
# Characters that some clients of event streams take for the end of a line, though the format does not.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


# --- request bodies -----------------------------------------------------------------------------


def _decode_base64(value: Any) -> Any:
    """Decode base64 or a data URI; bytes are the file of a multipart body."""
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RequestError(f"'picture' must be a base64 string or a data URI, got {reprlib.repr(value)}")
    head, comma, rest = value.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise PictureError(f"'picture' begins with '{head[:40]}'; send base64 or a data URI")
    try:
        return base64.b64decode(rest if comma else value, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise PictureError(f"'picture' is not base64 ({exc}); send base64 or a data URI") from exc


def _check_box(edges: list[float]) -> list[float]:
    if not (edges[0] < edges[2] and edges[1] < edges[3]):
        raise RequestError(f"a box must be [x0, y0, x1, y1] in pixels with x0 < x1 and y0 < y1, got {edges}")
    return edges


PictureFile: TypeAlias = Annotated[bytes, BeforeValidator(_decode_base64), WithJsonSchema(
    {"type": "string", "contentEncoding": "base64"})]
InputBox: TypeAlias = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4), AfterValidator(_check_box)]
Positive: TypeAlias = Annotated[int, Field(ge=1)]


class _RequestBody(BaseModel):
    noun: ClassVar[str] = "the body"  # in error messages
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise RequestError(f"{cls.noun} must be an object, got {_kind(values)}")
        unknown = sorted(values.keys() - cls.model_fields.keys())
        if unknown:
            raise RequestError(f"unknown field '{unknown[0]}'; known fields are {', '.join(sorted(cls.model_fields))}")
        return values


class _PictureBody(_RequestBody):
    picture: PictureFile | None = Field(default=None, description="A picture file as base64 or as a data URI.")
    sample: str | None = Field(default=None, description="The name of a sample picture, instead of `picture`.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.picture is not None and self.sample is not None:
            raise RequestError("both 'picture' and 'sample' are given; send one of them")
        return self

    @property
    def has_picture(self) -> bool:
        """Return whether a picture or a sample is given."""
        return self.picture is not None or self.sample is not None


class BudgetBody(_RequestBody):
    """Limits of one question, at most those of the server."""

    noun: ClassVar[str] = "'budget'"
    turns: Positive | None = Field(default=None, description="Turns of the policy, including the answer.")
    tokens: Positive | None = Field(default=None, description="Generated tokens over all turns.")
    deadline_ms: Positive | None = Field(default=None, description="Milliseconds until the answer.")


class AskBody(_PictureBody):
    """A question about a picture."""

    question: str = Field(description="The question about the picture.")
    workflow: Annotated[Workflow, Field(strict=False)] = Field(
        default=Workflow.GOG,
        description="gog: all actions; full_image: the whole picture is searched; direct: no search.",
    )
    budget: BudgetBody | None = None

    @field_validator("workflow", mode="before")
    @classmethod
    def _default_workflow(cls, value: Any) -> Any:
        return Workflow.GOG if value is None or value == "" else value

    @model_validator(mode="after")
    def _check_picture(self) -> Self:
        if not self.has_picture:
            raise RequestError("neither 'picture' nor 'sample' is given; send one of them")
        return self

    def merge_budget(self, limits: Budget) -> Budget:
        """Return the limits lowered by the budget of this request. Raises RequestError if it exceeds them."""
        asked = self.budget.model_dump(exclude_none=True) if self.budget else {}
        most = {name: getattr(limits, name) for name in BudgetBody.model_fields}
        for name, value in asked.items():
            if value > most[name]:
                raise RequestError(f"'budget.{name}' must be between 1 and {most[name]}, got {value}")
        return Budget(**most | asked)


class SearchQuery(_PictureBody):
    """A text, a picture or both; the text and each region of the picture are searches of their own."""

    noun: ClassVar[str] = "a query"
    text: str | None = Field(default=None, description="Text to search for.")
    box: InputBox | None = Field(
        default=None,
        description="A region [x0, y0, x1, y1] of the upright picture in pixels; otherwise the whole picture.",
    )
    boxes: list[InputBox] | None = Field(
        default=None, min_length=1, description="Regions; each is a search of its own."
    )
    question: str | None = Field(default=None, description="Selects the paragraphs; by default `text`.")

    @model_validator(mode="after")
    def _check_query(self) -> Self:
        if self.text is None and not self.has_picture:
            raise RequestError("a query needs 'text', 'picture' or 'sample'")
        if self.box is not None and self.boxes is not None:
            raise RequestError("both 'box' and 'boxes' are given; send one of them")
        if self.regions and not self.has_picture:
            raise RequestError("a box needs a 'picture' or 'sample' that it is a region of")
        return self

    @property
    def regions(self) -> tuple[Box, ...]:
        """Return the regions of the picture to search with; empty for the whole picture."""
        return tuple(Box(*edges) for edges in ([self.box] if self.box is not None else self.boxes or ()))


class SearchBody(_RequestBody):
    """Several queries, searched in one batch."""

    queries: list[SearchQuery] = Field(min_length=1, max_length=MAX_QUERIES)
    fuse: bool = Field(default=False, description="Return one result of all queries instead of one for each.")
    k: int = Field(default=DEFAULT_K, ge=1, le=MAX_K, description="Items of the fused result; needs `fuse`.")

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if not self.fuse and "k" in self.model_fields_set:
            raise RequestError("'k' is the number of items of a fused result; it needs 'fuse': true")
        boxes = sum(len(query.regions) for query in self.queries)
        if boxes > MAX_BOXES:
            raise RequestError(f"a search must have at most {MAX_BOXES} boxes, got {boxes}")
        return self


async def read_body(request: Request, picture_bytes: int) -> bytes:
    """Return the body, without reading more than a base64 picture of `picture_bytes` needs. Raises TooLarge."""
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


def parse_ask(content_type: str, body: bytes) -> AskBody:
    """Parse the body of POST /v1/ask, JSON or multipart. Raises InputError."""
    return _validate(AskBody, {"question": ""} | _read_values(content_type, body))


def parse_search(content_type: str, body: bytes) -> SearchBody:
    """Parse the body of POST /v1/search: one query, or an object with 'queries'. Raises InputError."""
    values = _read_values(content_type, body)
    if "queries" in values:
        return _validate(SearchBody, values)
    return SearchBody(queries=[_validate(SearchQuery, values)])


def _validate(model: type[B], values: dict[str, Any]) -> B:
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in error["loc"])
        message = error["msg"].replace("Input should be", "must be").replace("List should", "must")
        message = message.partition(" after validation")[0]
        raise RequestError(f"'{path}' {message}, got {reprlib.repr(error['input'])}") from None


def _read_values(content_type: str, body: bytes) -> dict[str, Any]:
    kind, options = parse_options_header(content_type)
    match kind:
        case b"application/json":
            return _read_json(body)
        case b"multipart/form-data":
            return _read_multipart(body, options.get(b"boundary", b""))
    raise RequestError(f"the body is '{content_type}'; send application/json or multipart/form-data")


def _read_json(body: bytes | str) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"the body is not JSON in UTF-8 ({exc})") from exc
    if not isinstance(values, dict):
        raise RequestError(f"the body must be a JSON object, got {_kind(values)}")
    return values


def _read_multipart(body: bytes, boundary: bytes) -> dict[str, Any]:
    """Return the file 'picture' as bytes, 'budget' as JSON and other fields as text.

    Starlette's parser of forms is not used: it decodes text that is not UTF-8 as Latin-1.
    """
    parts: dict[str, bytes] = {}

    def on_field(field: FormField) -> None:
        parts[_name(field.field_name)] = field.value or b""

    def on_file(file: File) -> None:
        file.file_object.seek(0)
        parts[_name(file.field_name)] = file.file_object.read()

    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # never to disk: the body is in memory and bounded
    try:
        parser = FormParser("multipart/form-data", on_field, on_file, boundary=boundary, config=config)
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise RequestError(f"the body is not multipart/form-data ({exc})") from exc
    values: dict[str, Any] = {name: part if name == "picture" else _text(name, part) for name, part in parts.items()}
    return values | {"budget": _read_json(parts["budget"])} if "budget" in parts else values


def _name(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise QuestionError(f"'{name}' is not UTF-8 ({exc.reason} at byte {exc.start})") from exc


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --- response bodies ----------------------------------------------------------------------------

BoxEdges: TypeAlias = Annotated[list[float], Field(min_length=4, max_length=4, description="[x0, y0, x1, y1], pixels")]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class ResponseBody(BaseModel):
    """Base of the response bodies."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ResponseBody):
    """What was wrong."""

    type: str = Field(description="The class of the error, for example QuestionError.")
    message: str = Field(description="What was wrong, with which value, and what to do.")


class ErrorBody(ResponseBody):
    """An error."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class CitedPassage(Passage):
    """A paragraph of the snapshot with the image of its article."""

    image: ImageRef | None


class StepBody(ResponseBody):
    """One turn of the policy."""

    action: Literal["answer", "text_search", "image_search", "gaze_search", "malformed"]
    box: BoxEdges | None
    query: str | None
    evidence: list[Evidence]
    ms: float
    found: Probability | None = Field(description="Probability that the subject of the search is in the snapshot.")
    cached: bool
    note: str = Field(description="How the box was corrected, or why the action was refused.")


class TimingsBody(ResponseBody):
    """Milliseconds by stage."""

    prefill: float
    decode: float
    search: float
    total: float


class AnswerBody(ResponseBody):
    """The answer with its sources and steps."""

    answer: str
    found: Probability | None = Field(description="Probability that the subject is in the snapshot; null: no search.")
    citations: list[CitedPassage] = Field(description="The passages that contain the answer.")
    related: list[CitedPassage] = Field(description="Without citations: the best passage of a likely result.")
    steps: list[StepBody]
    timings_ms: TimingsBody
    ended: str = Field(description="answer, or what forced it: turns, tokens, deadline, searches, context, malformed, "
                                   "box_refused or action_refused.")
    trace: str | None = Field(description="Path of the trace file on the server.")


@dataclass(frozen=True, slots=True)
class ResultBody:
    """The result of one query, or of all of them."""

    evidence: list[Evidence]
    found: Probability  # that the subject of the query (of a fused result: of any query) is in the packs
    cached: bool


class SearchResults(ResponseBody):
    """One result for each text, then for each region or picture, in the order of the queries; one if fused."""

    results: list[ResultBody]


class SampleBody(ResponseBody):
    """A picture to try, with questions about it."""

    name: str
    title: str
    picture: str = Field(description="Path of the picture on this server.")
    questions: list[str]


class SampleList(ResponseBody):
    """The sample pictures of the bundle."""

    samples: list[SampleBody]


class ModelCard(ResponseBody):
    """A model in the format of OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = Field(description="The bundle that the policy is from.")


class ModelList(ResponseBody):
    """The policy that is served, and the limits of the server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    limits: Limits


class Health(ResponseBody):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(ResponseBody):
    """Whether a question asked now would be answered, and the generation of each pack."""

    status: Literal["ready", "busy", "failed"]
    packs: list[PackState]
    reason: str = Field(default="", description="Why the engines are not available; only with the status failed.")


def error_body(exc: Exception) -> dict[str, Any]:
    """Return the JSON of an error; see ErrorBody. Lone surrogates, which UTF-8 cannot encode, are escaped."""
    message = str(exc).encode("utf-8", "backslashreplace").decode()
    return {"error": {"type": type(exc).__name__, "message": message}}


def sse(kind: str, data: Mapping[str, Any]) -> bytes:
    """Encode one server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"event: {kind}\ndata: {text}\n\n".encode()
