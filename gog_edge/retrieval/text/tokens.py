"""Fold and tokenize text: one function for stored paragraphs, queries, names and answers.

`fold` follows Unicode (NFKC, case folding) and removes marks only where readers write a word with or without them. The
FTS5 index holds the words of `index_text`, which its tokenizer separates at blanks; a query holds words of the same
function, so that both agree in every script. Citations keep the original text.

Scripts without blanks between words are indexed by overlapping n-grams, two characters of Han, Kana and Hangul, three
of alphabets such as Thai: any part of a text is found. Korean is among them because particles are attached to words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

MAX_QUERY_CHARS = 4_000  # further characters are ignored
MAX_QUERY_WORDS = 96  # and further words
MAX_QUERY_UNITS = 256  # and further units, see `split_units`
MAX_TERMS = 64  # distinct search terms of a query
MAX_NAME_WORDS = 8  # longest title or redirect that is recognised inside a query
MAX_NAME_UNITS = 16  # and its longest length in a script without blanks
MAX_COMPOUND_PARTS = 4  # of a compound word all of whose neighbouring parts are indexed as one word too
Unit: TypeAlias = tuple[str, bool]  # a word or character, and whether it continues the word of the unit before
_STOP_WORDS = (
    "a about all also am an and any are as at be been being both but by can could did do does doing for from had has "
    "have having he her here him his how i if in into is it its itself let me my no not of on or our please s she "
    "should so some such t tell than that the their them then there these they this those to too us use used uses "
    "using very was we were what when where which who whom whose why will with would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())

# --- scripts without blanks between words -------------------------------------------------------

_IDEOGRAPHS = (  # Han, Kana, Bopomofo, Hangul, Yi, Tangut, Khitan, Nushu
    "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\ua48c\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U00016fe0-\U00018cff\U0001aff0-\U0001b2ff\U00020000-\U0003ffff"
)
_ALPHABETS = (  # Thai, Lao, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Balinese, Javanese, Tai Viet, Ahom
    "\u0e01-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf\u1000-\u109f\u1780-\u17dd\u1950-\u19df\u1a20-\u1aad\u1b00-\u1b4c\ua980-\ua9c0"
    "\ua9cf-\ua9ff\uaa60-\uaadf\U00011700-\U00011746"
)
_NGRAM_SIZES = {"ideographs": 2, "alphabets": 3}  # characters
_RUN = re.compile(f"(?P<ideographs>[{_IDEOGRAPHS}]+)|(?P<alphabets>[{_ALPHABETS}]+)")
_NEAR_RUN = re.compile("[\u0e01-\U0003ffff]")  # is faster than _RUN; scripts below have blanks
_PREFIXES = re.compile(f"[{_IDEOGRAPHS}{_ALPHABETS}]"), re.compile(f"(?=([{_ALPHABETS}]{{2}}))")
_WORD = re.compile(f"[{_IDEOGRAPHS}]+|[{_ALPHABETS}]+|(?:(?![{_IDEOGRAPHS}{_ALPHABETS}])[0-9a-z\x80-\U0010ffff])+")

# --- characters ---------------------------------------------------------------------------------

# Marks that are removed: accents of Latin, Greek and Cyrillic; Hebrew points; Arabic and Syriac vowel signs; Vedic
# accents; Ethiopic gemination; marks of symbols; variation selectors. All other marks are part of the spelling: vowel
# signs and viramas of India, vowels and tones of Thai, Lao, Khmer and Burmese, Tibetan letters, Japanese dakuten.
_REMOVED_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0711\u0730-\u074a\u08ca-\u08e1\u08e3-\u08ff\u0951-\u0954"
    "\u135d-\u135f\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1cd0-\u1ce8\u1ced\u1cf4\u1cf8\u1cf9\u1dc0-\u1dff\u20d0-\u20f0"
    "\u2de0-\u2dff\ufe00-\ufe0f\ufe20-\ufe2f\U000e0100-\U000e01ef]"
)
# Letters that readers write in several ways. Arabic as Lucene's ArabicNormalizer and PersianNormalizer, but Urdu's yeh
# barree stays, which distinguishes grammatical forms there. Devanagari as Lucene's HindiNormalizer: without nukta, one
# nasal sign. Cyrillic io is often written without dots; short i, yi and the others are letters of their own. Malayalam
# chillus and Bengali khanda ta are written with a virama too.
_LETTERS = {
    "æ": "ae", "œ": "oe", "þ": "th", "ð": "d", "ı": "i", "ŋ": "n", "ə": "e", "ɛ": "e", "ɔ": "o", "ĸ": "k",
    "ё": "е", "ѐ": "е", "ѝ": "и",
    "װ": "וו", "ױ": "וי", "ײ": "יי",
    "آ": "ا", "أ": "ا", "إ": "ا", "ٱ": "ا", "ى": "ي", "ی": "ي", "ة": "ه", "ک": "ك", "ہ": "ه", "ۀ": "ه", "ۂ": "ه",
    "ۓ": "ے", "\u0640": "",
    "\u093c": "", "\u0901": "\u0902", "ऩ": "न", "ऱ": "र", "ऴ": "ळ",
    "ൺ": "ണ്", "ൻ": "ന്", "ർ": "ര്", "ൽ": "ല്", "ൾ": "ള്", "ൿ": "ക്", "ৎ": "ত্",
    "և": "եվ",
    "\u115f": "", "\u1160": "", "\u3164": "", "\uffa0": "",  # fillers
}  # fmt: skip
_VARIANT = re.compile("LATIN SMALL LETTER ([A-Z]{1,2}) WITH ")  # with a stroke, a hook: not decomposed by Unicode

# Characters inside of a word. Between letters of other scripts than Latin an apostrophe belongs to the word (п'ять), as
# do gershayim in Hebrew (צה"ל), the zero-width non-joiner in Arabic script and Armenian tone marks; such words are
# indexed as a whole and in parts. In Latin script an apostrophe separates words (d'Ivoire).
_APOSTROPHE, _GERSHAYIM, _MODIFIER, _DOT, _NON_JOINER = "'", '"', "\u02bc", "\u00b7", "\u200c"
_JOINED, _SEPARATE = "\x01", "\x02"  # both are indexed in parts and as a whole; a query has the whole or the parts
_INNER_CHARACTERS = {
    **dict.fromkeys("'`\u00b4\u2018\u2019\u201b\uff07\u055a\u055b\u055c\u055e\u055f\u05f3", _APOSTROPHE),
    **dict.fromkeys('"\u05f4', _GERSHAYIM),
    **dict.fromkeys("\u02bb\u02bc\u02bd", _MODIFIER),  # letters in Uzbek and Hawaiian
    **dict.fromkeys("\u00b7\u0387\u2027", _DOT),  # Catalan col·lecció
    _NON_JOINER: _NON_JOINER,
    "\u0e33": "\u0e33", "\u0eb3": "\u0eb3",  # Thai and Lao am; NFKC would divide it and move the tone mark
}  # fmt: skip
_INNER = re.compile(f"[{_APOSTROPHE}{_GERSHAYIM}{_MODIFIER}{_DOT}{_NON_JOINER}{_JOINED}]+")
_COMPOUND = re.compile(f"[^ {_JOINED}{_SEPARATE}]+(?:[{_JOINED}{_SEPARATE}][^ {_JOINED}{_SEPARATE}]+)+")
_AM = re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32|\u0ecd([\u0ec8-\u0ecb]?)\u0eb2")


class _Characters(dict[int, str]):
    """The folded form of each character, computed when it is first met."""

    def __missing__(self, code: int) -> str:
        folded = _fold_character(chr(code))
        if code < 0x30000:  # planes beyond have nothing that is met often
            self[code] = folded
        return folded


_CHARACTERS = _Characters()


def _fold_character(char: str) -> str:
    """Return the folded form of one character of a text in NFC: word characters, blanks for separators, or ''."""
    if char in _INNER_CHARACTERS:
        return _INNER_CHARACTERS[char]
    if char in _LETTERS:
        return _LETTERS[char]
    category = unicodedata.category(char)
    if _REMOVED_MARKS.match(char) or category == "Cf" or "\u02b9" <= char <= "\u02df" and category == "Lm":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category[0] in "SN":
        return _fold_symbol(char, category)
    if category[0] not in "LM" and category not in ("Co", "Cn"):
        return " "
    plain = unicodedata.normalize("NFKC", char)
    if plain != char:
        return "".join(_CHARACTERS[ord(one)] for one in plain)
    if unicodedata.name(char, "").startswith(("LATIN", "GREEK")):
        plain = _REMOVED_MARKS.sub("", unicodedata.normalize("NFD", char))
    lower = _REMOVED_MARKS.sub("", unicodedata.normalize("NFKC", plain.casefold()))
    return "".join(_LETTERS.get(one) or _base_letter(one) for one in lower)


def _fold_symbol(char: str, category: str) -> str:
    """Return the folded form of a symbol or of a number that is no digit."""
    if char in "\u2122\u2120":  # trade mark and service mark: 'Windows' would become 'windowstm'
        return " "
    plain = unicodedata.normalize("NFKC", char)
    if plain == char:
        return " " if category[0] == "S" else char.casefold()
    folded = "".join(_CHARACTERS[ord(one)] for one in plain)
    if category == "Nl" or "\u2e80" <= char <= "\u2fdf":  # Roman numerals, and Han radicals in place of characters
        return folded
    if category == "No" and unicodedata.decomposition(char).startswith(("<super>", "<sub>")):
        return _JOINED + folded
    return f" {folded.strip(chr(0x3099) + chr(0x309a))} "


def _base_letter(char: str) -> str:
    """Return the letters that a Latin letter with a stroke, hook or the like is a variant of; others unchanged."""
    variant = None if char.isascii() else _VARIANT.match(unicodedata.name(char, ""))
    return variant[1].lower() if variant else char


# --- folding ------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Return the words of a text, folded and separated by blanks; '' if it has none.

    Folding is idempotent. Words of a script without blanks are separated from others, but not divided.
    """
    return " ".join(_words(text))


