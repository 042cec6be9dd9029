"""Finds out what a reader sees in the place of a template or parser function.

About a hundred families of templates are rendered: those of numbers, units, dates, foreign words and signs. Templates
of which nothing is seen in the sentence are left out. Any other leaves a mark, see `arguments`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mwparserfromhell

from gog_edge.indexing.sources.mediawiki.site import Site
from gog_edge.indexing.sources.mediawiki.templates import chronology, languages, numeric
from gog_edge.indexing.sources.mediawiki.templates.arguments import (
    BOX,
    GONE,
    HOLE,
    ITEM,
    SPOKEN,
    Arguments,
    Renderer,
    by_name,
)
from gog_edge.indexing.sources.mediawiki.templates.names import (
    displayed_argument,
    fixed_text,
    is_invisible,
    is_pronunciation,
    is_quotation,
    quotation_marks,
)
from gog_edge.indexing.sources.mediawiki.templates.numbers import format_number, parse_formatted
from gog_edge.indexing.sources.mediawiki.vocabulary import words

_Flatten = Callable[[Any], str]
_DEGREES = re.compile(r"-?\d+(?:\.\d+)?")
_FUNCTION = re.compile(r"\s*(#?[^\W\d_][\w-]*|#)\s*[:：](.*)", re.DOTALL)
_PREFIXES = re.compile(r"(?:\s*(?:subst|safesubst|msgnw|msg|raw)\s*:)+", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"[+\-−]?\d+(?:\.\d+)?")
_ASSIGNMENTS = words(
    """
    defaultsort defaultsortkey defaultcategorysort displaytitle sortierung seitentitel сортировка_по_умолчанию
    ключ_сортировки показать_заголовок стандартне_сортування デフォルトソート デフォルトソートキー 默认排序
    默认排序关键字 기본정렬 ordenar ordena clefdetri cleftri afficher_titre standaardsortering standardsortering
    sortuj řazení domyślniesortuj ordenarpordefecto predeterminado titre_affiché toc_limit #coordinates #related #seo
    noexternallanglinks #set #categorytree
    """
)  # set something of the page, and display nothing


def render_template(template: Any, flatten: _Flatten, site: Site, title: str) -> str:
    """Return the text that a template displays; marks stand for what is not rendered.

    Args:
        template: a template node of mwparserfromhell.
        flatten: returns the visible text of wikicode.
        site: the wiki.
        title: of the page.
    """
    given = " ".join(flatten(template.name).replace("_", " ").split())
    if not given or HOLE in given:
        return HOLE
    if (found := _FUNCTION.fullmatch(_PREFIXES.sub("", str(template.name)).strip())) is not None:
        prefix = found[1].lower()
        if prefix not in site.template_prefixes:
            return _function(prefix, found[2], template, flatten, site)
        given = " ".join(found[2].replace("_", " ").split())
    given = _PREFIXES.sub("", given).strip()
    name = given.lower()
    if not template.params and (value := _variable(given, site, title)) is not None:
        return value
    try:
        text = _rendered(name, given, Arguments(template, flatten, site))
    except (ValueError, ArithmeticError):  # numbers of thousands of digits, and the like
        text = None
    return _unknown(template) if text is None else text


def _rendered(name: str, given: str, args: Arguments) -> str | None:
    language = args.site.format_language
    if name == "citation" and language == "fr":
        return quotation_marks(language).format(args.get(1)) if args.get(1) else None
    for table in (numeric.RENDERERS, chronology.RENDERERS, languages.RENDERERS, _RENDERERS):
        if renderer := table.get(name):
            return renderer(args)
    if (text := languages.foreign_text(name, args)) is not None:
        return text or None
    if (text := fixed_text(name, given, args.get(1))) is not None:
        return text
    if is_pronunciation(name):
        return SPOKEN
    if number := displayed_argument(name):
        return _displayed(number, args)
    if is_quotation(name, language):
        return _quotation(name, args)
    return GONE if is_invisible(name) else None


def _displayed(number: int, args: Arguments) -> str | None:
    if number == -1:
        texts = args.positional()
        return texts[-1] if texts and texts[-1] else None
    if number == 1 and args.get(2) and args.get(1)[-1:].isdigit():
        return None  # perhaps a number and its unit
    return args.get(number, "text", "texte", "texto", "content", "1") or None


def _quotation(name: str, args: Arguments) -> str | None:
    text = args.get("text", "texte", "texto", "quote", "content", "Text", 1)
    if not text:
        return None
    quoted = quotation_marks(args.site.format_language).format(text) if name in ('"', "guil", "guillemets",
        "zitat") else text
    return quoted if name in ('"', "guil", "guillemets", "cita", "citat", "sitat", "citazione") else f"\n\n{quoted}\n\n"


def _items(separator: str) -> Renderer:
    def render(args: Arguments) -> str | None:
        texts = [text for text in args.positional() if text]
        return separator.join(texts) if texts else GONE

    return render


def _list(args: Arguments) -> str | None:
    texts = [text for text in args.positional() if text]
    return "".join(f"\n{ITEM}{text}" for text in texts) + "\n" if texts else GONE


def _coordinates(args: Arguments) -> str | None:
    """`{{coord|1|N|2|E}}`: 1°N 2°E. Coordinates beside the title are not part of the text."""
    shown = args.get("display", "anzeige").lower()
    if shown in ("title", "t", "title,inline=no", "заголовок"):
        return GONE
    signs, parts, text = ("°", "′", "″"), [], ""
    values = args.positional()
    decimal = all(_DEGREES.fullmatch(value) for value in values[:2]) and not set(values[2:4]) & {"N", "S"}
    if len(values) >= 2 and decimal:
        north, east = float(values[0]), float(values[1])
        return f"{abs(north):g}°{'N' if north >= 0 else 'S'} {abs(east):g}°{'E' if east >= 0 else 'W'}"
    for value in values:
        if value in ("N", "S", "E", "W", "O") and text:
            parts.append(text + value)
            text = ""
            if len(parts) == 2:
                return " ".join(parts)
        elif _DEGREES.fullmatch(value) and text.count("°") + text.count("′") + text.count("″") < 3:
            text += value + signs[text.count("°") + text.count("′")]
        else:
            break
    return None


def _around(before: str, after: str = "") -> Renderer:
    """Return the renderer of an argument between two signs."""
    return lambda args: f"{before}{args.get(1)}{after}" if args.get(1) else None


_RENDERERS = by_name(
    (_coordinates, "coord, coordinate, coor dms, coor dm, coor d, koord, coord/dms, koordinaatit, coords"),
    (_items(" · "), "hlist, flatlist, hlijst, liste horizontale"),
    (_items(", "), "comma separated entries, enum, cslist"),
    (_list, "ubl, unbulleted list, plainlist, plain list, ublist, bulleted list, bullet list, ordered list, vunblist"),
    (_around("⟨", "⟩"), "angbr, angle bracket, angle brackets, grapheme"),
    (_around("[", "]"), "bracket, brackets, interp"),
    (_around("– ", " –"), "incise"),
    (_around("p. "), "p., page, pp."),
    (_around("n° "), "n°, numéro, №"),
    (_around("§ "), "§"),
)


# --- parser functions and variables -----------------------------------------------------------


def _variable(name: str, site: Site, title: str) -> str | None:
    if name in ("PAGENAME", "FULLPAGENAME", "BASEPAGENAME", "SUBPAGENAME", "PAGENAMEE", "SEITENNAME", "NOMPAGE"):
        return title or None
    if name == "SITENAME":
        return site.name or None
    year, _, rest = site.date.partition("-")
    values = {"CURRENTYEAR": year, "LOCALYEAR": year, "JAHR": year, "CURRENTMONTH": rest[:2],
        "CURRENTDAY": rest[3:].lstrip("0")}
    return values.get(name) or None


def _function(name: str, first: str, template: Any, flatten: _Flatten, site: Site) -> str:
    """Evaluate a parser function: `{{name:first|...}}`. Those that compute leave a hole."""
    if name in _ASSIGNMENTS:
        return GONE
    if any(param.showkey for param in template.params) and name != "#tag":
        return _unknown(template)

    def value(number: int) -> str:
        return flatten(template.params[number - 1].value).strip() if len(template.params) >= number else ""

    text = flatten(mwparserfromhell.parse(first, skip_style_tags=True)).strip()
    if name in ("formatnum", "formatierezahl"):
        return _formatnum(text, value(1), site)
    if name in _CASES:
        return HOLE if HOLE in text else _CASES[name](text)
    if name == "#if":
        return value(1) if text.strip(GONE) else value(2)
    if name == "#ifeq":
        return HOLE if HOLE in text + value(1) else value(2) if text == value(1) else value(3)
    if name == "#language":
        return languages.language_name(text, site.format_language) or HOLE
    return GONE if name == "#tag" and text in ("ref", "references", "gallery") else _unknown(template)


def _unknown(template: Any) -> str:
    """Return the mark of a template that is not rendered."""
    return BOX if "\n" in str(template) and len(template.params) > 1 else HOLE


_CASES: dict[str, Callable[[str], str]] = {
    "lc": str.lower, "uc": str.upper, "lcfirst": lambda text: text[:1].lower() + text[1:],
    "ucfirst": lambda text: text[:1].upper() + text[1:], "anchorencode": str, "urlencode": str, "nowiki": str,
}  # fmt: skip


def _formatnum(text: str, option: str, site: Site) -> str:
    language = site.format_language
    if option.upper() in ("R", "NOSEP"):
        return parse_formatted(text, language) if option.upper() == "R" else text
    if HOLE in text or not text:
        return HOLE
    return format_number(text, language) if _PLAIN_NUMBER.fullmatch(text) else text
