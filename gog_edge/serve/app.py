"""The HTTP application: routes, errors and the life of a request. Everything slow happens in `work`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from gog_edge import __version__
from gog_edge.agent.actions import picture_query
from gog_edge.agent.events import Answered, Event
from gog_edge.agent.trace import TraceFolder
from gog_edge.bundle import Sample
from gog_edge.errors import (
    BackendError,
    BudgetExceeded,
    Busy,
    GogEdgeError,
    InputError,
    NotFound,
    RequestError,
    TooLarge,
)
from gog_edge.runtime import Runtime
from gog_edge.serve.metrics import Metrics
from gog_edge.serve.schemas import (
    PictureGiven,
    SearchBody,
    SearchItem,
    error_body,
    parse_ask,
    parse_search,
    read_body,
    sse,
)
from gog_edge.serve.security import LOOPBACK, Guard, page_policy
from gog_edge.serve.supervisor import Run, Supervisor, Workers
from gog_edge.types import ImageQuery, PackState, Query, SearchResult, TextQuery

T = TypeVar("T")

_log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "kiosk" / "index.html"
STATUS: dict[type[Exception], int] = {  # the nearest class in an error's ancestry decides
    TooLarge: 413,
    NotFound: 404,
    RequestError: 422,
    InputError: 400,
    Busy: 503,
    BackendError: 503,
    BudgetExceeded: 504,
    GogEdgeError: 500,
}
FAULT = {"error": {"type": "InternalError", "message": "something went wrong inside; the server's log says what"}}
PICTURES_HELD = 2  # of the largest size, decoded for one search
RETRY_AFTER = "2"  # seconds; about one question
CACHED = "private, max-age=3600"
EVENT_STREAM = "text/event-stream"
MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def create_app(
    served: Runtime | Supervisor, *, hosts: frozenset[str] | None = LOOPBACK, waiting: int = 4,
    traces: TraceFolder | None = None,
) -> FastAPI:
    """Build the application around an open bundle, or one that a supervisor opens.

    `hosts` are the names it answers to (None: any); `waiting` questions may stand in line behind the
    `limits.concurrent` that are worked on, further ones are refused with 503. `traces` gets one
    file for each episode.
    """
    supervisor = served if isinstance(served, Supervisor) else Supervisor(served)
    service = Service(supervisor, Workers(supervisor.runtime.limits.concurrent, waiting), traces)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with supervisor.watching():
            yield
            service.workers.close()

    return FastAPI(
        title="gog_edge",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load scripts from the network
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        routes=service.routes(),
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={GogEdgeError: refuse, HTTPException: refuse_route, Exception: fail},
    )


class Service:
    """The endpoints over the runtime that is served at the moment."""

    def __init__(self, supervisor: Supervisor, workers: Workers, traces: TraceFolder | None = None) -> None:
        self.supervisor, self.workers, self.metrics, self.traces = supervisor, workers, Metrics(), traces
        self.samples = {sample.picture.name: sample for sample in self.runtime.samples}

    @property
    def runtime(self) -> Runtime:
        """What is served now: a request that needs the same one throughout asks once."""
        return self.supervisor.runtime

    def routes(self) -> list[BaseRoute]:
        """Every route; /v1/chat/completions is not offered yet."""
        return [
            Route("/", self.page),
            Route("/v1/ask", self.ask, methods=["POST"]),
            Route("/v1/search", self.search, methods=["POST"]),
            Route("/v1/images/{pack}/{image:int}", self.image),
            Route("/v1/samples", self.list_samples),
            Route("/v1/samples/{name}", self.sample),
            Route("/v1/models", self.models),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.show_metrics),
        ]

    # --- asking and searching -------------------------------------------------------------------

    async def ask(self, request: Request) -> Response:
        """POST /v1/ask: the answer as JSON, or every event as it comes."""
        events = self._episode(request)
        first = await anext(events, None)  # what is wrong with the input is known before the first event
        if EVENT_STREAM in request.headers.get("accept", ""):
            return StreamingResponse(_as_sse(first, events), media_type=EVENT_STREAM,
                                     headers={"Cache-Control": "no-store"})
        last = first
        async for event in events:
            last = event
        if not isinstance(last, Answered):
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(last.record.to_json())

    async def search(self, request: Request) -> Response:
        """POST /v1/search: the packs without the policy, any number of queries in one batch.

        The body is one query, or {"queries": [...]} with up to 16 of them. A query has `text`, or a `picture` (base64)
        or `sample` with at most one of `box` and `boxes` ([x0, y0, x1, y1] in pixels of the upright picture), or both
        kinds, and may have a `question`, which chooses the paragraphs. The answer is {"results": [...]} with a result
        for each text, then for each box or whole picture, in the order of the queries.

        With "fuse": true there is one result for all of them, of at most `k` things (1 to 50, usually 5), those first
        that several crops and words point at; the text finds articles, the crops find what they show.

        A result has `found`, the calibrated chance that (in a fused result: any of) what was searched for is in the
        packs, and `evidence`: `titles`, `passages` (pack, article, section, paragraph, text, licence, span in the
        article's text), `image` (pack, image, caption, licence, attribution), `score`, and `ranks`: the place that each
        channel gave it ("image_to_image", "image_to_caption", "text_to_image", "text_to_caption", "words").
        """
        body = await self._read(request, parse_search)
        run = self._admit(partial(self._search, body))
        async for results in run:
            return JSONResponse({"results": [asdict(result) for result in results]})
        return Response(status_code=499)

    async def _episode(self, request: Request) -> AsyncGenerator[Event, None]:
        """From the body to the answer; whatever happens, the outcome is counted once."""
        began, outcome = time.monotonic(), "failed"
        try:
            body = await self._read(request, partial(parse_ask, limits=self.runtime.limits.budget))
            run = self._admit(lambda runtime: runtime.ask(
                self._bytes(body.picture), body.question, workflow=body.workflow, budget=body.budget,
                trace=self.traces.new() if self.traces else None))
            async with _stopped_when_gone(request, run):
                async for event in run:
                    yield event
            outcome = "stopped" if run.stopped else "answered"
        except (InputError, Busy) as exc:
            outcome = "busy" if isinstance(exc, Busy) else "refused"
            raise
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "stopped"
            raise
        finally:
            self.metrics.count(outcome, time.monotonic() - began)

    def _admit(self, work: Callable[[Runtime], Generator[T, None, None]]) -> Run[T]:
        return self.workers.admit(partial(self.supervisor.run, work))

    def _search(self, body: SearchBody, runtime: Runtime) -> Generator[tuple[SearchResult, ...], None, None]:
        queries = [*self._queries(body.items)]
        if body.fused is None:
            yield runtime.search(queries)
        else:
            crops = [query for query in queries if isinstance(query, ImageQuery)]
            texts = [query for query in queries if isinstance(query, TextQuery)]
            yield (runtime.search_many(crops, texts, body.fused),)

    def _queries(self, items: Iterable[SearchItem]) -> Iterator[Query]:
        """Each text and box. Pictures are held together until all are searched, so that their sum is bounded too."""
        check, most = self.runtime.limits.check_question, PICTURES_HELD * self.runtime.limits.picture_pixels
        pixels = 0
        for item in items:
            question = check(item.question) if item.question else ""
            if item.text is not None:
                yield TextQuery(check(item.text), question)
            if item.picture is not None:
                picture = self.runtime.decode(self._bytes(item.picture))
                pixels += picture.size.width * picture.size.height
                if pixels > most:
                    raise TooLarge(f"the pictures of this search have more than {most} pixels together; send smaller "
                                   "ones, or several searches")
                yield from (picture_query(picture, question, box) for box in item.boxes or (None,))

    async def _read(self, request: Request, parse: Callable[[str, bytes], T]) -> T:
        body = await read_body(request, self.runtime.limits.picture_bytes)
        return await run_in_threadpool(parse, request.headers.get("content-type", ""), body)

    def _bytes(self, given: PictureGiven) -> bytes:
        return self._sample(given.sample).picture.read_bytes() if given.sample is not None else given.data or b""

    # --- looking at what is here ----------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """GET /: the kiosk page, which needs nothing from anywhere else."""
        page = await run_in_threadpool(PAGE.read_text, encoding="utf-8")
        headers = {"Content-Security-Policy": page_policy(page), "Cache-Control": "no-cache"}
        return _cacheable(request, page.encode(), "text/html; charset=utf-8", headers)

    async def image(self, request: Request) -> Response:
        """GET /v1/images/{pack}/{id}: one image of the snapshot."""
        pack, image = request.path_params["pack"], request.path_params["image"]
        stored = await run_in_threadpool(self.runtime.picture, pack, image)
        return _cacheable(request, stored.data, stored.media_type, {"Cache-Control": CACHED})

    async def list_samples(self, request: Request) -> Response:
        """GET /v1/samples: pictures to try, with questions that suit them."""
        return JSONResponse({"samples": [_sample_json(name, sample) for name, sample in self.samples.items()]})

    async def sample(self, request: Request) -> Response:
        """GET /v1/samples/{name}: the picture of a sample."""
        data = await run_in_threadpool(self._sample(request.path_params["name"]).picture.read_bytes)
        return _cacheable(request, data, _media_type(data), {"Cache-Control": CACHED})

    def _sample(self, name: str) -> Sample:
        if name not in self.samples:
            raise NotFound(f"there is no sample '{name}'; GET /v1/samples lists them")
        return self.samples[name]

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the policy, in OpenAI's shape, and what this box accepts."""
        runtime = self.runtime
        names = [] if runtime.policy is None else [runtime.policy.name]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": runtime.name} for name in names]
        return JSONResponse({"object": "list", "data": models, "limits": asdict(runtime.limits)})

    # --- watching over it -----------------------------------------------------------------------

    async def healthz(self, request: Request) -> Response:
        """GET /healthz: the process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """GET /readyz: a question asked now would be taken; which generation of each pack it would be asked.

        Where engines cannot be had or were lost, "failed" and the reason; the server goes on trying.
        """
        runtime = self.runtime
        packs = [asdict(state) for state in _states(runtime)]
        if runtime.failure:
            return JSONResponse({"status": "failed", "reason": runtime.failure, "packs": packs}, status_code=503)
        if self.workers.admitted >= self.workers.capacity:
            headers = {"Retry-After": RETRY_AFTER}
            return JSONResponse({"status": "busy", "packs": packs}, status_code=503, headers=headers)
        return JSONResponse({"status": "ready", "packs": packs})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: figures for Prometheus."""
        text = self.metrics.render(running=self.workers.admitted, packs=_states(self.runtime))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


# --- errors -------------------------------------------------------------------------------------


async def refuse(request: Request, exc: Exception) -> Response:
    """Any error of ours, with the status that its class has in `STATUS`."""
    status = _nearest(STATUS, exc)
    headers = {"Retry-After": RETRY_AFTER} if status == 503 else None
    return JSONResponse(error_body(exc), status_code=status, headers=headers)


async def refuse_route(request: Request, exc: Exception) -> Response:
    """A path or method that is not served."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    headers = exc.headers if isinstance(exc, HTTPException) else None
    message = f"{request.method} {request.url.path}: {HTTPStatus(status).phrase.lower()}"
    return JSONResponse({"error": {"type": "NoRoute", "message": message}}, status_code=status, headers=headers)


async def fail(request: Request, exc: Exception) -> Response:
    """A fault of ours: the log has it, the caller only learns that it happened."""
    headers = {"Connection": "close"}  # as the server does after a fault; untold, the caller's next request is lost
    return JSONResponse(FAULT, status_code=500, headers=headers)


def _nearest(table: Mapping[type[Exception], T], exc: Exception) -> T:
    return next(table[kind] for kind in type(exc).__mro__ if kind in table)


# --- helpers ------------------------------------------------------------------------------------


@asynccontextmanager
async def _stopped_when_gone(request: Request, run: Run[Any]) -> AsyncIterator[None]:
    """Stops `run` when the client disconnects, and in any case at the end of the block."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        run.stop()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        if not run.done:
            run.stop()


async def _as_sse(first: Event | None, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        if first is not None:
            yield sse(first.kind, first.to_json())
        try:
            async for event in events:
                yield sse(event.kind, event.to_json())
        except GogEdgeError as exc:
            yield sse("error", error_body(exc))
        except Exception:  # the status is sent already: an event says what `fail` would
            _log.exception("a question failed after its first event")
            yield sse("error", FAULT)


def _states(runtime: Runtime) -> Sequence[PackState]:
    return () if runtime.packs is None else runtime.packs.states()


def _sample_json(name: str, sample: Sample) -> dict[str, Any]:
    picture = f"/v1/samples/{quote(name)}"
    return {"name": name, "title": sample.title, "picture": picture, "questions": sample.questions}


def _cacheable(request: Request, data: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**headers, "ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


def _media_type(data: bytes) -> str:
    return next((kind for magic, kind in MEDIA_TYPES.items() if data.startswith(magic)), "application/octet-stream")
