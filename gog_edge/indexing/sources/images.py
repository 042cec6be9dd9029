"""SVG -> PNG, of drawings that can do no harm: the renderer would draw this machine's files, and nest till it falls."""

from __future__ import annotations

import base64
import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from xml.parsers import expat

from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.picture import FORMATS, PictureLimits, decode_picture
from gog_edge.types import Pixels

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 200  # elements within elements; real drawings stay below 50
MAX_PIXELS = 16_000_000  # of all pictures within a drawing, which the renderer unpacks whatever their size

# What an image may show: a drawing within a drawing would come to the renderer unchecked, packed or nested.
SHOWN = ("data:image/png", "data:image/jpeg", "data:image/webp", "data:image/gif", "#")


def is_svg(data: bytes) -> bool:
    """Whether bytes begin as an SVG does, with or without an XML declaration and comments."""
    head = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!DOCTYPE")) and b"<svg" in head)


def draw_svg(data: bytes, longest: int) -> bytes:
    """A PNG on white whose longest side is `longest` pixels; PictureError when it cannot be drawn.

    Letters are not drawn: fonts differ from machine to machine, and so would the pictures. Needs the extra `index`.
    """
    import resvg_py

    _check(data)
    try:
        # With both sides given it fits the drawing in; with one, an outlandish shape takes all the memory.
        drawn: bytes = resvg_py.svg_to_bytes(
            svg_string=data.decode(), width=longest, height=longest, background="#ffffff", skip_system_fonts=True
        )
    except ValueError as exc:
        raise PictureError(f"the SVG cannot be drawn ({exc}); send another picture") from exc
    return drawn


def _check(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise PictureError(f"the SVG has {len(data)} bytes, the limit is {MAX_BYTES}; send a smaller one")
    parser = expat.ParserCreate()
    watch = _Watch()
    parser.StartElementHandler, parser.EndElementHandler = watch.start, watch.end
    parser.EntityDeclHandler = watch.entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as exc:
        raise PictureError(f"the SVG is not XML ({exc}); send another picture") from exc


def _data_of(address: str) -> bytes:
    """The bytes of a `data:` URI (RFC 2397)."""
    kind, _, text = address.partition(",")
    try:
        return base64.b64decode(unquote(text)) if kind.lower().endswith(";base64") else unquote_to_bytes(text)
    except ValueError as exc:
        raise PictureError(f"the SVG shows '{address[:80]}', which is no base64 ({exc}); send another one") from exc


class _Watch:
    """Raises PictureError at what must not reach the renderer."""

    def __init__(self) -> None:
        self._depth, self._pixels = 0, 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PictureError(f"the SVG has more than {MAX_DEPTH} elements within each other; send another picture")
        if name.rpartition(":")[2] in ("image", "feImage"):
            for key, value in attributes.items():
                if key.rpartition(":")[2] == "href":
                    self._look_at(value.strip())

    def _look_at(self, address: str) -> None:
        if not address.lower().startswith(SHOWN):
            raise PictureError(f"the SVG shows '{address[:80]}'; send one that holds its pictures, as PNG, JPEG, WebP "
                               "or GIF")
        if address.startswith("#"):
            return
        size = decode_picture(_data_of(address), PictureLimits(max_pixels=MAX_PIXELS - self._pixels)).size
        self._pixels += size.width * size.height

    def end(self, name: str) -> None:
        self._depth -= 1

    def entity(self, *_: Any) -> None:
        raise PictureError("the SVG declares entities, which are not read; send another picture")


UNDECODABLE, TOO_SMALL = "image does not decode", "image is smaller than an icon"
_SERVED = ("WEBP", "JPEG", "PNG")
_ORIENTATION_TAG = 0x0112  # EXIF
_PNG_DEPTH = 24  # the byte of a PNG's header that says how many bits a sample has


@dataclass(frozen=True, slots=True)
class ThumbnailRules:
    """What an image must be like to be kept as it is, and what it is made into otherwise."""

    longest: int = 320  # pixels: what Kiwix's snapshots hold at most
    shortest: int = 48  # pixels: anything with a smaller side is an icon, a rule or a signature
    quality: int = 80  # of WebP


RULES = ThumbnailRules()


def make_thumbnail(data: bytes, what: str, rules: ThumbnailRules = RULES) -> bytes | Skipped:
    """The file to serve, or why there is none; the same bytes for the same image.

    WebP, JPEG and PNG within the limits that are neither animated, rotated, CMYK nor of 16 bits stay as they are;
    everything else becomes WebP. `what` names the image in the report.
    """
    try:
        if is_svg(data):
            data = draw_svg(data, rules.longest)
        pixels = decode_picture(data).pixels
    except PictureError:
        return Skipped(UNDECODABLE, what)
    if min(pixels.shape[:2]) < rules.shortest:
        return Skipped(TOO_SMALL, what)
    if max(pixels.shape[:2]) <= rules.longest and _served_as_it_is(data):
        return data
    return _webp(pixels, rules)


def _served_as_it_is(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF that cannot be read
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        plain = image.format in _SERVED and not getattr(image, "is_animated", False)
        deep = image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[_PNG_DEPTH] == 16)
        return plain and not deep and image.mode != "CMYK" and _upright(image)


def _upright(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(_ORIENTATION_TAG, 1) == 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return False  # unreadable EXIF is not passed on to those who look at the pack


def _webp(pixels: Pixels, rules: ThumbnailRules) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((rules.longest, rules.longest), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=rules.quality)
    return out.getvalue()
