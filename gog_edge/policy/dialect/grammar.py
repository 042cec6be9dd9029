"""What a turn may say: the grammar of a dialect's syntax, followed token by token with llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from gog_edge.engines.base import Array, Floats
from gog_edge.errors import ArtifactError, DialectError
from gog_edge.policy.decoding import Constraint, TextStream
from gog_edge.policy.dialect.actions import Marks, Tags, Tool, ToolCalls
from gog_edge.policy.dialect.dialect import Dialect

LEXER_FUEL = 2_000_000  # work of one mask, some 14,000 a millisecond: ten times the default, far from what was seen
THINK_BUDGET = 1024  # tokens of thinking in one turn, where the dialect sets no other


class GrammarConstraint:
    """One turn, held to a grammar."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._bits = allocate_token_bitmask(1, vocab)

    @property
    def done(self) -> bool:
        """The action is closed."""
        return self._matcher.is_stopped()

    def forced(self) -> Sequence[int]:
        """Ids that the grammar leaves no choice about."""
        return self._matcher.compute_ff_tokens()

    def admits(self, ids: Sequence[int]) -> int:
        """How many of these ids the grammar takes."""
        return self._matcher.validate_tokens(list(ids))

    def mask(self, logits: Floats) -> None:
        """Set logits [vocab] of what the grammar does not take to -inf, in place."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], count=len(logits), bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def accept(self, token: int) -> None:
        """Take one id. DialectError where the grammar does not."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DialectError(f"the turn has left the dialect's grammar: {self._matcher.get_error()}")


class Grammar:
    """The turns of one dialect in one vocabulary, compiled once."""

    def __init__(self, dialect: Dialect, tokenizer: Tokenizer, vocab: int, eos: Collection[int]) -> None:
        """`vocab`: length of the logits; `eos`: ids that end a turn.

        DialectError where the marks make no grammar, ArtifactError where the tokenizer cannot be followed.
        """
        vocabulary = load_vocabulary(tokenizer, vocab, eos)
        self._vocab = vocab
        self._turn = _compile(turn_grammar(dialect), vocabulary)
        self._answer = _compile(answer_grammar(dialect), vocabulary)
        opening = dialect.syntax.answer_open
        if not self._answer.consume_tokens(tokenizer.encode(opening, add_special_tokens=False).ids):
            raise DialectError(f"no answer of dialect {dialect.name} can begin with '{opening}'; change what opens it")

    def turn(self) -> Constraint:
        """A turn from its beginning."""
        return GrammarConstraint(self._turn.deep_copy(), self._vocab)

    def answer(self) -> Constraint:
        """A turn that has just opened its answer."""
        return GrammarConstraint(self._answer.deep_copy(), self._vocab)


def _compile(lark: str, vocabulary: LLTokenizer) -> LLMatcher:
    limits = LLParserLimits(step_lexer_fuel=LEXER_FUEL, verbose_errors=False)
    matcher = LLMatcher(vocabulary, lark, log_level=0, limits=limits)
    if matcher.is_error():
        raise DialectError(f"the dialect's marks make no grammar: {matcher.get_error()}")
    return matcher


class ThinkBudget:
    """Closes a thought that has gone on for too long; whatever else is said is the inner constraint's."""

    def __init__(self, inner: Constraint, dialect: Dialect, tokenizer: Tokenizer, most: int | None = None
                 ) -> None:
        """`most`: tokens that this turn can spare for a thought and its end, whatever the dialect allows."""
        thinking, closing = dialect.thinking, dialect.syntax.skip_until
        self._inner = inner
        self._opening, self._closing = thinking.open, closing
        self._cut: list[int] = tokenizer.encode(f"\n{closing}\n\n", add_special_tokens=False).ids
        self._left = thinking.budget or THINK_BUDGET
        if most is not None:
            self._left = min(self._left, most - len(self._cut))
        self._stream = TextStream(tokenizer)
        self._text = thinking.open if thinking.prefilled else ""

    @property
    def done(self) -> bool:
        """The inner constraint is done."""
        return self._inner.done

    def forced(self) -> Sequence[int]:
        """The end of the thought once the budget is spent."""
        # Behind half a character no mark may stand.
        if self._left <= 0 and self._thinks() and self._inner.admits(self._cut) == len(self._cut):
            return self._cut
        return self._inner.forced()

    def admits(self, ids: Sequence[int]) -> int:
        """What the inner constraint admits."""
        return self._inner.admits(ids)

    def mask(self, logits: Floats) -> None:
        """As the inner constraint does."""
        self._inner.mask(logits)

    def accept(self, token: int) -> None:
        """Take one id; of a thought it costs one of the budget."""
        self._inner.accept(token)
        self._text += self._stream.push(token)
        self._left -= self._thinks()

    def _thinks(self) -> bool:
        return self._text.lstrip().startswith(self._opening) and self._closing not in self._text



