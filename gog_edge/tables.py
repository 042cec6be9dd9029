"""TOML tables -> dataclasses, checked by the dataclass's own annotations."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gog_edge.errors import DialectError

T = TypeVar("T")


def build(kind: type[T], table: Any, name: str) -> T:
    """A dataclass from a table; DialectError names the first key that is missing, unknown or of a wrong kind."""
    if not isinstance(table, dict):
        raise DialectError(f"[{name}] is {table!r}, which is no table")
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise DialectError(f"[{name}] has an unknown key '{key}'; known are {', '.join(hints)}")
    values = {key: _value(value, hints[key], f"{name}.{key}") for key, value in table.items()}
    for field in fields(kind):  # type: ignore[arg-type]  # every caller gives a dataclass
        if field.name in values:
            _check(field.name, values[field.name], hints[field.name])
        elif field.default is MISSING:
            raise DialectError(f"the field '{field.name}' is missing from [{name}]")
    return kind(**values)


def at_least(least: float, **values: float | None) -> None:
    """DialectError for the first value below `least`; None is no value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise DialectError(f"{name} is {value!r}, which is less than {least}")


def _value(value: Any, hint: Any, name: str) -> Any:
    """Lists become tuples, lists of tables tuples of dataclasses."""
    if not isinstance(value, list):
        return value
    inner = get_args(hint)
    if len(inner) == 2 and inner[1] is Ellipsis and is_dataclass(inner[0]) and isinstance(inner[0], type):
        return tuple(build(inner[0], item, name) for item in value)
    return tuple(value)


def _check(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise DialectError(f"{name} {value!r} is none of {', '.join(get_args(hint))}")
    elif not _fits(value, hint):
        raise DialectError(f"{name} is {value!r}, which is no {_named(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in arguments if one is not NoneType)
    if get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, tuple) and all(isinstance(one, arguments[0]) for one in value)
    if get_origin(hint) is tuple:  # of marks: an empty one would be found everywhere
        texts = isinstance(value, tuple) and all(isinstance(one, str) and one != "" for one in value)
        return texts and len(value) == len(arguments)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
