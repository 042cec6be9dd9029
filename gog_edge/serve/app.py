"""The HTTP application: middleware, endpoints and error responses. Slow work runs in worker threads."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gog_edge import __version__
from gog_edge.agent.actions import picture_query
from gog_edge.agent.events import Answered, Event
from gog_edge.agent.trace import TraceFolder
from gog_edge.bundle import Sample
from gog_edge.config import Budget
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
from gog_edge.runtime import Runtime, check_question
from gog_edge.serve.metrics import CONTENT_TYPE, Metrics
from gog_edge.serve.openapi import ask_request, describe, event_stream, get_route, post_route, search_request
from gog_edge.serve.pages import API_PAGE, KIOSK_PAGE, page_response, picture_response
from gog_edge.serve.schemas import (
    AnswerBody,
    AskBody,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    SampleBody,
    SampleList,
    SearchBody,
    SearchQuery,
    SearchResults,
    error_body,
    parse_ask,
    parse_search,
    read_body,
    sse,
)
from gog_edge.serve.supervisor import Job, Supervisor, WorkerPool
from gog_edge.types import ImageQuery, PackState, Query, SearchResult, TextQuery

T = TypeVar("T")
Results: TypeAlias = tuple[SearchResult, ...]

_log = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",  # pages set their own
}
STATUS: dict[type[Exception], int] = {  # the first class in the MRO of an error decides
    TooLarge: 413,
    NotFound: 404,
    RequestError: 422,
    InputError: 400,
    Busy: 503,
    BackendError: 503,
    BudgetExceeded: 504,
    GogEdgeError: 500,
}
INTERNAL_ERROR = {"error": {"type": "InternalError", "message": "an internal error occurred; see the server's log"}}
PICTURES_HELD = 2  # decoded pictures of the largest size that one search may hold
RETRY_AFTER = "2"  # seconds; about the duration of one question
EVENT_STREAM = "text/event-stream"


def create_app(
    served: Runtime | Supervisor, *, hosts: frozenset[str] | None = LOOPBACK, waiting: int = 4,
    traces: TraceFolder | None = None,
) -> FastAPI:
    """Return the application that serves an open bundle, or one that a supervisor opens.

    Args:
        served: what answers questions.
        hosts: host names that requests may address; None for any.
        waiting: questions that may wait behind the `limits.concurrent` that are answered; others are refused with 503.
        traces: where a trace of each episode is written.
    """
    supervisor = served if isinstance(served, Supervisor) else Supervisor(served)
    service = Service(supervisor, WorkerPool(supervisor.runtime.limits.concurrent, waiting), traces)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with supervisor.watch():
            yield
            service.workers.close()

    return _App(
        title="gog_edge",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from the network
        redoc_url=None,
        lifespan=lifespan,
        routes=service.routes(),
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={GogEdgeError: refuse, HTTPException: refuse_route, Exception: fail},
    )


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which is generated once."""
        if self.openapi_schema is None:
            self.openapi_schema = describe(self.routes)
        return self.openapi_schema


class Guard:
    """ASGI middleware that refuses foreign hosts and cross-site requests, and adds `SECURITY_HEADERS` to each response.

    A page of another site must not control the server: neither by DNS rebinding, which the Host header reveals, nor by
    posting a form, which browsers mark with `Sec-Fetch-Site: cross-site`.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        """`hosts`: the host names that requests may address, in lower case and without port; None for any."""
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = self._refusal(Headers(scope=scope), scope["method"])
        refused = JSONResponse({"error": {"type": "Forbidden", "message": reason}}, status_code=403)
        await (refused if reason else self.app)(scope, receive, send_guarded)

    def _refusal(self, headers: Headers, method: str) -> str:
        """Return the reason why a request is refused, or "" if it is allowed."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts is not None and host not in self.hosts:
            return f"the host '{host}' is not allowed; start the server with --host to serve other machines"
        if method == "POST" and headers.get("sec-fetch-site") == "cross-site":
            return "requests from pages of other sites are not allowed"
        return ""


