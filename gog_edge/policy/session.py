"""The live session: what was said stays in the cache, turns only append, nothing is computed twice."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from gog_edge.engines.base import Floats, KvCache, Snapshot
from gog_edge.errors import BackendError, BudgetExceeded, InputError
from gog_edge.policy.decoding import (
    Chooser,
    Constraint,
    DraftConfig,
    Drafter,
    Memory,
    Sampler,
    Sampling,
    Speech,
    TextStream,
    Unconstrained,
)
from gog_edge.policy.model import Decoder, Positions
from gog_edge.policy.vision import ImageTokens

CHUNK = 512  # tokens a prefill step: bounds its scratch memory, costs nothing in speed
GREEDY = Sampling()
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
    forced: int = 0  # of the tokens: those that the grammar left no choice about
    drafted: int = 0  # guesses that were computed
    accepted: int = 0  # guesses that came true


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
    deepstack: Floats | None = None  # [layers, T, hidden]; None adds nothing

    def cut(self, start: int, stop: int | None = None) -> _Piece:
        """Some of its tokens."""
        deepstack = None if self.deepstack is None else self.deepstack[:, start:stop]
        return _Piece(self.embeds[start:stop], self.positions[:, start:stop], deepstack)


@dataclass(slots=True)
class _Rows:
    """Logits behind the last token said and behind each guess, of use as long as the guesses come true."""

    logits: Floats  # [guesses + 1, vocab]
    guesses: list[int]
    true: int = 0  # guesses that came true

    @property
    def now(self) -> Floats:
        """Logits [vocab] of what comes next."""
        logits: Floats = self.logits[self.true]
        return logits

    def guessed(self, token: int) -> bool:
        """Whether `token` was the next guess: it is then computed already."""
        right = self.true < len(self.guesses) and self.guesses[self.true] == token
        self.true += right
        return right


def text_positions(start: int, count: int) -> Positions:
    """Text: all three axes step together."""
    return np.broadcast_to(np.arange(start, start + count), (3, count))


def image_positions(start: int, rows: int, columns: int) -> Positions:
    """A still picture: one moment, its rows and its columns."""
    places = np.indices((rows, columns)).reshape(2, -1) + start
    return np.concatenate([np.full((1, rows * columns), start), places])


class Session:
    """One conversation over one cache. Not for use by several threads at once."""

    def __init__(self, decoder: Decoder, cache: KvCache | None = None) -> None:
        """Start an empty conversation; `cache` is a new one of the decoder's engine when None."""
        self._decoder = decoder
        self._cache = cache or decoder.engine.new_cache()
        self.tokens: list[int] = []  # everything said; the image token stands for each image embedding
        self.prefilled = 0  # tokens that went through the decoder since the start or fork, generated ones included
        self._position = 0  # next rotary position
        self._cached = 0  # tokens in the cache; the rest of `tokens` waits
        self._waiting: list[_Piece] = []
        self._memory: Memory | None = None  # of the tokens, for drafts; made when they are first asked for

    @property
    def capacity(self) -> int:
        """Tokens one conversation may hold."""
        return self._decoder.capacity

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return self._decoder.eos

    @property
    def image_token(self) -> int:
        """Stands for each image embedding."""
        return self._decoder.image_token

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
            self._append(ids, _Piece(self._decoder.embed(ids), positions), self._position + len(ids))

    def append_image(self, image: ImageTokens) -> None:
        """Append a picture's embeddings. BudgetExceeded, with nothing appended, when they do not fit."""
        positions = image_positions(self._position, image.rows, image.columns)
        following = self._position + max(image.rows, image.columns)
        piece = _Piece(image.embeds, positions, image.deepstack)
        self._append([self._decoder.image_token] * len(image.embeds), piece, following)

    def _append(self, ids: Sequence[int], piece: _Piece, following: int) -> None:
        if len(ids) > self.room:
            raise BudgetExceeded(
                f"the conversation is full: {len(self.tokens)} tokens said, {len(ids)} more do not fit "
                f"{self.capacity}; answer now, or open the policy with a larger context"
            )
        self.tokens.extend(ids)
        self._waiting.append(piece)
        self._position = following

    def prefill(self) -> Floats | None:
        """Compute what waits, in chunks; the last token's logits [vocab], or None when nothing waited."""
        return self.look_ahead([])[-1] if self._waiting else None

    def look_ahead(self, guesses: Sequence[int]) -> Floats:
        """Compute what waits and guesses of what follows -> logits [guesses + 1, vocab].

        The guesses are not said: what the cache holds of them counts once they are (see `take_guess`).
        """
        waiting = _join([*self._waiting, *self._pieces(guesses)])
        self._waiting = []
        keep = 1 + len(guesses)
        chunk = max(CHUNK, keep)
        while len(waiting.embeds) > chunk:
            count = min(chunk, len(waiting.embeds) - keep)  # the last chunk holds all that is kept
            self._step(waiting.cut(0, count), 1)
            waiting = waiting.cut(count)
        logits = self._step(waiting, keep)
        self._cached -= len(guesses)
        return logits

    def _step(self, piece: _Piece, keep: int) -> Floats:
        cos, sin = self._decoder.rotary(piece.positions)
        logits = self._decoder.engine.step(
            self._cache, piece.embeds, cos, sin, self._cached, deepstack=piece.deepstack, keep=keep
        )
        self._cached += len(piece.embeds)
        self.prefilled += len(piece.embeds)
        return logits

    def _pieces(self, ids: Sequence[int]) -> list[_Piece]:
        return [_Piece(self._decoder.embed(ids), text_positions(self._position, len(ids)))] if ids else []

    def take_guess(self, token: int) -> None:
        """Say the next guess of those that were computed last."""
        self.tokens.append(token)
        self._cached += 1
        self._position += 1

    def generate(self, *, max_tokens: int, sampling: Sampling = GREEDY, chooser: Chooser | None = None,
                 constraint: Constraint | None = None, drafts: DraftConfig | None = None,
                 deadline: float | None = None, on_text: Callable[[str], None] | None = None) -> Generated:
        """Speak until an end token, the constraint's end, `max_tokens`, a full cache or a `time.monotonic()` deadline.

        `chooser` is asked instead of a sampler of `sampling`. What the constraint forces is said without asking.
        `drafts` has what probably follows computed along with what was said: the same tokens, sooner.

        An end token is not appended: what closes a turn is the caller's to say. The last token said is computed
        when something follows it. BudgetExceeded when nothing waits to be answered, or not one token fits.
        """
        if not self._waiting or self.room < 1:
            raise BudgetExceeded(
                f"nothing to go on from: {len(self.tokens)} of {self.capacity} tokens said and "
                f"{len(self.tokens) - self._cached} waiting; append a turn or answer now"
            )
        speech = Speech(TextStream(self._decoder.tokenizer), on_text)
        drafter = Drafter(drafts, self._remembered()) if drafts else None
        most = min(max_tokens, self.room)
        turn = _Turn(self, speech, chooser or Sampler(sampling), constraint or Unconstrained(), drafter, most)
        return turn.speak(deadline)

    def _remembered(self) -> Memory:
        if self._memory is None:
            self._memory = Memory(self._decoder.never_drafted)
        return self._memory

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
        waiting = _join(list(mark.waiting)) if mark.waiting else None
        computed = 0
        if waiting is not None:
            # Tokens that waited at the mark may have been computed since: the cache still holds them.
            computed = min(self._cached, mark.tokens - 1) - mark.cached
            waiting = waiting.cut(computed)
        self._waiting = [] if waiting is None else [waiting]
        self._cached = mark.cached + computed
        self._position = mark.position
        del self.tokens[mark.tokens :]
        if self._memory is not None:
            self._memory.forget(mark.tokens)

    def snapshot(self) -> Snapshot:
        """What is computed, to be kept in files."""
        return self._cache.snapshot(self._cached)

    def adopt(self, kept: Snapshot) -> None:
        """Take a snapshot of the very tokens that wait for what they would be computed to."""
        self._cache.restore(kept)
        self._cached, self._waiting = len(self.tokens), []

    def fork_from(self, other: Session) -> None:
        """Become a copy of another session of the same decoder; what it has computed is copied, not computed."""
        self._cache.copy_from(other._cache, other._cached)
        self.tokens = list(other.tokens)
        self._position, self._cached = other._position, other._cached
        self._waiting = list(other._waiting)
        self._memory = None
        self.prefilled = 0