def tokenize(text: str) -> list[str]:
    """Return the folded words of a query, at most MAX_QUERY_WORDS; a run of a script without blanks is one word."""
    words: list[str] = []
    left = MAX_QUERY_UNITS
    for word in _words(text[:MAX_QUERY_CHARS])[:MAX_QUERY_WORDS]:
        units = len(word) if ngram_size(word) else 1
        words.append(word[:left] if ngram_size(word) else word)
        left -= units
        if left <= 0:
            break
    return words


def name_key(text: str) -> str:
    """Return the lookup key of a title or redirect: its folded words, joined by blanks; '' for '???'."""
    return " ".join(tokenize(text))


def index_text(text: str) -> str:
    """Return the text that FTS5 indexes for a stored text; its tokenizer `ascii` separates it into words."""
    if text.isascii():
        return text
    folded = _fold_characters(text)
    if _JOINED in folded or _SEPARATE in folded:
        folded = _COMPOUND.sub(_whole_and_parts, folded)
    return _RUN.sub(_ngrams_of_run, folded) if _NEAR_RUN.search(folded) else folded


def _words(text: str) -> list[str]:
    if text.isascii():
        return _WORD.findall(text.lower())
    return _WORD.findall(_fold_characters(text).replace(_JOINED, "").replace(_SEPARATE, " "))


