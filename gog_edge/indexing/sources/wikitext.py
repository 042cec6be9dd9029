"""Wikitext -> paragraphs in sections: what is drawn by templates, tables and files is left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import mwparserfromhell

from gog_edge.indexing.sources.html_rules import DROPPED_SECTIONS
from gog_edge.indexing.sources.paragraphs import MAX_TITLE, clean_lines, one_line, split_text

MAX_CHARACTERS = 4 * 2**20  # twice what MediaWiki stores of a page
HIDDEN_LINKS = frozenset(("file", "image", "category", "media"))  # namespaces, in lower case; every wiki knows these
_DROPPED_TAGS = frozenset(
    (
        "ref", "references", "gallery", "table", "math", "chem", "ce", "timeline", "syntaxhighlight", "source", "score",
        "imagemap", "graph", "templatestyles", "style", "mapframe", "maplink", "hiero", "indicator", "section",
        "inputbox", "categorytree",
    )
)  # fmt: skip
_SWITCHES = re.compile(r"__[A-Z]+__")
_BREAK = re.compile(r"\n\s*\n")
_REMAINS = re.compile(r"^(?:[{|!].*|[:;*#]+|\s+)", re.MULTILINE)  # of tables not closed; the marks of lists


def read_wikitext(text: str, hidden: Collection[str] = HIDDEN_LINKS) -> Iterator[tuple[str, str]]:
    """(section, paragraph) in reading order. `hidden` are the namespaces, in lower case, whose links show no text."""
    path: list[tuple[int, str]] = []
    dropped = 0
    loose: list[str] = []
    for node in mwparserfromhell.parse(text, skip_style_tags=True).nodes:
        if not isinstance(node, mwparserfromhell.nodes.Heading):
            loose.append(_shown(node, hidden))
            continue
        yield from () if dropped else _paragraphs(path, loose)
        loose = []
        if dropped and node.level > dropped:
            continue
        title = one_line(_text(node.title, hidden))[:MAX_TITLE]
        path = [(level, name) for level, name in path if level < node.level] + [(node.level, title)]
        dropped = node.level if title.casefold() in DROPPED_SECTIONS else 0
    yield from () if dropped else _paragraphs(path, loose)


def _paragraphs(path: list[tuple[int, str]], parts: list[str]) -> Iterator[tuple[str, str]]:
    section = " / ".join(title for _, title in path if title)
    for raw in _BREAK.split(_SWITCHES.sub("", "".join(parts))):
        text = clean_lines(_REMAINS.sub("", raw))
        yield from ((section, piece) for piece in split_text(text))


def _text(code: Any, hidden: Collection[str]) -> str:
    return "" if code is None else "".join(_shown(node, hidden) for node in code.nodes)


def _shown(node: Any, hidden: Collection[str]) -> str:
    """What a reader sees of a node."""
    kind = type(node).__name__
    if kind == "Text":
        return str(node.value).replace("'''", "").replace("''", "")
    if kind == "Wikilink":
        return _link(node, hidden)
    if kind == "Tag":
        return _tag(node, hidden)
    if kind == "ExternalLink":
        return _text(node.title, hidden) if node.brackets else str(node.url)
    if kind == "HTMLEntity":
        return str(node.normalize())
    return ""  # templates, arguments, comments


def _link(node: Any, hidden: Collection[str]) -> str:
    name = str(node.title).strip()
    if name.partition(":")[0].strip().lower() in hidden:
        return ""
    return _text(node.text, hidden) if node.text is not None else name.lstrip(":")


def _tag(node: Any, hidden: Collection[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name in ("br", "hr"):
        return "\n"
    return _text(node.contents, hidden)
