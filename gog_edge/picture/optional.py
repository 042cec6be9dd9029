"""HEIC and JPEG XL, which Pillow reads with the packages of the extra `formats`; imported only for such a file."""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gog_edge.errors import PictureError

HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
AVIF_BRANDS = frozenset((b"avif", b"avis"))
JXL_CONTAINER, JXL_CODESTREAM = b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", b"\xff\x0a"


@dataclass(frozen=True, slots=True)
class OptionalFormat:
    """A format whose decoder is a package of its own."""

    name: str
    module: str  # the package
    opener: str  # its subclass of Pillow's ImageFile
    suffixes: tuple[str, ...]


OPTIONAL = {  # by Pillow's name of the format
    "HEIF": OptionalFormat("HEIC", "pillow_heif", "HeifImageFile", (".heic", ".heif", ".hif")),
    "JXL": OptionalFormat("JPEG XL", "pillow_jxl.JpegXLImagePlugin", "JXLImageFile", (".jxl",)),
}


def optional_format(data: bytes) -> str | None:
    """Return the key in OPTIONAL of the format that the file begins like, or None."""
    if data.startswith((JXL_CONTAINER, JXL_CODESTREAM)):
        return "JXL"
    brands = _brands(data)
    return "HEIF" if HEIF_BRANDS.intersection(brands) and not AVIF_BRANDS.intersection(brands[:1]) else None


def open_optional(data: bytes, key: str) -> Image.Image:
    """Open a file with the package of its format.

    Raises:
        PictureError: the package is not installed; the message says how to install it.
    """
    known = OPTIONAL[key]
    try:
        opener: Any = getattr(importlib.import_module(known.module), known.opener)
    except ImportError as exc:
        raise PictureError(f"the picture is a {known.name} file, which this installation cannot read; send a JPEG, or "
                           "install the reader with pip install 'gog_edge[formats]'") from exc
    try:
        image: Image.Image = opener(io.BytesIO(data))
    except BaseException as exc:
        if type(exc).__name__ == "PanicException":  # of a decoder in Rust; not a subclass of Exception
            raise ValueError(str(exc)) from exc
        raise
    return image


def _brands(data: bytes) -> list[bytes]:
    """Return the major and the compatible brands of an ISO base media file; [] for other files."""
    if data[4:8] != b"ftyp":
        return []
    size = min(int.from_bytes(data[:4], "big"), 256)
    return [data[8:12], *(data[place : place + 4] for place in range(16, size - 3, 4))]
