"""A policy that runs on another server with OpenAI's chat protocol: vLLM, SGLang, TensorRT-Edge-LLM or llama.cpp."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import httpx
from PIL import Image

from gog_edge import __version__
from gog_edge.config import RemoteConfig
from gog_edge.errors import BackendError, BudgetExceeded
from gog_edge.picture import Picture, resize
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, TurnParser, TurnPart
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.vision import smart_resize
from gog_edge.types import Action, Observation, Pixels, Size, Utterance

Message: TypeAlias = dict[str, Any]

BACKOFF_S = 0.5  # before the second attempt; doubled for each further one
MAX_BACKOFF_S = 8.0
MAX_EVENT_BYTES = 2**20
RETRY_STATUSES = (429, 502, 503, 504)  # of a server that is starting, busy or behind a proxy
JPEG_QUALITY = 92
REASONING_KEYS = ("reasoning_content", "reasoning")  # vLLM renamed the field, the other servers kept its first name
THINKING_TAGS = ("<think>", "</think>")  # for dialects without tags of their own
# The protocol has no error code for a full context, and every server words it differently.
_CONTEXT_FULL = re.compile(r"context[ _]*(length|size|window)|exceed_context|maximum context|max_model_len",
                           re.IGNORECASE)  # fmt: skip


class _RetryableError(Exception):
    """An attempt failed before the first token for a reason that may be temporary."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s  # as the server requested


class RemotePolicy:
    """A policy at a URL. Conversations may run in parallel, one thread each."""

    def __init__(self, config: RemoteConfig, dialect: Dialect, key: str = "") -> None:
        self.config, self.dialect = config, dialect
        self.server = _ChatClient(config, key)

    @classmethod
    def open(cls, config: RemoteConfig) -> RemotePolicy:
        """Read the dialect and the API key; the server is first contacted by a question.

        Raises:
            DialectError: the dialect does not exist or cannot be used.
            BackendError: the environment variable of the key is empty or contains no valid key.
        """
        key = os.environ.get(config.key_env, "").strip() if config.key_env else ""
        if config.key_env and not key:
            raise BackendError(f"the API key of {config.url} is expected in the environment variable "
                               f"'{config.key_env}', which is empty or not set; set it")
        if not (key.isascii() and key.isprintable()):
            raise BackendError(f"the API key in the environment variable '{config.key_env}' must be printable ASCII; "
                               "set it again")
        return cls(config, load_dialect(config.dialect), key)

    @property
    def name(self) -> str:
        """Return the name for traces and /v1/models."""
        return self.config.model

    @property
    def rules(self) -> LoopRules:
        """Return the rules of the dialect, with a final notice if the server cannot continue a given answer tag."""
        rules = self.dialect.loop_rules
        needs_notice = self.config.continues == "none" and not rules.final_notice
        return replace(rules, final_notice="action_refused") if needs_notice else rules

    def begin(self, picture: Picture, question: str) -> RemoteConversation:
        """Start a conversation about a picture; the first request is sent by the first `generate`."""
        return RemoteConversation(self, picture, question)


