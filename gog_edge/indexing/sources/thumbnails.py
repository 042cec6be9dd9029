"""Image files -> the files that a pack serves: small, upright WebP, JPEG or PNG."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.indexing.drafts import Skipped
from gog_edge.indexing.sources.svg import draw_svg, is_svg
from gog_edge.picture import FORMATS, decode_picture
from gog_edge.types import Pixels

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
