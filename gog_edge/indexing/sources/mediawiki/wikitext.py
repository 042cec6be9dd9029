"""Turns the wikitext of a page into the paragraphs that a reader sees, each with its section."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import mwparserfromhell
from mwparserfromhell.nodes import Argument, ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink

from gog_edge.indexing.sources.mediawiki.paragraphs import paragraphs, protect, without_marks
from gog_edge.indexing.sources.mediawiki.site import Site, link_kind, shown_title
from gog_edge.indexing.sources.mediawiki.templates.arguments import GONE, HOLE, ITEM, MARKS, SPOKEN
from gog_edge.indexing.sources.mediawiki.templates.numbers import subscript, superscript
from gog_edge.indexing.sources.mediawiki.templates.rendering import render_template
from gog_edge.indexing.sources.mediawiki.variants import resolve_variants
from gog_edge.indexing.sources.mediawiki.vocabulary import SKIPPED_SECTIONS, words
from gog_edge.indexing.sources.text import MAX_TITLE, clean_line, split_text

_INVISIBLE_TAGS = words(
    """
    ref references gallery timeline syntaxhighlight source imagemap graph chart templatestyles style mapframe maplink
    indicator section inputbox categorytree includeonly rt rp rtc s del strike templatedata languages phonos
    dynamicpagelist script
    """
)
_FORMULAS = frozenset(("math", "chem", "ce", "score", "hiero", "abc"))
_BLOCKS = words(
    """
    p div blockquote center poem ul ol dl h1 h2 h3 h4 h5 h6
    """
)
_ITEMS = frozenset(("li", "dd", "dt"))
_ANNOTATIONS = frozenset(("rt", "rp", "rtc"))  # of ruby
_RAW = frozenset(("nowiki", "pre"))
# Comments, and tags whose content is not wikitext or not part of the sentence. They are removed before parsing, which
# is faster. As in MediaWiki, the first closing tag ends them.
_EXTENSIONS = words(
    """
    nowiki pre ref references gallery timeline syntaxhighlight source imagemap graph chart templatestyles mapframe
    maplink score hiero math chem ce inputbox categorytree includeonly templatedata
    """
)
_OPENING = re.compile(
    rf"(?P<line>(?<=\n)[ \t]{{0,9}}<!--)|<!--|<(?P<tag>{'|'.join(sorted(_EXTENSIONS))})\b"
    r"(?P<attributes>(?:[^<>\"]|\"[^\"\n]{0,500}+\")*+(?=>)|[^<>]*+(?=>))>",  # quotes that are not closed are text
    re.IGNORECASE,
)
_CLOSING = {tag: re.compile(rf"</{tag}\s*>", re.IGNORECASE) for tag in _EXTENSIONS}
_LINE_END = re.compile(r"[ \t]*\n")
_SIMPLE_FORMULA = re.compile(r"[\w\s.,+\-−=<>()/*±×·]*")
_INLINE = re.compile(r"\binline\b", re.IGNORECASE)
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_MARK_CHARACTERS = re.compile(f"[{MARKS}\x0e-\x1b]")


def parse_wikitext(text: str, site: Site | None = None, title: str = "") -> Iterator[tuple[str, str]]:
    """Yield (section, paragraph) in reading order.

    Tables, boxes, galleries and formulas are left out. A sentence that lacks something, because a template or formula
    in it cannot be rendered, is left out too. Lists are paragraphs of their own, with a line for each item.

    Args:
        text: wikitext of a page.
        site: the wiki; English without further namespaces by default.
        title: of the page, for templates that display it.
    """
    page = _Page(site or Site(), title)
    path: list[tuple[int, str]] = []
    skipped_level = 0
    parts: list[str] = []
    for node in mwparserfromhell.parse(page.prepare(text), skip_style_tags=True).nodes:
        if not isinstance(node, Heading):
            page.add(node, parts)
            continue
        yield from () if skipped_level else _section(path, parts)
        parts = []
        if skipped_level and node.level > skipped_level:
            continue
        name = clean_line(without_marks(page.text_of(node.title)))[:MAX_TITLE]
        path = [(level, outer) for level, outer in path if level < node.level] + [(node.level, name)]
        skipped_level = node.level if name.casefold() in SKIPPED_SECTIONS else 0
    yield from () if skipped_level else _section(path, parts)


def _section(path: list[tuple[int, str]], parts: list[str]) -> Iterator[tuple[str, str]]:
    section = " / ".join(name for _, name in path if name)
    for text in paragraphs("".join(parts), lead=not path):
        yield from ((section, piece) for piece in split_text(text))


class _Page:
    """Flattens the nodes of one page."""

    def __init__(self, site: Site, title: str) -> None:
        self._site, self._title = site, title
        self._handlers: dict[type[Any], Callable[[Any], str]] = {
            Text: lambda node: node.value, Wikilink: self._link, Tag: self._tag, ExternalLink: self._external_link,
            HTMLEntity: lambda node: protect(_MARK_CHARACTERS.sub("", str(node.normalize()))), Argument: self._argument,
            Template: lambda node: render_template(node, self.text_of, site, title),
                Heading: lambda node: self.text_of(node.title),
        }  # fmt: skip

    def prepare(self, text: str) -> str:
        """Return the wikitext without comments, references and the like, in one variant of the language."""
        text = _without_extensions(_MARK_CHARACTERS.sub("", text))
        return resolve_variants(text, self._site.language, self._site.variant)

    def text_of(self, code: Any) -> str:
        """Return the visible text of wikicode, with marks."""
        parts: list[str] = []
        for node in () if code is None else code.nodes:
            self.add(node, parts)
        return "".join(parts)

    def add(self, node: Any, parts: list[str]) -> None:
        """Append the visible text of a node. What is lowered after a digit stays apart from it: 10₂."""
        handler = self._handlers.get(type(node))
        text = "" if handler is None else handler(node)
        if text and parts and type(node) is Tag and parts[-1][-1:].isdigit() and str(node.tag).lower() == "sub":
            text = subscript(text)
        if text:
            parts.append(text)

    def _argument(self, node: Any) -> str:
        return HOLE if node.default is None else self.text_of(node.default)

    def _external_link(self, node: Any) -> str:
        if not node.brackets:
            return protect(str(node.url))
        return self.text_of(node.title) or GONE

    def _link(self, node: Any) -> str:
        name = self.text_of(node.title).strip()
        kind = link_kind(name, self._site)
        if kind != "shown":
            return GONE if kind == "hidden" else SPOKEN
        text = self.text_of(node.text) if node.text is not None else ""
        return text or shown_title(name)

    def _tag(self, node: Any) -> str:
        name = str(node.tag).strip().lower()
        if node.wiki_markup and name in _ITEMS:
            return ITEM
        if name in ("br", "hr"):
            return "\n"
        if name == "table":
            return "\n\n"
        if name in _INVISIBLE_TAGS or any(_HIDING.search(str(attribute.value)) for attribute in node.attributes):
            return GONE
        if name in _FORMULAS:
            return HOLE
        if name == "ruby":
            return self._ruby(node)
        if name in _RAW:
            return protect(str(node.contents or ""))
        text = self.text_of(node.contents)
        if name == "sup":
            return superscript(text)
        if name in _BLOCKS:
            return f"\n\n{text}\n\n"
        return f"\n{ITEM}{text}" if name in _ITEMS else text


    def _ruby(self, node: Any) -> str:
        """Return the base of annotated characters with their reading in brackets."""
        base, reading = list[str](), ""
        for child in node.contents.nodes:
            if type(child) is Tag and str(child.tag).lower() in _ANNOTATIONS:
                reading += self.text_of(child.contents).strip() if str(child.tag).lower() == "rt" else ""
            else:
                self.add(child, base)
        return "".join(base) + (f"({reading})" if reading else "")


def _without_extensions(text: str) -> str:
    """Return wikitext without comments, and with the tags that are not wikitext replaced by what they display."""
    parts, at = list[str](), 0
    unclosed = set[str]()  # tags that are not closed in the rest of the text
    for found in _OPENING.finditer(text):
        if found.start() < at:
            continue
        tag = (found["tag"] or "").lower()
        if not tag:
            end = text.find("-->", found.end())
            end = len(text) if end < 0 else end + 3
            line_end = _LINE_END.match(text, end) if found["line"] else None
            shown, end = "", line_end.end() if line_end else end
        elif found["attributes"].endswith("/"):
            shown, end = "" if tag in _RAW else GONE, found.end()
        else:
            closing = None if tag in unclosed else _CLOSING[tag].search(text, found.end())
            if closing is None:
                unclosed.add(tag)
            shown = HOLE if closing is None else _shown(tag, found["attributes"], text[found.end() : closing.start()])
            end = found.end() if closing is None else closing.end()
        parts += text[at : found.start()], shown
        at = end
    return "".join((*parts, text[at:]))


def _shown(tag: str, attributes: str, content: str) -> str:
    """Return what stands in the place of a tag: its text, nothing, or a mark."""
    if tag in _RAW:
        return protect(content)
    if tag in _FORMULAS:
        plain = tag == "math" and content.strip() and _SIMPLE_FORMULA.fullmatch(content)
        return f" {content.strip()} " if plain else HOLE
    if tag in ("syntaxhighlight", "source") and content:
        return protect(content) if _INLINE.search(attributes) else "\n\n"
    return GONE
