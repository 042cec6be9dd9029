"""Validate TOML tables and JSON objects against the annotations of a dataclass.

Every table that gog_edge reads (bundle.toml, dialects, manifests) is described by a dataclass. Bounds are written with
`annotated_types`, for example ``turns: Annotated[int, Ge(1)] = 6``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen

from gog_edge.errors import GogEdgeError

T = TypeVar("T")

Name = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Dimension = Annotated[int, Ge(1), Le(2**24)]  # of an array or a model
MAX_INTEGER = 2**63 - 1  # of TOML, NumPy, SQLite
SHOWN_CHARS = 200  # of a value in a message
_TYPE_NAMES = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


def build(kind: type[T], table: Any, name: str, *, error: type[GogEdgeError], where: str = "",
          known_only: bool = False) -> T:
    """Return an instance of the dataclass `kind` with the values of a TOML table or a JSON object.

    Args:
        kind: its fields are the keys of the table. A field may be a str, int, float, bool, Literal, optional, tuple,
            mapping, dataclass, or a tuple of dataclasses; `Annotated` bounds are checked. Integers have 64 bits, and
            become floats where a float is expected; floats are finite.
        table: the parsed table.
        name: the name of the table in messages, for example "limits".
        error: the class of the error that is raised.
        where: the file, as a prefix of messages.
        known_only: ignore the keys of the table, but not of tables in it, that are no fields of `kind`.

    Raises:
        GogEdgeError: of class `error`; names the first key that is missing, unknown, of a wrong type or out of bounds.
    """
    try:
        if known_only and isinstance(table, Mapping):
            names = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
            table = {key: value for key, value in table.items() if key in names}
        return _build(kind, table, name)
    except _Invalid as exc:
        raise error(f"{where}: {exc}" if where else str(exc)) from None


def shown(value: Any) -> str:
    """Return the representation of a value for a message, shortened to about SHOWN_CHARS characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text):,} characters)"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


class _Invalid(Exception):
    """A table that does not match its dataclass."""


def _build(kind: type[T], table: Any, name: str) -> T:
    label = f"[{name}]" if name else "the file"
    if not isinstance(table, Mapping):
        raise _Invalid(f"{label} must be a table, got {shown(table)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # callers pass dataclasses
    for key in table:
        if key not in known:
            raise _Invalid(f"{label} has an unknown key {shown(key)}; known keys are {', '.join(known)}")
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in table:
            path = f"{name}.{field.name}" if name else field.name
            values[field.name] = _value(table[field.name], hints[field.name], path, f"{label} '{field.name}'")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _Invalid(f"{label} requires the key '{field.name}', which is missing")
    return kind(**values)


def _value(value: Any, hint: Any, path: str, label: str) -> Any:
    """Return a value converted to its annotation: lists become tuples, tables become dataclasses."""
    if get_origin(hint) is Annotated:
        inner, *bounds = get_args(hint)
        converted = _value(value, inner, path, label)
        for problem in _violations(converted, bounds):
            raise _Invalid(f"{label} must be {problem}, got {shown(value)}")
        return converted
    if get_origin(hint) in (UnionType, Union):
        if value is None and NoneType in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not NoneType]
        return _value(value, next((one for one in options if _matches(value, one)), options[0]), path, label)
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, path)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return _tuple(value, get_args(hint), path, label)
    if not _matches(value, hint):
        raise _Invalid(f"{label} must be {_describe(hint, value)}, got {shown(value)}")
    if hint is float:
        return float(value)
    if get_origin(hint) in (dict, Mapping):
        _, item = get_args(hint)
        return {key: _value(one, item, f"{path}.{key}", f"{label}[{shown(key)}]") for key, one in value.items()}
    return value


def _tuple(value: list[Any] | tuple[Any, ...], items: tuple[Any, ...], path: str, label: str) -> tuple[Any, ...]:
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_value(one, items[0], path, f"{label}[{n}]") for n, one in enumerate(value))
    if len(value) != len(items):
        raise _Invalid(f"{label} must be a list of {len(items)} values, got {shown(value)}")
    pairs = enumerate(zip(value, items, strict=True))
    return tuple(_value(one, item, path, f"{label}[{n}]") for n, (one, item) in pairs)


def _matches(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple)
    if hint is Any:
        return True
    if get_origin(hint) is not None or is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is float:
        return (type(value) is int and abs(value) <= MAX_INTEGER) or (type(value) is float and math.isfinite(value))
    return type(value) is hint and (hint is not int or -MAX_INTEGER <= value <= MAX_INTEGER)


def _describe(hint: Any, value: Any) -> str:
    if hint in (int, float) and type(value) is int:
        return "a number of at most 64 bits"
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])
    if get_origin(hint) is tuple:
        return "a list"
    return _TYPE_NAMES.get(hint, "a table")


def _violations(value: Any, bounds: list[Any]) -> Iterator[str]:
    """Yield what a value must be, for each bound that it violates; None, of an optional field, violates none."""
    for bound in bounds if value is not None else ():
        match bound:
            case Ge(ge) if value < ge:
                yield f"at least {ge}"
            case Gt(gt) if not value > gt:
                yield f"greater than {gt}"
            case Le(le) if value > le:
                yield f"at most {le}"
            case MinLen(length) if len(value) < length:
                yield "a non-empty string" if isinstance(value, str) else f"a list of at least {length}"