class _Turn:
    """One turn being said: forced tokens first, then guesses that come true, then one token at a time."""

    def __init__(self, session: Session, speech: Speech, chooser: Chooser, constraint: Constraint,
                 drafter: Drafter | None, most: int) -> None:
        self._session, self._speech, self._most = session, speech, most
        self._chooser, self._constraint, self._drafter = chooser, constraint, drafter
        self._rows: _Rows | None = None
        self._ended = False
        self._forced = 0
        self._ready: float | None = None  # when the first logits were there

    def speak(self, deadline: float | None) -> Generated:
        """Say it, to the end or as far as it may go."""
        started = time.monotonic()
        waiting = len(self._session.tokens) - self._session.computed
        while (stopped := self._stopped(deadline)) is None:
            for token in self._must_follow() or self._chosen():
                self._say(token)
        self._leave_rows()
        text = self._speech.finish()
        ended, ready = time.monotonic(), started if self._ready is None else self._ready
        return Generated(
            tokens=tuple(self._speech.tokens),
            text=text,
            stopped=stopped,
            prefilled=0 if self._ready is None else waiting,
            prefill_ms=1e3 * (ready - started),
            decode_ms=1e3 * (ended - ready),
            forced=self._forced,
            drafted=self._drafter.drafted if self._drafter else 0,
            accepted=self._drafter.accepted if self._drafter else 0,
        )

    @property
    def _left(self) -> int:
        return self._most - len(self._speech.tokens)

    def _stopped(self, deadline: float | None) -> Stop | None:
        if self._ended or self._constraint.done:
            return "end"
        if self._left <= 0:
            return "tokens"
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None

    def _must_follow(self) -> Sequence[int]:
        tokens = self._constraint.forced()[: self._left]
        self._forced += len(tokens)
        return tokens

    def _chosen(self) -> Sequence[int]:
        """The chooser's token; none when it ends the turn."""
        logits = self._logits()
        logits[self._session.image_token] = -np.inf  # only a picture may stand there
        token = self._chooser.choose(logits, self._session.tokens)
        if not self._constraint.admits([token]):  # seldom: so nothing is masked before
            self._constraint.mask(logits)
            token = self._chooser.choose(logits, self._session.tokens)
        self._ended = token in self._session.eos
        return () if self._ended else (token,)

    def _logits(self) -> Floats:
        if self._rows is None:
            guesses = self._guesses()
            self._rows = _Rows(self._session.look_ahead(guesses), guesses)
            if self._ready is None:
                self._ready = time.monotonic()
        return self._rows.now

    def _guesses(self) -> list[int]:
        if self._drafter is None:
            return []
        guesses = self._drafter.propose(self._session.tokens, self._left - 1)
        return guesses[: self._constraint.admits(guesses)]

    def _say(self, token: int) -> None:
        if self._rows is not None and self._rows.guessed(token):
            self._session.take_guess(token)
        else:
            self._leave_rows()
            self._session.append_tokens([token])
        self._constraint.accept(token)
        self._speech.add(token)

    def _leave_rows(self) -> None:
        if self._rows is not None and self._drafter is not None:
            self._drafter.learn(len(self._rows.guesses), self._rows.true)
        self._rows = None


