"""Writes dates, years and ages as the date templates of the large Wikipedias do."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "ca": "gener febrer març abril maig juny juliol agost setembre octubre novembre desembre",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "sv": "januari februari mars april maj juni juli augusti september oktober november december",
    "no": "januar februar mars april mai juni juli august september oktober november desember",
    "da": "januar februar marts april maj juni juli august september oktober november december",
    "ro": "ianuarie februarie martie aprilie mai iunie iulie august septembrie octombrie noiembrie decembrie",
    "id": "Januari Februari Maret April Mei Juni Juli Agustus September Oktober November Desember",
    "tr": "Ocak Şubat Mart Nisan Mayıs Haziran Temmuz Ağustos Eylül Ekim Kasım Aralık",
    "pl": "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia",
    "cs": "ledna února března dubna května června července srpna září října listopadu prosince",
    "ru": "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
    "uk": "січня лютого березня квітня травня червня липня серпня вересня жовтня листопада грудня",
    "bg": "януари февруари март април май юни юли август септември октомври ноември декември",
    "el": "Ιανουαρίου Φεβρουαρίου Μαρτίου Απριλίου Μαΐου Ιουνίου Ιουλίου Αυγούστου Σεπτεμβρίου Οκτωβρίου Νοεμβρίου "
          "Δεκεμβρίου",
    "ar": "يناير فبراير مارس أبريل مايو يونيو يوليو أغسطس سبتمبر أكتوبر نوفمبر ديسمبر",
    "fa": "ژانویه فوریه مارس آوریل مه ژوئن ژوئیه اوت سپتامبر اکتبر نوامبر دسامبر",
    "he": "ינואר פברואר מרץ אפריל מאי יוני יולי אוגוסט ספטמבר אוקטובר נובמבר דצמבר",
    "hi": "जनवरी फ़रवरी मार्च अप्रैल मई जून जुलाई अगस्त सितम्बर अक्टूबर नवम्बर दिसम्बर",
}  # fmt: skip
_MONTHS |= {"simple": _MONTHS["en"], "sco": _MONTHS["en"], "nb": _MONTHS["no"], "nn": _MONTHS["no"],
    "gl": _MONTHS["es"]}
_EAST_ASIAN = {"ja": "年月日", "zh": "年月日", "ko": "년월일"}
# By language: how day, month and year are joined.
_PATTERNS = {"de": "{d}. {m} {y}", "da": "{d}. {m} {y}", "no": "{d}. {m} {y}", "cs": "{d}. {m} {y}",
             "es": "{d} de {m} de {y}", "pt": "{d} de {m} de {y}", "ca": "{d} de {m} de {y}", "gl": "{d} de {m} de {y}",
             "he": "{d} ב{m} {y}"}  # fmt: skip
_WITHOUT_YEAR = {"es": "{d} de {m}", "pt": "{d} de {m}", "ca": "{d} de {m}", "gl": "{d} de {m}"}
_TRUE = frozenset(("y", "yes", "1", "true", "on"))
_DAY = re.compile(r"0?(\d{1,2})(?:er|\.|st|nd|rd|th|º)?")
_YEAR = re.compile(r"-?\d{1,4}")


def month_name(month: int, language: str) -> str:
    """Return the name of a month as it stands within a date; in English if the language is not known."""
    return _MONTHS.get(language, _MONTHS["en"]).split()[month - 1]


def month_number(text: str) -> int:
    """Return the number of a month given as a number or a name of any known language; 0 for other texts."""
    text = text.strip().rstrip(".").casefold()
    if text.isdecimal():
        return int(text) if 1 <= int(text) <= 12 else 0
    if len(text) < 3:
        return 0
    for names in _MONTHS.values():
        for number, name in enumerate(names.casefold().split(), 1):
            if name == text or (len(text) == 3 and name.startswith(text) and names == _MONTHS["en"]):
                return number
    return 0


def is_true(text: str) -> bool:
    """Return whether the value of a template's option means yes."""
    return text.strip().casefold() in _TRUE


def format_date(year: str, month: str, day: str, language: str, *, day_first: bool = False) -> str | None:
    """Return a date in the style of a language; parts may be empty from the right. None if a part cannot be read.

    Args:
        year: of up to four digits, negative before the common era; or empty.
        month: number or name, or empty.
        day: number, or empty.
        language: code of the wiki's language.
        day_first: in English, write 1 May 2000 instead of May 1, 2000.
    """
    year, number, found = year.strip(), month_number(month), _DAY.fullmatch(day.strip()) if day.strip() else None
    if (year and not _YEAR.fullmatch(year)) or (month.strip() and not number) or (day.strip() and not found):
        return None
    if not year and not number:
        return None
    shown = f"{int(year.lstrip('-'))}{' BC' if year.startswith('-') else ''}" if year else ""
    if not number:
        return shown
    if language in _EAST_ASIAN:
        return _east_asian(shown, number, int(found[1]) if found else 0, language)
    name = month_name(number, language)
    if found is None:
        return f"{name} {shown}".strip()
    return _day_of_month(int(found[1]), name, shown, language, day_first)


def _east_asian(year: str, month: int, day: int, language: str) -> str:
    signs = _EAST_ASIAN[language]
    parts = [f"{part}{sign}" for part, sign in zip((year, month, day), signs, strict=True) if part]
    return (" " if language == "ko" else "").join(parts)


def _day_of_month(day: int, month: str, year: str, language: str, day_first: bool) -> str:
    if language in ("en", "simple") and not day_first:
        return f"{month} {day}, {year}" if year else f"{month} {day}"
    number = "1er" if language == "fr" and day == 1 else str(day)
    pattern = _PATTERNS.get(language, "{d} {m} {y}") if year else _WITHOUT_YEAR.get(language, "{d} {m}")
    return pattern.format(d=number, m=month, y=year).strip()


def age(born: Sequence[str], other: Sequence[str]) -> str | None:
    """Return the age in years between two dates of (year, month, day); with missing parts the year alone counts.

    The result is a range, such as 75–76, where a birthday may lie on either side. None if a year cannot be read.
    """
    try:
        first, second = [[int(part) for part in parts if part.strip()] for parts in (born, other)]
    except ValueError:
        return None
    if not first or not second:
        return None
    years = second[0] - first[0]
    if len(first) == 3 == len(second):
        return str(years - (second[1:] < first[1:]))
    return f"{years - 1}–{years}" if years > 0 else str(years)
