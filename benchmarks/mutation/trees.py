"""Structural mutations of JSON and TOML: values of other types, keys lost, doubled and added, damaged text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from datetime import date
from random import Random
from typing import Any, TypeAlias

from benchmarks.mutation.texts import mutate_bytes

Mutator: TypeAlias = Callable[[Random, bytes], bytes]
DEPTHS = (60, 900, 100_000)  # of nested lists
LONG = 200_000  # characters
TREE_SHARE = 0.8  # of mutations that change the tree; the others change the text


class Raw(str):
    """Text that is written as it is, in place of a value."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object as (key, value) pairs, so that a key may occur twice."""


# (in JSON, in TOML); None: the format has no such value.
_LITERALS: tuple[tuple[str | None, str | None], ...] = (
    ("null", None), ("true", "true"), ("false", "false"), ("0", "0"), ("-0", "-0"), ("-1", "-1"), ("1", "1"),
    ("0.5", "0.5"), ("-1.5e300", "-1.5e300"), ("1e999", "inf"), ("-1e999", "-inf"), ("NaN", "nan"),
    ("Infinity", "inf"), ("1e-400", "1e-400"), ("2147483648", "2147483648"), ("-2147483649", "-2147483649"),
    ("9223372036854775808", "9223372036854775808"), ("1" + "0" * 40, "1" + "0" * 40), ("7" * 400, "7" * 400),
    ("7" * 5000, "7" * 5000), ('""', '""'), ('" "', '" "'), ('"0"', '"0"'), ('"nan"', '"nan"'), ('"1e999"', '"1e999"'),
    ('"\\ud800"', '"\\ud800"'), ('"a\\u0000b"', '"a\\u0000b"'), ('"\\u001b[2J\\u2028"', '"\\u001b[2J\\u2028"'),
    ('"../../../etc/passwd"', '"../../../etc/passwd"'), ('"/dev/zero"', '"/dev/zero"'), ('"."', '"."'),
    ('"a//b/../c"', '"a//b/../c"'), ('"{}"', '"{}"'), ('"%s"', '"%s"'), ("[]", "[]"), ("{}", "{}"), ("[[]]", "[[]]"),
    ("[null]", "[{}]"), ('{"": null}', '{"" = 0}'), ('[1, "2", null]', '[1, "2", 1979-05-27]'), ("[NaN]", "[nan]"),
    (None, "1979-05-27"), (None, "07:32:00"), (None, "1979-05-27T07:32:00Z"), (None, "0x7fffffff"),
)  # fmt: skip


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Return a JSON file with one or two changes."""
    if rng.random() > TREE_SHARE:
        return mutate_bytes(rng, data)
    tree = json.loads(data, object_pairs_hook=Pairs)
    for _ in range(rng.choice((1, 1, 1, 2))):
        tree = _mutate_tree(rng, tree, toml=False)
    return to_json(tree).encode("utf-8", "surrogatepass")


def mutate_toml(rng: Random, data: bytes) -> bytes:
    """Return a TOML file with one or two changes; tables are written in one line."""
    if rng.random() > TREE_SHARE:
        return mutate_bytes(rng, data, comment=b"#")
    tree: Any = _pairs(tomllib.loads(data.decode()))
    if rng.random() < 0.02:
        return data + b"\n" + b".".join([b"a"] * rng.choice((1_000, 100_000))) + b" = 1\n"
    for _ in range(rng.choice((1, 1, 1, 2))):
        tree = _mutate_tree(rng, tree, toml=True)
    if not isinstance(tree, Pairs):
        return str(tree).encode("utf-8", "surrogatepass")
    return "".join(f"{json.dumps(key)} = {_to_toml(value)}\n" for key, value in tree).encode("utf-8", "surrogatepass")


def mutate_json_lines(rng: Random, data: bytes) -> bytes:
    """Return a file of JSON lines with one line changed, lost, doubled or moved."""
    if rng.random() > TREE_SHARE:
        return mutate_bytes(rng, data)
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    change = rng.randrange(8)
    if change == 0:
        del lines[place]
    elif change == 1:
        lines.insert(place, lines[place])
    elif change == 2:
        lines.insert(place, rng.choice((b"", b"null", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000)))
    else:
        lines[place] = mutate_json(rng, lines[place]).replace(b"\n", b" ")
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def to_json(tree: Any) -> str:
    """Return a tree of `Pairs`, lists, plain values and `Raw` text as JSON."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(to_json, tree)) + "]"
    return json.dumps(tree)