def _fold_characters(text: str) -> str:
    """Return a text in folded characters; _JOINED and _SEPARATE stand between the parts of compound words."""
    folded = unicodedata.normalize("NFC", text).translate(_CHARACTERS)
    folded = _INNER.sub(_resolve_inner, folded)
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", folded.replace("եւ", "եվ"))
        if _NEAR_RUN.search(folded):
            folded = _AM.sub(_compose_am, folded)
    return folded


def _resolve_inner(match: re.Match[str]) -> str:
    """Decide whether characters that may stand inside of a word belong to it, by what is before and after them."""
    inner, text = match[0], match.string
    before = text[match.start() - 1] if match.start() else " "
    after = text[match.end()] if match.end() < len(text) else " "
    visible = inner.strip(_NON_JOINER)
    if not visible:
        return _JOINED if "\u0600" <= before <= "\u08ff" and "\u0600" <= after <= "\u08ff" else ""
    if not (_is_word(before) and _is_word(after)):
        return "" if visible == _JOINED else " "
    if visible == _JOINED:  # a superscript or subscript digit; those of one number stay together
        previous = text[match.start() - 2] if match.start() > 1 else " "
        return "" if previous == _JOINED else " " if before.isdigit() else _JOINED
    if before.isascii() and after.isascii():
        return _SEPARATE if visible in (_MODIFIER, _DOT) else " "
    if before.isascii() or after.isascii():
        return " "
    if visible in (_APOSTROPHE, _MODIFIER) or visible == _GERSHAYIM and "\u05d0" <= before <= "\u05f2":
        return _JOINED
    return " "


