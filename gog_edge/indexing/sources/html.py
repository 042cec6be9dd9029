"""Parses the HTML that MediaWiki and Kiwix write for an article into paragraphs in sections, and figures.

What is not article text is recognised by CSS class wherever there is one, so that it works in every language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from selectolax.lexbor import LexborHTMLParser, LexborNode

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.text import MAX_TITLE, SKIPPED_SECTIONS, clean_line, split_text

MAX_DEPTH = 4000  # nested elements; the time that the parser takes grows with the square of the depth
IMAGE_IS_FORMULA, IMAGE_IS_ICON = "image is a formula", "image is an icon"
MIN_IMAGE_SIDE = 48  # pixels; smaller images are icons
MAX_CAPTION = 1000  # characters

# --- MediaWiki's markup -------------------------------------------------------------------------

_NO_TEXT = ", ".join(
    (
        "style", "script", "noscript", "template", "link", "meta", "audio", "video", "form", "nav", "footer", "object",
        ".mw-editsection", ".mw-empty-elt", ".mw-jump-link", ".printfooter", ".catlinks", ".toc", "#toc", ".magnify",
        "#contentSub", "#siteSub", ".subpages", ".zim-footer",
        ".navbox", ".navbox-styles", ".vertical-navbox", ".sidebar", ".authority-control", ".portalbox", ".portal",
        ".ambox", ".ombox", ".tmbox", ".cmbox", ".fmbox", ".mbox-small", ".metadata", ".sistersitebox", ".noprint",
        ".hatnote", ".dablink", ".rellink", ".shortdescription", ".nomobile",
        ".reference", ".mw-ref", ".mw-cite-backlink", ".reflist", ".references", ".mw-references-wrap", ".refbegin",
        ".geo-inline-hidden", ".geo-nondefault", ".geo-multi-punct", "#coordinates", ".coordinates", ".mw-kartographer",
        "[hidden]", "[role=navigation]", "[style*='display:none']", "[style*='display: none']",
    )
)  # fmt: skip
_FOOTER = "<!--htdig_noindex-->", "<!--/htdig_noindex-->"  # enclose what Kiwix writes below an article
_FORMULA = ".mwe-math-element"
_FORMULA_IMAGE = "mwe-math"  # prefix of the classes of formulas that are images

_INLINE = frozenset(
    (
        "a", "abbr", "b", "bdi", "bdo", "big", "br", "button", "cite", "code", "data", "del", "dfn", "em", "font", "i",
        "img", "input", "ins", "kbd", "label", "mark", "math", "picture", "q", "rb", "rp", "rt", "ruby", "s", "samp",
        "small", "source", "span", "strike", "strong", "sub", "sup", "svg", "time", "tt", "u", "var", "wbr",
    )
)  # fmt: skip
_LISTS = frozenset(("ul", "ol", "dl"))
_HEADINGS = {"h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
# Elements whose text is taken as a whole; all other blocks are containers.
_LEAF_BLOCKS = frozenset(
    ("p", "blockquote", "pre", "figcaption", "address", "h1", "table", "figure", *_LISTS, *_HEADINGS)
)  # fmt: skip
_LINE_STARTS = "p, div, li, dd, dt, tr, caption"
_FIGURES = frozenset(("thumb", "gallery", "tmulti", "thumbinner"))  # classes; their texts are captions
_INFOBOXES = ("infobox", "taxobox", "biota", "vcard-box")  # parts of class names: infobox_v2
# Class of a frame around an image, and the selector of its caption.
_CAPTIONS = (("gallerybox", ".gallerytext"), ("tsingle", ".thumbcaption"), ("thumbinner", ".thumbcaption"),
             ("thumb", ".thumbcaption"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """An image of an article."""

    source: str  # as in the page: a path relative to the page, an address, or a data: URI
    caption: str
    lead: bool  # in the infobox, or where there is none, the first image before the first heading


@dataclass(frozen=True, slots=True)
class Page:
    """The content of an article's HTML."""

    paragraphs: tuple[tuple[str, str], ...]  # (section, text); nested sections are joined: "History / Early years"
    figures: tuple[Figure, ...]
    skipped: tuple[Skipped, ...]  # images


