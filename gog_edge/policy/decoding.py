"""Turn logits into text: sampling, constraints, incremental detokenization, and speculation by prompt lookup."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats
from gog_edge.errors import InputError
from gog_edge.policy.dialect.dialect import Dialect

Probabilities: TypeAlias = NDArray[np.float64]
TokenIds: TypeAlias = NDArray[np.int64]


# --- sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is selected; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise InputError(
                "sampling parameters must be temperature >= 0, 0 < top_p <= 1, top_k >= 0 and repetition_penalty > 0, "
                f"got temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k} and "
                f"repetition_penalty {self.repetition_penalty}"
            )


class TokenSampler(Protocol):
    """Selects the tokens of one turn."""

    def sample(self, logits: Floats, context: Sequence[int]) -> int:
        """Return the next token id for logits [vocab]; `context` holds all tokens so far and only grows.

        Called once for each token, in order, and a second time, with the logits of invalid tokens at -inf, when the
        constraint rejects the first result.
        """


class Sampler:
    """Samples tokens; the same seed gives the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._seen: TokenIds = np.empty(0, np.int64)  # distinct ids of the context
        self._read = 0  # tokens of the context that `_seen` includes

    def sample(self, logits: Floats, context: Sequence[int]) -> int:
        """Return the next token id for logits [vocab]; `context` is needed for the repetition penalty."""
        if self._params.repetition_penalty != 1.0:
            logits = apply_repetition_penalty(logits, self._distinct(context), self._params.repetition_penalty)
        if self._params.temperature == 0.0:
            return int(np.argmax(logits))
        return self._draw(logits)

    def _distinct(self, context: Sequence[int]) -> TokenIds:
        added = np.setdiff1d(np.asarray(context[self._read :], np.int64), self._seen)
        if len(added):
            self._seen = np.concatenate([self._seen, added])
        self._read = len(context)
        return self._seen

    def _draw(self, logits: Floats) -> int:
        # Exactly one random number per call, so that decoding with and without drafts draws the same tokens.
        ids, probabilities = sampling_distribution(logits, self._params)
        at = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
        return int(ids[min(at, len(ids) - 1)])


def apply_repetition_penalty(logits: Floats, ids: TokenIds, penalty: float) -> Floats:
    """Return a copy of logits [vocab] with those of the distinct `ids` divided (positive) or multiplied (negative).

    The penalty of CTRL (Keskar et al., 2019), as in transformers.
    """
    penalised = logits.copy()
    values = penalised[ids]
    penalised[ids] = np.where(values > 0, values / penalty, values * penalty)
    return penalised


def sampling_distribution(logits: Floats, params: SamplingParams) -> tuple[TokenIds, Probabilities]:
    """Return the candidate ids for logits [vocab], ascending, and their probabilities, which sum to 1.

    Applies the temperature, then `top_k`, then `top_p` (nucleus sampling).
    """
    ids: TokenIds = np.arange(len(logits))
    if 0 < params.top_k < len(logits):
        ids = np.argpartition(logits, -params.top_k)[-params.top_k :]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    scaled = logits[ids].astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    nucleus = np.flatnonzero(np.cumsum(probabilities) - probabilities < params.top_p)
    # Sorted by id: the order of nearly equal logits depends on rounding and must not change which token is drawn.
    nucleus = nucleus[np.argsort(ids[nucleus])]
    return ids[nucleus], probabilities[nucleus] / probabilities[nucleus].sum()


# --- constraints ----------------------------------------------------------------------------------


class Constraint(Protocol):
    """Restricts the tokens of one turn."""

    @property
    def done(self) -> bool:
        """Return whether the turn is complete: no token may follow, and no end token is needed."""

    def forced_tokens(self) -> Sequence[int]:
        """Return the ids that must come next, in the tokenizer's own segmentation; empty when there is a choice."""

    def count_valid(self, ids: Sequence[int]) -> int:
        """Return the length of the longest prefix of `ids` that may come next."""

    def mask_logits(self, logits: Floats) -> None:
        """Set logits [vocab] of invalid tokens to -inf, in place."""

    def accept_token(self, token: int) -> None:
        """Advance past `token`.

        Raises:
            DialectError: the token is not valid here.
        """


class Unconstrained:
    """A constraint that allows all tokens."""

    done = False

    def forced_tokens(self) -> Sequence[int]:
        """Return no tokens."""
        return ()

    def count_valid(self, ids: Sequence[int]) -> int:
        """Return the number of ids."""
        return len(ids)

    def mask_logits(self, logits: Floats) -> None:
        """Leave the logits unchanged."""

    def accept_token(self, token: int) -> None:
        """Accept any token."""


THINKING_BUDGET = 1024  # tokens of thinking in one turn, unless the dialect sets a budget


