"""Parses the HTML of articles, as MediaWiki, Kiwix and other sites write it, into paragraphs in sections, and figures.

What is not article text is recognised by CSS class wherever there is one, so that it works in every language.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selectolax.lexbor import LexborHTMLParser, LexborNode

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.markup.cleaning import remove_all_but_text
from gog_edge.indexing.sources.markup.figures import Figure, classes, extract_figures, is_infobox
from gog_edge.indexing.sources.markup.marks import (
    INLINE,
    mark_text,
    plain_text,
    remove_marks,
    replace_formulas,
    text_lines,
)
from gog_edge.indexing.sources.text import MAX_TITLE, SKIPPED_SECTIONS, split_text

_FOOTER = "<!--htdig_noindex-->", "<!--/htdig_noindex-->"  # enclose what Kiwix writes below an article
_LISTS = frozenset(("ul", "ol", "dl"))
_HEADINGS = {"h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
# Elements whose text is taken as a whole; all other blocks are containers.
_LEAF_BLOCKS = frozenset(
    ("p", "blockquote", "pre", "textarea", "listing", "xmp", "figcaption", "address", "h1", "table", "figure",
     *_LISTS, *_HEADINGS)
)  # fmt: skip
_FIGURES = frozenset(("thumb", "gallery", "tmulti", "thumbinner", "wp-caption"))  # classes; their texts are captions


@dataclass(frozen=True, slots=True)
class Page:
    """The content of an article's HTML."""

    paragraphs: tuple[tuple[str, str], ...]  # (section, text); nested sections are joined: "History / Early years"
    figures: tuple[Figure, ...]
    skipped: tuple[Skipped, ...]  # images
    title: str = ""  # of its first top-level heading, or of its head
    base: str = ""  # address that those of the images are relative to; empty: that of the page


def parse_page(html: str) -> Page:
    """Parse a page or a fragment. It never fails: malformed HTML is text. Call `decoding.exceeds_max_depth` before."""
    above, _, footer = html.partition(_FOOTER[0])
    html = above + footer.partition(_FOOTER[1])[2]
    tree = LexborHTMLParser(remove_marks(html))
    body = tree.body
    if body is None:
        return Page((), (), ())
    lower = html.encode("utf-8", "replace").lower()  # bytes are lowered and searched several times as fast as text
    title, base = _title_and_base(tree, body, lower)
    formulas = replace_formulas(body, lower)  # first, because parts of a formula are hidden and would be removed
    remove_all_but_text(body, lower)
    mark_text(body, lower)
    figures, skipped = extract_figures(body)
    has_chapters = lower.count(b"<h1") > 1 and len(body.css("h1")) > 1
    return Page(_ParagraphReader(has_chapters).read(body), figures, (*formulas, *skipped), title, base)


def _title_and_base(tree: LexborHTMLParser, body: LexborNode, html: bytes) -> tuple[str, str]:
    head = tree.head
    base = head.css_first("base[href]") if head is not None and b"<base" in html else None
    title = plain_text(body.css_first("h1")) if b"<h1" in html else ""
    title = title or ("" if head is None else plain_text(head.css_first("title")))
    return title[:MAX_TITLE], "" if base is None else (base.attributes.get("href") or "").strip()


class _ParagraphReader:
    """A reader of the blocks of a page, in order; the text of a block is taken as a whole."""

    def __init__(self, has_chapters: bool) -> None:
        # One top-level heading is the title of the page; several are its chapters.
        self._headings = _HEADINGS | ({"h1": 1} if has_chapters else {})
        self._path: list[tuple[int, str]] = []  # (level, title) of the enclosing sections
        self._skipped_level = 0  # level of the section that is left out; 0: none
        self._inline: list[str] = []  # text between blocks
        self._facts: list[str] = []  # of infoboxes, which precede the lead section and are stored after it
        self._paragraphs: list[tuple[str, str]] = []

    def read(self, body: LexborNode) -> tuple[tuple[str, str], ...]:
        """Return all paragraphs as (section, text)."""
        parent = None
        for node in _blocks(body):
            tag, above = node.tag or "", node.parent
            if (above and above.mem_id) != parent or not _is_inline(tag):
                self._flush()
                parent = above and above.mem_id
            self._read_block(tag, node)
        self._flush()
        self._add_facts()
        return tuple(self._paragraphs)

    def _read_block(self, tag: str, node: LexborNode) -> None:
        if tag in self._headings:
            self._enter_section(self._headings[tag], plain_text(node)[:MAX_TITLE])
        elif self._skipped_level or tag in ("h1", "figure", "-comment") or _is_figure(node):
            return
        elif _is_inline(tag):
            self._inline.append(node.text())
        elif tag == "table" and is_infobox(classes(node)):
            self._facts.append(text_lines(node.text(), ": "))
        elif not (tag in _LISTS and _is_link_list(node)):
            self._add(text_lines(node.text()))

    def _enter_section(self, level: int, title: str) -> None:
        self._add_facts()
        if self._skipped_level and level > self._skipped_level:
            return
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        self._skipped_level = level if title.casefold() in SKIPPED_SECTIONS else 0
        self._path.append((level, title))

    def _flush(self) -> None:
        if not self._inline:
            return
        text = "".join(self._inline)
        self._inline.clear()
        if not self._skipped_level:
            self._add(text_lines(text, " "))

    def _add_facts(self) -> None:
        facts, self._facts = self._facts, []
        for text in facts:
            self._add(text)

    def _add(self, text: str) -> None:
        section = " / ".join(title for _, title in self._path if title)
        self._paragraphs.extend((section, piece) for piece in split_text(text))


def _blocks(root: LexborNode) -> Iterator[LexborNode]:
    """Yield the blocks below `root`, those within containers included, in document order.

    The traversal is iterative, because pages may be nested deeper than Python's recursion limit.
    """
    node = root.first_child
    while node is not None:
        if (inside := _first_child(node)) is not None:
            node = inside
            continue
        yield node
        while node is not None and node.next is None:
            node = node.parent
            if node is None or node.mem_id == root.mem_id:  # == would serialise both nodes
                return
        node = node.next if node is not None else None


def _first_child(node: LexborNode) -> LexborNode | None:
    """Return the first child of a container, and None for all other nodes."""
    tag = node.tag or "-"
    if tag in _LEAF_BLOCKS or _is_inline(tag) or tag.startswith("-") or _is_figure(node):
        return None
    return node.first_child


def _is_inline(tag: str) -> bool:
    return tag == "-text" or tag in INLINE


def _is_figure(node: LexborNode) -> bool:
    """Return whether a node is a gallery, or a figure as MediaWiki wrote it before HTML5."""
    return node.is_element_node and not _FIGURES.isdisjoint(classes(node))


def _is_link_list(node: LexborNode) -> bool:
    """Return whether more than half of the items contain an external link: a list of links, in any language."""
    items = node.css("li")
    return bool(items) and 2 * len(node.css("li a.external")) >= len(items) + 1
