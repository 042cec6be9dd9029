"""Recognise the columns of a table of pictures by their names, in the languages of common exports."""

from __future__ import annotations

import html
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from gog_edge.errors import InputError

Field: TypeAlias = Literal["file", "address", "number", "title", "caption", "text", "licence", "attribution", "detail"]
FIELDS: tuple[Field, ...] = get_args(Field)
MAPPABLE = ("file", "title", "caption", "text", "licence", "attribution")  # fields that a user may assign to columns

MAX_NAME = 120  # characters of a column name that may be known
_PREFIXES = ("dc", "dcterms", "schema", "edm", "lido", "xmp", "iptc", "object", "artwork", "item", "data", "record")
_LANGUAGE_NAMES = (
    "en eng english de deu ger german deutsch fr fra french francais es spa spanish espanol it ita italian italiano nl "
    "nld dutch pt por portuguese pl ru rus russian el greek ar arabic he zh chinese ja japanese ko korean tr uk cs sv "
    "da no fi hu 1 2 3"
)
_LANGUAGES = frozenset(_LANGUAGE_NAMES.split())
_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})  # without a decomposition
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PARENTHESIS = re.compile(r"\s*[(\[].*[)\]]\s*$")
_BLOCK_TAG = re.compile(
    r"<\s*/?\s*(?:p|br|div|li|ul|ol|h[1-6]|tr|table|blockquote)(?:\s[^<>]{0,500})?/?\s*>", re.IGNORECASE)
_INLINE_TAG = re.compile(
    r"<\s*/?\s*(?:i|em|b|strong|a|span|sup|sub|u|cite|q|font|small|abbr)(?:\s[^<>]{0,500})?/?\s*>", re.IGNORECASE)
Cells: TypeAlias = Mapping[str, str]  # by column


def plain_name(name: str) -> str:
    """Return a column name in lower case without accents and punctuation: `Bild-Datei`, `imageFile` -> `image file`."""
    spaced = _CAMEL.sub(" ", unicodedata.normalize("NFKC", name))
    plain = "".join(char for char in unicodedata.normalize("NFD", spaced.casefold()) if not _is_accent(char))
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", plain).translate(_LETTERS)).split())


def _is_accent(char: str) -> bool:
    """Return whether a character is a combining mark of Latin, Greek or Cyrillic letters."""
    return "\u0300" <= char <= "\u036f"


def _read_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plain_name(name) for name in text.split(",")))


_NAMES = tomllib.loads(Path(__file__).with_name("columns.toml").read_text(encoding="utf-8"))
FIELD_NAMES: dict[Field, tuple[str, ...]] = {field: _read_names(_NAMES[field]) for field in FIELDS}
_RANKS = {field: {name: rank for rank, name in enumerate(names)} for field, names in FIELD_NAMES.items()}


@dataclass(frozen=True)
class Roles:
    """The columns of each field, the most specific first, and the columns that are not used."""

    columns: Mapping[Field, tuple[str, ...]]
    unused: tuple[str, ...]

    @property
    def naming(self) -> tuple[str, ...]:
        """Return the columns that may name a picture."""
        return (*self.columns["file"], *self.columns["address"], *self.columns["number"])

    def with_file(self, column: str) -> Roles:
        """Return the roles with one more column that names the picture."""
        columns = {**self.columns, "file": (column,)}
        return Roles(columns, tuple(name for name in self.unused if name != column))


def find_roles(columns: Sequence[str], assigned: Mapping[str, str] | None = None) -> Roles:
    """Assign columns to fields by their names; `assigned` are column names by field that the user gives."""
    given = {plain_name(column): cast(Field, field) for field, column in (assigned or {}).items()}
    ranked: dict[Field, list[tuple[int, str]]] = {field: [] for field in FIELDS}
    for column in columns:
        if plain_name(column) in given:
            ranked[given[plain_name(column)]].append((-1, column))
            continue
        for field, rank in _matches(column):
            ranked[field].append((rank, column))
    found = {field: tuple(column for _, column in sorted(pairs, key=lambda pair: pair[0]))
             for field, pairs in ranked.items()}
    for field in given.values():  # only the column that the user gives
        found[field] = tuple(column for rank, column in ranked[field] if rank == -1)
    used = {column for names in found.values() for column in names}
    return Roles(found, tuple(column for column in columns if column not in used))


def parse_columns(assignments: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return (field, column) of texts such as `file=Inv.-Nr.`.

    Raises:
        InputError: a text has another form, or a field is unknown or given twice.
    """
    pairs = [(field.strip().lower().replace("license", "licence"), column.strip()) for field, _, column in
             (text.partition("=") for text in assignments)]
    for (name, column), text in zip(pairs, assignments, strict=True):
        if name not in MAPPABLE or not column:
            raise InputError(f"a column must be given as FIELD=NAME, where FIELD is one of {', '.join(MAPPABLE)}; got "
                              f"'{text}'")
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"each field can be given one column, got {', '.join(assignments)}")
    return tuple(pairs)


def _matches(column: str) -> list[tuple[Field, int]]:
    for name in _variants(column):
        if found := [(field, ranks[name]) for field, ranks in _RANKS.items() if name in ranks]:
            return found
    return []


def _variants(column: str) -> Iterable[str]:
    """Yield the plain forms of a column name: whole, and without a language, a prefix or the path of a JSON object."""
    if len(column) > MAX_NAME:
        return
    for name in dict.fromkeys((column, _PARENTHESIS.sub("", column))):
        words = plain_name(name).split()
        yield " ".join(words)
        if len(words) > 1 and words[-1] in _LANGUAGES:
            words = words[:-1]
            yield " ".join(words)
        if len(words) > 1 and words[0] in _PREFIXES:
            yield " ".join(words[1:])
    if "." in column:
        last = column.rpartition(".")[2]
        if plain_name(last) in ("filename", "file name"):
            yield "file"


def field_value(cells: Cells, columns: Sequence[str]) -> str:
    """Return the first of some cells that is not blank."""
    return next((value for column in columns if (value := cells.get(column, "").strip())), "")


def joined_values(cells: Cells, columns: Sequence[str], separator: str) -> str:
    """Return the distinct values of some cells."""
    values = (cells.get(column, "").strip() for column in columns)
    return separator.join(dict.fromkeys(value for value in values if value))


def without_markup(text: str) -> str:
    """Return a cell without the HTML tags and entities that exports of web pages contain."""
    if "<" in text:
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", text))
    return html.unescape(text) if re.search(r"&(?:#\d+|#x[0-9a-fA-F]+|[a-zA-Z]{2,8});", text) else text
