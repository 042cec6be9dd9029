"""A live session: one conversation whose KV cache is only ever appended to, so that no token is computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from gog_edge.engines.base import PREFILL_CHUNK, Floats, KvCache, KvSnapshot
from gog_edge.errors import BudgetExceeded, InputError
from gog_edge.policy.decoding import (
    Constraint,
    Detokenizer,
    DraftConfig,
    NgramIndex,
    PromptLookupDrafter,
    Sampler,
    SamplingParams,
    TokenSampler,
    TokenStream,
    Unconstrained,
)
from gog_edge.policy.model import Decoder, Positions
from gog_edge.policy.vision import ImageTokens

GREEDY = SamplingParams()
StopReason: TypeAlias = Literal["end", "tokens", "deadline"]  # the turn is complete, a token limit, the deadline


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of `Session.generate`."""

    tokens: tuple[int, ...]  # without the end token
    text: str
    stop_reason: StopReason
    prompt_tokens: int  # computed before the first new token
    prefill_ms: float
    decode_ms: float
    forced: int = 0  # tokens that the constraint left no choice about
    drafted: int = 0  # draft tokens that were computed
    accepted: int = 0  # draft tokens that were accepted


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A point of a session to roll back to."""

    tokens: int
    position: int
    cached: int
    pending: tuple[_DecoderInput, ...]


@dataclass(frozen=True, slots=True)
class _DecoderInput:
    """The decoder inputs of tokens that were appended and are not yet computed."""

    embeds: Floats  # [T, hidden]
    positions: Positions  # [3, T]
    deepstack: Floats | None = None  # [layers, T, hidden]; None adds nothing

    def slice(self, start: int, stop: int | None = None) -> _DecoderInput:
        """Return the inputs of tokens `start` to `stop`."""
        deepstack = None if self.deepstack is None else self.deepstack[:, start:stop]
        return _DecoderInput(self.embeds[start:stop], self.positions[:, start:stop], deepstack)


def text_positions(start: int, count: int) -> Positions:
    """Return the rotary positions [3, count] of text: all three axes advance together."""
    return np.broadcast_to(np.arange(start, start + count), (3, count))


def image_positions(start: int, rows: int, columns: int) -> Positions:
    """Return the rotary positions [3, rows * columns] of a still picture: constant time, then row and column."""
    places = np.indices((rows, columns)).reshape(2, -1) + start
    return np.concatenate([np.full((1, rows * columns), start), places])


class Session:
    """One conversation with its KV cache. Not safe for use by several threads at once.

    Appended tokens are pending until the next `prefill` or `generate` computes them.
    """

    def __init__(self, decoder: Decoder, cache: KvCache | None = None) -> None:
        """Start an empty conversation; `cache` defaults to a new one of the decoder's engine."""
        self._decoder = decoder
        self._cache = cache or decoder.engine.new_cache()
        self.tokens: list[int] = []  # of the whole conversation; the image token stands for each image embedding
        self.num_processed = 0  # tokens that went through the decoder since the start or fork
        self._position = 0  # next rotary position
        self._cached = 0  # tokens in the cache; the rest of `tokens` is pending
        self._pending: list[_DecoderInput] = []
        self._index: NgramIndex | None = None  # of the tokens, for drafts; built on first use

    @property
    def capacity(self) -> int:
        """Return the number of tokens that the conversation may have."""
        return self._decoder.capacity

    @property
    def eos(self) -> frozenset[int]:
        """Return the ids that end a turn."""
        return self._decoder.eos

    @property
    def image_token(self) -> int:
        """Return the id that stands for an image embedding."""
        return self._decoder.image_token

    @property
    def num_cached(self) -> int:
        """Return the number of tokens in the cache; the others are pending."""
        return self._cached

    @property
    def remaining(self) -> int:
        """Return the number of tokens that can still be appended."""
        return self.capacity - len(self.tokens)

    def append_text(self, text: str) -> int:
        """Append text and return its number of tokens; special tokens written in it are encoded as plain text."""
        ids = self._decoder.encode(text)
        self.append_tokens(ids)
        return len(ids)

    def append_template(self, text: str) -> None:
        """Append one of the strings of the chat format, the only ones that may contain special tokens."""
        self.append_tokens(self._decoder.template_ids[text])

    def append_tokens(self, ids: Sequence[int]) -> None:
        """Append token ids.

        Raises:
            BudgetExceeded: they do not fit; the session is unchanged.
        """
        if ids:
            positions = text_positions(self._position, len(ids))
            self._append(ids, _DecoderInput(self._decoder.embed(ids), positions), self._position + len(ids))

    def append_image(self, image: ImageTokens) -> None:
        """Append the embeddings of a picture.

        Raises:
            BudgetExceeded: they do not fit; the session is unchanged.
        """
        positions = image_positions(self._position, image.rows, image.columns)
        following = self._position + max(image.rows, image.columns)
        inputs = _DecoderInput(image.embeds, positions, image.deepstack)
        self._append([self._decoder.image_token] * len(image.embeds), inputs, following)

    def _append(self, ids: Sequence[int], inputs: _DecoderInput, following: int) -> None:
        if len(ids) > self.remaining:
            raise BudgetExceeded(
                f"the context is full: the conversation has {len(self.tokens)} tokens, {len(ids)} more exceed its "
                f"capacity of {self.capacity}; answer now, or open the policy with a larger context"
            )
        self.tokens.extend(ids)
        self._pending.append(inputs)
        self._position = following

    def prefill(self) -> Floats | None:
        """Compute the pending tokens in chunks; return the logits [vocab] of the last, or None without any."""
        return self.step_with_drafts([])[-1] if self._pending else None

    def step_with_drafts(self, drafts: Sequence[int]) -> Floats:
        """Compute the pending tokens and draft tokens for what follows; return logits [len(drafts) + 1, vocab].

        Row i holds the logits after i draft tokens. The drafts are not appended: see `accept_draft`.
        """
        pending = _concatenate([*self._pending, *self._text_input(drafts)])
        self._pending = []
        keep = 1 + len(drafts)
        chunk = max(PREFILL_CHUNK, keep)
        while len(pending.embeds) > chunk:
            count = min(chunk, len(pending.embeds) - keep)  # the last chunk includes all rows that are returned
            self._step(pending.slice(0, count), 1)
            pending = pending.slice(count)
        logits = self._step(pending, keep)
        self._cached -= len(drafts)
        return logits

    def _step(self, inputs: _DecoderInput, keep: int) -> Floats:
        cos, sin = self._decoder.rotary(inputs.positions)
        logits = self._decoder.engine.step(
            self._cache, inputs.embeds, cos, sin, self._cached, deepstack=inputs.deepstack, keep=keep
        )
        self._cached += len(inputs.embeds)
        self.num_processed += len(inputs.embeds)
        return logits

    def _text_input(self, ids: Sequence[int]) -> list[_DecoderInput]:
        return [_DecoderInput(self._decoder.embed(ids), text_positions(self._position, len(ids)))] if ids else []

    def accept_draft(self, token: int) -> None:
        """Append the next draft token of the last `step_with_drafts`, which is in the cache already."""
        self.tokens.append(token)
        self._cached += 1
        self._position += 1

    def generate(self, *, max_tokens: int, sampling: SamplingParams = GREEDY, sampler: TokenSampler | None = None,
                 constraint: Constraint | None = None, drafts: DraftConfig | None = None,
                 deadline: float | None = None, on_text: Callable[[str], None] | None = None) -> Generated:
        """Generate one turn.

        Stops at an end token, at the end of the constraint, after `max_tokens`, when the context is full, or at the
        deadline. An end token is not appended: the caller appends what closes the turn. The last generated token stays
        pending until more is appended.

        Args:
            max_tokens: upper limit of generated tokens, forced ones included.
            sampling: parameters of a new sampler, unless `sampler` is given.
            sampler: selects the tokens.
            constraint: restricts the tokens; forced tokens are appended without a step of the decoder.
            drafts: enables speculation by prompt lookup, which changes the speed and not the result.
            deadline: a value of `time.monotonic()`.
            on_text: called with each piece of text as it is decoded.

        Raises:
            BudgetExceeded: no token is pending, or the context is full.
        """
        if not self._pending or self.remaining < 1:
            raise BudgetExceeded(
                f"cannot generate: {len(self.tokens) - self._cached} tokens are pending and {self.remaining} of "
                f"{self.capacity} can still be appended; append a turn, or open the policy with a larger context"
            )
        stream = TokenStream(Detokenizer(self._decoder.tokenizer), on_text)
        drafter = PromptLookupDrafter(drafts, self._ngram_index()) if drafts else None
        limit = min(max_tokens, self.remaining)
        turn = _Turn(self, stream, sampler or Sampler(sampling), constraint or Unconstrained(), drafter, limit)
        return turn.run(deadline)

    def _ngram_index(self) -> NgramIndex:
        if self._index is None:
            self._index = NgramIndex(self._decoder.never_drafted)
        return self._index

    def savepoint(self) -> Savepoint:
        """Return a point to roll back to; it costs nothing."""
        return Savepoint(len(self.tokens), self._position, self._cached, tuple(self._pending))

    def rollback(self, savepoint: Savepoint) -> None:
        """Remove all tokens since the savepoint.

        Tokens that were computed before the savepoint stay in the cache. If tokens were pending there, the last of
        them is computed again: `generate` needs its logits.

        Raises:
            InputError: the savepoint is of another session, or after the end of this one.
        """
        if savepoint.tokens > len(self.tokens) or savepoint.cached > self._cached:
            raise InputError(
                f"the savepoint is at token {savepoint.tokens}, but the session has {len(self.tokens)} tokens; "
                "roll back to a savepoint of the session's own past"
            )
        pending = _concatenate(list(savepoint.pending)) if savepoint.pending else None
        computed = 0
        if pending is not None:
            # Tokens that were pending at the savepoint may have been computed since: they are in the cache.
            computed = min(self._cached, savepoint.tokens - 1) - savepoint.cached
            pending = pending.slice(computed)
        self._pending = [] if pending is None else [pending]
        self._cached = savepoint.cached + computed
        self._position = savepoint.position
        del self.tokens[savepoint.tokens :]
        if self._index is not None:
            self._index.truncate(savepoint.tokens)

    def snapshot(self) -> KvSnapshot:
        """Return the computed tokens of the cache, for saving to files."""
        return self._cache.snapshot(self._cached)

    def restore(self, snapshot: KvSnapshot) -> None:
        """Load the keys and values of all pending tokens from a snapshot of the same tokens."""
        self._cache.restore(snapshot)
        self._cached, self._pending = len(self.tokens), []

    def fork_from(self, other: Session) -> None:
        """Replace this conversation by a copy of another session of the same decoder; nothing is computed again."""
        self._cache.copy_from(other._cache, other._cached)
        self.tokens = list(other.tokens)
        self._position, self._cached = other._position, other._cached
        self._pending = list(other._pending)
        self._index = None
        self.num_processed = 0