# --- the grammar of a turn ------------------------------------------------------------------------

# Free text has no greatest length: counted repetition costs the lexer a state a character, and a turn's tokens are
# counted anyway. A string holds no plain "<", so that no mark can stand in it.
_COMMON = r"""
ANY: /(?s:.*)/
WORDS: /\s*[^\s\x00-\x1f](?s:.*)/
SPACE: /[ \t\r\n]{0,8}/
CHAR: /[^"\\<\x00-\x1f]|\\["\\\/bfnrt]|\\u([0-9a-cA-CefEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})/
STRING: "\"" CHAR* "\""
QUERY: "\"" /[^\s"\\<\x00-\x1f]/ CHAR* "\""
INDEX: /0|[1-9][0-9]?/
"""
_PIXELS = "/0|[1-9][0-9]{0,4}/"
_NUMBERS = {"rel1000": "/0|[1-9][0-9]{0,2}|1000/", "rel1": r"/0(\.[0-9]{1,4})?|1(\.0{1,4})?/"}


def turn_grammar(dialect: Dialect) -> str:
    """Lark: a thought and a reason, which may both be left out, then exactly one action."""
    foreign = _foreign(dialect)
    asides = list(_asides(dialect))
    rules = _tags(dialect.syntax, foreign) if isinstance(dialect.syntax, Tags) else _calls(dialect.syntax, foreign)
    return "\n".join([
        " ".join(["start: SPACE", *(use for use, _ in asides), "action"]),
        *rules,
        *(rule for _, rule in asides),
        _answer(dialect),
        f"NUMBER: {_NUMBERS.get(dialect.box_frame, _PIXELS)}",
        _COMMON,
    ])  # fmt: skip


def answer_grammar(dialect: Dialect) -> str:
    """Lark: an answer and nothing else."""
    return f"start: answer\n{_answer(dialect)}\n{_COMMON}"


def _asides(dialect: Dialect) -> Iterator[tuple[str, str]]:
    """What may come before the action: its use, and its rule."""
    thinking, closing = dialect.thinking, dialect.syntax.skip_until
    if closing and thinking.prefilled:
        yield "thought SPACE", _lazy("thought", _until("ANY", closing))
    elif closing and thinking.open:
        yield "(thought SPACE)?", _lazy("thought", f"{_literal(thinking.open)} {_until('ANY', closing)}")
    opening, end = dialect.syntax.reason
    if opening and end and opening != thinking.open:
        yield "(reason SPACE)?", _lazy("reason", f"{_literal(opening)} {_until('ANY', end, closing)}")


def _answer(dialect: Dialect) -> str:
    syntax, foreign = dialect.syntax, _foreign(dialect)
    if isinstance(syntax, ToolCalls) and syntax.answer is None:
        return f"answer: WITHOUT_CALL\nWITHOUT_CALL: {_free('WORDS', syntax.call[0], *foreign)}"
    return _lazy("answer", _words(syntax.answer or ("", ""), foreign))


def _tags(tags: Tags, foreign: Sequence[str]) -> Iterator[str]:
    opening, closing = map(_literal, tags.image_search)
    places = [_literal(tags.whole_picture)]
    if tags.box:
        places.append(" ".join(_literal(text) + (" NUMBER" if name else "") for text, name in _parts(tags.box)))
    yield f"action: answer | search | {opening} ({' | '.join(places)}) {closing}"
    yield _lazy("search", _words(tags.text_search, foreign))


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """(text, name of the field behind it) of a format string."""
    return ((text, name) for text, name, *_ in Formatter().parse(template))


def _calls(calls: ToolCalls, foreign: Sequence[str]) -> Iterator[str]:
    opening, closing = calls.call[0] + "\n", "\n" + calls.call[1]
    yield f"action: answer | opening ({' | '.join(map(_call, calls.tools))}) {_literal(closing)}"
    if calls.answer:
        yield f"opening: {_literal(opening)}"
    else:  # what begins like an answer may become words before a call
        yield _lazy("opening", f"{_free('ANY', calls.call[0], *foreign)} {_literal(opening)}")


