"""What the headers of picture files say that Pillow does not."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from gog_edge.picture.optional import JXL_CODESTREAM, optional_format

MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp",
               "TIFF": "image/tiff", "AVIF": "image/avif", "JPEG2000": "image/jp2", "HEIF": "image/heic",
               "JXL": "image/jxl"}  # fmt: skip
_SIGNATURES = {b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP",
               b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\0\x0cjP": "JPEG2000", b"\xff\x4f\xff\x51": "JPEG2000"}
_BOXES = 64  # of a JPEG XL container that are searched for the codestream
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height, by code 1..7


def media_type(data: bytes) -> str | None:
    """Return the media type of a picture file by its first bytes, or None."""
    key = optional_format(data)
    if key is None:
        key = next((form for signature, form in _SIGNATURES.items() if data.startswith(signature)), None)
    return "image/avif" if data[4:12] in (b"ftypavif", b"ftypavis") else MEDIA_TYPES.get(key or "")


def check_png(data: bytes) -> None:
    """Raise ValueError if the checksum of compressed pixels is wrong, which Pillow does not compare."""
    place, end = 8, len(data)
    while place + 12 <= end and data[place + 4 : place + 8] != b"IEND":
        size = int.from_bytes(data[place : place + 4], "big")
        body, place = place + 4, place + 12 + size
        if data[body : body + 4] != b"IDAT" or place > end:
            continue
        if zlib.crc32(memoryview(data)[body : place - 4]) != int.from_bytes(data[place - 4 : place], "big"):
            raise ValueError("a checksum of its pixels is wrong")


def png_chunk(data: bytes, name: bytes) -> bytes:
    """Return the content of a chunk before the pixels of a PNG file; b"" if it has none."""
    place = 8
    while place + 8 <= len(data) and data[place + 4 : place + 8] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == name:
            return data[place + 8 : place + 8 + size]
        place += size + 12
    return b""


def jp2_levels(data: bytes) -> int:
    """Return how often a JPEG 2000 file can be halved: the levels in its marker COD (ISO/IEC 15444-1, A.6.1)."""
    place = data.find(b"\xff\x52", data.find(b"\xff\x4f\xff\x51"))
    return data[place + 9] if 0 <= place < len(data) - 9 else 0


def strip_bytes(image: Any) -> int:
    """Return the bytes of a strip of a TIFF file, which is decompressed as a whole."""
    rows = image.tag_v2.get(278, image.height)
    height = min(rows, image.height) if isinstance(rows, int) else image.height
    tiled = 324 in image.tag_v2
    return 0 if tiled or image.info.get("compression") == "raw" else height * image.width * len(image.getbands())


def coefficient_bytes(layers: Sequence[tuple[int, int, int, int]]) -> float:
    """Return the bytes for each pixel of the coefficients of a progressive JPEG, which are all kept (2 a sample)."""
    across, down = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    return sum(2 * layer[1] * layer[2] / (across * down) for layer in layers)


def jxl_size(data: bytes) -> tuple[int, int]:
    """Return width and height that a JPEG XL file declares (ISO/IEC 18181-1, SizeHeader), before orientation.

    The decoder allocates the picture when the file is opened, so the limits are checked with this.

    Raises:
        ValueError: the header is damaged.
    """
    code = _jxl_codestream(data)
    bits, place = int.from_bytes(code[2:16], "little"), 0

    def read(count: int) -> int:
        nonlocal place
        value = bits >> place & ((1 << count) - 1)
        place += count
        return value

    def side(small: bool) -> int:
        return (read(5) + 1) * 8 if small else read((9, 13, 18, 30)[read(2)]) + 1

    small = bool(read(1))
    height = side(small)
    ratio = read(3)
    if not ratio:
        return side(small), height
    numerator, denominator = _JXL_RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _jxl_codestream(data: bytes) -> bytes:
    """Return the beginning of the codestream, which may be in a container of boxes."""
    if data.startswith(JXL_CODESTREAM):
        return data[:16]
    place = 0
    for _ in range(_BOXES):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        content = place + head + (4 if kind == b"jxlp" else 0)
        if kind in (b"jxlc", b"jxlp") and data[content : content + 2] == JXL_CODESTREAM:
            return data[content : content + 16]
        if size < head:
            break
        place += size
    raise ValueError("the JPEG XL file has no codestream")
