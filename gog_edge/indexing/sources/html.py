"""An article's HTML, as MediaWiki and Kiwix write it -> paragraphs in sections, and figures.

Figures are told by both shapes that there are: `<figure>` with `<figcaption>`, and `<div class="thumb">` with
`<div class="thumbcaption">`; besides them those of infoboxes, galleries and tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from selectolax.lexbor import LexborHTMLParser, LexborNode

from gog_edge.indexing.sources import html_rules as rules
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.figures import FORMULA, Figure, classes_of, is_infobox, read_figures
from gog_edge.indexing.sources.text import MAX_TITLE, one_line, split_text

_LINE, _CELL = "\x1e", "\x1f"  # set into the tree where a line or a cell begins; in no text of a page
MAX_DEPTH = 4000  # elements within elements: each new one makes the parser look at all around it
_LATEX = re.compile(r"^\{\\(?:displaystyle|textstyle) (.*)\}$", re.DOTALL)

# A comment, or a tag with its attributes, each ended as the tokenizer of the HTML standard ends it.
_TAG = re.compile(
    r"""<(?: !--(?:-?>|.*?(?:--!?>|\Z)) | [!?][^>]*+ | /[^a-zA-Z][^>]*+ | (/?)([a-zA-Z][^\s/>]*+)
        (?: [\s/]++ | [^\s/>][^\s/>=]*+ (?: \s*+=\s*+ (?: "[^"]*+"? | '[^']*+'? | [^\s>"'][^\s>]*+ )?+ )?+ )*+ )""",
    re.DOTALL | re.VERBOSE,
)
# Void elements, and those that end where another one like them begins.
_SHALLOW = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
     "p", "li", "dt", "dd", "tr", "td", "th", "tbody", "thead", "tfoot", "caption", "colgroup", "option", "optgroup",
     "rp", "rt", "html", "head", "body")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Page:
    """What an article's HTML holds."""

    paragraphs: tuple[tuple[str, str], ...]  # (section, text); of nested sections "History / Early years"
    figures: tuple[Figure, ...]
    skipped: tuple[Skipped, ...]  # images


def is_too_deep(html: str) -> bool:
    """Whether more than MAX_DEPTH elements stand open at once, about: the parser would take minutes over such a page.

    Not counted are elements that may be left open; a tag that ends nothing counts for nothing.
    """
    if html.count("<") <= MAX_DEPTH:
        return False
    depth, around = 0, Counter[str]()
    for tag in _TAG.finditer(html):
        name = (tag[2] or "").lower()
        if not name or name in _SHALLOW:
            continue
        step = -1 if tag[1] else 1
        if step > 0 or around[name]:
            around[name] += step
            depth += step
        if depth > MAX_DEPTH:
            return True
    return False


def read_page(html: str) -> Page:
    """Read a whole page or a part of one, not `is_too_deep`. Never fails: what is not HTML is text."""
    above, _, footer = html.partition(rules.FOOTER[0])
    html = above + footer.partition(rules.FOOTER[1])[2]
    body = LexborHTMLParser(html.replace(_LINE, " ").replace(_CELL, " ")).body
    if body is None:
        return Page((), (), ())
    formulas = _spell_formulas(body)  # first, for part of each is hidden
    for node in body.css(rules.DROPPED):
        node.decompose(recursive=False)
    _mark(body)
    figures, skipped = read_figures(body)
    return Page(_Paragraphs().read(body), figures, (*formulas, *skipped))


def _mark(body: LexborNode) -> None:
    """Set marks where lines and cells begin, which the text of a node tells nothing of."""
    for node in body.css("br"):
        node.replace_with(_LINE)
    for node in body.css(rules.LINE_STARTS):
        node.insert_before(_LINE)
    for node in body.css("td, th"):
        node.insert_before(_CELL)


def _spell_formulas(body: LexborNode) -> list[Skipped]:
    """Put the LaTeX in the place of formulas, and tell their images."""
    images = []
    for node in body.css(rules.FORMULA):
        images += [Skipped(FORMULA, (image.attributes.get("src") or "")[:200]) for image in node.css("img")]
        if node.parent is not None:
            node.replace_with(_latex(node))
    return images


def _latex(node: LexborNode) -> str:
    math, image = node.css_first("math"), node.css_first("img")
    text = (math and math.attributes.get("alttext")) or (image and image.attributes.get("alt")) or ""
    found = _LATEX.match(text.strip())
    return f" {found.group(1) if found else text} "


def text_lines(node: LexborNode, between: str = " | ") -> str:
    """The text of a node in lines, cells of a line told apart by `between`; of a tree that was marked."""
    lines = []
    for raw in node.text().split(_LINE):
        cells = [cell for part in raw.split(_CELL) if (cell := one_line(part))]
        if cells:
            lines.append(between.join(cells))
    return "\n".join(lines)


class _Paragraphs:
    """Walks over the blocks of a page; what lies within one is taken as text at once."""

    def __init__(self) -> None:
        self._path: list[tuple[int, str]] = []  # (level, title) of the sections around
        self._dropped = 0  # level of the section that is left out; 0 for none
        self._loose: list[str] = []  # text between blocks
        self._facts: list[str] = []  # of infoboxes: they stand first, and are read after the lead
        self._done: list[tuple[str, str]] = []

    def read(self, body: LexborNode) -> tuple[tuple[str, str], ...]:
        """All paragraphs."""
        parent = None
        for node in _blocks(body):
            tag, above = node.tag or "", node.parent
            if (above and above.mem_id) != parent or not _is_inline(tag):
                self._flush()
                parent = above and above.mem_id
            self._take(tag, node)
        self._flush()
        self._end_lead()
        return tuple(self._done)

    def _take(self, tag: str, node: LexborNode) -> None:
        if tag in rules.HEADINGS:
            self._enter(rules.HEADINGS[tag], one_line(node.text())[:MAX_TITLE])
        elif self._dropped or tag in ("h1", "figure", "-comment") or is_figure(node):
            return
        elif _is_inline(tag):
            self._loose.append(node.text())
        elif tag == "table" and is_infobox(classes_of(node)):
            self._facts.append(text_lines(node, ": "))
        elif not (tag in rules.LISTS and _is_link_list(node)):
            self._add(text_lines(node))

    def _enter(self, level: int, title: str) -> None:
        self._end_lead()
        if self._dropped and level > self._dropped:
            return
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        self._dropped = level if title.casefold() in rules.DROPPED_SECTIONS else 0
        self._path.append((level, title))

    def _flush(self) -> None:
        if not self._loose:
            return
        text = "".join(self._loose)
        self._loose.clear()
        if not self._dropped:
            self._add("\n".join(line for raw in text.split(_LINE) if (line := one_line(raw))))

    def _end_lead(self) -> None:
        facts, self._facts = self._facts, []
        for text in facts:
            self._add(text)

    def _add(self, text: str) -> None:
        section = " / ".join(title for _, title in self._path if title)
        self._done.extend((section, piece) for piece in split_text(text))


def _blocks(root: LexborNode) -> Iterator[LexborNode]:
    """What stands in `root` and in the containers within it, in order. Not by recursion: pages may nest without end."""
    node = root.first_child
    while node is not None:
        if (inside := _contents(node)) is not None:
            node = inside
            continue
        yield node
        while node is not None and node.next is None:
            node = node.parent
            if node is None or node.mem_id == root.mem_id:  # == would write out both as HTML
                return
        node = node.next if node is not None else None


def _contents(node: LexborNode) -> LexborNode | None:
    """The first child of a container, None of everything else."""
    tag = node.tag or "-"
    if tag in _LEAVES or _is_inline(tag) or tag.startswith("-") or is_figure(node):
        return None
    return node.first_child


_LEAVES = rules.TEXT_BLOCKS | rules.LISTS | frozenset(rules.HEADINGS) | {"h1", "table", "figure"}


def _is_inline(tag: str) -> bool:
    return tag == "-text" or tag in rules.INLINE


def is_figure(node: LexborNode) -> bool:
    """Whether a node is a figure of the older shape, or a gallery."""
    return node.is_element_node and not rules.FIGURES.isdisjoint(classes_of(node))


def _is_link_list(node: LexborNode) -> bool:
    """Whether more than half of a list's lines hold a link out of the snapshot: external links, in any language."""
    lines = node.css("li")
    return bool(lines) and 2 * len(node.css("li a.external")) >= len(lines) + 1
