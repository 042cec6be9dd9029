"""Finds the images of a parsed page: their addresses, captions, and which of them shows the subject."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from selectolax.lexbor import LexborNode

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.markup.marks import IMAGE_IS_FORMULA, plain_text
from gog_edge.indexing.sources.text import clean_line

IMAGE_IS_ICON = "image is an icon"
MIN_IMAGE_SIDE = 48  # pixels; smaller images are icons
MAX_CAPTION = 1000  # characters

_IMAGES = "img, video, object[data]"
_FORMULA_IMAGE = "mwe-math"  # prefix of the classes of formulas that are images
_INFOBOXES = ("infobox", "taxobox", "biota", "vcard-box")  # parts of class names: infobox_v2
# Class of a frame around an image, and the selector of its caption.
_CAPTIONS = (("gallerybox", ".gallerytext"), ("tsingle", ".thumbcaption"), ("thumbinner", ".thumbcaption"),
             ("thumb", ".thumbcaption"), ("wp-caption", ".wp-caption-text"))  # fmt: skip
_MAX_ANCESTORS = 16  # elements between an image and its frame
_NUMBER = re.compile(r"\s*(\d+)\s*(?:px)?\s*$")
_STYLED_SIDE = re.compile(r"(?:^|;)\s*(?:width|height)\s*:\s*(\d+)(?:\.\d+)?px", re.IGNORECASE)
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|svg|webp|avif|tiff?)\s*$", re.IGNORECASE)

# Attributes of an address and of a set of them. Pages that load images lazily keep the address in one of the first, and
# a placeholder or nothing in src.
_LAZY = ("data-src", "data-lazy-src", "data-original", "data-lazy", "data-hi-res-src")
_SETS = ("data-srcset", "data-lazy-srcset", "srcset")
_MAX_SET, _MAX_SOURCES = 20_000, 64  # characters; nodes before the image
# A candidate of a srcset, as the HTML standard parses it: an address that ends with a comma, or one with descriptors.
_CANDIDATE = re.compile(r"[\s,]*(?:(\S*[^\s,]),+(?=\s|\Z)|(\S+)([^,]*))")
_DESCRIPTOR = re.compile(r"\s(\d+(?:\.\d+)?)([wx])(?=\s|\Z)")


@dataclass(frozen=True, slots=True)
class Figure:
    """An image of an article."""

    source: str  # as in the page: a path relative to the page, an address, or a data: URI
    caption: str
    lead: bool  # in the infobox, or where there is none, the first image before the first heading
    others: tuple[str, ...] = ()  # the same image in other sizes or formats, the best first


def extract_figures(body: LexborNode) -> tuple[tuple[Figure, ...], tuple[Skipped, ...]]:
    """Return the figures in document order, each source once, and the images that are formulas or icons."""
    found: dict[str, Figure] = {}
    skipped: list[Skipped] = []
    first: str | None = None  # source of the first figure before the first heading
    after_heading = False
    for node in body.css(f"{_IMAGES}, h2"):
        if node.tag == "h2":
            after_heading = True
            continue
        addresses = addresses_of(node)
        source, *others = addresses or [""]
        if not source or source in found:
            continue
        if reason := _skip_reason(node):
            skipped.append(Skipped(reason, source))
            continue
        found[source] = Figure(source, *_caption_and_lead(node), tuple(others))
        first = first or (None if after_heading else source)
    if first and not any(figure.lead for figure in found.values()):
        found[first] = replace(found[first], lead=True)
    return tuple(found.values()), tuple(skipped)


def is_infobox(names: list[str]) -> bool:
    """Return whether one of the classes of an element is that of an infobox, in any language."""
    return any(part in name for name in names for part in _INFOBOXES)


def classes(node: LexborNode) -> list[str]:
    """Return the classes of an element."""
    return (node.attributes.get("class") or "").split()


# --- addresses ----------------------------------------------------------------------------------


def addresses_of(node: LexborNode) -> list[str]:
    """Return the addresses of an image: the largest first, `data:` URIs last, each once."""
    attributes = node.attributes
    if node.tag == "video":
        return [address for address in [(attributes.get("poster") or "").strip()] if address]
    if node.tag == "object":
        address = (attributes.get("data") or "").strip()
        is_image = (attributes.get("type") or "").lower().startswith("image/") or _FILE_NAME.search(address)
        return [address] if address and is_image else []
    ranked = [*_ranked(attributes), *(one for source in _sources_of(node) for one in _ranked(source.attributes))]
    ranked.sort(key=lambda one: one[0], reverse=True)  # stable
    return list(dict.fromkeys(address for _, address in ranked))


def _sources_of(image: LexborNode) -> Iterator[LexborNode]:
    """Yield the <source> elements before the image of a <picture>."""
    above, node = image.parent, image.prev
    if above is None or above.tag != "picture":
        return
    for _ in range(_MAX_SOURCES):
        if node is None:
            return
        if node.tag == "source":
            yield node
        node = node.prev


def _ranked(attributes: dict[str, str | None]) -> Iterator[tuple[tuple[bool, bool, float, bool], str]]:
    """Yield addresses with their rank: files before data: URIs, widths before densities, lazy ones before src."""
    for name in _LAZY:
        if address := (attributes.get(name) or "").strip():
            yield (not address.startswith("data:"), False, 1.0, True), address
    for name in _SETS:
        for address, size, in_pixels in parse_srcset(attributes.get(name) or ""):
            yield (not address.startswith("data:"), in_pixels, size, name != "srcset"), address
    if address := (attributes.get("src") or "").strip():
        yield (not address.startswith("data:"), False, 1.0, False), address


def parse_srcset(text: str) -> Iterator[tuple[str, float, bool]]:
    """Yield the candidates of a `srcset` as (address, size, in pixels); the size is a width in pixels or a density."""
    if len(text) > _MAX_SET:
        return
    for found in _CANDIDATE.finditer(text.strip(", \t\n\f\r")):
        address = found[1] or found[2]
        if not address:
            continue
        descriptor = _DESCRIPTOR.search(found[3] or "")
        size = float(descriptor[1]) if descriptor else 1.0
        yield address, size, descriptor is not None and descriptor[2] == "w"


def _skip_reason(image: LexborNode) -> str | None:
    if any(name.startswith(_FORMULA_IMAGE) for name in classes(image)):
        return IMAGE_IS_FORMULA
    attributes = image.attributes
    sides = [found[1] for name in ("width", "height") if (found := _NUMBER.match(attributes.get(name) or ""))]
    sides += _STYLED_SIDE.findall(attributes.get("style") or "")
    return IMAGE_IS_ICON if any(int(side[:9]) < MIN_IMAGE_SIDE for side in sides) else None


# --- captions -----------------------------------------------------------------------------------


def _caption_and_lead(image: LexborNode) -> tuple[str, bool]:
    """Return the caption of the innermost frame, cell or alt text, and whether an infobox contains the image."""
    caption, lead, cell = "", False, None
    for node in _ancestors(image):
        names = classes(node)
        if node.tag in ("td", "th") and cell is None:
            cell = node
        caption = caption or _frame_caption(node, names)
        if is_infobox(names):
            lead = True
            caption = caption or plain_text(cell)
            break
    attributes = image.attributes
    other = next((clean_line(text) for name in ("alt", "data-alt", "aria-label", "title")
                  if (text := attributes.get(name)) and not _FILE_NAME.search(text)), "")
    return (caption or other)[:MAX_CAPTION], lead


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
        return plain_text(node.css_first("figcaption"))
    return next((plain_text(node.css_first(selector)) for name, selector in _CAPTIONS if name in names), "")
