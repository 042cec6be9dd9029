"""Forms paragraphs from the flattened text of a section, without the sentences that lack something."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gog_edge.indexing.sources.mediawiki.site import remove_switches
from gog_edge.indexing.sources.mediawiki.templates.arguments import BOX, GONE, HOLE, ITEM, MARKS, SPOKEN
from gog_edge.indexing.sources.mediawiki.vocabulary import ABBREVIATIONS, LABEL_WORDS
from gog_edge.indexing.sources.text import clean_lines

# Characters of raw text (`<nowiki>`, entities) that would be taken for markup, and what they are replaced by meanwhile.
_SPECIAL = "{}[]<>|_'!#*:;"
_PROTECT = {ord(character): chr(0x0E + at) for at, character in enumerate(_SPECIAL)}
_UNPROTECT = {ord(new): chr(old) for old, new in _PROTECT.items()}
_NO_MARKS = dict.fromkeys(map(ord, MARKS))
_ONLY_MARKS = re.compile(rf"[{MARKS}\s]+")
_QUOTES = re.compile(r"'{2,}")  # bold and italics
_TAG = re.compile(
    r"</?(?:small|big|b|i|u|span|div|center|font|sup|sub|p|br|nowiki|noinclude|onlyinclude|blockquote|tt|code|em|strong|"
    r"cite|var|li|ul|ol|poem|section|nobr|abbr|bdi|bdo|q|ruby|rb|samp|kbd|dfn|mark|wbr|hr|table|tr|td|th|tbody|caption|"
    r"dl|dd|dt|pre)\b[^<>\n]*>",
    re.IGNORECASE,
)
_BROKEN_TEMPLATE = re.compile(r"\{[^{}|]*\|[^{}]*\}")  # a line with one brace of two
_ITEM_INSIDE = re.compile(rf"[ \t]{{0,9}}{ITEM}+[ \t]*")
_BROKEN = re.compile(
    r"\[\[|\]\]|\{\||\|\}|</?(?:ref|references|math|gallery)\b[^\n<>]*>?|-\{|\}-(?=[^\W\d])", re.IGNORECASE
)
_END = r"[.!?…。！？।॥۔؟։።။៕]"
_CLOSING = r"[\"'”’»)\]」』）\u201d\u2019]*"
_NOTE = re.compile(rf"({_END}{_CLOSING})[{HOLE}{BOX}{GONE}]+(?=\s|$)")
_ENDED = re.compile(rf"(?:{_END}|[:：;]){_CLOSING}\s*$")
_BOUNDARY = re.compile(
    rf"([.!?…]{_CLOSING})\s+(?=[\"'“‘«(\[¿¡„‚「『]*[^\s\"'“‘«(\[])|([。！？]{_CLOSING})\s*|([।॥۔؟։።។៕]{_CLOSING})\s*"
)
_WORD_BEFORE = re.compile(r"([^\s(\[\"“«„/—–-]+)$")
_PARENTHESES = re.compile(r"([ \t\u00a0]{0,9})([(（])([^()（）]*+)([)）])")
_SEPARATOR = re.compile(r"\s*([;,；，、])\s*")
_LABEL = re.compile(r".{0,60}:", re.DOTALL)
_BEFORE_PUNCTUATION = re.compile(rf"([,;:])?[ \t\u00a0]{{0,9}}[{GONE}]+[ \t\u00a0]*(?=[,;:.!?)\]）])")
_AFTER_OPENING = re.compile(rf"(?<=[(\[（])[ \t\u00a0]*[{GONE}]+[ \t\u00a0]*")
_GONE_RUN = re.compile(rf"{GONE}{{2,}}")
_BETWEEN_SPACES = re.compile(rf"[ \t\u00a0]{{1,9}}[{GONE}]+(?=\s)")
_COORDINATES_ONLY = re.compile(r"[\d.]+°[\d.°′″'\" NSEWO;,/]*")


def protect(text: str) -> str:
    """Return raw text whose characters are not taken for markup; `paragraphs` restores them."""
    return text.translate(_PROTECT)


def without_marks(text: str) -> str:
    """Return flattened text as it is displayed, with nothing in the place of marks."""
    return _TAG.sub("", _QUOTES.sub("", remove_switches(text))).translate(_NO_MARKS).translate(_UNPROTECT)


def paragraphs(text: str, *, lead: bool = False) -> Iterator[str]:
    """Yield the paragraphs of a section.

    Args:
        text: flattened text with marks.
        lead: whether the section is the first one of its page. A first line that is set off, and all in italics,
            refers to other pages there.
    """
    text = _TAG.sub("", remove_switches(text))
    for number, block in enumerate(_blocks([_keep_apostrophes(line) for line in text.split("\n")])):
        if lead and not number and len(block) == 1 and _is_hatnote(block[0]):
            continue
        if block[0].startswith(ITEM):
            lines = (_finish(_ITEM_INSIDE.sub(": ", line.lstrip(ITEM + " \t"))) for line in block)
            shown = "\n".join(filter(None, lines))
        else:
            shown = _finish(_ITEM_INSIDE.sub(": ", "\n".join(block)))
        if shown and not _COORDINATES_ONLY.fullmatch(shown):
            yield shown


def _keep_apostrophes(line: str) -> str:
    """Return a line in which apostrophes beside bold or italics are protected, by MediaWiki's rules: l'''Iliade''."""
    if "'''" not in line:
        return line
    runs = [(run.start(), len(run[0])) for run in _QUOTES.finditer(line)]
    kept = {start for start, length in runs if length == 4 or length > 5}
    lengths = [3 if length == 4 else min(length, 5) for _, length in runs]
    if sum(length != 3 for length in lengths) % 2 and sum(length != 2 for length in lengths) % 2:
        bold = [start for (start, _), length in zip(runs, lengths, strict=True) if length == 3]
        kept.update(sorted(bold, key=lambda start: _apostrophe_rank(line, start))[:1])
    parts, at = list[str](), 0
    for start in sorted(kept):
        parts += line[at:start], protect("'")
        at = start + 1
    return "".join((*parts, line[at:]))


def _apostrophe_rank(line: str, start: int) -> int:
    """Return how likely an apostrophe begins here: 0 after a word of one letter, 1 after others, 2 after a space."""
    if line[max(0, start - 1) : start] == " ":
        return 2
    return int(line[max(0, start - 2) : max(0, start - 1)] not in ("", " "))


def _is_hatnote(line: str) -> bool:
    text = line.lstrip(ITEM + " ")
    return line.startswith(ITEM) and text.startswith("''") and text.rstrip().endswith("''")


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield groups of lines: the lines of a paragraph, or the items of a list."""
    block: list[str] = []
    table = skipped = False
    for line in lines:
        bare = line.strip(" \t\r\u00a0")
        if not bare:
            yield from (block,) if block else ()
            block, skipped = [], False
            continue
        if bare.startswith(("{|", "|}")):
            table = bare.startswith("{|")
            continue
        if bare.startswith("|") or (table and bare.startswith("!")) or _BROKEN_TEMPLATE.fullmatch(bare):
            continue
        if not block:
            table = False
        if _ONLY_MARKS.fullmatch(bare):
            skipped = skipped or HOLE in bare or SPOKEN in bare
            continue
        item = bare.startswith(ITEM)
        broken = skipped and not item and bool(block) and not block[-1].startswith(ITEM)
        if broken and not _ENDED.search(block[-1]) and not bare.lstrip("'\"")[:1].isupper():
            bare = HOLE + bare  # the template stood within a sentence
        elif block and (broken or item != block[-1].startswith(ITEM)):
            yield block
            block = []
        skipped = False
        block.append(bare)
    if block:
        yield block


