"""Renders the templates of numbers, units, currencies and formulas."""

from __future__ import annotations

import re

from gog_edge.indexing.sources.mediawiki.templates.arguments import Arguments, Renderer, by_name
from gog_edge.indexing.sources.mediawiki.templates.conversions import convert
from gog_edge.indexing.sources.mediawiki.templates.numbers import (
    FRACTION_SLASH,
    MINUS,
    decimal_mark,
    ordinal,
    parse_number,
    roman,
    subscript,
    superscript,
)
from gog_edge.indexing.sources.mediawiki.templates.units import unit

_CURRENCIES = {
    "usd": "US$", "us$": "US$", "$": "$", "us dollar": "US$", "aud": "A$", "a$": "A$", "au$": "A$", "cad": "C$",
    "c$": "C$", "ca$": "C$", "can$": "C$", "nzd": "NZ$", "nz$": "NZ$", "hkd": "HK$", "hk$": "HK$", "sgd": "S$",
    "s$": "S$", "gbp": "£", "£": "£", "pound sterling": "£", "eur": "€", "euro": "€", "inr": "₹", "₹": "₹",
    "indian rupee": "₹", "rupee": "₹", "pkr": "Rs.", "jpy": "¥", "¥": "¥", "jpy2": "¥", "cny": "CN¥", "rmb": "CN¥",
    "krw": "₩", "₩": "₩", "won": "₩", "php": "₱", "₱": "₱", "ngn": "₦", "₦": "₦", "uah": "₴", "rub": "₽", "rur": "₽",
    "ils": "₪", "₪": "₪", "nis": "₪", "try": "₺", "vnd": "₫", "thb": "฿", "brl": "R$", "mxn": "Mex$", "twd": "NT$",
    "nt$": "NT$", "chf": "CHF ", "dkk": "DKK ", "nok": "NOK ", "sek": "SEK ", "pln": "PLN ", "zar": "R",
    "inrconvert": "₹", "jpyconvert": "¥", "krwconvert": "₩", "phpconvert": "₱", "cnyconvert": "CN¥",
}  # fmt: skip
_MAGNITUDES = {"k": " thousand", "m": " million", "b": " billion", "t": " trillion", "l": " lakh", "c": " crore",
               "lc": " lakh crore"}  # fmt: skip
_NUMERAL = re.compile(r"[+\-−–±~<>≈]?\s*[\d.,\s\u00a0]*\d.*")
_CHARGE = re.compile(r"\d*[+\-−]")
_GAUGE = re.compile(r"(?:(\d+(?:\.\d+)?)\s*mm|(\d+)\s*ft(?:\s*(\d+(?:\.\d+)?|\d+\s+\d/\d)\s*in)?|(\d+(?:\.\d+)?)\s*in)")
_GAUGES = {"sg": "1,435 mm", "std": "1,435 mm", "uksg": "4 ft 8½ in", "ussg": "4 ft 8½ in"}
_POWER_OF_UNIT = re.compile(r"[-−]?\d{1,2}")
_NOTES = {"sharp": "♯", "flat": "♭", "natural": "♮", "#": "♯", "b": "♭", "double flat": "𝄫", "double sharp": "𝄪"}


def _convert(args: Arguments) -> str | None:
    return convert(args.positional(), args.named(), args.site.format_language)


def _number_text(text: str, language: str) -> str | None:
    """Return a number in the style of the language; texts that begin with a number are returned as they are."""
    number = parse_number(text, language)
    if number is not None:
        return number.shown
    return text if _NUMERAL.fullmatch(text) else None


def _number(args: Arguments) -> str | None:
    """`{{nombre|1234|habitants}}`: a number, perhaps with what is counted."""
    shown = _number_text(args.get(1), args.site.format_language)
    what = args.get(2)
    return shown if shown is None or not what or what == "R" else f"{shown} {what}"


