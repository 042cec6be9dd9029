"""The live session: what was said stays in the cache, turns only append, nothing is computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.engines.base import DecoderEngine, Floats, KvCache
from gog_edge.errors import BudgetExceeded, InputError
from gog_edge.policy.decode import Sampler, Sampling, TextStream
from gog_edge.policy.manifest import PolicyManifest
from gog_edge.policy.vision import ImageTokens

CHUNK = 512  # tokens a prefill step: bounds its scratch memory, costs nothing in speed
GREEDY = Sampling()

Positions: TypeAlias = NDArray[np.int64]  # [3, T]: time, height, width
Stop: TypeAlias = Literal["end", "tokens", "deadline"]  # an end token, no more room or tokens allowed, too late


@dataclass(frozen=True, slots=True)
class Generated:
    """What one `generate` said."""

    tokens: tuple[int, ...]  # without the end token
    text: str
    stopped: Stop
    prefilled: int  # tokens computed before the first new one
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a session to come back to."""

    tokens: int
    position: int
    cached: int
    waiting: tuple[_Piece, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens appended and not yet computed."""

    embeds: Floats  # [T, hidden]
    positions: Positions  # [3, T]

    def after(self, count: int) -> _Piece:
        return _Piece(self.embeds[count:], self.positions[:, count:])


@dataclass(slots=True)
class _Speech:
    """What is being said, passed on as whole characters."""

    stream: TextStream
    listener: Callable[[str], None] | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self._tell(self.stream.push(token))

    def finish(self) -> str:
        self._tell(self.stream.finish())
        return self.text

    def _tell(self, piece: str) -> None:
        self.text += piece
        if piece and self.listener is not None:
            self.listener(piece)


class Decoder:
    """A decoder with its embedding table, rotary angles and tokenizer; shared by all sessions."""

    def __init__(self, engine: DecoderEngine, manifest: PolicyManifest, table: Floats, tokenizer: Tokenizer) -> None:
        """`table` [vocab, hidden], usually a memory map; `tokenizer` is from now on this decoder's own."""
        self.engine = engine
        self.manifest = manifest
        self.table = table
        self.tokenizer = tokenizer
        self.eos = frozenset(manifest.eos)
        self.image_token = manifest.image_token
        # Special tokens come from the chat format's strings only: in what people or articles say they are plain text.
        tokenizer.encode_special_tokens = False
        self.markup = {text: self.encode(text) for text in asdict(manifest.chat).values()}
        tokenizer.encode_special_tokens = True
        spec = manifest.text
        half = spec.head_dim // 2
        exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
        self._frequencies: Floats = (np.float32(1) / np.power(np.float32(spec.rope_theta), exponent)).astype(np.float32)
        self._axes = np.repeat(np.arange(len(spec.mrope_section)), spec.mrope_section)  # [half]: 0 time, 1 row, 2 col

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def embed(self, ids: Sequence[int]) -> Floats:
        """Ids [T] -> embeddings [T, hidden] float32."""
        return np.asarray(self.table[np.asarray(ids, np.int64)], np.float32)

    def rotary(self, positions: Positions) -> tuple[Floats, Floats]:
        """Positions [3, T] -> cos, sin [T, head_dim / 2]."""
        angles = positions[self._axes].T.astype(np.float32) * self._frequencies
        return np.cos(angles), np.sin(angles)


def text_positions(start: int, count: int) -> Positions:
    """Text: all three axes step together."""
    return np.broadcast_to(np.arange(start, start + count), (3, count))


def image_positions(start: int, rows: int, columns: int) -> Positions:
    """A still picture: one moment, its rows and its columns."""
    places = np.indices((rows, columns)).reshape(2, -1) + start
    return np.concatenate([np.full((1, rows * columns), start), places])


class Session:
    """One conversation over one cache. Not for use by several threads at once."""

    def __init__(self, decoder: Decoder, cache: KvCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self.tokens: list[int] = []  # everything said; the image token stands for each image embedding
        self.prefilled = 0  # tokens that went through the decoder since the start or fork, generated ones included
        self._position = 0  # next rotary position
        self._cached = 0  # tokens in the cache; the rest of `tokens` waits
        self._waiting: list[_Piece] = []

    @property
    def capacity(self) -> int:
        """Tokens one conversation may hold."""
        return self._decoder.engine.capacity

    @property
    def computed(self) -> int:
        """Tokens in the cache; the others wait."""
        return self._cached

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - len(self.tokens)

    def append_text(self, text: str) -> int:
        """Append what somebody says; special tokens written in it stay text. Returns the number of tokens."""
        ids = self._decoder.encode(text)
        self.append_tokens(ids)
        return len(ids)

    def append_markup(self, text: str) -> None:
        """Append one of the chat format's strings, special tokens and all; nothing else may hold them."""
        self.append_tokens(self._decoder.markup[text])

    def append_tokens(self, ids: Sequence[int]) -> None:
        """Append ids. BudgetExceeded, with nothing appended, when they do not fit."""
        if ids:
            positions = text_positions(self._position, len(ids))
            self._append(ids, self._decoder.embed(ids), positions, self._position + len(ids))

    def append_image(self, image: ImageTokens) -> None:
        """Append a picture's embeddings. BudgetExceeded, with nothing appended, when they do not fit."""
        positions = image_positions(self._position, image.rows, image.columns)
        following = self._position + max(image.rows, image.columns)
        self._append([self._decoder.image_token] * len(image.embeds), image.embeds, positions, following)

    def _append(self, ids: Sequence[int], embeds: Floats, positions: Positions, following: int) -> None:
        if len(ids) > self.room:
            raise BudgetExceeded(
                f"the conversation is full: {len(self.tokens)} tokens said, {len(ids)} more do not fit "
                f"{self.capacity}; answer now, or open the policy with a larger context"
            )
        self.tokens.extend(ids)
        self._waiting.append(_Piece(embeds, positions))
        self._position = following

    def prefill(self) -> Floats | None:
        """Compute what waits, in chunks; the last token's logits [vocab], or None when nothing waited."""
        logits = None
        waiting = _join(self._waiting)
        self._waiting = []
        while waiting is not None and len(waiting.embeds):
            count = min(CHUNK, len(waiting.embeds))
            logits = self._step(waiting.embeds[:count], waiting.positions[:, :count])
            waiting = waiting.after(count)
        return logits

    def _step(self, embeds: Floats, positions: Positions) -> Floats:
        cos, sin = self._decoder.rotary(positions)
        logits = self._decoder.engine.step(self._cache, embeds, cos, sin, self._cached)
        self._cached += len(embeds)
        self.prefilled += len(embeds)
        return logits

    def generate(self, *, max_tokens: int, sampling: Sampling = GREEDY, deadline: float | None = None,
                 on_text: Callable[[str], None] | None = None) -> Generated:
        """Speak until an end token, `max_tokens`, a full cache or `deadline` (`time.monotonic()`).

        An end token is not appended: what closes a turn is the caller's to say. The last token said is computed
        when something follows it. BudgetExceeded when nothing waits to be answered, or not one token fits.
        """
        if not self._waiting or self.room < 1:
            raise BudgetExceeded(
                f"nothing to go on from: {len(self.tokens)} of {self.capacity} tokens said and "
                f"{len(self.tokens) - self._cached} waiting; append a turn or answer now"
            )
        started = time.monotonic()
        prefilled = len(self.tokens) - self._cached
        logits = self.prefill()
        ready = time.monotonic()
        speech = _Speech(TextStream(self._decoder.tokenizer), on_text)
        stopped: Stop = "tokens"
        sampler = Sampler(sampling)
        most = min(max_tokens, self.room)
        while logits is not None and len(speech.tokens) < most:
            if deadline is not None and time.monotonic() >= deadline:
                stopped = "deadline"
                break
            logits[self._decoder.image_token] = -np.inf  # only a picture may stand there
            token = sampler.choose(logits, self.tokens)
            if token in self._decoder.eos:
                stopped = "end"
                break
            self.append_tokens([token])
            speech.add(token)
            logits = self.prefill() if len(speech.tokens) < most else None
        text = speech.finish()
        decode_ms = 1e3 * (time.monotonic() - ready)
        return Generated(tuple(speech.tokens), text, stopped, prefilled, 1e3 * (ready - started), decode_ms)

    def mark(self) -> Mark:
        """A place to roll back to; costs nothing."""
        return Mark(len(self.tokens), self._position, self._cached, tuple(self._waiting))

    def rollback(self, mark: Mark) -> None:
        """Forget what was said since the mark, which must lie in this session's own past (InputError).

        What was computed before the mark is not computed again, but for the last token that waited there: its
        logits are gone, and `generate` needs them.
        """
        if mark.tokens > len(self.tokens) or mark.cached > self._cached:
            raise InputError(
                f"the mark stands at token {mark.tokens}, this session has said {len(self.tokens)}; "
                "roll back to a mark of its own past"
            )
        waiting = _join(list(mark.waiting))
        computed = 0
        if waiting is not None:
            # Tokens that waited at the mark may have been computed since: the cache still holds them.
            computed = min(self._cached, mark.tokens - 1) - mark.cached
            waiting = waiting.after(computed)
        self._waiting = [] if waiting is None else [waiting]
        self._cached = mark.cached + computed
        self._position = mark.position
        del self.tokens[mark.tokens :]

    def fork_from(self, other: Session) -> None:
        """Become a copy of another session of the same decoder; what it has computed is copied, not computed."""
        self._cache.copy_from(other._cache, other._cached)
        self.tokens = list(other.tokens)
        self._position, self._cached = other._position, other._cached
        self._waiting = list(other._waiting)
        self.prefilled = 0


def _join(pieces: list[_Piece]) -> _Piece | None:
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    embeds = np.concatenate([piece.embeds for piece in pieces])
    return _Piece(embeds, np.concatenate([piece.positions for piece in pieces], axis=1))