def _to_toml(tree: Any) -> str:
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)} = {_to_toml(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_to_toml, tree)) + "]"
    return str(tree) if isinstance(tree, date) else json.dumps(tree)


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, _pairs(item)) for key, item in value.items())
    return [_pairs(item) for item in value] if isinstance(value, list) else value


# --- changes of a tree --------------------------------------------------------------------------


def _mutate_tree(rng: Random, tree: Any, *, toml: bool) -> Any:
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return _other_value(rng, tree, toml=toml)
    owner, key = _choose(rng, places)
    change = rng.randrange(10)
    if change < 6:  # another value
        value = owner[key][1] if isinstance(owner, Pairs) else owner[key]
        new = _other_value(rng, value, toml=toml)
        owner[key] = (owner[key][0], new) if isinstance(owner, Pairs) else new
    elif change == 6:
        del owner[key]
    elif change == 7 and isinstance(owner, Pairs):
        owner.insert(rng.randrange(len(owner) + 1), _extra_pair(rng, owner, key, toml=toml))
    elif change == 7:
        owner.insert(key, owner[key])
    elif change == 8 and isinstance(owner, Pairs):
        owner[key] = (_other_key(rng, owner[key][0]), owner[key][1])
    elif isinstance(owner, Pairs):  # swap the values of two keys
        other = rng.randrange(len(owner))
        owner[key], owner[other] = (owner[key][0], owner[other][1]), (owner[other][0], owner[key][1])
    else:
        rng.shuffle(owner)
    return tree


def _places(tree: Any) -> Iterator[tuple[list[Any], int]]:
    """Yield (container, index) of every value below the root."""
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            yield tree, number
            yield from _places(item[1] if isinstance(tree, Pairs) else item)


def _choose(rng: Random, places: list[tuple[list[Any], int]]) -> tuple[list[Any], int]:
    """Choose a container first, and a place in it then: a list of thousands of numbers is one container."""
    owners = list({id(owner): owner for owner, _ in places}.values())
    owner = rng.choice(owners)
    return owner, rng.randrange(len(owner))


def _other_value(rng: Random, value: Any, *, toml: bool) -> Any:
    change = rng.randrange(12)
    if change == 0:
        return [value]
    if change == 1:
        return Pairs([("a", value)])
    if change == 2:
        depth = rng.choice(DEPTHS)
        return Raw("[" * depth + "]" * depth)
    if change == 3 and isinstance(value, str):
        return rng.choice(
            (value + value, value[:-1], value.upper(), f" {value}", value + "\n", "a" * LONG, "../" + value)
        )
    if change == 3 and isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice((-value, value + 1, value * 2, value / 3, str(value), float(value), 1 - value))
    if change == 3 and isinstance(value, list) and value:
        return rng.choice((value[:-1], value[1:], value + value, value * 100, type(value)(reversed(value))))
    return Raw(rng.choice([literal for pair in _LITERALS if (literal := pair[toml]) is not None]))


def _extra_pair(rng: Random, owner: Pairs, key: int, *, toml: bool) -> tuple[str, Any]:
    name, value = owner[key]
    new = rng.choice((name, name, "unknown", "", "a" * 1_000, "__class__", "self", "\u0000", name.upper()))
    return new, rng.choice((value, _other_value(rng, value, toml=toml)))


def _other_key(rng: Random, name: str) -> str:
    return rng.choice((name.upper(), name + "s", name[:-1], "", "a" * 1_000, name + " ", "\ud800", "é" + name, "0"))