def _finish(text: str) -> str:
    """Return a paragraph or item as it is displayed, without the sentences that lack something."""
    text = _QUOTES.sub("", text)
    if "{" in text or "}" in text or "[" in text or "]" in text or "<" in text or "|}" in text:
        text = "\n".join(map(_without_broken_markup, text.split("\n")))
    if any(mark in text for mark in MARKS):
        text = _without_incomplete_sentences(_resolve_marks(text)).translate(_NO_MARKS)
    return clean_lines(text.translate(_UNPROTECT))


def _without_broken_markup(line: str) -> str:
    """Return a line with holes in the place of braces, brackets and tags that are not closed."""
    if line.lstrip(" \t").startswith("{{"):
        return BOX
    if "}}" in line:
        line = HOLE + line.rpartition("}}")[2]
    if "{{" in line:
        line = line.partition("{{")[0] + HOLE
    return _BROKEN.sub(HOLE, line)


def _resolve_marks(text: str) -> str:
    """Return the text with one kind of mark left, the holes; and without the traces of what was left out."""
    text = _NOTE.sub(r"\1", text.lstrip(BOX + " \t") if text.startswith(BOX) else text)
    text = text.replace("\n" + BOX, "\n").replace(BOX, HOLE)
    if GONE in text or SPOKEN in text:
        text, previous = _GONE_RUN.sub(GONE, text), ""
        while previous != text:
            previous, text = text, _PARENTHESES.sub(_parenthesis, text)
        text = re.sub(rf",\s*{SPOKEN}\s*,", "," + GONE, text).replace(SPOKEN, HOLE)
        text = _AFTER_OPENING.sub("", _BEFORE_PUNCTUATION.sub(_punctuation, text))
        text = _BETWEEN_SPACES.sub("", text).replace(GONE, "")
    return text