def _call(tool: Tool) -> str:
    """A call as `json.dumps` writes it: separators leave no choice, so they cost no step."""
    box = '"[" NUMBER ", " NUMBER ", " NUMBER ", " NUMBER "]"'
    needed = [_argument(name, value) for name, value in ((tool.query, "QUERY"), (tool.box, box)) if name]
    spare = [_argument(name, value) for name, value in ((tool.label, "STRING"), (tool.image, "INDEX")) if name]
    head = _literal(f'{{"name": {json.dumps(tool.name)}, "arguments": {{')
    return f'{head} {_listed(needed, spare)} "}}}}"'


def _argument(name: str, value: str) -> str:
    return f"{_literal(json.dumps(name) + ': ')} {value}"


def _listed(needed: list[str], spare: list[str]) -> str:
    """Comma-separated arguments, of which the spare ones may be left out."""
    if needed:
        return ' ", " '.join(needed) + "".join(f' (", " {argument})?' for argument in spare)
    first = (_listed([argument], spare[n + 1 :]) for n, argument in enumerate(spare))
    return f"({' | '.join(first)})?" if spare else ""


def _words(marks: Marks, foreign: Sequence[str]) -> str:
    """Words between marks."""
    return f"{_literal(marks[0])} {_until('WORDS', marks[1], *foreign)}"


def _until(body: str, closing: str, *marks: str) -> str:
    return f"{_free(body, closing, *marks)} {_literal(closing)}"


def _lazy(name: str, terminal: str) -> str:
    """A rule that ends with the first closing mark: no longer text is waited for."""
    return f"{name}[lazy]: {name.upper()}\n{name.upper()}: {terminal}"


def _free(body: str, *marks: str) -> str:
    """Text in which none of these marks stands."""
    return f"({body} & ~(ANY ({' | '.join(_literal(mark) for mark in dict.fromkeys(marks) if mark)}) ANY))"


def _foreign(dialect: Dialect) -> tuple[str, ...]:
    """Marks that would change what the words they stand in are read as."""
    return dialect.syntax.skip_until, dialect.syntax.reason[0], dialect.thinking.open


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- the vocabulary -------------------------------------------------------------------------------


def load_vocabulary(tokenizer: Tokenizer, vocab: int, eos: Collection[int]) -> LLTokenizer:
    """A byte-level tokenizer's tokens as bytes; `vocab` ids, of which some may stand for nothing.

    ArtifactError where the tokenizer is of another kind, or has more ids than there are logits.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    most = max(ids.values())
    if most >= vocab:
        raise ArtifactError(f"the tokenizer has a token {most}, the policy {vocab} logits; export the two together")
    tokens = [b""] * vocab
    for spelled, token in zip(_bytes_of(list(ids)), ids.values(), strict=True):
        tokens[token] = spelled
    told = b"".join(tokens[token] for token in tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
    if told != _SAMPLE.encode():
        raise ArtifactError(f"the tokenizer is not byte-level: {_SAMPLE!r} becomes {told!r}; open without a grammar")
    # What ends a turn, or the chat format keeps for itself, is no part of a text.
    special = {token for token, form in tokenizer.get_added_tokens_decoder().items() if form.special} | set(eos)
    wrapped = TokenizerWrapper(_Vocabulary(tokenizer, tokens, sorted(special), min(eos)))
    # Slices would make masks quicker and the start slower; masks are only made where the first choice was refused.
    return LLTokenizer(wrapped, n_vocab=vocab, eos_token=sorted(eos), slices=[])


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    tokenizer: Tokenizer
    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, text: bytes) -> list[int]:
        return list(self.tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids)


def _byte_letters() -> Array:
    """[0x145] int16: the byte that each letter of a byte-level tokenizer stands for, -1 for what is no such letter.

    Printable Latin-1 stands for itself, letters from U+0100 on for the other bytes.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    letters = np.full(0x100 + len(others) + 1, -1, np.int16)
    letters[own] = own
    letters[0x100:-1] = others
    return letters


_LETTERS = _byte_letters()
_SAMPLE = "Größe of it\n"


def _bytes_of(tokens: Sequence[str]) -> list[bytes]:
    """What each token stands for: all letters at once, as a start waits for it."""
    letters = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    found = _LETTERS[np.minimum(letters, len(_LETTERS) - 1)]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    strange = np.append(0, np.cumsum(found < 0))  # letters that stand for no byte, before each place
    foreign = strange[ends] > strange[ends - lengths]  # an added token stands for its own text
    spelled = found.astype(np.uint8).tobytes()
    parts = zip(tokens, (ends - lengths).tolist(), ends.tolist(), foreign.tolist(), strict=True)
    return [token.encode() if own else spelled[start:end] for token, start, end, own in parts]
