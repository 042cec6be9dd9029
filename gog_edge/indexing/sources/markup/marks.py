"""Prepares a parsed page so that the text of its nodes shows lines, cells, formulas, exponents and readings.

Marks are control characters that pages do not contain: `remove_marks` removes them before a page is parsed.
"""

from __future__ import annotations

import re

from selectolax.lexbor import LexborNode

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.text import clean_line

IMAGE_IS_FORMULA = "image is a formula"
# Inserted where a line or a table cell begins, and for a space that is kept: white space, and not white space for
# str.split.
_LINE, _CELL, _SPACE = "\x1e", "\x1f", "\x01"
INLINE = frozenset(
    (
        "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "br", "cite", "code", "data", "del", "dfn", "em", "font", "i",
        "img", "input", "ins", "kbd", "label", "mark", "math", "nobr", "object", "picture", "q", "rb", "rp", "rt",
        "ruby", "s", "samp", "small", "source", "span", "strike", "strong", "sub", "sup", "svg", "time", "tt", "u",
        "var", "video", "wbr",
    )
)  # fmt: skip

_LINES = frozenset(("p", "div", "li", "dd", "dt", "tr", "caption", "pre", "blockquote", "ul", "ol", "dl"))
_MARKED = ", ".join(("br", "td", "th", "sup", "sub", *sorted(_LINES)))
_PREFORMATTED = ("pre, textarea, listing, xmp, [style*='white-space:pre' i], [style*='white-space: pre' i], "
                 "[style*='white-space:break-spaces' i]")  # fmt: skip
_FORMULA = ".mwe-math-element"
_OTHER_FORMULAS = "math, img.tex, img.latex, img[class*='mwe-math']"
# One of these is in every page with preformatted text, or with formulas.
_PREFORMATTED_WORDS = (b"<pre", b"<textarea", b"<listing", b"<xmp", b"white-space")
_FORMULA_WORDS = (b"math", b'class="tex', b"class='tex", b"class=tex", b"latex")
_LATEX = re.compile(r"^\{\\(?:displaystyle|textstyle|scriptstyle) (.*)\}$", re.DOTALL)
_MAX_FORMULA_DEPTH = 40
_MAX_NESTED_MARKUP = 4  # elements around an exponent

_RAISED = str.maketrans("0123456789+-−()=n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾⁼ⁿ")
_LOWERED = str.maketrans("0123456789+-−()=", "₀₁₂₃₄₅₆₇₈₉₊₋₋₍₎₌")
_EXPONENT = re.compile(r"[0-9+\-−()=n]+")
_INDEX = re.compile(r"[0-9+\-−()=]+")
_STARTS_WITH_NUMBER = re.compile(r"[+\-−]?\d")


def remove_marks(html: str) -> str:
    """Return a page without the characters that are used as marks."""
    return html.replace(_LINE, " ").replace(_CELL, " ").replace(_SPACE, " ")


def mark_text(body: LexborNode, html: bytes) -> None:
    """Mark lines, cells and kept spaces, and write exponents, indices and readings of characters as text.

    `html` is the page in lower case.
    """
    if b"<ruby" in html:
        for node in _outermost(body, "ruby"):
            _write_reading(node)
    for node in body.css(_MARKED):
        tag = node.tag
        if tag == "br":
            node.replace_with(_LINE)
        elif tag in ("td", "th"):
            node.insert_before(_CELL)
        elif tag in ("sup", "sub"):
            _write_raised_or_lowered(node)
        elif tag in _LINES:
            node.insert_before(_LINE)
            if (after := node.next) is not None and (after.tag in INLINE or (after.is_text_node and _text(after))):
                node.insert_after(_LINE)
    if any(word in html for word in _PREFORMATTED_WORDS):
        for node in _outermost(body, _PREFORMATTED):
            _keep_white_space(node)


def _outermost(body: LexborNode, selector: str) -> list[LexborNode]:
    """Return the nodes that a selector finds and that are not within another one of them, each once."""
    found: list[LexborNode] = []
    known: set[int] = set()
    for node in body.css(selector):
        if node.mem_id not in known:
            found.append(node)
            known.update(inside.mem_id for inside in (node, *node.css(selector)))
    return found


def text_lines(text: str, separator: str = " | ") -> str:
    """Return the text of a marked node in lines, with `separator` between the cells of a line."""
    lines = []
    for raw in text.split(_LINE):
        cells = [cell for part in raw.split(_CELL) if (cell := _clean_cell(part))]
        if cells:
            lines.append(separator.join(cells))
    return "\n".join(lines)


def plain_text(node: LexborNode | None) -> str:
    """Return the text of a node in one line."""
    return "" if node is None else clean_line((node.text() or "").replace(_SPACE, " "))


