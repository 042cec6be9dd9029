"""Renders `{{convert}}` and its relatives with the rounding rules of Module:Convert.

Options and rounding: https://en.wikipedia.org/wiki/Template:Convert/doc. Symbols of units are used throughout, as with
`abbr=on`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gog_edge.indexing.sources.mediawiki.templates.numbers import (
    MINUS,
    Number,
    format_number,
    parse_number,
    round_half_up,
)
from gog_edge.indexing.sources.mediawiki.templates.units import Unit, composite_output, parts_of, unit

_RANGES = {
    "-": "–", "–": "–", "—": "–", "to": " to ", "to(-)": "–", "and": " and ", "and(-)": " and ", "&": " & ",
    "or": " or ", "by": " by ", "x": " × ", "×": " × ", "*": " × ", "xx": " × ", "by(x)": " × ", "x(y)": " × ",
    "+": " + ", "+/-": " ± ", "±": " ± ", "&plusmn;": " ± ", ",": ", ", "to about": " to about ", "-to-": " to ",
    "–to–": " to ", "through": " through ", "upto": " up to ", "between": " and ",
}  # fmt: skip
_FUDGE = 1e-14
_MAX_RANGE = 8  # values of a range
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class _Input:
    values: tuple[Number, ...]
    words: tuple[str, ...]  # between the values, as displayed
    unit: Unit
    shown: str  # the whole input with its unit
    subunits: int = 0  # 12 for feet and inches: the value is in the smaller unit
    inches: bool = False  # the smaller unit is the inch


def convert(positional: Sequence[str], options: dict[str, str], language: str) -> str | None:
    """Return a value with its conversions, such as `120 km (75 mi)`.

    Args:
        positional: the arguments without a name: value, unit, output unit, rounding; or a range of values.
        options: the arguments with a name.
        language: code of the wiki's language, for separators.

    Returns:
        None if the value or its unit cannot be read. A value whose output unit is not known is not converted.
    """
    read = _read_input(list(positional), language)
    if read is None:
        return None
    source, rest = read
    outputs, rest = _read_outputs(rest, source.unit)
    digits = _digits(rest, options)
    results = [shown for code in outputs if (shown := _output(source, code, digits, options, language))]
    shown = source.shown
    middle = rest and options.get("adj") == "mid" and rest[0].strip().lstrip("-")
    if middle:
        shown = f"{shown} {middle}"
    return _layout(shown, results, options)


def _layout(shown: str, results: list[str], options: dict[str, str]) -> str:
    style = options.get("disp", "")
    if not results:
        return shown
    if style in ("out", "output only", "number", "output number only"):
        return "; ".join(results)
    if options.get("order") == "flip" or style in ("flip", "flip2"):
        shown, results = results[0], [*results[1:], shown]
    joined = "; ".join(results)
    if style == "or":
        return f"{shown} or {joined}"
    if style in ("comma", ",", "slash", "/"):
        return f"{shown}, {joined}"
    return f"{shown} [{joined}]" if style in ("sqbr", "x") else f"{shown} ({joined})"


def _read_input(arguments: list[str], language: str) -> tuple[_Input, list[str]] | None:
    if len(arguments) < 2:
        return None
    first = parse_number(arguments[0], language)
    if first is None:
        return None
    values, words, at = [first], list[str](), 1
    while at + 1 < len(arguments) and len(values) < _MAX_RANGE:
        word, number = _RANGES.get(arguments[at].strip()), parse_number(arguments[at + 1], language)
        if word is None or number is None:
            break
        words.append(word)
        values.append(number)
        at += 2
    source = unit(arguments[at]) if at < len(arguments) else None
    if source is None:
        return None
    if len(values) == 1 and at + 2 < len(arguments) and (both := _composite(first, arguments[at : at + 3], language)):
        return both, arguments[at + 3 :]
    shown = _quantity([value.shown for value in values], words, source)
    return _Input(tuple(values), tuple(words), source, shown), arguments[at + 1 :]


def _composite(first: Number, rest: list[str], language: str) -> _Input | None:
    """Return the value of arguments such as `5|ft|10|in`, whose first number is given."""
    larger, count, smaller = rest
    second, ratio = parse_number(count, language), parts_of(larger, smaller)
    small, large = unit(smaller), unit(larger)
    if second is None or not ratio or small is None or large is None:
        return None
    total = abs(first.value) * ratio + second.value
    number = Number(math.copysign(total, first.value), second.clean, "", second.denominator)
    shown = f"{first.shown} {large.symbol} {second.shown} {small.symbol}"
    return _Input((number,), (), small, shown, ratio, small.symbol == "in")


def _read_outputs(rest: list[str], source: Unit) -> tuple[list[str], list[str]]:
    """Return the codes of the output units and the remaining arguments."""
    first = rest[0].strip() if rest else ""
    if not first or _INTEGER.fullmatch(first):
        return source.default.split(), rest[1:] if rest and not first else rest
    if unit(first) or composite_output(first):
        return [first], rest[1:]
    return [code for code in re.split(r"[\s+]+", first) if code], rest[1:]


def _digits(rest: list[str], options: dict[str, str]) -> tuple[str, int] | None:
    """Return how results are rounded: ("decimals", n), ("figures", n), ("steps", n), or None for the default."""
    for text in rest[:2]:
        if _INTEGER.fullmatch(text.strip()):
            return "decimals", max(-12, min(int(text), 12))
    for name, kind in (("sigfig", "figures"), ("round", "steps")):
        if options.get(name, "").strip().isdecimal():
            return kind, max(1, min(int(options[name]), 100))
    return None


def _output(source: _Input, code: str, digits: tuple[str, int] | None, options: dict[str, str], language: str) -> str:
    """Return the converted values with their unit; empty if they cannot be converted to it."""
    if both := composite_output(code):
        return _composite_output(source, *both, digits, language)
    target = unit(code)
    if target is None or target.kind != source.unit.kind:
        return ""
    results = [_result(number, source.unit, target) for number in source.values]
    if any(not math.isfinite(result) for result in results):
        return ""
    pairs = zip(source.values, results, strict=True)
    defaults = [_default_precision(number, result, source, target) for number, result in pairs]
    shown = [_rounded(result, digits, max(defaults), language) for result in results]
    if options.get("disp") in ("number", "output number only"):
        return _quantity(shown, source.words, None)
    return _quantity(shown, source.words, target)


def _result(number: Number, source: Unit, target: Unit) -> float:
    if source.inverse != target.inverse:
        return 1 / (number.value * source.scale * target.scale) if number.value else math.inf
    return (number.value - source.offset) * (source.scale / target.scale) + target.offset


def _composite_output(
    source: _Input, large: Unit, small: Unit, ratio: int, digits: tuple[str, int] | None, language: str
) -> str:
    if large.kind != source.unit.kind or len(source.values) > 1:
        return ""
    number = source.values[0]
    total = _result(number, source.unit, small)
    precision = max(0, _default_precision(number, total, source, small))
    if digits and digits[0] == "decimals":
        precision = max(0, digits[1])
    whole, rest = divmod(float(round_half_up(abs(total), precision)), ratio)
    first, second = format_number(str(int(whole)), language), format_number(round_half_up(rest, precision), language)
    return f"{MINUS if total < 0 else ''}{first} {large.symbol} {second} {small.symbol}"


def _default_precision(number: Number, result: float, source: _Input, target: Unit) -> int:
    """Return the number of decimals by which Module:Convert rounds a result: about the precision of the input."""
    if number.denominator:
        given = max(math.log10(number.denominator), 1.0)
    else:
        given = float(_decimals(number.clean, bool(source.subunits)))
    if source.unit.kind == "temperature":
        kelvin = abs((number.value - source.unit.offset) * source.unit.scale)
        least = 2 if kelvin < 1e-8 else 2 - math.floor(math.log10(kelvin) + _FUDGE)
        return max(math.floor(given), least)
    size, value = abs(result), abs(number.value)
    if not value or not size:
        return 0
    if target.more_precision and number.value == int(number.value):
        adjust = -math.log10(source.unit.scale)
    elif source.inches:
        adjust = math.log10(target.scale) + 2
    else:
        adjust = math.log10(value / size)
    return max(math.floor(given + adjust + math.log10(2)), 1 - math.floor(math.log10(size) + _FUDGE))


def _decimals(clean: str, keep_zeros: bool) -> int:
    """Return the number of decimals of a number as written; trailing zeros of a whole number count as negative."""
    mantissa, _, exponent = clean.lower().partition("e")
    whole, point, decimals = mantissa.partition(".")
    count = len(decimals) if point else 0 if keep_zeros else -(len(whole) - len(whole.rstrip("0")))
    return count - int(exponent or 0)


def _rounded(result: float, digits: tuple[str, int] | None, default: int, language: str) -> str:
    kind, count = digits or ("decimals", default)
    if kind == "figures":
        count = count - 1 - math.floor(math.log10(abs(result)) + _FUDGE) if result else 0
    if kind == "steps":
        return format_number(str(int(abs(result) / count + 0.5) * count * (1 if result >= 0 else -1)), language)
    return format_number(round_half_up(result, count), language)


def _quantity(values: Sequence[str], words: Sequence[str], named: Unit | None) -> str:
    """Return values and the words between them with a unit; each value of a product has its unit."""
    repeat = " × " in words
    parts = list[str]()
    for at, value in enumerate(values):
        last = at == len(values) - 1
        symbol = named.symbol_after(value) if named and (last or repeat) else ""
        parts.append(value + ("" if symbol.startswith("/") or not symbol else " ") + symbol)
        parts.append("" if last else words[at])
    return "".join(parts)
