"""Decode the bytes of a picture file from an untrusted source to upright 8-bit sRGB pixels."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile

from gog_edge.errors import PictureError
from gog_edge.picture.headers import check_png, coefficient_bytes, jp2_levels, jxl_size, strip_bytes
from gog_edge.picture.optional import OPTIONAL, open_optional, optional_format
from gog_edge.types import Box, Pixels, Size

if TYPE_CHECKING:
    from gog_edge.picture.colour import Rows

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")  # by Pillow's names
NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000"
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
            ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
            *(suffix for known in OPTIONAL.values() for suffix in known.suffixes))  # fmt: skip
MAX_BYTES = 32 * 2**20  # of a picture file
MAX_PIXELS = 64_000_000  # read from the header before anything is decoded
DECODED_PIXELS = 2**24  # of a decoded picture: the camera of a telephone is below, larger ones are reduced
BLANK_FRAMES = 16  # of an animation that are skipped because nothing is visible in them,
BLANK_PIXELS = 2**24  # and pixels of these frames together

# --- memory of decoding, measured at 64 million pixels (tests/picture/test_picture_memory.py) ---
BYTES_PER_PIXEL = 5.5  # that decoding may take at MAX_PIXELS; what takes more is refused from a smaller size on
BAND_BYTES = 16 * 2**20  # of the bands of rows that are being converted
RESULT_BYTES = 3  # a pixel of the result
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # Pillow's; 4 in other modes
_FORMAT_BYTES = {"WEBP": 16.5, "AVIF": 9.5, "HEIF": 7.5, "JXL": 7.5, "JPEG2000": 19.5}  # a pixel, all included

_ORIENTATION = 0x0112  # EXIF
_NEED_WHOLE_FILE = ((0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (8, b"WEBPVP8", "WebP"), (4, b"ftypavif", "AVIF"))
_SERVED = ("JPEG", "PNG", "WEBP")  # what every browser shows
# The exceptions that Pillow's decoders raise on malformed files. Anything else is a bug of ours and must surface.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
                   EOFError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
_pillow = threading.Lock()  # guards Pillow's limits and the warning filters, which are process-wide


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture: upright, sRGB, read-only."""

    pixels: Pixels  # a large picture is reduced by a whole factor
    given: Size | None = None  # width and height of the file, upright; None if `pixels` are not reduced
    plain: bool = False  # every browser shows the file itself with the same pixels

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)

    @cached_property
    def size(self) -> Size:
        """Return width and height of the picture file in pixels, in which boxes are given."""
        return self.given or self.resolution

    @property
    def resolution(self) -> Size:
        """Return width and height of `pixels`."""
        height, width, _ = self.pixels.shape
        return Size(width, height)

    @cached_property
    def sha256(self) -> str:
        """Return the hex digest of the decoded pixels and the size: equal for two files that look the same."""
        digest = hashlib.sha256(f"{self.size.width}x{self.size.height}\n".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def crop(self, box: Box) -> Pixels:
        """Return the pixels that `box` covers, clipped to the picture. Raises PictureError when it covers none."""
        size, resolution = self.size, self.resolution
        across, down = resolution.width / size.width, resolution.height / size.height
        x0, y0 = max(0, math.floor(box.x0 * across)), max(0, math.floor(box.y0 * down))
        x1 = min(resolution.width, math.ceil(box.x1 * across))
        y1 = min(resolution.height, math.ceil(box.y1 * down))
        if x0 >= x1 or y0 >= y1:
            raise PictureError(f"{box} covers no pixel of a picture of {size.width} x {size.height}")
        return self.pixels[y0:y1, x0:x1]


@dataclass(frozen=True, slots=True)
class _Options:
    max_pixels: int
    min_side: int
    decoded_pixels: int
    formats: Sequence[str]
    frame: int

    @property
    def memory(self) -> int:
        """Return the bytes that decoding may take."""
        return decoding_bytes(self.max_pixels, self.decoded_pixels)


class _DamagedError(Exception):
    """The file is not a picture, truncated or damaged; the message is for the person who sent it."""


def decode_picture(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, min_side: int = 1,
                   decoded_pixels: int = DECODED_PIXELS, formats: Sequence[str] = FORMATS, frame: int = 0) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 file; HEIC and JPEG XL with the extra `formats`.

    The result is upright (EXIF) and in sRGB (ICC profiles, and the colour chunks of PNG and AVIF), with transparency on
    white. CMYK, CIELAB, palette, grey, 16-bit and floating-point pictures become 8-bit RGB. Of an animation, the first
    frame in which anything is visible is taken. A file that lacks a few bytes at its end is accepted.

    Args:
        data: the file.
        max_bytes: largest size of the file.
        max_pixels: largest width times height, checked before decoding; it also bounds the memory of decoding.
        min_side: shortest side in pixels.
        decoded_pixels: larger pictures are reduced by a whole factor while they are decoded.
        formats: Pillow's names of the formats that are read besides HEIC and JPEG XL.
        frame: page of a TIFF file or frame of an animation, counted from 0.

    Raises:
        PictureError: any other format, a truncated or damaged file, or one beyond these limits.
    """
    if not data:
        raise PictureError(f"the picture is empty (0 bytes); send a {NAMES} file")
    if len(data) > max_bytes:
        raise PictureError(f"the picture has {len(data)} bytes, the limit is {max_bytes}; send a smaller one",
                           beyond_limits=True)
    options = _Options(max_pixels, min_side, decoded_pixels, formats, frame)
    with _strict_pillow():
        try:
            return _decode(data, options)
        except _DamagedError as exc:
            with suppress(_DamagedError, *_DECODER_ERRORS):
                completed = _decode_completed(data, options)
                if completed is not None:
                    return completed
            raise PictureError(str(exc)) from exc


def decoding_bytes(max_pixels: int, decoded_pixels: int) -> int:
    """Return the bytes that decoding one picture takes at most, the result included and the file not."""
    return int(BYTES_PER_PIXEL * max_pixels) + RESULT_BYTES * min(max_pixels, decoded_pixels) + BAND_BYTES


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Resize pixels [height, width, 3] uint8 to `size` with Pillow's bicubic filter."""
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    image = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


# --- one file -----------------------------------------------------------------------------------


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Replace Pillow's limits by ours for one decode: no warnings, no truncated files."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(data: bytes, options: _Options) -> Picture:
    Image.MAX_IMAGE_PIXELS = None
    if data.startswith((b"BM", b"II*\0", b"MM\0*")):
        picture = _decode_samples(data, options)
        if picture is not None:
            return picture
    image = _open(data, options)
    try:
        return _decode_image(image, data, options)
    except _DECODER_ERRORS as exc:
        raise _DamagedError(f"the picture is truncated or damaged ({exc}); send the whole file") from exc


def _decode_completed(data: bytes, options: _Options) -> Picture | None:
    """Decode a file that lacks a little at its end; None if it lacks more."""
    from gog_edge.picture.tails import MISSING_SHARE, complete_tail

    pictures = [_decode(completed, options) for completed in complete_tail(data)]
    if len(pictures) == 2:
        one, other = (picture.pixels for picture in pictures)
        parts = pictures[0].resolution.bands()
        different = sum(int((one[top:bottom] != other[top:bottom]).any(axis=-1).sum()) for top, bottom in parts)
        if different > MISSING_SHARE * one.shape[0] * one.shape[1]:
            return None
    return replace(pictures[0], plain=False) if pictures else None


def _decode_samples(data: bytes, options: _Options) -> Picture | None:
    """Decode the TIFF and BMP files that Pillow does not read, or not with all bits; None for any other file."""
    from gog_edge.picture.samples import open_samples

    try:
        raster = open_samples(data, options.frame)
        if raster is None:
            return None
        _check_size(raster.size, options)
        factor = _factor(raster.size, options)
        if raster.bytes + _result_bytes(raster.size, factor) > options.memory:
            return None  # Pillow may read fewer bits
        pixels = _render(raster.load(), raster.size, factor, raster.orientation)
    except _DECODER_ERRORS:
        return None  # Pillow's refusal says more
    return Picture(pixels, _upright(raster.size, raster.orientation) if factor > 1 else None)


def _decode_image(image: Image.Image, data: bytes, options: _Options) -> Picture:
    if image.format == "TIFF" and options.frame:
        _seek(image, options.frame)  # before anything is checked, because each page has a size of its own
    size = image.size
    _check_size(size, options)
    Image.MAX_IMAGE_PIXELS = size[0] * size[1] // 2 + 1  # Pillow refuses twice as many: frames that are larger
    factor = _factor(size, options)
    _reduce_while_decoding(image, data, factor)
    _check_memory(image, size, factor, options)
    if image.format == "PNG":
        check_png(data)
    _select_frame(image, options.frame)
    animated = bool(getattr(image, "is_animated", False))
    orientation = _orientation(image)
    rest = max(1, round(size[0] / image.width))  # what the decoder has not reduced
    stored = image.size
    pixels = _render(_rgb_rows(image, data), stored, max(1, factor // rest), orientation)
    given = _upright(size, orientation) if pixels.shape[0] * pixels.shape[1] != size[0] * size[1] else None
    plain = (image.format in _SERVED and not animated and orientation == 1 and given is None
             and image.mode not in ("CMYK", "I", "F") and not image.mode.startswith("I;16")
             and not (image.format == "PNG" and data[24] == 16))  # fmt: skip
    return Picture(pixels, given, plain)


def _open(data: bytes, options: _Options) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(options.formats))
    except _DECODER_ERRORS as exc:
        key = optional_format(data)
        if key is not None:
            return _open_optional(data, key, options)
        for place, mark, name in _NEED_WHOLE_FILE:
            if data.startswith(mark, place):
                raise _DamagedError(f"the {name} picture is truncated or damaged, or of a kind that is not read; send "
                                    "the whole file, or a PNG or JPEG file") from exc
        drawing = " but an SVG drawing" if b"<svg" in data[:4096] else ""
        raise _DamagedError(f"the bytes are not a {NAMES} picture{drawing}; send one of these") from exc


def _open_optional(data: bytes, key: str, options: _Options) -> Image.Image:
    try:
        if key == "JXL":
            size = jxl_size(data)
            _check_size(size, options)
            _check_bytes(key, _FORMAT_BYTES[key] * size[0] * size[1], size, options)
        return open_optional(data, key)
    except _DECODER_ERRORS as exc:
        raise _DamagedError(f"the {OPTIONAL[key].name} picture is damaged ({exc}); send the whole file") from exc


def _check_size(size: tuple[int, int], options: _Options) -> None:
    width, height = size
    if width * height > options.max_pixels:
        raise PictureError(f"the picture has {width} x {height} = {width * height} pixels, the limit is "
                           f"{options.max_pixels}; scale it down", beyond_limits=True)
    if min(width, height) < max(1, options.min_side):
        raise PictureError(f"the picture is {width} x {height}; each side must have at least "
                           f"{max(1, options.min_side)} pixels")


# --- size and memory ----------------------------------------------------------------------------


def _factor(size: tuple[int, int], options: _Options) -> int:
    """Return the whole factor by which both sides are reduced."""
    width, height = size
    factor = max(1, math.floor(math.sqrt(width * height / options.decoded_pixels)))
    while math.ceil(width / factor) * math.ceil(height / factor) > options.decoded_pixels:
        factor += 1
    return factor


def _reduce_while_decoding(image: Any, data: bytes, factor: int) -> None:
    """Let the decoders of JPEG and JPEG 2000 compute the reduced picture only, by a power of two up to `factor`."""
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
    elif factor > 1 and image.format == "JPEG2000":
        image.reduce = min(int(math.log2(factor)), jp2_levels(data))


def _check_memory(image: Any, size: tuple[int, int], factor: int, options: _Options) -> None:
    """Raise PictureError if decoding an opened image needs more memory than is planned."""
    pixels = size[0] * size[1]
    a_pixel = _FORMAT_BYTES.get(image.format)
    if image.format == "JPEG2000":
        needed = _FORMAT_BYTES["JPEG2000"] * pixels / 4 ** int(getattr(image, "_reduce", 0))
    elif a_pixel is not None:
        needed = a_pixel * pixels
    else:
        needed = _MODE_BYTES.get(image.mode, 4) * image.width * image.height
        if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
            needed += coefficient_bytes(image.layer) * pixels
        if image.format == "TIFF":
            needed += strip_bytes(image) + (needed if image.getexif().get(_ORIENTATION, 1) != 1 else 0)
        elif image.format == "PNG" and image.mode == "RGB" and "transparency" in image.info:
            needed *= 2  # the low bytes of 16 bits
        elif image.format in ("PNG", "GIF") and (getattr(image, "default_image", False) or options.frame):
            needed = 12 * pixels  # a frame, what it is drawn on, and both together
    _check_bytes(image.format, needed + _result_bytes(size, factor), size, options)


def _result_bytes(size: tuple[int, int], factor: int) -> int:
    return RESULT_BYTES * math.ceil(size[0] / factor) * math.ceil(size[1] / factor)


def _check_bytes(form: str, needed: float, size: tuple[int, int], options: _Options) -> None:
    if needed > options.memory:
        raise PictureError(f"to decode {size[0]} x {size[1]} pixels in the format {form} takes "
                           f"{needed / 2**20:.0f} MiB, the limit is {options.memory / 2**20:.0f} MiB; scale the "
                           "picture down, or send it as JPEG", beyond_limits=True)


# --- frames, orientation, pixels ----------------------------------------------------------------


def _select_frame(image: Any, frame: int) -> None:
    """Load a frame of an image: the first in which anything is visible if `frame` is 0.

    A PNG animation may have a picture for programs that do not animate, which browsers do not show.
    """
    first = 1 if getattr(image, "default_image", False) else 0
    if first + frame:
        _seek(image, first + frame)
    image.load()
    shown = image.tell()
    most = min(BLANK_FRAMES, BLANK_PIXELS // (image.width * image.height))
    for _ in range(0 if frame else most):
        if not _is_blank(image):
            return
        try:
            image.seek(image.tell() + 1)
            image.load()
        except (EOFError, Image.DecompressionBombError):
            break
    if image.tell() != shown:
        image.seek(shown)
        image.load()


def _seek(image: Image.Image, frame: int) -> None:
    try:
        image.seek(frame)
    except EOFError as exc:
        raise PictureError(f"the picture has no page or frame {frame} (counted from 0)") from exc


def _is_blank(image: Image.Image) -> bool:
    """Return whether every pixel is fully transparent, in formats that can be animated."""
    if image.format not in ("GIF", "PNG", "WEBP", "AVIF") or not getattr(image, "is_animated", False):
        return False
    key = image.info.get("transparency")
    if image.mode == "P":
        return isinstance(key, int) and image.getextrema() == (key, key)
    return image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (0, 0)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Unreadable EXIF is ignored: the pixels are complete without it."""
    if image.format == "JXL":
        return 1  # the decoder has applied that of the codestream
    with suppress(*_DECODER_ERRORS):
        value = image.getexif().get(_ORIENTATION, 1)
        if isinstance(value, int) and 1 <= value <= 8:
            return value
    return 1


def _upright(size: tuple[int, int], orientation: int) -> Size:
    width, height = size
    return Size(height, width) if orientation >= 5 else Size(width, height)


def _rgb_rows(image: Image.Image, data: bytes) -> Rows:
    """Return the function that converts rows of a loaded image to RGB in sRGB on white."""
    if image.format == "JPEG" and image.mode == "RGB" and "icc_profile" not in image.info:
        return lambda top, bottom: image.crop((0, top, image.width, bottom))
    from gog_edge.picture.colour import rgb_rows

    return rgb_rows(image, data)


def _render(rows: Rows, size: tuple[int, int], factor: int, orientation: int) -> Pixels:
    """Return the upright pixels, converted and reduced band by band."""
    width, height = size
    reduced = _upright((math.ceil(width / factor), math.ceil(height / factor)), orientation)
    pixels = np.empty((reduced.height, reduced.width, 3), np.uint8)
    stored = _as_stored(pixels, orientation)
    for top, bottom in Size(width, height).bands(factor):
        band = rows(top, bottom)
        if factor > 1:
            band = band.reduce(factor)
        stored[top // factor : top // factor + band.height] = np.asarray(band)
    return pixels


def _as_stored(pixels: Pixels, orientation: int) -> Pixels:
    """Return upright pixels as the file stores them, without a copy: rows and columns by the EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return pixels[::rows, ::columns]