def _concatenate(parts: list[_DecoderInput]) -> _DecoderInput:
    if len(parts) == 1:
        return parts[0]
    embeds = np.concatenate([part.embeds for part in parts])
    positions = np.concatenate([part.positions for part in parts], axis=1)
    first = next((part.deepstack for part in parts if part.deepstack is not None), None)
    if first is None:
        return _DecoderInput(embeds, positions)
    deepstack = [
        np.zeros((len(first), *part.embeds.shape), np.float32) if part.deepstack is None else part.deepstack
        for part in parts
    ]
    return _DecoderInput(embeds, positions, np.concatenate(deepstack, axis=1))


@dataclass(slots=True)
class _DraftLogits:
    """The logits after the last token and after each draft token, valid as long as the drafts are accepted."""

    logits: Floats  # [len(drafts) + 1, vocab]
    drafts: list[int]
    accepted: int = 0

    @property
    def current(self) -> Floats:
        """Return the logits [vocab] of the next token."""
        logits: Floats = self.logits[self.accepted]
        return logits

    def accept(self, token: int) -> bool:
        """Return whether `token` is the next draft token, which is then computed already."""
        matches = self.accepted < len(self.drafts) and self.drafts[self.accepted] == token
        self.accepted += matches
        return matches


class _Turn:
    """The generation of one turn: forced tokens first, then accepted drafts, then one token per step."""

    def __init__(self, session: Session, stream: TokenStream, sampler: TokenSampler, constraint: Constraint,
                 drafter: PromptLookupDrafter | None, max_tokens: int) -> None:
        self._session, self._stream, self._max_tokens = session, stream, max_tokens
        self._sampler, self._constraint, self._drafter = sampler, constraint, drafter
        self._step: _DraftLogits | None = None  # the last step, while its logits are valid
        self._ended = False  # by an end token
        self._forced = 0
        self._prefilled_at: float | None = None  # when the first logits were available

    def run(self, deadline: float | None) -> Generated:
        """Generate until the turn is complete or a limit is reached."""
        started = time.monotonic()
        pending = len(self._session.tokens) - self._session.num_cached
        while (stop_reason := self._stop_reason(deadline)) is None:
            for token in self._forced_tokens() or self._sampled_token():
                self._append(token)
        self._end_step()
        text = self._stream.finish()
        ended, prefilled_at = time.monotonic(), started if self._prefilled_at is None else self._prefilled_at
        return Generated(
            tokens=tuple(self._stream.tokens),
            text=text,
            stop_reason=stop_reason,
            prompt_tokens=0 if self._prefilled_at is None else pending,
            prefill_ms=1e3 * (prefilled_at - started),
            decode_ms=1e3 * (ended - prefilled_at),
            forced=self._forced,
            drafted=self._drafter.drafted if self._drafter else 0,
            accepted=self._drafter.accepted if self._drafter else 0,
        )

    @property
    def _remaining(self) -> int:
        return self._max_tokens - len(self._stream.tokens)

    def _stop_reason(self, deadline: float | None) -> StopReason | None:
        if self._ended or self._constraint.done:
            return "end"
        if self._remaining <= 0:
            return "tokens"
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None

    def _forced_tokens(self) -> Sequence[int]:
        tokens = self._constraint.forced_tokens()[: self._remaining]
        self._forced += len(tokens)
        return tokens

    def _sampled_token(self) -> Sequence[int]:
        """Return the sampled token; none when it ends the turn."""
        logits = self._logits()
        logits[self._session.image_token] = -np.inf  # reserved for images
        token = self._sampler.sample(logits, self._session.tokens)
        if not self._constraint.count_valid([token]):  # rare: a mask for every token would cost more
            self._constraint.mask_logits(logits)
            token = self._sampler.sample(logits, self._session.tokens)
        self._ended = token in self._session.eos
        return () if self._ended else (token,)

    def _logits(self) -> Floats:
        if self._step is None:
            drafts = self._propose_drafts()
            self._step = _DraftLogits(self._session.step_with_drafts(drafts), drafts)
            if self._prefilled_at is None:
                self._prefilled_at = time.monotonic()
        return self._step.current

    def _propose_drafts(self) -> list[int]:
        if self._drafter is None:
            return []
        drafts = self._drafter.propose(self._session.tokens, self._remaining - 1)
        return drafts[: self._constraint.count_valid(drafts)]

    def _append(self, token: int) -> None:
        if self._step is not None and self._step.accept(token):
            self._session.accept_draft(token)
        else:
            self._end_step()
            self._session.append_tokens([token])
        self._constraint.accept_token(token)
        self._stream.add(token)

    def _end_step(self) -> None:
        if self._step is not None and self._drafter is not None:
            self._drafter.update(len(self._step.drafts), self._step.accepted)
        self._step = None