class ThinkingBudget:
    """A constraint that forces thinking to end after a number of tokens and leaves all else to an inner constraint."""

    def __init__(self, inner: Constraint, dialect: Dialect, tokenizer: Tokenizer, max_tokens: int | None = None
                 ) -> None:
        """`max_tokens`: an upper limit for the thinking with its closing tag, whatever the dialect allows."""
        thinking, closing = dialect.thinking, dialect.syntax.skip_until
        self._inner = inner
        self._opening, self._closing = thinking.open, closing
        self._end: list[int] = tokenizer.encode(f"\n{closing}\n\n", add_special_tokens=False).ids
        self._remaining = thinking.budget or THINKING_BUDGET
        if max_tokens is not None:
            self._remaining = min(self._remaining, max_tokens - len(self._end))
        self._detokenizer = Detokenizer(tokenizer)
        self._text = thinking.open if thinking.prefilled else ""

    @property
    def done(self) -> bool:
        """Return whether the inner constraint is done."""
        return self._inner.done

    def forced_tokens(self) -> Sequence[int]:
        """Return the tokens that end the thinking when the budget is spent, else those of the inner constraint."""
        # The inner constraint rejects the closing tag after an incomplete UTF-8 sequence; it is forced one token later.
        if self._remaining <= 0 and self._is_thinking() and self._inner.count_valid(self._end) == len(self._end):
            return self._end
        return self._inner.forced_tokens()

    def count_valid(self, ids: Sequence[int]) -> int:
        """Return the result of the inner constraint."""
        return self._inner.count_valid(ids)

    def mask_logits(self, logits: Floats) -> None:
        """Apply the mask of the inner constraint."""
        self._inner.mask_logits(logits)

    def accept_token(self, token: int) -> None:
        """Advance past `token`; inside thinking it reduces the budget by one."""
        self._inner.accept_token(token)
        self._text += self._detokenizer.push(token)
        self._remaining -= self._is_thinking()

    def _is_thinking(self) -> bool:
        return self._text.lstrip().startswith(self._opening) and self._closing not in self._text


# --- streaming ------------------------------------------------------------------------------------

_REPLACEMENT = "\ufffd"  # decoders return it for an incomplete UTF-8 sequence


