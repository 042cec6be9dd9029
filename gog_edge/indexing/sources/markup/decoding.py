"""Prepares the bytes of a page for the HTML parser: decodes them, rewrites XHTML, and finds pages nested too deeply.

Charsets: https://encoding.spec.whatwg.org, of whose labels those are listed that Python names otherwise.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from html import escape

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_HEAD_BYTES = 2048  # in which a page may name its charset
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"<\?xml[^>]*?\sencoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE)
# Charsets whose bytes may be valid UTF-8, by a byte that they contain.
_WIDE = {b"\0": ("utf-16",), b"\x1b": ("iso2022",)}
_FALLBACK = "windows-1252"  # what browsers assume
# Browsers decode these charsets by a superset.
_SUPERSETS = {
    "ascii": _FALLBACK, "iso8859-1": _FALLBACK, "iso8859-9": "windows-1254", "iso8859-11": "cp874",
    "tis-620": "cp874", "shift_jis": "cp932", "x-sjis": "cp932", "gb2312": "gb18030", "gbk": "gb18030",
    "x-gbk": "gb18030", "euc_kr": "cp949", "x-euc-jp": "euc_jp", "big5": "big5hkscs", "x-x-big5": "big5hkscs",
    "x-cp1250": "windows-1250", "x-cp1251": "windows-1251", "x-cp1252": _FALLBACK, "x-mac-cyrillic": "mac_cyrillic",
    "unicode": "utf-16-le", "utf-16": "utf-16-le",
}  # fmt: skip
_NOT_CHARSETS = frozenset(("unicode_escape", "raw_unicode_escape", "idna", "punycode", "utf-7", "mbcs", "oem"))


def decode_page(data: bytes, media_type: str = "") -> str:
    """Return the text of a page; bytes that its charset does not have become U+FFFD.

    The charset is that of the byte order mark; UTF-8 if the bytes are valid UTF-8; or the one that is named by the
    media type, the XML declaration or a <meta> element. Without any, it is UTF-8 with a few damaged characters, or
    Windows-1252.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    for sign, names in _WIDE.items():
        if sign in data and (named := _named_charset(data, media_type)) is not None and named.startswith(names):
            return data.decode(named, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        named = _named_charset(data, media_type)
        return data.decode(named if named and not named.startswith("utf-16") else _guess(data), "replace")


def _named_charset(data: bytes, media_type: str) -> str | None:
    head = data[:_HEAD_BYTES]
    xml = _XML_ENCODING.search(head)
    names = (_CHARSET.search(media_type), _CHARSET.search(head.decode("ascii", "replace")))
    for label in (names[0] and names[0][1], xml and xml[1].decode("ascii", "replace"), names[1] and names[1][1]):
        if label and (found := _codec(label)):
            return found
    return None


def _codec(label: str) -> str | None:
    """Return Python's name of a charset; None if it is unknown."""
    label = label.strip().lower()
    if label in _SUPERSETS:
        return _SUPERSETS[label]
    try:
        name = codecs.lookup(label).name
        b"A".decode(name, "replace")  # fails for codecs that are not charsets, such as base64
    except (LookupError, ValueError):
        return None
    return None if name in _NOT_CHARSETS else _SUPERSETS.get(name, name)


def _guess(data: bytes) -> str:
    """Return UTF-8 if most characters beyond ASCII are valid in it, otherwise Windows-1252."""
    text = data.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    valid = sum(not character.isascii() for character in text) - damaged
    return "utf-8" if valid > damaged else _FALLBACK


# --- XHTML --------------------------------------------------------------------------------------

_VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
                   "track", "wbr"))  # fmt: skip
# A CDATA section, a comment, or a tag: closing, or with its attributes and the slash that makes it empty.
_XML_PART = re.compile(
    r"""<!\[CDATA\[(.*?)(?:\]\]>|\Z) | <!--.*?(?:-->|\Z)
        | <(/?)([a-zA-Z_][^\s/<>]*+)((?:[^"'<>/]++|"[^"<]*+"|'[^'<]*+'|/(?!>))*+)(/?)>""",
    re.DOTALL | re.VERBOSE,
)
_PREFIXES = ("xhtml:", "html:", "h:")


def html_of_xhtml(text: str) -> str:
    """Return an XHTML page as HTML: empty elements have end tags, CDATA sections are text, prefixes are removed.

    An HTML parser would take the rest of the page for the content of `<script/>` or `<title/>`.
    """
    return _XML_PART.sub(_as_html, text)


def _as_html(part: re.Match[str]) -> str:
    if part[1] is not None:
        return escape(part[1], quote=False)
    if part[3] is None:
        return part[0]
    name = next((part[3].removeprefix(prefix) for prefix in _PREFIXES if part[3].startswith(prefix)), part[3])
    if part[2]:
        return f"</{name}>"
    return f"<{name}{part[4]}>" + (f"</{name}>" if part[5] and name.lower() not in _VOID else "")


# --- depth --------------------------------------------------------------------------------------

MAX_DEPTH = 4000  # nested elements; the time that the parser takes grows with the square of the depth

# A comment, or a tag with its attributes, each terminated as by the tokenizer of the HTML standard (section 13.2.5).
_TAG = re.compile(
    r"""<(?: !--(?:-?>|.*?(?:--!?>|\Z)) | [!?][^>]*+ | /[^a-zA-Z][^>]*+ | (/?)([a-zA-Z][^\s/>]*+)
        (?: [\s/]++ | [^\s/>][^\s/>=]*+ (?: \s*+=\s*+ (?: "[^"]*+"? | '[^']*+'? | [^\s>"'][^\s>]*+ )?+ )?+ )*+ )""",
    re.DOTALL | re.VERBOSE,
)
# Void elements, and elements that another one of their kind closes.
_NOT_NESTING = _VOID | frozenset(
    ("p", "li", "dt", "dd", "tr", "td", "th", "tbody", "thead", "tfoot", "caption", "colgroup", "option", "optgroup",
     "rp", "rt", "html", "head", "body")
)  # fmt: skip


def exceeds_max_depth(html: str) -> bool:
    """Return whether about more than MAX_DEPTH elements are nested: parsing such a page would take minutes.

    Elements whose end tag may be omitted and unmatched end tags are not counted.
    """
    if html.count("<") <= MAX_DEPTH:
        return False
    depth, open_elements = 0, Counter[str]()
    for tag in _TAG.finditer(html):
        name = (tag[2] or "").lower()
        if not name or name in _NOT_NESTING:
            continue
        step = -1 if tag[1] else 1
        if step > 0 or open_elements[name]:
            open_elements[name] += step
            depth += step
        if depth > MAX_DEPTH:
            return True
    return False
