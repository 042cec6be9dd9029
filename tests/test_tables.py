"""Tables and JSON objects against the annotations of a dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le, MinLen

from gog_edge.errors import BundleError
from gog_edge.tables import Count, Name, build, shown


@dataclass(frozen=True)
class Part:
    path: Name
    size: Count = 0


@dataclass(frozen=True)
class Whole:
    name: str
    share: Annotated[float, Ge(0), Le(1)]
    kind: Literal["a", "b"] = "a"
    limit: Annotated[int, Ge(1)] | None = None
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    counts: dict[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    some: Annotated[tuple[int, ...], MinLen(1)] = (1,)
    anything: Any = None


GOOD = {"name": "x", "share": 1, "kind": "b", "limit": None, "parts": [{"path": "p", "size": 3}],
        "pair": [2**63 - 1, 2], "counts": {"n": 1},
        "shapes": {"x": [[1, 2], []]}, "some": [5], "anything": {"free": [None]}}  # fmt: skip


def test_values_are_converted_to_their_annotations():
    whole = build(Whole, GOOD, "", error=BundleError)
    assert whole == Whole("x", 1.0, "b", None, (Part("p", 3),), (2**63 - 1, 2.0), {"n": 1}, {"x": ((1, 2), ())}, (5,),
                          {"free": [None]})  # fmt: skip
    assert type(whole.share) is float and type(whole.pair[1]) is float


@pytest.mark.parametrize("change, said", [
    ({"name": None}, "'name' must be a string, got None"), ({"name": ["x"]}, "must be a string"),
    ({"share": True}, "'share' must be a finite number, got True"), ({"share": float("nan")}, "finite number, got nan"),
    ({"share": float("inf")}, "finite number"), ({"share": "0.5"}, "finite number"), ({"share": 1.5}, "at most 1"),
    ({"share": 10**400}, "a number of at most 64 bits, got 1000"),
    ({"share": 16**5000}, "64 bits, got a value of type int"),
    ({"kind": "c"}, "one of 'a', 'b', got 'c'"), ({"kind": ["a"]}, "one of 'a', 'b'"),
    ({"limit": 0}, "at least 1, got 0"),
    ({"limit": 2**63}, "at most 64 bits"), ({"limit": 1.0}, "an integer, got 1.0"),
    ({"limit": True}, "an integer, got True"),
    ({"parts": {}}, "'parts' must be a list, got {}"), ({"parts": [None]}, r"\[parts\] must be a table, got None"),
    ({"parts": [{"path": ""}]}, r"\[parts\] 'path' must be a non-empty string"),
    ({"parts": [{}]}, "requires the key 'path'"),
    ({"parts": [{"path": "p", "size": -1}]}, "'size' must be at least 0"),
    ({"parts": [{"path": 1}]}, "must be a string"),
    ({"parts": [{"path": "p", "other": 1}]}, "unknown key 'other'"), ({"pair": [1]}, "a list of 2 values"),
    ({"pair": [1, "2"]}, r"'pair'\[1\] must be a finite number"),
    ({"counts": {"n": 1.5}}, r"'counts'\['n'\] must be an integer"),
    ({"counts": [1]}, "'counts' must be a table"),
    ({"shapes": {"x": [1]}}, r"'shapes'\['x'\]\[0\] must be a list, got 1"),
    ({"some": []}, "a list of at least 1"), ({"more": 1}, "unknown key 'more'; known keys are name, share"),
    ({"name": 3, "counts": "y" * 9999}, "'name' must be a string, got 3"),
    ({"pair": "y" * 9999}, r"got 'y+\.\.\. \(10,001"),
])  # fmt: skip
def test_the_first_invalid_value_is_named(change, said):
    with pytest.raises(BundleError, match=said) as refused:
        build(Whole, GOOD | change, "", error=BundleError, where="file")
    assert str(refused.value).startswith("file: ") and len(str(refused.value)) < 400


@pytest.mark.parametrize("table", [None, [], "x", 1, [("name", "x")]])
def test_a_table_is_required(table):
    with pytest.raises(BundleError, match="the file must be a table, got"):
        build(Whole, table, "", error=BundleError, known_only=True)


def test_further_keys_are_ignored_on_request_but_not_below():
    assert build(Part, {"path": "p", "of_tomorrow": 1}, "", error=BundleError, known_only=True) == Part("p")
    with pytest.raises(BundleError, match="unknown key 'of_tomorrow'"):
        build(Whole, GOOD | {"parts": [{"path": "p", "of_tomorrow": 1}]}, "", error=BundleError, known_only=True)


def test_values_are_shown_shortly():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("x") == "'x'" and shown(16**5000) == "a value of type int" and shown(deep) == "a value of type list"
    assert len(shown(list(range(10_000)))) < 250
