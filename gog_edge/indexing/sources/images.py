"""Images of a snapshot: found in a folder by their address, checked, and converted to small files that can be served.

SVG files are rendered only after a check, because the renderer would read local files and recurse without limit.
"""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from xml.parsers import expat

from PIL import Image

from gog_edge.errors import PictureError, SourceError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.files import PickleFieldsMixin
from gog_edge.picture import FORMATS, decode_picture
from gog_edge.types import Pixels

NO_IMAGE_FOLDER, IMAGE_MISSING = "no folder of images was given", "image is not in the folder"
UNDECODABLE, TOO_SMALL = "image does not decode", "image is smaller than an icon"
MAX_IMAGE_BYTES = 32 * 2**20
CACHED_THUMBNAILS = 1024  # a flag or a map appears in many articles
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".svg", ".tif", ".tiff", "")  # of files named by a hash

MAX_SVG_BYTES = 4 * 2**20
MAX_SVG_DEPTH = 200  # nested elements; real drawings stay below 50
MAX_SVG_PIXELS = 16_000_000  # of all embedded pictures, which the renderer decodes at full size
# What an <image> may reference: nested drawings would bypass the check.
SVG_REFERENCES = ("data:image/png", "data:image/jpeg", "data:image/webp", "data:image/gif", "#")

_SERVED_FORMATS = ("WEBP", "JPEG", "PNG")
_ORIENTATION_TAG = 0x0112  # EXIF
_PNG_DEPTH = 24  # offset of the bit depth in a PNG file


@dataclass(frozen=True, slots=True)
class ThumbnailOptions:
    """Limits within which an image is stored as it is, and the conversion of all others."""

    max_side: int = 320  # pixels, as in Kiwix snapshots
    min_side: int = 48  # pixels; smaller images are icons, rules or signatures
    quality: int = 80  # WebP


DEFAULT_THUMBNAILS = ThumbnailOptions()