def _quantity(args: Arguments) -> str | None:
    """`{{unité|1234|km|2}}` and its relatives: a number, and units with their powers."""
    values = args.positional()
    shown = _number_text(values[0], args.site.format_language) if values else None
    if shown is None:
        return None
    if any(sign in args for sign in ("-", "–", "x", "×", "x2", "+", "±", "+ou-", "/")):
        return None  # a range or tolerance whose form is not known
    for word in ("à", "et", "ou"):  # {{unité|75|à=80|kg}}
        if word in args:
            other = _number_text(args.get(word), args.site.format_language)
            if other is None:
                return None
            shown += f" {word} {other}"
    if exponent := args.get("e", "10"):
        shown += f"×10{superscript(exponent)}"
    units = list[str]()
    for text in values[1:]:
        if _POWER_OF_UNIT.fullmatch(text) and units:
            units[-1] += superscript(text) if text != "1" else ""
        elif text:
            units.append(text)
    return " ".join([shown, *units])


def _measure(args: Arguments) -> str | None:
    """`{{M|10|ul=km}}`: a number with its unit."""
    shown = _number_text(args.get(1), args.site.format_language)
    what = args.get("ul", "u", "um", 3, 2)
    return None if shown is None else f"{shown} {what}".strip()


def _val(args: Arguments) -> str | None:
    """`{{val|1.5|0.2|e=6|u=km}}`: a value with its uncertainty, power of ten and unit."""
    language = args.site.format_language
    values = args.positional()
    shown = _number_text(values[0], language) if values else None
    if shown is None:
        return None
    rest = [text for text in values[1:] if text]
    if len(rest) == 2 and rest[0] in ("-", "–", "to", "x", "by"):
        shown += f"{'–' if rest[0] in '-–' else f' {rest[0]} '}{_number_text(rest[1], language) or rest[1]}"
    elif len(rest) == 1:
        shown += f"±{_number_text(rest[0], language) or rest[0]}"
    elif rest:
        shown += "".join(text if text[0] in "+-−" else f"+{text}" for text in rest[:2]).replace("-", MINUS)
    exponent = args.get("e", "e10", 10)
    shown = args.get("p") + shown + (f"×10{superscript(exponent)}" if exponent else "") + args.get("s")
    what, per = args.get("u", "ul"), args.get("up", "upl")
    known = unit(what) if what else None
    shown += f" {known.symbol if known else what}" if what else ""
    known = unit(per) if per else None
    return shown + (f"/{known.symbol if known else per}" if per else "")


def _fraction(args: Arguments) -> str | None:
    values = [text for text in args.positional() if text]
    if len(values) > 3 or any(not re.fullmatch(r"[\w+\-−.,()]+", text) for text in values):
        return None
    if not values:
        return FRACTION_SLASH
    if len(values) == 1:
        return f"1{FRACTION_SLASH}{values[0]}"
    return " ".join((*values[:-2], f"{values[-2]}{FRACTION_SLASH}{values[-1]}"))


def _currency(symbol: str) -> Renderer:
    def render(args: Arguments) -> str | None:
        amount = args.get(1)
        if not amount:
            return symbol.strip()
        shown = _number_text(amount.lstrip("$£€₹¥"), args.site.format_language)
        if shown is None:
            return None
        scale = args.get(2).lower()
        return symbol + shown + _MAGNITUDES.get(scale, "")

    return render


def _any_currency(args: Arguments) -> str | None:
    shown = _number_text(args.get(1, "amount"), args.site.format_language)
    code = args.get(2, "type", "code")
    symbol = _CURRENCIES.get(code.lower(), f"{code} ") if code else "US$"
    return None if shown is None else symbol + shown


def _ten_to(args: Arguments) -> str | None:
    return f"×10{superscript(args.get(1) or '0')}"


def _power_of_ten(args: Arguments) -> str | None:
    return f"10{superscript(args.get(1))}"


def _chemical(args: Arguments) -> str | None:
    return "".join(superscript(text) if at and _CHARGE.fullmatch(text) else text for at,
        text in enumerate(args.positional()))