@dataclass(slots=True)
class Detokenizer:
    """Decodes tokens to text incrementally; incomplete UTF-8 sequences are held back."""

    tokenizer: Tokenizer
    _context: list[int] = field(default_factory=list)  # ids of the last piece: some decoders depend on the id before
    _pending: list[int] = field(default_factory=list)

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes, which may be empty."""
        self._pending.append(token)
        return self._decode_pending(finish=False)

    def finish(self) -> str:
        """Return the text that was held back, with U+FFFD for incomplete characters."""
        return self._decode_pending(finish=True)

    def _decode_pending(self, *, finish: bool) -> str:
        before = self._decode(self._context)
        piece = self._decode(self._context + self._pending)[len(before) :]
        if not self._pending or (piece.endswith(_REPLACEMENT) and not finish):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        # Special tokens are kept: the tags of a dialect may be special tokens.
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(slots=True)
class TokenStream:
    """The tokens and text of a turn so far; text is passed to `on_text` in whole characters."""

    detokenizer: Detokenizer
    on_text: Callable[[str], None] | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        """Append a generated token."""
        self.tokens.append(token)
        self._emit(self.detokenizer.push(token))

    def finish(self) -> str:
        """Return the whole text, including what was held back."""
        self._emit(self.detokenizer.finish())
        return self.text

    def _emit(self, piece: str) -> None:
        self.text += piece
        if piece and self.on_text is not None:
            self.on_text(piece)


# --- speculation by prompt lookup -----------------------------------------------------------------

MAX_NGRAM = 3  # tokens; longer matches are found by comparing backwards from an n-gram of this length


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """When to draft tokens, and how many: as many as maximise the expected tokens per second.

    A step that verifies n draft tokens takes (1 + setup_cost + token_cost * n) times as long as a step of one token.
    The default costs were measured once on two cores with 2 billion int4 weights and 1,500 tokens in the cache; where
    a large decoder runs they are measured (see `draft_cost`).
    """

    # (tokens of context that match an earlier place, prior probability that the next draft token is accepted).
    acceptance_priors: tuple[tuple[int, float], ...] = ((1, 0.1), (2, 0.5), (3, 0.8), (5, 0.95))
    prior_weight: float = 3.0  # number of observations that each prior counts for
    setup_cost: float = 0.33
    token_cost: float = 0.24
    max_tokens: int = 8  # of one draft

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.acceptance_priors]
        ordered = bool(lengths) and lengths == sorted(set(lengths)) and lengths[0] >= 1 and self.max_tokens >= 1
        costs = 0 <= self.token_cost < math.inf and 0 <= self.setup_cost < math.inf and self.prior_weight > 0
        if not ordered or not costs or not all(0 <= prior < 1 for _, prior in self.acceptance_priors):
            raise InputError(
                "drafts need acceptance_priors with match lengths that increase from at least 1 and probabilities of "
                "at least 0 and below 1, prior_weight > 0, finite setup_cost and token_cost >= 0, and max_tokens >= 1, "
                f"got {self}"
            )

    def draft_length(self, acceptance: float) -> int:
        """Return the number of draft tokens with the highest expected speed; 0 when no draft is faster than none.

        `acceptance`: probability that a draft token is accepted, given that those before it were.
        """
        best, length, expected, all_accepted = 1.0, 0, 1.0, 1.0
        for count in range(1, self.max_tokens + 1):
            all_accepted *= acceptance
            expected += all_accepted
            speed = expected / (1 + self.setup_cost + self.token_cost * count)
            if speed > best:
                best, length = speed, count
        return length


class NgramIndex:
    """An index of all n-grams of up to `MAX_NGRAM` tokens in a growing context; it can be truncated from the end."""

    def __init__(self, barriers: Collection[int]) -> None:
        """`barriers`: ids that are never drafted and that no match extends across."""
        self._barriers = frozenset(barriers)
        self._tokens: list[int] = []
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # n-gram -> where it was continued

    def extend(self, context: Sequence[int]) -> None:
        """Add the tokens that were appended to the context since the last call."""
        for token in context[len(self._tokens) :]:
            if token not in self._barriers:
                for ngram in self._last_ngrams():
                    self._places[ngram].append(len(self._tokens))
            self._tokens.append(token)

    def truncate(self, length: int) -> None:
        """Remove all but the first `length` tokens."""
        while len(self._tokens) > length:
            if self._tokens.pop() not in self._barriers:
                for ngram in self._last_ngrams():
                    self._places[ngram].pop()

    def lookup(self, max_tokens: int, max_match: int) -> tuple[int, list[int]]:
        """Find the latest earlier place that matches the end of the context.

        Returns the number of matching tokens, counted up to `max_match` and 0 without a match, and at most
        `max_tokens` ids that follow there.
        """
        for ngram in reversed(self._last_ngrams()):
            if places := self._places.get(ngram):
                return self._match_length(places[-1], len(ngram), max_match), self._continuation(places[-1], max_tokens)
        return 0, []

    def _last_ngrams(self) -> list[tuple[int, ...]]:
        """Return the n-grams at the end of the context, shortest first."""
        ngrams: list[tuple[int, ...]] = []
        end = len(self._tokens)
        for start in range(end - 1, max(-1, end - 1 - MAX_NGRAM), -1):
            if self._tokens[start] in self._barriers:
                break
            ngrams.append(tuple(self._tokens[start:]))
        return ngrams

    def _match_length(self, place: int, length: int, limit: int) -> int:
        tokens, end = self._tokens, len(self._tokens)
        while length < min(limit, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length

    def _continuation(self, start: int, max_tokens: int) -> list[int]:
        ids = self._tokens[start : start + max_tokens]
        return ids[: next((n for n, token in enumerate(ids) if token in self._barriers), len(ids))]


class PromptLookupDrafter:
    """Proposes draft tokens for one turn by prompt lookup, and learns how often they are accepted.

    Prompt lookup takes as draft what followed the last tokens when they occurred before; the answers of a policy often
    quote the evidence in its prompt.
    """

    def __init__(self, config: DraftConfig, index: NgramIndex) -> None:
        self._config, self._index = config, index
        self._accepted = [prior * config.prior_weight for _, prior in config.acceptance_priors]  # by match length
        self._verified = [config.prior_weight] * len(config.acceptance_priors)
        self._kind = -1  # index of the last proposal's match length in `acceptance_priors`
        self.drafted = 0
        self.accepted = 0

    def propose(self, context: Sequence[int], max_tokens: int) -> list[int]:
        """Return at most `max_tokens` draft tokens for what follows `context`; often none."""
        self._index.extend(context)
        longest, _ = self._config.acceptance_priors[-1]
        matching, draft = self._index.lookup(min(max_tokens, self._config.max_tokens), longest)
        self._kind = sum(matching >= length for length, _ in self._config.acceptance_priors) - 1
        if self._kind < 0:
            return []
        return draft[: self._config.draft_length(self._accepted[self._kind] / self._verified[self._kind])]

    def update(self, drafted: int, accepted: int) -> None:
        """Record that `drafted` tokens of the last proposal were computed and the first `accepted` were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        self._accepted[self._kind] += accepted
        self._verified[self._kind] += min(drafted, accepted + 1)
