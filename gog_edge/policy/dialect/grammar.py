"""Constrain a turn to the syntax of a dialect: a Lark grammar that llguidance follows token by token."""

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
from gog_edge.policy.dialect.actions import Delimiters, TagSyntax
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.tool_calls import Tool, ToolCallSyntax

LEXER_FUEL = 2_000_000  # work per mask, about 14,000 units per ms: ten times the default; masks use far less


class GrammarConstraint:
    """Constrains one turn to a grammar; see `decoding.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._bits = allocate_token_bitmask(1, vocab)

    @property
    def done(self) -> bool:
        """Return whether the action is complete."""
        return self._matcher.is_stopped()

    def forced_tokens(self) -> Sequence[int]:
        """Return the ids that the grammar leaves no choice about."""
        return self._matcher.compute_ff_tokens()

    def count_valid(self, ids: Sequence[int]) -> int:
        """Return how many of the ids, from the first, the grammar accepts."""
        return self._matcher.validate_tokens(list(ids))

    def mask_logits(self, logits: Floats) -> None:
        """Set logits [vocab] of tokens that the grammar rejects to -inf, in place."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], count=len(logits), bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def accept_token(self, token: int) -> None:
        """Advance past `token`.

        Raises:
            DialectError: the grammar rejects it.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DialectError(f"the turn does not match the dialect's grammar: {self._matcher.get_error()}")


class Grammar:
    """The grammar of a dialect's turns, compiled once for one vocabulary."""

    def __init__(self, dialect: Dialect, tokenizer: Tokenizer, vocab: int, eos: Collection[int]) -> None:
        """`vocab`: length of the logits; `eos`: ids that end a turn.

        Raises:
            DialectError: the delimiters of the dialect do not form a valid grammar.
            ArtifactError: the tokenizer is not supported.
        """
        vocabulary = load_vocabulary(tokenizer, vocab, eos)
        self._vocab = vocab
        self._turn = _compile(turn_grammar(dialect), vocabulary)
        self._answer = _compile(answer_grammar(dialect), vocabulary)
        opening = dialect.syntax.answer_open
        if not self._answer.consume_tokens(tokenizer.encode(opening, add_special_tokens=False).ids):
            raise DialectError(
                f"an answer of dialect {dialect.name} cannot begin with '{opening}'; change the text that opens it"
            )

    def turn(self) -> GrammarConstraint:
        """Return a constraint for a turn from its beginning."""
        return GrammarConstraint(self._turn.deep_copy(), self._vocab)

    def answer(self) -> GrammarConstraint:
        """Return a constraint for a turn that begins with the text that opens an answer."""
        return GrammarConstraint(self._answer.deep_copy(), self._vocab)


def _compile(lark: str, vocabulary: LLTokenizer) -> LLMatcher:
    limits = LLParserLimits(step_lexer_fuel=LEXER_FUEL, verbose_errors=False)
    matcher = LLMatcher(vocabulary, lark, log_level=0, limits=limits)
    if matcher.is_error():
        raise DialectError(f"the delimiters of the dialect do not form a valid grammar: {matcher.get_error()}")
    return matcher


# --- the grammar of a turn ------------------------------------------------------------------------

# Free text has no upper length: a counted repetition costs the lexer one state per character, and the tokens of a turn
# are limited anyway. Strings contain no plain "<", and therefore no delimiter.
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
    """Return the Lark grammar of a turn: optional thinking, an optional reason, then exactly one action."""
    forbidden = _forbidden(dialect)
    preamble = list(_preamble(dialect))
    syntax = dialect.syntax
    rules = _tag_rules(syntax, forbidden) if isinstance(syntax, TagSyntax) else _call_rules(syntax, forbidden)
    return "\n".join([
        " ".join(["start: SPACE", *(use for use, _ in preamble), "action"]),
        *rules,
        *(rule for _, rule in preamble),
        _answer_rule(dialect),
        f"NUMBER: {_NUMBERS.get(dialect.box_frame, _PIXELS)}",
        _COMMON,
    ])  # fmt: skip