def _stacked(args: Arguments) -> str | None:
    return superscript(args.get("p", 1)) + subscript(args.get("b", 2))


def _height(args: Arguments) -> str | None:
    """`{{height|ft=6|in=1}}`, `{{height|m=1.85}}`."""
    language = args.site.format_language
    if args.get("ft"):
        return convert([args.get("ft"), "ft", args.get("in") or "0", "in", "m"], {}, language)
    for code in ("m", "cm"):
        if value := args.get(code):
            return convert([value, code, "ftin", "0"], {}, language)
    return None


def _elevation(args: Arguments) -> str | None:
    shown = _number_text(args.get(1), args.site.format_language)
    return None if shown is None else f"{shown} m"


def _gauge(args: Arguments) -> str | None:
    text = args.get(1)
    if text.lower() in _GAUGES:
        return _GAUGES[text.lower()]
    found = _GAUGE.fullmatch(text)
    if found is None:
        return None
    if found[1]:
        return f"{_number_text(found[1], args.site.format_language)} mm"
    return f"{found[2]} ft" + (f" {found[3]} in" if found[3] else "") if found[2] else f"{found[4]} in"


def _ordinal(args: Arguments) -> str | None:
    text = args.get(1)
    return ordinal(int(text)) if text.lstrip("-").isdecimal() else None


def _roman(args: Arguments) -> str | None:
    text = args.get(1)
    return roman(int(text)) or None if text.isdecimal() else None


def _gaps(args: Arguments) -> str | None:
    mark = decimal_mark(args.site.format_language)
    text = "".join(args.positional()).replace(".", mark) if args.positional() else ""
    exponent = args.get("e")
    text += f"×10{superscript(exponent)}" if exponent else ""
    return f"{text} {args.get('u')}".strip() or None


def _music(args: Arguments) -> str | None:
    return _NOTES.get(args.get(1).lower())


def _percentage(args: Arguments) -> str | None:
    try:
        return f"{100 * float(args.get(1)) / float(args.get(2)):.{int(args.get(3) or 0)}f}%"
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _format_price(args: Arguments) -> str | None:
    number = parse_number(args.get(1), args.site.format_language)
    return None if number is None else number.shown


RENDERERS = {name: _currency(symbol) for name, symbol in _CURRENCIES.items()} | by_name(
    (_convert, "convert, cvt, convertir, converter, conversie, conversion, converti, konvertera, konverter"),
    (
        _number,
        """
        formatnum, fmtn, num, nombre, number, число, szám, liczba, formnum, nts2, commas, фн, formatnumber,
        numero decimale, ntsh
        """,
    ),
    (_quantity, "unité, unidad, unitats, unitat, tmp, grandeur, quantity, unidade"),
    (_measure, "m, misura"),
    (_val, "val, value, physconst"),
    (_fraction, "frac, fraction, sfrac, bruch, brch, fracción, frac2, дробь, intfrac, tfrac, xfrac, dfrac"),
    (_any_currency, "currency, monnaie, para"),
    (_ten_to, "e, e10, esp, ×10^, x10^, *10^"),
    (_power_of_ten, "10^, 10exp"),
    (_chemical, "chem, fchim, chem2, ce, chemf, хим, chemie, chm"),
    (_stacked, "su"),
    (lambda args: superscript(args.get(1)) or None, "sup, superscript, exp, exposant"),
    (lambda args: subscript(args.get(1)) or None, "sub, subscript, ind, indice"),
    (_height, "height"),
    (_elevation, "höhe"),
    (_gauge, "railgauge, track gauge, rail gauge, gauge"),
    (_ordinal, "ordinal, ord, nth"),
    (_roman, "roman, romannumeral"),
    (_gaps, "gaps"),
    (_music, "music"),
    (_percentage, "percentage, percent, pct"),
    (_format_price, "format price"),
)
