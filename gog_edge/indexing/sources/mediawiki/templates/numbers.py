"""Reads and writes numbers in the style of a wiki's language: separators, fractions, roman numerals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

NBSP = "\u00a0"
MINUS = "\u2212"
FRACTION_SLASH = "\u2044"
# By language: group separator, decimal mark, digits from which numbers are grouped. Others keep numbers as they are
# written in the page.
_STYLES: dict[str, tuple[str, str, int]] = {
    **dict.fromkeys(["en", "simple", "sco", "zh", "ja", "ko", "th", "he", "ur", "ms", "cy", "ga", "ta", "te", "ml",
        "kn", "mr"], (",", ".", 4)),
    **dict.fromkeys(["de", "nl", "da", "id", "tr", "el", "ro", "hr", "sl", "is", "vi", "gl", "ca", "eu", "az", "lb",
        "nds", "sr", "bs", "sh", "mk"], (".", ",", 4)),
    **dict.fromkeys(["fr", "it", "cs", "sk", "sv", "no", "nb", "nn", "fi", "kk", "hy", "et", "lt", "lv", "ka", "eo"],
        (NBSP, ",", 4)),
    **dict.fromkeys(["pl", "es", "pt", "hu", "bg", "ru", "uk", "be"], (NBSP, ",", 5)),
}
_NUMBER = re.compile(r"[+\-−–]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][+\-−]?\d+)?")
_MIXED = re.compile(r"([+\-−–])?(?:(\d+)[+\-\s]+)?(\d+)//?(\d+)")
_GROUPS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_DECIMAL_COMMA = re.compile(r"[+\-−–]?\d+,\d+")
_SUPERSCRIPTS = str.maketrans("0123456789+-−=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_SUBSCRIPTS = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_SCRIPTED = re.compile(r"[0-9+\-−=()ni\s]+")
_ROMAN = (("M", 1000), ("CM", 900), ("D", 500), ("CD", 400), ("C", 100), ("XC", 90), ("L", 50), ("XL", 40), ("X", 10),
          ("IX", 9), ("V", 5), ("IV", 4), ("I", 1))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a page. `clean` is its absolute value in ASCII without group separators, as it was written."""

    value: float
    clean: str
    shown: str  # in the style of the language, with a minus sign
    denominator: int = 0  # of a fraction


def parse_number(text: str, language: str) -> Number | None:
    """Return the number that a text consists of, such as `1,234.5`, `-5`, `1.2e3` or `9+1/2`; None for other texts."""
    text = text.strip().replace("&minus;", MINUS).replace(NBSP, "").replace("\u2009", "")
    if mixed := _MIXED.fullmatch(text):
        return _fraction(*mixed.groups())
    if _DECIMAL_COMMA.fullmatch(text) and decimal_mark(language) == "," and not _GROUPS.fullmatch(text.lstrip("+-−–")):
        text = text.replace(",", ".")
    if not _NUMBER.fullmatch(text):
        return None
    bare = text.lstrip("+-−–")
    if "," in bare and not _GROUPS.match(bare):
        return None
    sign, clean = "-" if text[0] in "-−–" else "", bare.replace(",", "").replace("−", "-")
    value = float(sign + clean)
    return Number(value, clean, (MINUS if sign else "") + format_number(clean, language))


def _fraction(sign: str | None, whole: str | None, numerator: str, denominator: str) -> Number | None:
    if not int(denominator):
        return None
    total = Fraction(int(numerator), int(denominator)) + int(whole or 0)
    shown = f"{whole or ''}{' ' if whole else ''}{numerator}{FRACTION_SLASH}{denominator}"
    negative = bool(sign) and sign != "+"
    return Number(float(-total if negative else total), f"{float(total):g}", (MINUS if negative else "") + shown,
                  int(denominator))  # fmt: skip


def decimal_mark(language: str) -> str:
    """Return the decimal mark of a language."""
    return _STYLES.get(language, ("", ".", 0))[1]


def format_number(clean: str, language: str) -> str:
    """Return a number of ASCII digits with the separators of a language; `1.2e3` becomes `1.2×10³`."""
    if language not in _STYLES:
        return clean
    group, mark, minimum = _STYLES[language]
    mantissa, _, exponent = clean.lower().partition("e")
    whole, point, decimals = mantissa.partition(".")
    sign = whole[:1] if whole[:1] in "+-" else ""
    whole = whole.removeprefix(sign) if sign else whole
    if len(whole) >= minimum:
        head = len(whole) % 3
        whole = group.join(filter(None, (whole[:head], *(whole[at : at + 3] for at in range(head, len(whole), 3)))))
    text = sign.replace("-", MINUS) + whole + (mark + decimals if point and decimals else "")
    return text + (f"×10{superscript(exponent)}" if exponent else "")


def parse_formatted(text: str, language: str) -> str:
    """Return a formatted number in ASCII digits (`{{formatnum:...|R}}`)."""
    group, mark, _ = _STYLES.get(language, (",", ".", 0))
    return text.replace(group, "").replace(" ", "").replace(mark, ".").replace(MINUS, "-")


def superscript(text: str) -> str:
    """Return raised text: digits and signs as superscript characters, other text unchanged."""
    text = text.strip()
    return text.translate(_SUPERSCRIPTS) if text and _SCRIPTED.fullmatch(text) else text


def subscript(text: str) -> str:
    """Return lowered text: digits and signs as subscript characters, other text unchanged."""
    text = text.strip()
    return text.translate(_SUBSCRIPTS) if text and _SCRIPTED.fullmatch(text) and not set(text) & set("ni") else text


def ordinal(number: int) -> str:
    """Return an English ordinal: 1st, 2nd, 3rd, 4th, 11th."""
    teen = 10 <= abs(number) % 100 <= 20
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(abs(number) % 10, 'th')}"


def roman(number: int) -> str:
    """Return a roman numeral; empty outside of 1 to 3999."""
    if not 0 < number < 4000:
        return ""
    text = ""
    for letters, value in _ROMAN:
        count, number = divmod(number, value)
        text += letters * count
    return text


def round_half_up(value: float, digits: int) -> str:
    """Return a value rounded to a number of decimals, or to tens if negative, in ASCII digits.

    2e-14 is added, as Module:Convert does, so that 0.285 is rounded as a reader expects.
    """
    if digits >= 0:
        return f"{value + 2e-14 if value >= 0 else value - 2e-14:.{digits}f}"
    step = 10**-digits
    return str(int(abs(value) / step + 0.5) * step * (1 if value >= 0 else -1))
