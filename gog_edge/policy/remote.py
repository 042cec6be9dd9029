"""A policy that another server runs behind OpenAI's chat protocol: vLLM, SGLang, TensorRT-Edge-LLM, llama.cpp."""

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
from gog_edge.picture import Picture
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import Dialect, LoopRules, Segment
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import Listener
from gog_edge.policy.vision import resize, smart_resize
from gog_edge.types import Action, Observation, Pixels, Size, Utterance

Message: TypeAlias = dict[str, Any]

BACKOFF_S = 0.5  # before the second attempt; doubled before each further one
LONGEST_WAIT_S = 8.0
MAX_LINE = 2**20  # bytes of one event
PASSING = (429, 502, 503, 504)  # statuses of a server that is starting, busy or behind a proxy
JPEG_QUALITY = 92
REASONING_KEYS = ("reasoning_content", "reasoning")  # vLLM renamed it; the others kept it
THINK = ("<think>", "</think>")  # where the dialect has no marks of its own
# No two servers word a full context alike, and the protocol has no code for it.
_FULL = re.compile(r"context[ _]*(length|size|window)|exceed_context|maximum context|max_model_len", re.IGNORECASE)


class _Passing(Exception):
    """An attempt failed before the first token, in a way that may pass."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s  # as the server asked


class RemotePolicy:
    """A policy at an address. Several conversations may go on at once, one thread each."""

    def __init__(self, config: RemoteConfig, dialect: Dialect, key: str = "") -> None:
        self.config, self.dialect = config, dialect
        self.server = _Server(config, key)

    @classmethod
    def open(cls, config: RemoteConfig) -> RemotePolicy:
        """Read the dialect and the key; the server is first reached by a question. DialectError or BackendError."""
        key = os.environ.get(config.key_env, "").strip() if config.key_env else ""
        if config.key_env and not key:
            raise BackendError(f"the key of {config.url} is to be in the environment variable '{config.key_env}', "
                               "which is empty or not set; set it")
        if not (key.isascii() and key.isprintable()):
            raise BackendError(f"the environment variable '{config.key_env}' holds what is no key; set it again")
        return cls(config, load_dialect(config.dialect), key)

    @property
    def name(self) -> str:
        """Name for traces and /v1/models."""
        return self.config.model

    @property
    def rules(self) -> LoopRules:
        """The dialect's; where no answer can be begun, it is asked for in words."""
        rules = self.dialect.loop_rules
        unasked = self.config.continues == "none" and not rules.last_notice
        return replace(rules, last_notice="action_refused") if unasked else rules

    def begin(self, picture: Picture, question: str) -> RemoteConversation:
        """Open a dialogue about a picture; nothing is sent before the first `generate`."""
        return RemoteConversation(self, picture, question)