def _clean_cell(text: str) -> str:
    text = clean_line(text)
    return text.replace(_SPACE, " ").rstrip() if _SPACE in text else text


def _keep_white_space(node: LexborNode) -> None:
    inside = [part for part in node.traverse(include_text=True) if part.is_text_node]
    for part in inside:
        text = part.text() or ""
        kept = text.expandtabs().replace(" ", _SPACE).replace("\r\n", "\n").replace("\n", _LINE)
        if kept != text:
            part.replace_with(kept)


# --- exponents and readings ---------------------------------------------------------------------


def _write_raised_or_lowered(node: LexborNode) -> None:
    """Write 10<sup>6</sup> as 10⁶ and log<sub>10</sub>2 as log₁₀2, since 106 and log102 are other numbers.

    Indices that do not touch a number stay as they are: H2O.
    """
    text = _only_text(node).strip()
    if not text:
        return
    before = _only_text(node.prev)[-1:]
    if node.tag == "sup":
        if _EXPONENT.fullmatch(text):
            node.replace_with(text.translate(_RAISED))
        elif _STARTS_WITH_NUMBER.match(text) and before.isdecimal():
            node.replace_with(f"^{text}")
    elif _INDEX.fullmatch(text) and (before.isdecimal() or before == "⁄" or _only_text(node.next)[:1].isdecimal()):
        node.replace_with(text.translate(_LOWERED))


def _text(node: LexborNode) -> str:
    return (node.text() or "").strip()


def _only_text(node: LexborNode | None) -> str:
    """Return the text of a node that contains nothing else, or elements that contain nothing else."""
    for _ in range(_MAX_NESTED_MARKUP):
        if node is None or node.is_text_node:
            return "" if node is None else node.text() or ""
        child = node.first_child
        if child is None or child.next is not None:
            return ""
        node = child
    return ""


def _write_reading(ruby: LexborNode) -> None:
    """Write the readings of characters in brackets after all of them, so that the word stays whole."""
    readings = "".join(clean_line(node.text() or "") for node in ruby.css("rt"))
    for node in ruby.css("rt, rp, rtc"):
        node.decompose(recursive=False)
    base = clean_line(ruby.text() or "")
    ruby.replace_with(f"{base}({readings})" if base and readings else base or readings)


# --- formulas -----------------------------------------------------------------------------------


def replace_formulas(body: LexborNode, html: bytes) -> list[Skipped]:
    """Replace formulas by their LaTeX, or by a line of text, and return their images as skipped.

    `html` is the page in lower case.
    """
    images: list[Skipped] = []
    if not any(word in html for word in _FORMULA_WORDS):
        return images
    for selector in (_FORMULA, _OTHER_FORMULAS):
        for node in _outermost(body, selector):
            shown = [node] if node.tag == "img" else node.css("img")
            images += [Skipped(IMAGE_IS_FORMULA, image.attributes.get("src") or "") for image in shown]
            node.replace_with(f" {_latex(node)} ")
    return images


def _latex(node: LexborNode) -> str:
    math = node if node.tag == "math" else node.css_first("math")
    image = node if node.tag == "img" else node.css_first("img")
    source = math and math.css_first("annotation[encoding*='tex' i]")
    text = ((math and math.attributes.get("alttext")) or (source and source.text())
            or (image and image.attributes.get("alt")) or (math and _linear(math)) or "")
    found = _LATEX.match(text.strip())
    return found.group(1) if found else text


# Number of parts and notation of MathML elements.
_NOTATIONS = {
    "msup": (2, "{}^{{{}}}"), "msub": (2, "{}_{{{}}}"), "msubsup": (3, "{}_{{{}}}^{{{}}}"), "mfrac": (2, "({})/({})"),
    "mroot": (2, "({})^(1/{})"), "munder": (2, "{}_{{{}}}"), "mover": (2, "{}^{{{}}}"),
    "munderover": (3, "{}_{{{}}}^{{{}}}"),
}  # fmt: skip


def _linear(node: LexborNode, depth: int = 0) -> str:
    """Return MathML as one line of text: x^{2}, (a)/(b)."""
    if depth > _MAX_FORMULA_DEPTH or node.is_text_node:
        return clean_line(node.text() or "")
    if (node.tag or "").startswith("annotation"):
        return ""
    parts, child = [], node.first_child
    while child is not None:
        if text := _linear(child, depth + 1):
            parts.append(text)
        child = child.next
    count, notation = _NOTATIONS.get(node.tag or "", (0, ""))
    if count and len(parts) == count:
        return notation.format(*parts)
    return f"√({''.join(parts)})" if node.tag == "msqrt" else "".join(parts)