class RemoteConversation:
    """One conversation. Each request repeats the earlier messages unchanged, so that the server's prefix cache hits."""

    def __init__(self, policy: RemotePolicy, picture: Picture, question: str) -> None:
        self._config, self._dialect, self._server = policy.config, policy.dialect, policy.server
        self._images = ShownImages(given=picture.size, resized=smart_resize(picture.resolution, self._config))
        self._question = question
        self._resized: Callable[[Size], Size] = lambda size: smart_resize(size, self._config)  # of the next image
        opening = self._message(self._dialect.render_question(picture.pixels, question))
        self._sent: list[Message] = [{"role": "system", "content": self._dialect.system_prompt}]
        self._queued = [opening]  # for the next request

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Generate one turn; see `Conversation.generate`.

        Raises:
            BackendError: the server cannot be reached, rejects the request, times out or closes the stream early.
            BudgetExceeded: the server reports a full context; what was queued is dropped, and an answer can still be
                forced.
        """
        opening = self._dialect.answer_open if force_answer and self._config.continues != "none" else ""
        messages = [*self._sent, *(self._queued or [self._answer_request()])]
        parser = TurnParser(self._dialect, self._images, on_text, on_action)
        tags = (self._dialect.thinking.open or THINKING_TAGS[0], self._dialect.syntax.skip_until or THINKING_TAGS[1])
        reply = _Reply(self._server.name, parser, tags, opening)
        try:
            asyncio.run(self._server.complete(self._body(messages, max_tokens, opening), reply, deadline))
        except BudgetExceeded as exc:
            if len(self._sent) == 1:
                raise BackendError(f"picture and question exceed the context: {exc}, or lower 'max_pixels'") from exc
            self._queued = []
            raise
        reply.finish()
        self._sent, self._queued = [*messages, reply.message()], []
        action, reason = parser.result()
        return Utterance(parser.text, action, reason, reply.prompt_tokens, reply.new_tokens,
                         reply.prefill_ms, reply.decode_ms)

    def observe(self, observation: Observation) -> None:
        """Queue a user turn with the result of an action; see `Conversation.observe`."""
        message = self._observation_message(observation)
        if observation.notice is not None and self._queued:  # some chat templates reject consecutive user turns
            queued = self._queued.pop()
            message = {**queued, "content": [*queued["content"], self._part("\n"), *message["content"]]}
        self._queued.append(message)
        self._images = self._dialect.images_after(self._images, observation, self._resized_crop)

    def close(self) -> None:
        """Do nothing: no resource is held between turns."""

    def _answer_request(self) -> Message:
        """Return a user turn that asks for an answer: servers do not continue after a turn of the assistant."""
        return self._observation_message(Observation(notice="action_refused", detail="nothing more can be searched"))

    def _body(self, messages: Sequence[Message], max_tokens: int, opening: str) -> bytes:
        config = self._config
        body = {
            "messages": [*messages, {"role": "assistant", "content": opening}] if opening else messages,
            "model": config.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            **config.options,
        }
        if opening and config.continues == "vllm":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return json.dumps(body).encode()

    def _observation_message(self, observation: Observation) -> Message:
        return self._message(self._dialect.render_observation(observation, self._question))

    def _message(self, parts: Sequence[TurnPart]) -> Message:
        # Results of tools are user turns too: the dialect writes what a chat template would put around them.
        return {"role": "user", "content": [self._part(part) for part in parts]}

    def _part(self, part: TurnPart) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        size = self._resized(Size(part.shape[1], part.shape[0]))
        self._resized = self._resized_crop  # all images after the given picture are crops
        return {"type": "image_url", "image_url": {"url": data_uri(resize(part, size), self._config.picture)}}

    def _resized_crop(self, size: Size) -> Size:
        return smart_resize(size, self._config, self._config.crop_max_pixels)


def data_uri(pixels: Pixels, kind: str) -> str:
    """Return pixels [height, width, 3] uint8 as a data URI of kind "png" or "jpeg"."""
    stream = io.BytesIO()
    # The server is usually on the same network: compressing more takes longer than sending more.
    options = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "jpeg" else {"compress_level": 1}
    Image.fromarray(pixels).save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(slots=True)
class _Reply:
    """One turn while it is received."""

    server: str
    parser: TurnParser
    thinking_tags: tuple[str, str]
    opening: str  # the start of the turn, which was given to the server
    content: str = ""
    reasoning: dict[str, str] = field(default_factory=dict)  # by the server's name of the field
    finished: bool = False
    prompt_tokens: int = 0  # computed before the first new one, if the server reports usage
    new_tokens: int = 0  # generated; the number of chunks if the server reports no usage
    _started: float = field(default_factory=time.monotonic)
    _first_at: float = 0.0  # when the first chunk arrived; 0 before
    _thinking: bool = False
    _held_back: str = ""  # may be a repetition of the opening
    _at_start: bool = True

    def __post_init__(self) -> None:
        self._add(self.opening)

    def add_event(self, data: bytes) -> None:
        """Add the data of one server-sent event.

        Raises:
            BackendError: it is an error, or not a chunk of a chat completion.
        """
        try:
            chunk = _parse_json(data)
            error = chunk.get("error")
            pieces = self._pieces(chunk.get("choices") or [])
            usage = chunk.get("usage") and _usage(chunk["usage"])
        except (ValueError, TypeError, LookupError, AttributeError) as exc:
            raise self.error(f"sent an event that is not a chat completion chunk: {_excerpt(data)}") from exc
        if error:
            raise self.error(f"reported an error: {_error_text(error)}")
        for key, text in pieces:
            self._first_at = self._first_at or time.monotonic()
            self.new_tokens += 1
            self._add_content(text) if key == "content" else self._add_reasoning(key, text)
        if usage:
            self.prompt_tokens, self.new_tokens = usage

    def _pieces(self, choices: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Return the (field, text) pairs of the first choice; further choices are never requested."""
        if not choices:
            return []
        self.finished = self.finished or bool(choices[0].get("finish_reason"))
        delta = choices[0].get("delta") or {}
        reasoning = next((key for key in REASONING_KEYS if delta.get(key)), "")
        pieces = [(key, delta[key]) for key in (reasoning, "content") if delta.get(key)]
        if not all(isinstance(text, str) for _, text in pieces):
            raise TypeError
        return pieces

    def _add_reasoning(self, key: str, text: str) -> None:
        """Add text that the server separated as thinking; it is passed on between tags, as a local policy writes it."""
        if not self._thinking:
            self._thinking = True
            self.parser.feed(self.thinking_tags[0])
        self.reasoning[key] = self.reasoning.get(key, "") + text
        self.parser.feed(text)

    def _add_content(self, text: str) -> None:
        """Add text of the turn; if it starts with a repetition of the opening, as llama.cpp sends it, remove that."""
        self._close_thinking()
        if self._at_start:
            self._held_back += text
            if self.opening.startswith(self._held_back) and self._held_back != self.opening:
                return
            text, self._held_back, self._at_start = self._held_back.removeprefix(self.opening), "", False
        self._add(text)

    def finish(self) -> None:
        """Complete the turn; text inside thinking that did not end is no action."""
        self._close_thinking()
        self._add(self._held_back)

    def _add(self, text: str) -> None:
        self.content += text
        self.parser.feed(text)

    def _close_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self.parser.feed(self.thinking_tags[1])

    def error(self, problem: str) -> BackendError:
        """Return the error to raise for a problem of the stream."""
        return BackendError(f"{self.server} {problem}; check its log, then ask again")

    def message(self) -> Message:
        """Return the turn as a message for the next request."""
        return {"role": "assistant", "content": self.content, **self.reasoning}

    @property
    def has_started(self) -> bool:
        """Return whether a token was received: the request must not be repeated then."""
        return self._first_at > 0

    @property
    def prefill_ms(self) -> float:
        """Return the time until the first chunk."""
        return ((self._first_at or time.monotonic()) - self._started) * 1000

    @property
    def decode_ms(self) -> float:
        """Return the time since the first chunk; read once, at the end of the turn."""
        return (time.monotonic() - self._first_at) * 1000 if self._first_at else 0.0


