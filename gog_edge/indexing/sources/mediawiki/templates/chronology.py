"""Renders the templates of dates, ages, centuries and reigns."""

from __future__ import annotations

import re

from gog_edge.indexing.sources.mediawiki.templates.arguments import Arguments, Renderer, by_name
from gog_edge.indexing.sources.mediawiki.templates.dates import age, format_date, is_true, month_number

_NUMBER = re.compile(r"-?\d{1,4}")
_ISO = re.compile(r"(-?\d{1,4})-(\d{1,2})-(\d{1,2})")
_DOTTED = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{3,4})")
_DAY_FIRST = re.compile(r"(\d{1,2})(?:er|\.|º)?\s+(?:de\s+)?([^\W\d]+)\.?(?:,?\s+(?:de\s+)?(\d{1,4}))?")
_MONTH_FIRST = re.compile(r"([^\W\d]+)\s+(\d{1,2}),?\s+(\d{1,4})")
_CENTURIES = {"fr": "{}e siècle", "es": "siglo {}", "ca": "segle {}", "pt": "século {}", "gl": "século {}",
              "it": "{} secolo"}  # fmt: skip
_AGED = {"en": " (aged {})", "de": " (mit {} Jahren)", "fr": " (à {} ans)", "es": " ({} años)", "ja": "（{}歳没）",
         "zh": "（{}歲）"}  # fmt: skip
_AGE = {"en": " (age {})", "de": " ({} Jahre)", "fr": " ({} ans)", "es": " ({} años)", "ja": "（{}歳）",
        "zh": "（{}歲）"}  # fmt: skip


def _date_of(texts: list[str], args: Arguments, *, day_first: bool = False) -> str | None:
    """Return the date of up to three arguments: year, month, day, or the reverse order, or one text."""
    language = args.site.format_language
    parts = [text for text in texts[:3] if text]
    if len(parts) == 1:
        return _date_of_text(parts[0], language, day_first)
    if len(parts) == 3 and (len(parts[2].strip("-")) > 2 or not _NUMBER.fullmatch(parts[0]) or _is_day_first(parts)):
        parts.reverse()
    elif len(parts) == 2 and not _NUMBER.fullmatch(parts[0]) and _NUMBER.fullmatch(parts[1]):
        parts.reverse()  # month, year
    elif len(parts) == 2 and len(parts[0]) <= 2 and not _NUMBER.fullmatch(parts[1]):
        return format_date("", parts[1], parts[0], language, day_first=day_first)
    year, month, day, *_ = *parts, "", "", ""
    return format_date(year, month, day, language, day_first=day_first) if parts else None


def _is_day_first(parts: list[str]) -> bool:
    return len(parts[0].strip("-")) <= 2 and month_number(parts[1]) > 0 and len(parts[2].strip("-")) > 2


def _date_of_text(text: str, language: str, day_first: bool) -> str | None:
    if found := _ISO.fullmatch(text):
        return format_date(found[1], found[2], found[3], language, day_first=day_first)
    if found := _DOTTED.fullmatch(text):
        return format_date(found[3], found[2], found[1], language, day_first=day_first)
    if (found := _DAY_FIRST.fullmatch(text)) and month_number(found[2]):
        return format_date(found[3] or "", found[2], found[1], language, day_first=True)
    if (found := _MONTH_FIRST.fullmatch(text)) and month_number(found[1]):
        return format_date(found[3], found[1], found[2], language, day_first=day_first)
    return text if re.search(r"\d", text) else None


def _day_first(args: Arguments) -> bool:
    return is_true(args.get("df"))


def _date(args: Arguments) -> str | None:
    return _date_of(args.positional(), args, day_first=_day_first(args))


def _european_date(args: Arguments) -> str | None:
    texts = args.positional()
    if len(texts) > 3 and not _NUMBER.fullmatch(texts[0]):
        texts = texts[1:]  # the day of the week
    return _date_of(texts, args, day_first=True)


def _today(args: Arguments) -> list[str]:
    return args.site.date.split("-") if args.site.date else []


def _birth_and_age(args: Arguments) -> str | None:
    texts = args.positional()[:3]
    if len(texts) == 1:
        return _date_of_text(texts[0], args.site.format_language, _day_first(args))
    shown = _date_of(texts, args, day_first=_day_first(args))
    return _with_age(shown, age(texts, _today(args)), _AGE, args)


def _death_and_age(args: Arguments) -> str | None:
    texts = args.positional()
    if len(texts) < 6:
        return _date_of(texts[:1] if len(texts) == 2 else texts, args, day_first=_day_first(args))
    first, second = texts[:3], texts[3:6]
    return _with_age(_date_of(first, args, day_first=_day_first(args)), age(second, first), _AGED, args)


def _age_at_death(args: Arguments) -> str | None:
    """`{{没年齢|1900|1|2|1980|3|4}}`: the date of birth comes first."""
    texts = args.positional()
    return _with_age(_date_of(texts[3:6], args), age(texts[:3], texts[3:6]), _AGED, args) if len(texts) > 5 else None


def _year_and_age(words: dict[str, str]) -> Renderer:
    def render(args: Arguments) -> str | None:
        texts = args.positional()
        other = texts[:1] if words is _AGED else _today(args)[:1]
        born = texts[1:2] if words is _AGED else texts[:1]
        return _with_age(texts[0] if texts and _NUMBER.fullmatch(texts[0]) else None, age(born, other), words, args)

    return render


