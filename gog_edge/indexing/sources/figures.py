"""The images of an article's HTML, with their captions, less formulas and icons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from selectolax.lexbor import LexborNode

from gog_edge.indexing.sources import html_rules as rules
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.text import one_line

FORMULA, ICON = "image is a formula", "image is an icon"
ICON_SIDE = 48  # pixels
MAX_CAPTION = 1000  # characters
_CLIMB = 16  # elements between an image and what it is a figure of, at most
_NUMBER = re.compile(r"\s*(\d+)\s*(?:px)?\s*$")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|svg|webp|tiff?)\s*$", re.IGNORECASE)
# The class of a frame, and where within it the caption stands.
_CAPTIONS = (("gallerybox", ".gallerytext"), ("tsingle", ".thumbcaption"), ("thumbinner", ".thumbcaption"),
             ("thumb", ".thumbcaption"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """An image that an article shows."""

    source: str  # as the page writes it: a path relative to the page, an address, or a data: URI
    caption: str
    lead: bool  # in the infobox, or where there is none, the first one before the first heading


def classes_of(node: LexborNode) -> list[str]:
    """The classes of an element."""
    return (node.attributes.get("class") or "").split()


def is_infobox(names: list[str]) -> bool:
    """Whether an element of these classes is an infobox, by any of its names."""
    return any(part in name for name in names for part in rules.INFOBOXES)


def read_figures(body: LexborNode) -> tuple[tuple[Figure, ...], tuple[Skipped, ...]]:
    """The figures in their order, each source once, and the images that are none."""
    found: dict[str, Figure] = {}
    skipped: list[Skipped] = []
    first: str | None = None  # source of the first figure before the first heading
    begun = False
    for node in body.css("img, h2"):
        if node.tag == "h2":
            begun = True
            continue
        source = _source(node)
        if not source or source in found:
            continue
        if reason := _unfit(node):
            skipped.append(Skipped(reason, source[:200]))
            continue
        found[source] = Figure(source, *_caption_and_lead(node))
        first = first or (None if begun else source)
    if first and not any(figure.lead for figure in found.values()):
        found[first] = replace(found[first], lead=True)
    return tuple(found.values()), tuple(skipped)


def _source(image: LexborNode) -> str:
    # Pages that load images late keep the address elsewhere, with a dot or nothing in its place.
    return (image.attributes.get("data-src") or image.attributes.get("src") or "").strip()


def _unfit(image: LexborNode) -> str | None:
    if any(name.startswith(rules.MATH_IMAGE) for name in classes_of(image)):
        return FORMULA
    sides = [_NUMBER.match(image.attributes.get(name) or "") for name in ("width", "height")]
    return ICON if any(side and int(side.group(1)[:9]) < ICON_SIDE for side in sides) else None


def _caption_and_lead(image: LexborNode) -> tuple[str, bool]:
    caption, lead, cell = "", False, None
    for node in _ancestors(image):
        names = classes_of(node)
        if node.tag in ("td", "th") and cell is None:
            cell = node
        caption = caption or _framed(node, names)
        if is_infobox(names):
            lead = True
            caption = caption or _text(cell)
            break
    alt = image.attributes.get("alt") or ""
    return (caption or ("" if _FILE_NAME.search(alt) else one_line(alt)))[:MAX_CAPTION], lead


def _ancestors(node: LexborNode) -> Iterator[LexborNode]:
    above = node.parent
    for _ in range(_CLIMB):
        if above is None or above.tag in ("body", "html"):
            return
        yield above
        above = above.parent


def _framed(node: LexborNode, names: list[str]) -> str:
    """The caption of a frame, none of what is no frame."""
    if node.tag == "figure":
        return _text(node.css_first("figcaption"))
    return next((_text(node.css_first(where)) for name, where in _CAPTIONS if name in names), "")


def _text(node: LexborNode | None) -> str:
    return "" if node is None else one_line(node.text())