class _ChatClient:
    """Sends chat completion requests. Each turn has its own connection and event loop, for exact deadlines."""

    def __init__(self, config: RemoteConfig, key: str) -> None:
        self._config = config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream",
                         "User-Agent": f"gog_edge/{__version__}"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = httpx.Timeout(config.read_s, connect=config.connect_s)
        self._tls = ssl.create_default_context()  # the system's certificates: local servers often have private ones
        self.name = f"the policy server at {config.url}"

    async def complete(self, body: bytes, reply: _Reply, deadline: float | None) -> None:
        """Send a request and receive its stream until it ends, or until `deadline`, when the connection is closed."""
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        turn = asyncio.ensure_future(self._retry(body, reply, deadline))
        await asyncio.wait({turn}, timeout=timeout)
        turn.cancel()  # no effect if it is complete
        with suppress(asyncio.CancelledError):
            await turn

    async def _retry(self, body: bytes, reply: _Reply, deadline: float | None) -> None:
        """Repeat attempts that failed temporarily, as long as the deadline allows."""
        for attempt in range(self._config.retries + 1):
            try:
                return await self._attempt(body, reply)
            except _RetryableError as exc:
                wait = min(max(BACKOFF_S * 2**attempt, exc.wait_s), MAX_BACKOFF_S)
                late = deadline is not None and time.monotonic() + wait >= deadline
                if attempt == self._config.retries or late:
                    raise BackendError(f"{self.name} {exc} ({attempt + 1} attempts)") from exc
                await asyncio.sleep(wait)

    async def _attempt(self, body: bytes, reply: _Reply) -> None:
        # Without proxies and .netrc of the environment: pictures are sent to the configured server and nowhere else.
        client = httpx.AsyncClient(verify=self._tls, timeout=self._timeout, trust_env=False)
        try:
            async with client, client.stream("POST", self._url, content=body, headers=self._headers) as response:
                if response.status_code != 200:
                    await self._raise_for_status(response)
                await _receive(response.aiter_bytes(), reply)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            reason = str(exc) or f"no connection within {self._config.connect_s:g} s"
            raise _RetryableError(f"cannot be reached: {reason}; start it, or correct 'url' in bundle.toml") from exc
        except httpx.TimeoutException as exc:
            raise reply.error(f"sent no data for {self._config.read_s:g} s (read_s)") from exc
        except httpx.RequestError as exc:
            problem = f"closed the connection: {exc or type(exc).__name__}"
            raise (reply.error(problem) if reply.has_started else _RetryableError(problem)) from exc

    async def _raise_for_status(self, response: httpx.Response) -> None:
        body = b""
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_EVENT_BYTES:
                break
        try:
            text = _error_text(_parse_json(body))
        except ValueError:
            text = _excerpt(body)
        problem = f"rejected the request with {response.status_code} {response.reason_phrase}: {text}"
        if response.status_code in RETRY_STATUSES:
            wait = response.headers.get("retry-after", "")
            raise _RetryableError(problem, float(wait) if wait.isdigit() else 0.0)
        if response.status_code in (400, 413, 422) and _CONTEXT_FULL.search(body.decode("utf-8", "replace")):
            raise BudgetExceeded(f"{self.name} {problem}; answer now, or serve the model with a longer context")
        if response.status_code in (401, 403):
            problem += "; set the key in the variable that 'key_env' in bundle.toml names"
        raise BackendError(f"{self.name} {problem}")