def _is_word(char: str) -> bool:
    return char.isalnum() or not char.isascii()


def _compose_am(match: re.Match[str]) -> str:
    return f"{match[1]}\u0e33" if match[1] is not None else f"{match[2]}\u0eb3"


def _whole_and_parts(match: re.Match[str]) -> str:
    """Return a compound word as a query may have it: its parts, and neighbouring parts joined."""
    joined = match[0].split(_SEPARATE)
    parts = [one for part in joined for one in part.split(_JOINED)]
    if len(parts) <= MAX_COMPOUND_PARTS:
        words = ["".join(parts[start:stop]) for stop in range(1, len(parts) + 1) for start in range(stop)]
    else:
        words = [*parts, *(part.replace(_JOINED, "") for part in joined)]
    return " ".join(dict.fromkeys(words))


# --- n-grams ------------------------------------------------------------------------------------


def ngram_size(word: str) -> int:
    """Return the characters of an n-gram in the script of a folded word; 0 if the script separates words by blanks."""
    run = _RUN.match(word)
    return _NGRAM_SIZES[run.lastgroup or ""] if run else 0


def is_prefix(term: str) -> bool:
    """Return whether a term is shorter than the n-grams of its script, so that it is the beginning of some."""
    return len(term) < ngram_size(term)


def ngram_prefixes(text: str) -> set[str]:
    """Return the parts of a text, as `index_text` returns it, that are shorter than the n-grams of their script."""
    if not _NEAR_RUN.search(text):
        return set()
    return {part for pattern in _PREFIXES for part in pattern.findall(text)}


def _ngrams_of_run(match: re.Match[str]) -> str:
    """Return the n-grams of a run. The last ones are shorter, so that each character begins one."""
    run = match[0]
    if match.lastgroup == "ideographs":
        return f" {' '.join(map(str.__add__, run, run[1:]))} {run[-1]} "
    return f" {' '.join([run[start : start + 3] for start in range(len(run))])} "


def _terms_of(word: str) -> list[str]:
    size = ngram_size(word)
    if not size or len(word) <= size:
        return [word]
    return [word[start : start + size] for start in range(len(word) - size + 1)]


# --- queries ------------------------------------------------------------------------------------


def search_terms(words: Iterable[str]) -> tuple[str, ...]:
    """Return up to MAX_TERMS distinct terms of folded words without stop words, in order; stop words if all are."""
    unique = list(dict.fromkeys(words))
    kept = [word for word in unique if word not in STOP_WORDS] or unique
    return tuple(dict.fromkeys(term for word in kept for term in _terms_of(word)))[:MAX_TERMS]


