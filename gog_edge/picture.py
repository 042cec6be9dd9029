"""Bytes from anyone -> an upright RGB picture, or a PictureError that says why not."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from gog_edge.errors import PictureError
from gog_edge.types import Box, Pixels, Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow's decoders raise on bytes made to hurt them; anything else is a fault of ours and must be seen.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
                   EOFError, MemoryError, RuntimeError, struct.error, zlib.error)
_ORIENTATION_TAG = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_pillow = threading.Lock()  # Pillow's own limits, and warning filters, are globals


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What is accepted as a picture."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000  # read from the header, before anything is decoded
    min_side: int = 1  # pixels


@dataclass(frozen=True, eq=False)
class Picture:
    """What the person stands before: upright, RGB, full resolution, read-only."""

    pixels: Pixels

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)

    @cached_property
    def size(self) -> Size:
        """Width and height in pixels."""
        height, width, _ = self.pixels.shape
        return Size(width, height)

    @cached_property
    def sha256(self) -> str:
        """Hex hash of the decoded pixels and their shape: equal for two files that look the same."""
        digest = hashlib.sha256(f"{self.size.width}x{self.size.height}\n".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def crop(self, box: Box) -> Pixels:
        """The pixels that `box` touches, clipped to the picture; PictureError where it touches none."""
        x0, y0 = max(0, math.floor(box.x0)), max(0, math.floor(box.y0))
        x1, y1 = min(self.size.width, math.ceil(box.x1)), min(self.size.height, math.ceil(box.y1))
        if x0 >= x1 or y0 >= y1:
            raise PictureError(f"{box} holds no pixel of a picture of {self.size.width} x {self.size.height}")
        return self.pixels[y0:y1, x0:x1]


def decode_picture(data: bytes, limits: PictureLimits = PictureLimits()) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF.

    EXIF rotation is applied, transparency is laid on white, CMYK, palette, grey and 16-bit become 8-bit RGB,
    and of an animation the first frame is taken. Raises PictureError for everything else.
    """
    if not data:
        raise PictureError("the picture is empty (0 bytes); send a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    if len(data) > limits.max_bytes:
        raise PictureError(f"the picture has {len(data)} bytes, the limit is {limits.max_bytes}; send a smaller one")
    with _strict_pillow():
        image = _open(data)
        _check_size(image, limits)
        try:
            image.load()
            return Picture(_to_rgb(_upright(image)))
        except _DECODER_ERRORS as exc:
            raise PictureError(f"the picture is truncated or damaged ({exc}); send the whole file") from exc


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Our limits instead of Pillow's, for one decode: no warnings of its own, no half-read files."""
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
        raise PictureError("these bytes are no JPEG, PNG, WebP, GIF, BMP or TIFF picture; send one of those") from exc


def _check_size(image: Image.Image, limits: PictureLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PictureError(f"the picture has {width} x {height} = {width * height} pixels, the limit is "
                           f"{limits.max_pixels}; scale it down")
    if min(width, height) < limits.min_side:
        raise PictureError(f"the picture is {width} x {height}, each side needs {limits.min_side} pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODER_ERRORS:
        return image  # the pixels are whole; unreadable EXIF is no reason to refuse them
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


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
    """Grey of unknown range to 8 bits: 0..1 when no value is above 1, else 0..255, else 0..65535."""
    grey = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    top = grey.max()
    scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 1 / 256
    return Image.fromarray(np.clip(grey * scale, 0, 255).astype(np.uint8))