async def _receive(stream: AsyncIterator[bytes], reply: _Reply) -> None:
    """Add every event of a stream to the reply.

    Raises:
        BackendError: the stream ended before the turn did, or is not a stream of server-sent events.
    """
    async for line in _lines(stream, reply):
        name, colon, value = line.partition(b":")
        if not line or (colon and not name) or name in (b"event", b"id", b"retry"):
            continue
        if name not in (b"data", b"error"):
            raise reply.error(f"sent data that is not an event stream: {_excerpt(line)}")
        if value.strip() == b"[DONE]":
            return
        if name == b"error":
            raise reply.error(f"reported an error: {_excerpt(value)}")
        reply.add_event(value)
    if not reply.finished:
        raise reply.error("ended its stream before the turn was complete")


async def _lines(stream: AsyncIterator[bytes], reply: _Reply) -> AsyncIterator[bytes]:
    # Not `aiter_lines` of httpx, which also splits at U+2028 inside the text of a model.
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(rest) > MAX_EVENT_BYTES:
            raise reply.error(f"sent an event of more than {MAX_EVENT_BYTES} bytes")
    yield rest


def _usage(value: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of newly computed prompt tokens and of generated tokens."""
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int(value["prompt_tokens"]) - int(cached), int(value["completion_tokens"])


def _parse_json(data: bytes) -> Any:
    """Parse JSON; raise ValueError if it is not valid or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def _error_text(value: Any) -> str:
    """Return the message of an error object, in any of the common fields."""
    while isinstance(value, Mapping):
        value = value.get("error") or value.get("message") or value.get("detail") or json.dumps(value)
    return _excerpt(str(value).encode())


def _excerpt(data: bytes) -> str:
    """Return the start of received data on one line."""
    text = " ".join(data[:1200].decode("utf-8", "replace").split())
    return (text[:300] + "...") if len(text) > 300 else text or "(nothing)"