# --- images in a folder -------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder(PickleFieldsMixin):
    """Thumbnails by image address. Without a folder every image is `Skipped`.

    A file may be named like the last part of the address, quoted or not, also in the subfolders of Wikimedia Commons
    (the first one and two hex digits of the name's MD5), or like the MD5, SHA-1 or SHA-256 of the address.
    """

    folder: Path | None
    options: ThumbnailOptions = DEFAULT_THUMBNAILS

    def check(self) -> None:
        """Raise SourceError if the folder does not exist."""
        if self.folder is not None and not self.folder.is_dir():
            raise SourceError(f"the folder of images '{self.folder}' does not exist; give the folder that the images "
                              "were downloaded to")

    def thumbnail(self, address: str) -> bytes | Skipped:
        """Return the file to serve, or why the image is skipped."""
        return self._cached(address)

    @cached_property
    def _cached(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(CACHED_THUMBNAILS)(self._load)

    def _load(self, address: str) -> bytes | Skipped:
        if self.folder is None:
            return Skipped(NO_IMAGE_FOLDER, address)
        return next((load_thumbnail(path, address, self.options) for name in candidate_names(address)
                     if _is_file(path := self.folder / name)), Skipped(IMAGE_MISSING, address))


def load_thumbnail(path: Path, item: str, options: ThumbnailOptions) -> bytes | Skipped:
    """Return the thumbnail of an image file; `item` names it in the report."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Skipped("image is too large", item)
        return make_thumbnail(path.read_bytes(), item, options)
    except OSError:
        return Skipped("image cannot be read", item)


def candidate_names(address: str) -> Iterator[str]:
    """Yield the file names, relative to the folder, that the image of an address may have, likely ones first."""
    last = address.partition("#")[0].partition("?")[0].rpartition("/")[2]
    for name in dict.fromkeys((PurePosixPath(unquote(last)).name, last)):
        if name and name != "..":
            yield name
            digits = hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
            yield f"{digits[0]}/{digits[:2]}/{name}"
    for algorithm in ("md5", "sha1", "sha256"):
        digest = hashlib.new(algorithm, address.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
        yield from (digest + suffix for suffix in SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # the name is too long, or contains bytes that file names cannot have


# --- thumbnails ---------------------------------------------------------------------------------


def make_thumbnail(data: bytes, item: str, options: ThumbnailOptions = DEFAULT_THUMBNAILS) -> bytes | Skipped:
    """Return the file to serve, or why the image is skipped; `item` names it in the report.

    WebP, JPEG and PNG files within the limits are returned unchanged unless they are animated, rotated by EXIF, CMYK or
    16-bit. All other images become WebP. The result is deterministic.
    """
    try:
        if is_svg(data):
            data = render_svg(data, options.max_side)
        pixels = decode_picture(data).pixels
    except PictureError:
        return Skipped(UNDECODABLE, item)
    if min(pixels.shape[:2]) < options.min_side:
        return Skipped(TOO_SMALL, item)
    if max(pixels.shape[:2]) <= options.max_side and _can_serve_unchanged(data):
        return data
    return _encode_webp(pixels, options)


def _can_serve_unchanged(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unreadable EXIF
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        plain = image.format in _SERVED_FORMATS and not getattr(image, "is_animated", False)
        deep = image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[_PNG_DEPTH] == 16)
        return plain and not deep and image.mode != "CMYK" and _is_upright(image)


def _is_upright(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(_ORIENTATION_TAG, 1) == 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return False  # unreadable EXIF is not passed on to clients


def _encode_webp(pixels: Pixels, options: ThumbnailOptions) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=options.quality)
    return out.getvalue()


# --- SVG ----------------------------------------------------------------------------------------


def is_svg(data: bytes) -> bool:
    """Return whether the bytes begin like an SVG file, with or without an XML declaration and comments."""
    head = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!DOCTYPE")) and b"<svg" in head)


def render_svg(data: bytes, longest: int) -> bytes:
    """Render an SVG file as PNG on white, with a longest side of `longest` pixels. Needs the extra `index`.

    Text is not rendered: system fonts differ between machines, and so would the pictures.

    Raises:
        PictureError: the file is not a drawing that can be rendered safely.
    """
    import resvg_py

    _check_svg(data)
    try:
        # With both sides given the drawing is fitted in. With one, an extreme aspect ratio would exhaust the memory.
        rendered: bytes = resvg_py.svg_to_bytes(
            svg_string=data.decode(), width=longest, height=longest, background="#ffffff", skip_system_fonts=True
        )
    except ValueError as exc:
        raise PictureError(f"the SVG cannot be rendered ({exc}); use another picture") from exc
    return rendered


def decode_data_uri(uri: str) -> bytes:
    """Return the content of a `data:` URI (RFC 2397).

    Raises:
        ValueError: its base64 is invalid.
    """
    header, _, text = uri.partition(",")
    return base64.b64decode(unquote(text)) if header.lower().endswith(";base64") else unquote_to_bytes(text)


def _check_svg(data: bytes) -> None:
    if len(data) > MAX_SVG_BYTES:
        raise PictureError(f"the SVG has {len(data)} bytes, the limit is {MAX_SVG_BYTES}; use a smaller one")
    parser = expat.ParserCreate()
    check = _SvgCheck()
    parser.StartElementHandler, parser.EndElementHandler = check.start, check.end
    parser.EntityDeclHandler = check.entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as exc:
        raise PictureError(f"the SVG is not well-formed XML ({exc}); use another picture") from exc


class _SvgCheck:
    """Handlers of an XML parser that raise PictureError for content that must not reach the renderer."""

    def __init__(self) -> None:
        self._depth, self._pixels = 0, 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_SVG_DEPTH:
            raise PictureError(f"the SVG nests more than {MAX_SVG_DEPTH} elements; use another picture")
        if name.rpartition(":")[2] in ("image", "feImage"):
            for key, value in attributes.items():
                if key.rpartition(":")[2] == "href":
                    self._check_reference(value.strip())

    def _check_reference(self, address: str) -> None:
        if not address.lower().startswith(SVG_REFERENCES):
            raise PictureError(f"the SVG refers to '{address[:80]}'; use one that embeds its pictures as PNG, JPEG, "
                               "WebP or GIF")
        if address.startswith("#"):
            return
        try:
            data = decode_data_uri(address)
        except ValueError as exc:
            raise PictureError(f"the SVG embeds '{address[:80]}', which is not valid base64 ({exc}); use another "
                               "picture") from exc
        size = decode_picture(data, max_pixels=MAX_SVG_PIXELS - self._pixels).size
        self._pixels += size.width * size.height

    def end(self, name: str) -> None:
        self._depth -= 1

    def entity(self, *_: Any) -> None:
        raise PictureError("the SVG declares entities, which are not supported; use another picture")
