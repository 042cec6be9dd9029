"""The OpenAPI document of the HTTP API: FastAPI's description of the routes, with request bodies and events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, get_args

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from gog_edge import __version__
from gog_edge.agent.events import Workflow
from gog_edge.serve.schemas import (
    AnswerBody,
    AskBody,
    BoxEdges,
    ErrorBody,
    Probability,
    ResponseBody,
    SearchBody,
    SearchQuery,
)
from gog_edge.types import Evidence

_REF = "#/components/schemas/{model}"


class StartedEvent(ResponseBody):
    """The first event."""

    kind: Literal["started"]
    question: str
    size: list[int] = Field(min_length=2, max_length=2, description="[width, height] of the picture in pixels")
    workflow: Workflow


class SpokeEvent(ResponseBody):
    """A piece of generated text."""

    kind: Literal["spoke"]
    step: int
    text: str


class ActedEvent(ResponseBody):
    """The policy has chosen an action."""

    kind: Literal["acted"]
    step: int
    action: Literal["answer", "text_search", "image_search", "gaze_search"]
    box: BoxEdges | None
    query: str | None
    note: str


class FoundEvent(ResponseBody):
    """A search has returned."""

    kind: Literal["found"]
    step: int
    evidence: list[Evidence]
    found: Probability
    cached: bool
    ms: float


class RefusedEvent(ResponseBody):
    """The turn contained no action that can be carried out."""

    kind: Literal["refused"]
    step: int
    reason: str


class AnsweredEvent(AnswerBody):
    """The last event."""

    kind: Literal["answered"]


EventBody: TypeAlias = StartedEvent | SpokeEvent | ActedEvent | FoundEvent | RefusedEvent | AnsweredEvent | ErrorBody


def get_route(path: str, endpoint: Callable[..., Any], **options: Any) -> APIRoute:
    """Return a route that answers GET and HEAD; options are those of APIRoute."""
    return APIRoute(path, endpoint, methods=["GET", "HEAD"], operation_id=endpoint.__name__, **options)


def post_route(path: str, endpoint: Callable[..., Any], model: Any, errors: Iterable[int], body: dict[str, Any],
               **content: Any) -> APIRoute:
    """Return a route that answers POST.

    Args:
        path: the path.
        endpoint: the endpoint.
        model: the model of its response.
        errors: the statuses of its errors.
        body: the description of its request body.
        content: the description of responses of other media types, by media type.
    """
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in errors
    }
    return APIRoute(path, endpoint, methods=["POST"], operation_id=endpoint.__name__, response_model=model,
                    responses={200: {"content": content}, **responses}, openapi_extra=body)


def ask_request() -> dict[str, Any]:
    """Return the request body of POST /v1/ask for `openapi_extra`."""
    return _request_body(AskBody)


def search_request() -> dict[str, Any]:
    """Return the request body of POST /v1/search for `openapi_extra`."""
    return _request_body(SearchQuery, SearchBody)


def event_stream() -> dict[str, Any]:
    """Return the content of a response of server-sent events, as FastAPI describes them."""
    events = [{"$ref": _REF.format(model=event.__name__)} for event in get_args(EventBody)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"oneOf": events}}
    kinds = ["started", "spoke", "acted", "found", "refused", "answered", "error"]
    item = {"type": "object", "required": ["event", "data"],
            "properties": {"event": {"type": "string", "enum": kinds}, "data": data}}
    return {"text/event-stream": {"itemSchema": item}}


def describe(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of some routes."""
    documented = []
    for route in routes:
        if isinstance(route, APIRoute):
            route = copy(route)
            route.methods = set(route.methods or ()) - {"HEAD"}  # answered like GET
            documented.append(route)
    document = get_openapi(title="gog_edge", version=__version__, routes=documented,
                           description="Answers questions about pictures from a local snapshot of Wikipedia.")
    models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in (AskBody, SearchQuery, SearchBody)),
        *((model, "serialization") for model in get_args(EventBody)),
    ]
    _, definitions = models_json_schema(models, ref_template=_REF)
    document["components"]["schemas"] |= definitions["$defs"]
    return document


def _request_body(*models: type[Any]) -> dict[str, Any]:
    """Describe a JSON body of any of the models, and a multipart body of the fields of the first."""
    refs = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    names = [name for name in models[0].model_fields if name not in ("box", "boxes")]  # lists have no form of text
    fields = {name: {"$ref": f"{refs[0]['$ref']}/properties/{name}"} for name in names}
    files = {"picture": {"type": "string", "contentMediaType": "application/octet-stream"}}
    form = {"type": "object", "properties": fields | files, "additionalProperties": False}
    content = {"application/json": {"schema": refs[0] if len(refs) == 1 else {"oneOf": refs}},
               "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