def _with_age(shown: str | None, years: str | None, words: dict[str, str], args: Arguments) -> str | None:
    pattern = words.get(args.site.format_language, words["en"])
    return shown if shown is None or years is None or years.startswith("-") else shown + pattern.format(years)


def _age(args: Arguments) -> str | None:
    texts = args.positional()
    return age(texts[:3], texts[3:6] or _today(args))


def _as_of(args: Arguments) -> str | None:
    if alternative := args.get("alt"):
        return alternative
    shown = _date_of(args.positional(), args, day_first=args.get("df") != "US")
    if shown is None:
        return None
    word = "" if is_true(args.get("bare")) else "Since " if is_true(args.get("since")) else "As of "
    return (word.lower() if is_true(args.get("lc")) else word) + shown + args.get("post")


def _about(sign: str) -> Renderer:
    """Return the renderer of `c. 1450`, `r. 1450–1460` and the like."""

    def render(args: Arguments) -> str | None:
        texts = [text for text in args.positional() if text]
        if not texts:
            return sign.strip()
        if sign == "c. " and len(texts) > 1:
            return " – ".join(sign + text for text in texts[:2])
        return sign + "–".join(texts[:2])

    return render


def _century(args: Arguments) -> str | None:
    """`{{s|XX}}`, `{{siglo|XX||s}}`; `{{s|XX}}` is a text without line breaks in some other languages."""
    text, language = args.get(1), args.site.format_language
    if not re.fullmatch(r"[IVXLCDM]+|\d{1,2}", text):
        return text or None
    if language not in _CENTURIES:
        return None
    shown = _CENTURIES[language].format(text)
    if language == "fr":
        shown = shown.replace("Ie ", "Ier ") if text == "I" else shown
    era = args.get(2)
    return f"{shown} {era}" if era and era not in ("e", "s", "d") else shown


def _short_century(args: Arguments) -> str | None:
    text = args.get(1) if args.site.format_language == "fr" else ""
    return f"{text}er" if text == "I" else f"{text}e" if text else None


def _two_centuries(args: Arguments) -> str | None:
    texts = [text for text in args.positional() if text]
    if len(texts) < 2:
        return None
    word = "et" if len(texts) == 2 else texts[1]
    return f"{texts[0]}e {word} {texts[-1]}e siècle{'s' if word == 'et' else ''}"


def _century_before_christ(args: Arguments) -> str | None:
    shown = _century(args)
    return f"{shown} av. J.-C." if shown else None


def _life(args: Arguments) -> str | None:
    """`{{bd|1950年|1月2日|2000年|3月4日}}`: the dates of birth and death."""
    texts = [*args.positional(), "", "", "", ""]
    born, died = texts[0] + texts[1], texts[2] + texts[3]
    return f"{born}－{died}" if born else None


def _old_style(args: Arguments) -> str | None:
    """`{{OldStyleDate|February 2|1905|January 20}}`: a date of the Gregorian and the Julian calendar."""
    day, year, old = args.get(1), args.get(2), args.get(3)
    return f"{day} [O.S. {old}] {year}".strip() if day and old else None


def _time(args: Arguments) -> str | None:
    texts = [text for text in args.positional() if text]
    return " ".join(f"{text} {name}" for text, name in zip(texts, ("h", "min", "s"), strict=False)) or None


RENDERERS = by_name(
    (
        _date,
        """
        birth date, birth-date, dob, death date, death-date, start date, start-date, end date, end-date, dts,
        start date and age, start date and years ago, film date, release date, launch date, date, datefr, date simple,
        birth date text, date-mf, sort date, 生年月日, 没年月日, 출생일, 사망일
        """,
    ),
    (
        _european_date,
        """
        datum, date-, date de naissance, date de décès, date rapide, date évènement, fecha, fecha de nacimiento,
        nacimiento, fecha de fallecimiento, fecha de inicio, dtlink, dni, dnibr, morte, data, data de nascimento,
        data de naixença, data naixement, дата, дата рождения, дата смерти, дата народження, дата смерті,
        data urodzenia, d.r., datum narození, datum úmrtí, születési dátum, halálozási dátum, syntymäaika, kuolinaika,
        tarih, تاريخ, تاريخ الميلاد, daton, dato
        """,
    ),
    (
        _birth_and_age,
        """
        birth date and age, bda, birth-date and age, date de naissance et âge, fecha de nacimiento y edad, nacido,
        edad, dnie, data de nascimento e idade, 生年月日と年齢, 출생일과 나이
        """,
    ),
    (
        _death_and_age,
        """
        death date and age, dda, death-date and age, morte e idade, fecha de defunción y edad, 死亡年月日と没年齢,
        사망일과 나이
        """,
    ),
    (_age_at_death, "没年齢"),
    (_year_and_age(_AGE), "birth year and age, birth year and age2"),
    (_year_and_age(_AGED), "death year and age"),
    (_age, "age, age in years, currentage, âge, alter, edad simple, возраст, 満年齢"),
    (_as_of, "as of, asof"),
    (_about("c. "), "circa, c., ca, ca., approx"),
    (_about("fl. "), "floruit, fl, fl."),
    (_about("r. "), "reign, r., ruled"),
    (_about("b. "), "b., born"),
    (_about("d. "), "d., died"),
    (_century, "s, siècle, siglo, segle, séc, século, secolo"),
    (_short_century, "s-, siècle-"),
    (_two_centuries, "s2, s2-, sp, sp-"),
    (_century_before_christ, "-s, -s-"),
    (_life, "bd"),
    (_old_style, "oldstyledate, osd"),
    (_time, "heure, time"),
)