def parse_page(html: str) -> Page:
    """Parse a page or a fragment. It never fails: malformed HTML is text. Call `exceeds_max_depth` before."""
    above, _, footer = html.partition(_FOOTER[0])
    html = above + footer.partition(_FOOTER[1])[2]
    body = LexborHTMLParser(html.replace(_LINE, " ").replace(_CELL, " ")).body
    if body is None:
        return Page((), (), ())
    formulas = _replace_formulas(body)  # first, because parts of a formula are hidden and would be removed
    for node in body.css(_NO_TEXT):
        node.decompose(recursive=False)
    _insert_marks(body)
    figures, skipped = _extract_figures(body)
    return Page(_ParagraphReader().read(body), figures, (*formulas, *skipped))


# --- depth --------------------------------------------------------------------------------------

# A comment, or a tag with its attributes, each terminated as by the tokenizer of the HTML standard (section 13.2.5).
_TAG = re.compile(
    r"""<(?: !--(?:-?>|.*?(?:--!?>|\Z)) | [!?][^>]*+ | /[^a-zA-Z][^>]*+ | (/?)([a-zA-Z][^\s/>]*+)
        (?: [\s/]++ | [^\s/>][^\s/>=]*+ (?: \s*+=\s*+ (?: "[^"]*+"? | '[^']*+'? | [^\s>"'][^\s>]*+ )?+ )?+ )*+ )""",
    re.DOTALL | re.VERBOSE,
)
# Void elements, and elements that another one of their kind closes.
_NOT_NESTING = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
     "p", "li", "dt", "dd", "tr", "td", "th", "tbody", "thead", "tfoot", "caption", "colgroup", "option", "optgroup",
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


# --- text ---------------------------------------------------------------------------------------

_LINE, _CELL = "\x1e", "\x1f"  # inserted where a line or a table cell begins; pages do not contain them
_LATEX = re.compile(r"^\{\\(?:displaystyle|textstyle) (.*)\}$", re.DOTALL)


def _insert_marks(body: LexborNode) -> None:
    """Mark where lines and cells begin, because the text of a node does not show it."""
    for node in body.css("br"):
        node.replace_with(_LINE)
    for node in body.css(_LINE_STARTS):
        node.insert_before(_LINE)
    for node in body.css("td, th"):
        node.insert_before(_CELL)


def _replace_formulas(body: LexborNode) -> list[Skipped]:
    """Replace formulas by their LaTeX, and return their images as skipped."""
    images = []
    for node in body.css(_FORMULA):
        images += [Skipped(IMAGE_IS_FORMULA, (image.attributes.get("src") or "")[:200]) for image in node.css("img")]
        if node.parent is not None:
            node.replace_with(_latex(node))
    return images


def _latex(node: LexborNode) -> str:
    math, image = node.css_first("math"), node.css_first("img")
    text = (math and math.attributes.get("alttext")) or (image and image.attributes.get("alt")) or ""
    found = _LATEX.match(text.strip())
    return f" {found.group(1) if found else text} "


def _text_lines(node: LexborNode, separator: str = " | ") -> str:
    """Return the text of a marked node in lines, with `separator` between the cells of a line."""
    lines = []
    for raw in node.text().split(_LINE):
        cells = [cell for part in raw.split(_CELL) if (cell := clean_line(part))]
        if cells:
            lines.append(separator.join(cells))
    return "\n".join(lines)


class _ParagraphReader:
    """A reader of the blocks of a page, in order; the text of a block is taken as a whole."""

    def __init__(self) -> None:
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
        if tag in _HEADINGS:
            self._enter_section(_HEADINGS[tag], clean_line(node.text())[:MAX_TITLE])
        elif self._skipped_level or tag in ("h1", "figure", "-comment") or _is_figure(node):
            return
        elif _is_inline(tag):
            self._inline.append(node.text())
        elif tag == "table" and _is_infobox(_classes(node)):
            self._facts.append(_text_lines(node, ": "))
        elif not (tag in _LISTS and _is_link_list(node)):
            self._add(_text_lines(node))

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
            self._add("\n".join(line for raw in text.split(_LINE) if (line := clean_line(raw))))

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
    return tag == "-text" or tag in _INLINE