def answer_grammar(dialect: Dialect) -> str:
    """Return the Lark grammar of an answer."""
    return f"start: answer\n{_answer_rule(dialect)}\n{_COMMON}"


def _preamble(dialect: Dialect) -> Iterator[tuple[str, str]]:
    """Yield what may precede the action: its use in `start`, and its rule."""
    thinking, closing = dialect.thinking, dialect.syntax.skip_until
    if closing and thinking.prefilled:
        yield "thought SPACE", _lazy_rule("thought", _until("ANY", closing))
    elif closing and thinking.open:
        yield "(thought SPACE)?", _lazy_rule("thought", f"{_literal(thinking.open)} {_until('ANY', closing)}")
    opening, end = dialect.syntax.reason
    if opening and end and opening != thinking.open:
        yield "(reason SPACE)?", _lazy_rule("reason", f"{_literal(opening)} {_until('ANY', end, closing)}")


def _answer_rule(dialect: Dialect) -> str:
    syntax, forbidden = dialect.syntax, _forbidden(dialect)
    if isinstance(syntax, ToolCallSyntax) and syntax.answer is None:
        return f"answer: WITHOUT_CALL\nWITHOUT_CALL: {_without('WORDS', syntax.call[0], *forbidden)}"
    return _lazy_rule("answer", _delimited_words(syntax.answer or ("", ""), forbidden))


def _tag_rules(tags: TagSyntax, forbidden: Sequence[str]) -> Iterator[str]:
    opening, closing = map(_literal, tags.image_search)
    bodies = [_literal(tags.whole_picture)]
    if tags.box:
        bodies.append(" ".join(_literal(text) + (" NUMBER" if name else "") for text, name in _fields(tags.box)))
    yield f"action: answer | search | {opening} ({' | '.join(bodies)}) {closing}"
    yield _lazy_rule("search", _delimited_words(tags.text_search, forbidden))


def _fields(template: str) -> Iterator[tuple[str, str | None]]:
    """Yield (literal text, name of the field after it) of a format string."""
    return ((text, name) for text, name, *_ in Formatter().parse(template))


def _call_rules(calls: ToolCallSyntax, forbidden: Sequence[str]) -> Iterator[str]:
    opening, closing = calls.call[0] + "\n", "\n" + calls.call[1]
    yield f"action: answer | opening ({' | '.join(map(_call, calls.tools))}) {_literal(closing)}"
    if calls.answer:
        yield f"opening: {_literal(opening)}"
    else:  # without delimiters for answers, text may precede a call
        yield _lazy_rule("opening", f"{_without('ANY', calls.call[0], *forbidden)} {_literal(opening)}")


def _call(tool: Tool) -> str:
    """Return a call with the separators of `json.dumps`: they leave no choice and are forced without a step."""
    box = '"[" NUMBER ", " NUMBER ", " NUMBER ", " NUMBER "]"'
    required = [_argument(name, value) for name, value in ((tool.query, "QUERY"), (tool.box, box)) if name]
    optional = [_argument(name, value) for name, value in ((tool.label, "STRING"), (tool.image, "INDEX")) if name]
    head = _literal(f'{{"name": {json.dumps(tool.name)}, "arguments": {{')
    return f'{head} {_argument_list(required, optional)} "}}}}"'


def _argument(name: str, value: str) -> str:
    return f"{_literal(json.dumps(name) + ': ')} {value}"


def _argument_list(required: list[str], optional: list[str]) -> str:
    """Return comma-separated arguments; each of the optional ones may be omitted."""
    if required:
        return ' ", " '.join(required) + "".join(f' (", " {argument})?' for argument in optional)
    first = (_argument_list([argument], optional[n + 1 :]) for n, argument in enumerate(optional))
    return f"({' | '.join(first)})?" if optional else ""