def split_units(words: Iterable[str]) -> list[Unit]:
    """Return the units of which names may consist: words, and the characters of words in a script without blanks."""
    units: list[Unit] = []
    for word in words:
        units += [(char, at > 0) for at, char in enumerate(word)] if ngram_size(word) else [(word, False)]
    return units


def join_units(units: Sequence[Unit]) -> str:
    """Return the words that consecutive units make up, joined by blanks."""
    return "".join(text if joins else f" {text}" for text, joins in units).lstrip(" ")


def name_spans(units: Sequence[Unit]) -> dict[str, list[tuple[int, int]]]:
    """Return the runs of units that may be a name: name key -> half-open ranges of positions.

    A name has at most MAX_NAME_WORDS words and MAX_NAME_UNITS units. A single character out of a run is none.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for start in range(len(units)):
        key, words = "", 0
        for stop in range(start + 1, min(start + MAX_NAME_UNITS, len(units)) + 1):
            text, joins = units[stop - 1]
            joins = joins and stop - 1 > start
            words += not joins
            if words > MAX_NAME_WORDS:
                break
            key = key + text if joins else f"{key} {text}".lstrip(" ")
            if stop - start > 1 or not _is_part(units, start):
                found.setdefault(key, []).append((start, stop))
    return found


def _is_part(units: Sequence[Unit], at: int) -> bool:
    """Return whether a unit is one of several of a word."""
    return units[at][1] or (at + 1 < len(units) and units[at + 1][1])


def replace_spans(units: Sequence[Unit], replaced: Mapping[tuple[int, int], Sequence[str]],
                  is_known: Callable[[str], bool]) -> list[str]:
    """Return the words of a query with names replaced by other words.

    Args:
        units: of the query.
        replaced: half-open ranges of positions that do not overlap -> words. A name may be part of a word; of the rest,
            what is shorter than an n-gram (often a particle) is left out.
        is_known: whether a term is stored. N-grams across the border of a name count only if they are.
    """
    words: list[str] = []
    start = 0
    for first, stop in (*sorted(replaced), (len(units), len(units))):
        others = join_units(units[start:first]).split()
        for at, position in ((0, start), (-1, first)):
            if others and position < len(units) and units[position][1] and is_prefix(others[at]):
                del others[at]
        words += [*others, *replaced.get((first, stop), ())]
        start = stop
    borders = {border for span in replaced for border in span if border < len(units) and units[border][1]}
    return [*words, *filter(is_known, (ngram for border in sorted(borders) for ngram in _ngrams_across(units, border)))]


def _ngrams_across(units: Sequence[Unit], border: int) -> Iterator[str]:
    """Yield the n-grams that begin before a position inside of a word and end after it."""
    size = ngram_size(units[border][0])
    for first in range(max(0, border - size + 1), min(border, len(units) - size + 1)):
        window = units[first : first + size]
        if all(joins for _, joins in window[1:]):
            yield "".join(text for text, _ in window)


def fts5_any(terms: Sequence[str]) -> str:
    """Return the FTS5 expression "any of these"."""
    return " OR ".join(map(_fts5_term, terms))


def fts5_all(terms: Sequence[str]) -> str:
    """Return the FTS5 expression "all of these"."""
    return " AND ".join(map(_fts5_term, terms))


def fts5_word(word: str) -> str:
    """Return the FTS5 expression "this word"; in a script without blanks its n-grams in order, anywhere in a run."""
    terms = _terms_of(word)
    return _fts5_term(word) if len(terms) == 1 else f'"{" ".join(terms)}"'


def _fts5_term(term: str) -> str:
    """Return a term as an FTS5 string. It consists of word characters, so that quotes need not be escaped."""
    return f'"{term}"*' if is_prefix(term) else f'"{term}"'