class RemoteConversation:
    """One question's dialogue. What was sent is sent again unchanged, so that the server finds it in its cache."""

    def __init__(self, policy: RemotePolicy, picture: Picture, question: str) -> None:
        self._config, self._dialect, self._server = policy.config, policy.dialect, policy.server
        self._frame = Frame(given=picture.size, resized=smart_resize(picture.size, self._config))
        self._question = question
        self._resized: Callable[[Size], Size] = lambda size: smart_resize(size, self._config)
        opening = self._message(self._dialect.render_question(picture.pixels, question))
        self._said: list[Message] = [{"role": "system", "content": self._dialect.system_prompt}]
        self._queued = [opening]  # not yet answered

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        """Let the policy speak one turn; see `Conversation.generate`.

        BackendError when the server is away, refuses, falls silent or breaks off. BudgetExceeded when it says that
        its context is full: what was queued is dropped, so that an answer can still be forced.
        """
        opening = self._dialect.answer_open if force_answer and self._config.continues != "none" else ""
        said = [*self._said, *(self._queued or [self._asking()])]
        listener = Listener(self._dialect, self._frame, on_text, on_action)
        think = (self._dialect.thinking.open or THINK[0], self._dialect.syntax.skip_until or THINK[1])
        reply = _Reply(self._server.name, listener, think, opening)
        try:
            asyncio.run(self._server.speak(self._body(said, max_tokens, opening), reply, deadline))
        except BudgetExceeded as exc:
            if len(self._said) == 1:
                raise BackendError(f"picture and question do not fit: {exc}, or lower 'max_pixels'") from exc
            self._queued = []
            raise
        reply.end()
        self._said, self._queued = [*said, reply.message()], []
        action, reason = listener.understood()
        return Utterance(listener.text, action, reason, reply.prompt_tokens, reply.new_tokens,
                         reply.prefill_ms, reply.decode_ms)

    def observe(self, observation: Observation) -> None:
        """Queue a turn that shows what an action brought back."""
        shown = self._shown(observation)
        if observation.notice is not None and self._queued:  # some chat templates refuse two turns of one side
            waits = self._queued.pop()
            shown = {**waits, "content": [*waits["content"], self._part("\n"), *shown["content"]]}
        self._queued.append(shown)
        self._frame = self._dialect.frame_after(self._frame, observation, self._resized_crop)

    def close(self) -> None:
        """Nothing is held between turns."""

    def _asking(self) -> Message:
        """Words to answer where what waited did not fit: a server goes on from no turn of its own."""
        return self._shown(Observation(notice="action_refused", detail="nothing more can be searched"))

    def _body(self, said: Sequence[Message], max_tokens: int, opening: str) -> bytes:
        config = self._config
        messages = [*said, {"role": "assistant", "content": opening}] if opening else said
        body = {
            "messages": messages,
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

    def _shown(self, observation: Observation) -> Message:
        return self._message(self._dialect.render_observation(observation, self._question))

    def _message(self, segments: Sequence[Segment]) -> Message:
        # Observations of tools too: dialects write out what a template would put around them.
        return {"role": "user", "content": [self._part(segment) for segment in segments]}

    def _part(self, segment: Segment) -> dict[str, Any]:
        if isinstance(segment, str):
            return {"type": "text", "text": segment}
        size = self._resized(Size(segment.shape[1], segment.shape[0]))
        self._resized = self._resized_crop  # what follows the given picture
        return {"type": "image_url", "image_url": {"url": data_uri(resize(segment, size), self._config.picture)}}

    def _resized_crop(self, size: Size) -> Size:
        return smart_resize(size, self._config, self._config.crop_max_pixels)


def data_uri(pixels: Pixels, kind: str) -> str:
    """Pixels [height, width, 3] uint8 as the text of a "png" or "jpeg" file."""
    stream = io.BytesIO()
    # A server is near: what a smaller file would save on the way is less than what packing it takes.
    options = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "jpeg" else {"compress_level": 1}
    Image.fromarray(pixels).save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(slots=True)
class _Reply:
    """One turn as it streams in."""

    server: str
    listener: Listener
    think: tuple[str, str]  # marks around thinking
    opening: str  # what the server goes on from
    content: str = ""
    reasoning: dict[str, str] = field(default_factory=dict)  # by the name that the server has for it
    finished: bool = False
    prompt_tokens: int = 0  # computed before the first new one, as far as the server tells
    new_tokens: int = 0  # generated; where the server does not tell, the pieces that came
    _started: float = field(default_factory=time.monotonic)
    _first: float = 0.0
    _thinking: bool = False
    _held: str = ""  # may turn out to be the opening, said again
    _fresh: bool = True

    def __post_init__(self) -> None:
        self._tell(self.opening)

    def take(self, data: bytes) -> None:
        """One event's data."""
        try:
            chunk = _parsed(data)
            error = chunk.get("error")
            pieces = self._pieces(chunk.get("choices") or [])
            usage = chunk.get("usage") and _usage(chunk["usage"])
        except (ValueError, TypeError, LookupError, AttributeError) as exc:
            raise self.broken(f"sent what is no chat completion: {_shown(data)}") from exc
        if error:
            raise self.broken(f"said: {_words(error)}")
        for key, text in pieces:
            self._first = self._first or time.monotonic()
            self.new_tokens += 1
            self.add_content(text) if key == "content" else self.add_reasoning(key, text)
        if usage:
            self.prompt_tokens, self.new_tokens = usage

    def _pieces(self, choices: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """(field, text) of what was said; only one choice is ever asked for."""
        if not choices:
            return []
        self.finished = self.finished or bool(choices[0].get("finish_reason"))
        delta = choices[0].get("delta") or {}
        thought = next((key for key in REASONING_KEYS if delta.get(key)), "")
        pieces = [(key, delta[key]) for key in (thought, "content") if delta.get(key)]
        if not all(isinstance(text, str) for _, text in pieces):
            raise TypeError
        return pieces

    def add_reasoning(self, key: str, text: str) -> None:
        """Words that the server took for thinking, told between marks as a local policy says them."""
        if not self._thinking:
            self._thinking = True
            self.listener.hear(self.think[0])
        self.reasoning[key] = self.reasoning.get(key, "") + text
        self.listener.hear(text)

    def add_content(self, text: str) -> None:
        """Words of the turn itself. llama.cpp begins with those that it was to go on from; they are told once."""
        self._close_thought()
        if self._fresh:
            self._held += text
            if self.opening.startswith(self._held) and self._held != self.opening:
                return
            text, self._held, self._fresh = self._held.removeprefix(self.opening), "", False
        self._tell(text)

    def end(self) -> None:
        """Nothing more will come; a turn that ended in its thinking did nothing."""
        self._close_thought()
        self._tell(self._held)

    def _tell(self, text: str) -> None:
        self.content += text
        self.listener.hear(text)

    def _close_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            self.listener.hear(self.think[1])

    def broken(self, what: str) -> BackendError:
        """An error of the stream."""
        return BackendError(f"{self.server} {what}; look at its log, then ask again")

    def message(self) -> Message:
        """The turn as it is sent back."""
        return {"role": "assistant", "content": self.content, **self.reasoning}

    @property
    def begun(self) -> bool:
        """Whether something was said: from then on nothing may be asked again."""
        return self._first > 0

    @property
    def prefill_ms(self) -> float:
        """Until the first piece."""
        return ((self._first or time.monotonic()) - self._started) * 1000

    @property
    def decode_ms(self) -> float:
        """Since the first piece; read once, when the turn is over."""
        return (time.monotonic() - self._first) * 1000 if self._first else 0.0


class _Server:
    """Speaks HTTP. A connection lasts one turn: asyncio gives exact deadlines, and turns come seconds apart."""

    def __init__(self, config: RemoteConfig, key: str) -> None:
        self._config = config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream",
                         "User-Agent": f"gog_edge/{__version__}"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = httpx.Timeout(config.read_s, connect=config.connect_s)
        self._tls = ssl.create_default_context()  # the machine's own certificates: servers here seldom have public ones
        self.name = f"the policy's server at {config.url}"

    async def speak(self, body: bytes, reply: _Reply, deadline: float | None) -> None:
        """Send one request and hear its stream to the end or to `deadline`, after which it is closed."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        turn = asyncio.ensure_future(self._persist(body, reply, deadline))
        await asyncio.wait({turn}, timeout=left)
        turn.cancel()  # where it is not over
        with suppress(asyncio.CancelledError):
            await turn

    async def _persist(self, body: bytes, reply: _Reply, deadline: float | None) -> None:
        """Ask again after what may pass, as long as there is time to."""
        for attempt in range(self._config.retries + 1):
            try:
                return await self._attempt(body, reply)
            except _Passing as exc:
                wait = min(max(BACKOFF_S * 2**attempt, exc.wait_s), LONGEST_WAIT_S)
                late = deadline is not None and time.monotonic() + wait >= deadline
                if attempt == self._config.retries or late:
                    raise BackendError(f"{self.name} {exc} ({attempt + 1} attempts)") from exc
                await asyncio.sleep(wait)

    async def _attempt(self, body: bytes, reply: _Reply) -> None:
        # Proxies and .netrc are not looked at: a bundle's pictures go where its owner said, and nowhere else.
        client = httpx.AsyncClient(verify=self._tls, timeout=self._timeout, trust_env=False)
        try:
            async with client, client.stream("POST", self._url, content=body, headers=self._headers) as response:
                if response.status_code != 200:
                    await self._refuse(response)
                await _hear(response.aiter_bytes(), reply)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            reason = str(exc) or f"no connection within {self._config.connect_s:g} s"
            raise _Passing(f"cannot be reached: {reason}; start it, or correct 'url' in bundle.toml") from exc
        except httpx.TimeoutException as exc:
            raise reply.broken(f"said nothing for {self._config.read_s:g} s (read_s)") from exc
        except httpx.RequestError as exc:
            what = f"broke off: {exc or type(exc).__name__}"
            raise (reply.broken(what) if reply.begun else _Passing(what)) from exc

    async def _refuse(self, response: httpx.Response) -> None:
        body = b""
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_LINE:
                break
        try:
            said = _words(_parsed(body))
        except ValueError:
            said = _shown(body)
        what = f"refused with {response.status_code} {response.reason_phrase}: {said}"
        if response.status_code in PASSING:
            asked = response.headers.get("retry-after", "")
            raise _Passing(what, float(asked) if asked.isdigit() else 0.0)
        if response.status_code in (400, 413, 422) and _FULL.search(body.decode("utf-8", "replace")):
            raise BudgetExceeded(f"{self.name} {what}; answer now, or serve the model with a longer context")
        if response.status_code in (401, 403):
            what += "; 'key_env' in bundle.toml names the variable with its key"
        raise BackendError(f"{self.name} {what}")


async def _hear(stream: AsyncIterator[bytes], reply: _Reply) -> None:
    """Every event of a stream, which must say itself that it is over."""
    async for line in _lines(stream, reply):
        name, colon, value = line.partition(b":")
        if not line or (colon and not name) or name in (b"event", b"id", b"retry"):
            continue
        if name not in (b"data", b"error"):
            raise reply.broken(f"sent what is no event stream: {_shown(line)}")
        if value.strip() == b"[DONE]":
            return
        if name == b"error":
            raise reply.broken(f"said: {_shown(value)}")
        reply.take(value)
    if not reply.finished:
        raise reply.broken("ended its stream in the middle of a turn")


async def _lines(stream: AsyncIterator[bytes], reply: _Reply) -> AsyncIterator[bytes]:
    # Not httpx's own lines: those end at U+2028 too, which may stand in what a model says.
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(rest) > MAX_LINE:
            raise reply.broken(f"sent an event of more than {MAX_LINE} bytes")
    yield rest


def _usage(value: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens newly computed, and generated."""
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int(value["prompt_tokens"]) - int(cached), int(value["completion_tokens"])


def _parsed(data: bytes) -> Any:
    """JSON; ValueError where it is none."""
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def _words(value: Any) -> str:
    """What an error object says, in whichever of the usual places."""
    while isinstance(value, Mapping):
        value = value.get("error") or value.get("message") or value.get("detail") or json.dumps(value)
    return _shown(str(value).encode())


def _shown(data: bytes) -> str:
    """The beginning of what came, on one line."""
    text = " ".join(data[:1200].decode("utf-8", "replace").split())
    return (text[:300] + "...") if len(text) > 300 else text or "(nothing)"