def _is_figure(node: LexborNode) -> bool:
    """Return whether a node is a gallery, or a figure as MediaWiki wrote it before HTML5."""
    return node.is_element_node and not _FIGURES.isdisjoint(_classes(node))


def _is_infobox(names: list[str]) -> bool:
    return any(part in name for name in names for part in _INFOBOXES)


def _is_link_list(node: LexborNode) -> bool:
    """Return whether more than half of the items contain an external link: a list of links, in any language."""
    items = node.css("li")
    return bool(items) and 2 * len(node.css("li a.external")) >= len(items) + 1


def _classes(node: LexborNode) -> list[str]:
    return (node.attributes.get("class") or "").split()


# --- figures ------------------------------------------------------------------------------------

_MAX_ANCESTORS = 16  # elements between an image and its frame
_NUMBER = re.compile(r"\s*(\d+)\s*(?:px)?\s*$")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|svg|webp|tiff?)\s*$", re.IGNORECASE)


def _extract_figures(body: LexborNode) -> tuple[tuple[Figure, ...], tuple[Skipped, ...]]:
    """Return the figures in document order, each source once, and the images that are formulas or icons."""
    found: dict[str, Figure] = {}
    skipped: list[Skipped] = []
    first: str | None = None  # source of the first figure before the first heading
    after_heading = False
    for node in body.css("img, h2"):
        if node.tag == "h2":
            after_heading = True
            continue
        source = _source(node)
        if not source or source in found:
            continue
        if reason := _skip_reason(node):
            skipped.append(Skipped(reason, source[:200]))
            continue
        found[source] = Figure(source, *_caption_and_lead(node))
        first = first or (None if after_heading else source)
    if first and not any(figure.lead for figure in found.values()):
        found[first] = replace(found[first], lead=True)
    return tuple(found.values()), tuple(skipped)


def _source(image: LexborNode) -> str:
    # Lazy loading keeps the address in another attribute, and a placeholder or nothing in src.
    return (image.attributes.get("data-src") or image.attributes.get("src") or "").strip()


def _skip_reason(image: LexborNode) -> str | None:
    if any(name.startswith(_FORMULA_IMAGE) for name in _classes(image)):
        return IMAGE_IS_FORMULA
    sides = [_NUMBER.match(image.attributes.get(name) or "") for name in ("width", "height")]
    return IMAGE_IS_ICON if any(side and int(side.group(1)[:9]) < MIN_IMAGE_SIDE for side in sides) else None


def _caption_and_lead(image: LexborNode) -> tuple[str, bool]:
    """Return the caption of the innermost frame, cell or alt text, and whether an infobox contains the image."""
    caption, lead, cell = "", False, None
    for node in _ancestors(image):
        names = _classes(node)
        if node.tag in ("td", "th") and cell is None:
            cell = node
        caption = caption or _frame_caption(node, names)
        if _is_infobox(names):
            lead = True
            caption = caption or _clean_text(cell)
            break
    alt = image.attributes.get("alt") or ""
    return (caption or ("" if _FILE_NAME.search(alt) else clean_line(alt)))[:MAX_CAPTION], lead


def _ancestors(node: LexborNode) -> Iterator[LexborNode]:
    above = node.parent
    for _ in range(_MAX_ANCESTORS):
        if above is None or above.tag in ("body", "html"):
            return
        yield above
        above = above.parent


def _frame_caption(node: LexborNode, names: list[str]) -> str:
    """Return the caption of a frame; empty if the node is not one."""
    if node.tag == "figure":
        return _clean_text(node.css_first("figcaption"))
    return next((_clean_text(node.css_first(selector)) for name, selector in _CAPTIONS if name in names), "")


def _clean_text(node: LexborNode | None) -> str:
    return "" if node is None else clean_line(node.text())