class Service:
    """The endpoints of the runtime that is served at the moment."""

    def __init__(self, supervisor: Supervisor, workers: WorkerPool, traces: TraceFolder | None = None) -> None:
        self.supervisor, self.workers, self.traces = supervisor, workers, traces
        self.metrics = Metrics(lambda: workers.size, self._pack_states)
        self.samples = {sample.picture.name: sample for sample in self.runtime.samples}

    @property
    def runtime(self) -> Runtime:
        """Return what is served now. A request that needs the same runtime throughout reads this once."""
        return self.supervisor.runtime

    def routes(self) -> list[BaseRoute]:
        """Return all routes."""
        errors = sorted(set(STATUS.values()))
        image: dict[int | str, dict[str, Any]] = {
            200: {"content": {"image/*": {}}, "description": "The file of the picture."},
            "4XX": {"model": ErrorBody, "description": "The picture does not exist."},
        }
        return [
            post_route("/v1/ask", self.ask, AnswerBody, errors, ask_request(), **event_stream()),
            post_route("/v1/search", self.search, SearchResults, errors, search_request()),
            get_route("/v1/images/{pack}/{image:int}", self.image, response_class=Response, responses=image),
            get_route("/v1/samples", self.list_samples, response_model=SampleList),
            get_route("/v1/samples/{name}", self.sample, response_class=Response, responses=image),
            get_route("/v1/models", self.models, response_model=ModelList),
            get_route("/healthz", self.healthz, response_model=Health),
            get_route("/readyz", self.readyz, response_model=Readiness, responses={503: {"model": Readiness}}),
            get_route("/metrics", self.show_metrics, response_class=Response,
                 responses={200: {"content": {"text/plain": {}}}}),
            get_route("/", self.kiosk_page, include_in_schema=False),
            get_route("/docs", self.api_page, include_in_schema=False),
        ]

    # --- questions and searches -----------------------------------------------------------------

    async def ask(self, request: Request) -> Response:
        """Answer a question about a picture.

        With `Accept: text/event-stream` every event is sent as it happens; the last one is `answered`, or `error`.
        """
        events = self._episode(request)
        first = await anext(events, None)  # errors of the input are raised before the first event
        if EVENT_STREAM in request.headers.get("accept", ""):
            return StreamingResponse(_as_sse(first, events), media_type=EVENT_STREAM,
                                     headers={"Cache-Control": "no-store"})
        last = first
        async for event in events:
            last = event
        if not isinstance(last, Answered):
            return Response(status_code=499)  # the client has disconnected
        return JSONResponse(last.record.to_json())

    async def search(self, request: Request) -> Response:
        """Search the packs without the policy, with any number of queries in one batch.

        The body is one query, or `{"queries": [...]}` with several. The response has a result for each text, then for
        each region or picture, in the order of the queries. With `"fuse": true` it has one result of all queries, of at
        most `k` items, first those that several queries agree on.

        `ranks` are the ranks of an item by channel: image_to_image, image_to_caption, text_to_image, text_to_caption,
        text_to_paragraph and words.
        """
        job = self.workers.submit(partial(self._search, await self._read(request, parse_search)))
        async for results in job:
            return JSONResponse({"results": [asdict(result) for result in results]})
        return Response(status_code=499)

    async def _episode(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the events of the question in a request, and count its outcome."""
        started, outcome = time.monotonic(), "failed"
        try:
            body = await self._read(request, parse_ask)
            budget = body.merge_budget(self.runtime.limits)
            job = self.workers.submit(partial(self._answer, body, budget))
            async with _stop_on_disconnect(request, job):
                async for event in job:
                    yield event
            outcome = "stopped" if job.stopped else "answered"
        except (InputError, Busy) as exc:
            outcome = "busy" if isinstance(exc, Busy) else "refused"
            raise
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "stopped"
            raise
        finally:
            self.metrics.questions.labels(outcome).inc()
            if outcome == "answered":
                self.metrics.seconds.observe(time.monotonic() - started)

    def _answer(self, body: AskBody, budget: Budget, on_event: Callable[[Event], None]) -> None:
        """Answer a question; runs in a worker thread."""
        with self.supervisor.lend() as runtime:
            runtime.answer(self._picture_bytes(body), body.question, on_event, workflow=body.workflow,
                           budget=budget, trace=self.traces.new() if self.traces else None)

    def _search(self, body: SearchBody, on_results: Callable[[Results], None]) -> None:
        """Search the packs; runs in a worker thread."""
        with self.supervisor.lend() as runtime:
            queries = [*self._queries(runtime, body.queries)]
            if not body.fuse:
                on_results(runtime.search(queries))
                return
            crops = [query for query in queries if isinstance(query, ImageQuery)]
            texts = [query for query in queries if isinstance(query, TextQuery)]
            on_results((runtime.search_many(crops, texts, body.k),))

    def _queries(self, runtime: Runtime, queries: Sequence[SearchQuery]) -> Iterator[Query]:
        """Yield each text and region. All pictures stay in memory during the search, so their sum is bounded."""
        check = partial(check_question, max_chars=runtime.limits.question_chars)
        most = PICTURES_HELD * min(runtime.limits.picture_pixels, runtime.limits.decoded_pixels)
        pixels = 0
        for query in queries:
            question = (query.text or "") if query.question is None else query.question
            question = check(question) if question else ""
            if query.text is not None:
                yield TextQuery(check(query.text), question)
            if query.has_picture:
                picture = runtime.decode(self._picture_bytes(query))
                pixels += picture.resolution.width * picture.resolution.height
                if pixels > most:
                    raise TooLarge(f"the pictures of this search have more than {most} pixels together; send smaller "
                                   "ones, or several searches")
                yield from (picture_query(picture, question, box) for box in query.regions or (None,))

    async def _read(self, request: Request, parse: Callable[[str, bytes], T]) -> T:
        body = await read_body(request, self.runtime.limits.picture_bytes)
        return await run_in_threadpool(parse, request.headers.get("content-type", ""), body)

    def _picture_bytes(self, body: AskBody | SearchQuery) -> bytes:
        return body.picture if body.picture is not None else self._sample(body.sample or "").picture.read_bytes()

    # --- pictures, samples and pages ------------------------------------------------------------

    async def image(self, request: Request, pack: str, image: int) -> Response:
        """Return an image of a pack."""
        stored = await run_in_threadpool(self.runtime.picture, pack, image)
        return picture_response(request, stored.data, stored.media_type)

    async def list_samples(self) -> SampleList:
        """List the sample pictures, with questions about them."""
        return SampleList(samples=[
            SampleBody(name=name, title=sample.title, picture=f"/v1/samples/{quote(name)}",
                       questions=list(sample.questions))
            for name, sample in self.samples.items()
        ])

    async def sample(self, request: Request, name: str) -> Response:
        """Return a sample picture."""
        data = await run_in_threadpool(self._sample(name).picture.read_bytes)
        return picture_response(request, data)

    def _sample(self, name: str) -> Sample:
        if name not in self.samples:
            raise NotFound(f"the sample '{name}' does not exist; GET /v1/samples lists the samples")
        return self.samples[name]

    async def kiosk_page(self, request: Request) -> Response:
        """Return the kiosk page."""
        return await page_response(request, KIOSK_PAGE)

    async def api_page(self, request: Request) -> Response:
        """Return the API reference, which renders /openapi.json."""
        return await page_response(request, API_PAGE)

    # --- status ---------------------------------------------------------------------------------

    async def models(self) -> ModelList:
        """List the policy in the format of OpenAI's API, and the limits of this server."""
        runtime = self.runtime
        names = [] if runtime.policy is None else [runtime.policy.name]
        return ModelList(data=[ModelCard(id=name, owned_by=runtime.name) for name in names], limits=runtime.limits)

    async def healthz(self) -> Health:
        """Return whether the process responds."""
        return Health()

    async def readyz(self) -> Response:
        """Return whether a question asked now would be accepted, and the generation of each pack.

        If engines are not available or were lost, the status is failed with the reason; the server keeps retrying.
        """
        runtime = self.runtime
        packs = [asdict(state) for state in self._pack_states()]
        if runtime.failure:
            return JSONResponse({"status": "failed", "reason": runtime.failure, "packs": packs}, status_code=503)
        if self.workers.size >= self.workers.capacity:
            headers = {"Retry-After": RETRY_AFTER}
            return JSONResponse({"status": "busy", "packs": packs}, status_code=503, headers=headers)
        return JSONResponse({"status": "ready", "packs": packs})

    async def show_metrics(self) -> Response:
        """Return metrics for Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    def _pack_states(self) -> Sequence[PackState]:
        packs = self.runtime.packs
        return () if packs is None else packs.states()


# --- errors -------------------------------------------------------------------------------------


async def refuse(request: Request, exc: Exception) -> Response:
    """Return an error of this package with the status of its class in `STATUS`."""
    status = next(STATUS[kind] for kind in type(exc).__mro__ if kind in STATUS)
    headers = {"Retry-After": RETRY_AFTER} if status == 503 else None
    return JSONResponse(error_body(exc), status_code=status, headers=headers)


async def refuse_route(request: Request, exc: Exception) -> Response:
    """Return the error of a path or method that does not exist."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    headers = exc.headers if isinstance(exc, HTTPException) else None
    message = f"{request.method} {request.url.path}: {HTTPStatus(status).phrase.lower()}"
    return JSONResponse({"error": {"type": "NoRoute", "message": message}}, status_code=status, headers=headers)


async def fail(request: Request, exc: Exception) -> Response:
    """Return an internal error without its details, which are in the log."""
    headers = {"Connection": "close"}  # the server closes it; without this, the client's next request would be lost
    return JSONResponse(INTERNAL_ERROR, status_code=500, headers=headers)


# --- helpers ------------------------------------------------------------------------------------


@asynccontextmanager
async def _stop_on_disconnect(request: Request, job: Job[Any]) -> AsyncIterator[None]:
    """Stop the job when the client disconnects, and at the end of the block if it still runs."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.stop()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        if not job.done:
            job.stop()


async def _as_sse(first: Event | None, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        if first is not None:
            yield sse(first.kind, first.to_json())
        try:
            async for event in events:
                yield sse(event.kind, event.to_json())
        except GogEdgeError as exc:
            yield sse("error", error_body(exc))
        except Exception:  # the status was sent already: the event takes the place of `fail`
            _log.exception("a question failed after its first event")
            yield sse("error", INTERNAL_ERROR)