def _punctuation(found: re.Match[str]) -> str:
    """Return one of the two signs of punctuation around something that was left out."""
    return "" if found[1] and found.string[found.end()] in ",;.)）" else found[1] or ""


def _parenthesis(found: re.Match[str]) -> str:
    """Return a parenthesis without the parts of which nothing but a label is left; nothing if that is all of it."""
    if GONE not in found[3] and SPOKEN not in found[3]:
        return found[0]
    pieces = _SEPARATOR.split(found[3])
    kept = list[str]()
    for at in range(0, len(pieces), 2):
        piece = pieces[at]
        bare = piece.replace(GONE, "").replace(SPOKEN, "").strip()
        if (GONE in piece or SPOKEN in piece) and _is_label(bare):
            continue
        if kept:
            sign = pieces[at - 1]
            kept.append(sign if sign in "；，、" else sign + " ")
        kept.append(bare)
    return f"{found[1]}{found[2]}{''.join(kept)}{found[4]}" if kept else ""


def _is_label(text: str) -> bool:
    parts = text.casefold().replace("/", " ").split()
    return not text or _LABEL.fullmatch(text) is not None or all(part.rstrip(":.") in LABEL_WORDS for part in parts)


def _without_incomplete_sentences(text: str) -> str:
    """Return the text without the sentences that have a hole. Where it is not certain that one ends, it goes on."""
    if HOLE not in text:
        return text
    sentences, start = list[str](), 0
    for found in _BOUNDARY.finditer(text):
        if _ends_sentence(text, found):
            sentences.append(text[start : found.end()])
            start = found.end()
    sentences.append(text[start:])
    return "".join(sentence for sentence in sentences if HOLE not in sentence)


def _ends_sentence(text: str, found: re.Match[str]) -> bool:
    if not found[1]:
        return True
    following = text[found.end() :].lstrip("\"'“‘«([¿¡„‚「『" + MARKS)[:1]
    if following.islower():
        return False
    if not found[1].startswith("."):
        return not found[1].startswith("…")
    before = _WORD_BEFORE.search(text, max(0, found.start() - 40), found.start())
    word = before[1].strip("'\"”’»)]") if before else ""
    if word.endswith(HOLE):
        return True
    if not word:
        return len(found[1]) > 1 or text[found.start() - 1 : found.start()] in ")]\"”»"
    cased = word[-1].upper() != word[-1].lower()
    if len(word) < (3 if cased or word.isdecimal() else 2) or "." in word:
        return False
    return word.casefold() not in ABBREVIATIONS