def _join(pieces: list[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    embeds = np.concatenate([piece.embeds for piece in pieces])
    positions = np.concatenate([piece.positions for piece in pieces], axis=1)
    deeper = next((piece.deepstack for piece in pieces if piece.deepstack is not None), None)
    if deeper is None:
        return _Piece(embeds, positions)
    added = [
        np.zeros((len(deeper), *piece.embeds.shape), np.float32) if piece.deepstack is None else piece.deepstack
        for piece in pieces
    ]
    return _Piece(embeds, positions, np.concatenate(added, axis=1))


_ARRAYS = tuple(field.name for field in fields(Snapshot))
_log = logging.getLogger(__name__)


def prefill_kept(session: Session, cache: Path, form: str) -> None:
    """Compute what waits in a new session, or take what an earlier start computed of the same tokens.

    `cache` belongs to this model on this processor; where it is not there (the model is small, or its folder cannot
    be written), everything is computed.
    """
    tokens = np.asarray(session.tokens, np.int64)
    folder = cache / f"prompt-{hashlib.sha256(form.encode() + tokens.tobytes()).hexdigest()[:16]}"
    if folder.is_dir():
        try:
            session.adopt(Snapshot(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}))
            return
        except (OSError, ValueError, BackendError) as exc:
            _log.warning("the prompt kept in '%s' cannot be used (%s): it is computed again", folder, exc)
            shutil.rmtree(folder, ignore_errors=True)
    session.prefill()
    if cache.is_dir():
        _keep(session.snapshot(), folder)


def _keep(snapshot: Snapshot, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        for name in _ARRAYS:
            np.save(part / f"{name}.npy", getattr(snapshot, name), allow_pickle=False)
        part.rename(folder)
    except OSError as exc:
        _log.warning("the prompt cannot be kept in '%s' (%s): every start computes it again", folder, exc)
    finally:
        shutil.rmtree(part, ignore_errors=True)