def _delimited_words(delimiters: Delimiters, forbidden: Sequence[str]) -> str:
    return f"{_literal(delimiters[0])} {_until('WORDS', delimiters[1], *forbidden)}"


def _until(body: str, closing: str, *forbidden: str) -> str:
    return f"{_without(body, closing, *forbidden)} {_literal(closing)}"


def _lazy_rule(name: str, terminal: str) -> str:
    """Return a rule that ends with the first closing delimiter instead of the longest match."""
    return f"{name}[lazy]: {name.upper()}\n{name.upper()}: {terminal}"


def _without(body: str, *forbidden: str) -> str:
    """Return a terminal for text that contains none of the given strings."""
    return f"({body} & ~(ANY ({' | '.join(_literal(text) for text in dict.fromkeys(forbidden) if text)}) ANY))"


def _forbidden(dialect: Dialect) -> tuple[str, ...]:
    """Return the delimiters that would change how the words around them are parsed."""
    return dialect.syntax.skip_until, dialect.syntax.reason[0], dialect.thinking.open


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- the vocabulary -------------------------------------------------------------------------------


def load_vocabulary(tokenizer: Tokenizer, vocab: int, eos: Collection[int]) -> LLTokenizer:
    """Return a byte-level tokenizer for llguidance, with `vocab` ids, some of which may be unused.

    Raises:
        ArtifactError: the tokenizer is not byte-level, or has more ids than there are logits.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(ids.values())
    if largest >= vocab:
        raise ArtifactError(
            f"the tokenizer has a token {largest}, but the policy has only {vocab} logits; export both together"
        )
    tokens = [b""] * vocab
    for encoded, token in zip(_token_bytes(list(ids)), ids.values(), strict=True):
        tokens[token] = encoded
    decoded = b"".join(tokens[token] for token in tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
    if decoded != _SAMPLE.encode():
        raise ArtifactError(
            f"the tokenizer is not byte-level: {_SAMPLE!r} is decoded to {decoded!r}; open the policy without a grammar"
        )
    # End tokens and the special tokens of the chat format are not text.
    special = {token for token, form in tokenizer.get_added_tokens_decoder().items() if form.special} | set(eos)
    wrapped = TokenizerWrapper(_Vocabulary(tokenizer, tokens, sorted(special), min(eos)))
    # No slices: they make masks faster and the start slower, and masks are rare (see `session._Turn`).
    return LLTokenizer(wrapped, n_vocab=vocab, eos_token=sorted(eos), slices=[])


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The interface that llguidance's `TokenizerWrapper` requires."""

    tokenizer: Tokenizer
    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, text: bytes) -> list[int]:
        return list(self.tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids)


def _byte_letters() -> Array:
    """Return the byte that each letter of a byte-level tokenizer encodes [0x145] int16; -1 for other letters.

    As `bytes_to_unicode` of GPT-2: printable Latin-1 characters encode themselves, letters from U+0100 the other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    letters = np.full(0x100 + len(others) + 1, -1, np.int16)
    letters[printable] = printable
    letters[0x100:-1] = others
    return letters


_LETTERS = _byte_letters()
_SAMPLE = "Größe of it\n"


def _token_bytes(tokens: Sequence[str]) -> list[bytes]:
    """Return the bytes of each token; all at once, as the start of a policy depends on it."""
    letters = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    found = _LETTERS[np.minimum(letters, len(_LETTERS) - 1)]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    unknown = np.append(0, np.cumsum(found < 0))  # letters before each position that encode no byte
    literal = unknown[ends] > unknown[ends - lengths]  # an added token, which is its own text
    encoded = found.astype(np.uint8).tobytes()
    parts = zip(tokens, (ends - lengths).tolist(), ends.tolist(), literal.tolist(), strict=True)
    return [token.encode() if is_literal else encoded[start:end] for token, start, end, is_literal in parts]
