"""Decode the bytes of a picture file from an untrusted source to upright 8-bit RGB pixels."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from gog_edge.errors import PictureError
from gog_edge.types import Box, Pixels, Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of files in these formats
MAX_BYTES = 32 * 2**20  # of a picture file
MAX_PIXELS = 64_000_000  # read from the header before anything is decoded
# The exceptions that Pillow's decoders raise on malformed files. Anything else is a bug of ours and must surface.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
                   EOFError, MemoryError, RuntimeError, struct.error, zlib.error)
_pillow = threading.Lock()  # guards Pillow's limits and the warning filters, which are process-wide


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture: upright, RGB, full resolution, read-only."""

    pixels: Pixels

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)

    @cached_property
    def size(self) -> Size:
        """Return width and height in pixels."""
        height, width, _ = self.pixels.shape
        return Size(width, height)

    @cached_property
    def sha256(self) -> str:
        """Return the hex digest of the decoded pixels and their shape: equal for two files that look the same."""
        digest = hashlib.sha256(f"{self.size.width}x{self.size.height}\n".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def crop(self, box: Box) -> Pixels:
        """Return the pixels that `box` covers, clipped to the picture. Raises PictureError when it covers none."""
        x0, y0 = max(0, math.floor(box.x0)), max(0, math.floor(box.y0))
        x1, y1 = min(self.size.width, math.ceil(box.x1)), min(self.size.height, math.ceil(box.y1))
        if x0 >= x1 or y0 >= y1:
            raise PictureError(f"{box} covers no pixel of a picture of {self.size.width} x {self.size.height}")
        return self.pixels[y0:y1, x0:x1]


def decode_picture(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS,
                   min_side: int = 1) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF file.

    EXIF rotation is applied, transparency is composited on white, CMYK, palette, grey and 16-bit pictures become 8-bit
    RGB, and the first frame of an animation is taken.

    Args:
        data: the file.
        max_bytes: largest size of the file.
        max_pixels: largest width times height, checked before decoding.
        min_side: shortest side in pixels.

    Raises:
        PictureError: any other format, a truncated or damaged file, or one beyond these limits.
    """
    if not data:
        raise PictureError("the picture is empty (0 bytes); send a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    if len(data) > max_bytes:
        raise PictureError(f"the picture has {len(data)} bytes, the limit is {max_bytes}; send a smaller one")
    with _strict_pillow():
        image = _open(data)
        _check_size(image, max_pixels, min_side)
        try:
            image.load()
            _rotate_upright(image)
            return Picture(_to_rgb(image))
        except _DECODER_ERRORS as exc:
            raise PictureError(f"the picture is truncated or damaged ({exc}); send the whole file") from exc


def resize(pixels: Pixels, size: Size) -> Pixels:
    """Resize pixels [height, width, 3] uint8 to `size` with Pillow's bicubic filter."""
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    image = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Replace Pillow's limits by ours for one decode: no warnings, no truncated files."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except _DECODER_ERRORS as exc:
        raise PictureError("the bytes are not a JPEG, PNG, WebP, GIF, BMP or TIFF picture; send one of these") from exc


def _check_size(image: Image.Image, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(f"the picture has {width} x {height} = {width * height} pixels, the limit is {max_pixels}; "
                           "scale it down")
    if min(width, height) < min_side:
        raise PictureError(f"the picture is {width} x {height}; each side must have at least {min_side} pixels")


def _rotate_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place. Unreadable EXIF is ignored: the pixels are complete without it."""
    with suppress(*_DECODER_ERRORS):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _eight_bit(np.asarray(image))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def _eight_bit(values: NDArray[np.int32] | NDArray[np.float32]) -> Image.Image:
    """Convert grey values of unknown range to 8 bits: 0..1 when no value is above 1, else 0..255, else 0..65535."""
    grey = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    top = grey.max()
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 1 / 256
    return Image.fromarray(np.clip(grey * scale, 0, 255).astype(np.uint8))
