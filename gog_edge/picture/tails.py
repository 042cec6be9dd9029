"""Picture files that lack a few bytes at their end.

Cameras and interrupted transfers leave such files, and browsers show them. What is missing is filled in, if it is
little: the marks that end a file, or a small part of the picture. A file that lacks more is refused, because a question
about the missing part would be answered wrongly.
"""

from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any

from PIL import Image, ImageChops

MISSING_SHARE = 0.02  # of the picture
FEW_BYTES, FEW_SHARE = 16, 0.25  # for small pictures: up to this many bytes, and this part of the picture
BLOCK = 16  # pixels; the coded data of a JPEG file is in blocks of up to this height
PADDING = 64  # bytes that may be missing in a format whose decoder knows how many there must be
PNG_BYTES = 2**27  # of the rows of a PNG file that is written anew
_EOI = b"\xff\xd9"  # also the end of a JPEG 2000 codestream
_PNG = b"\x89PNG\r\n\x1a\n"
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_TIFF_TYPES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}  # bytes of a value; 1 in other types
_PIECE = 2**20


def complete_tail(data: bytes) -> tuple[bytes, ...]:
    """Return the file with what is missing at its end filled in; () if too much is missing, or something else.

    Two files are returned where the decoder must tell what was missing: only if they differ in no more than
    MISSING_SHARE of the pixels is the first one right.
    """
    if data.startswith(b"\xff\xd8"):
        return _complete_jpeg(data)
    if data.startswith(_PNG):
        return _complete_png(data)
    noise = Random(0).randbytes(PADDING)
    if (place := data.find(b"\xff\x4f\xff\x51", 0, 4096)) >= 0:
        end = _jp2_end(data, place)
        missing = max(0, end - len(data))
        fills = (bytes(PADDING), noise) if missing <= PADDING else ()
        return tuple(data[:end] + fill[:missing] + _EOI for fill in fills)
    if data[4:8] == b"ftyp":
        return ()  # AVIF and HEIC: a decoder makes up any part of the picture from what there is
    if data.startswith(b"RIFF") and not 0 < int.from_bytes(data[4:8], "little") + 8 - len(data) <= PADDING:
        return ()
    if data.startswith((b"II", b"MM")):
        if _tiff_directory_end(data) > len(data):
            return ()
        noise = bytes(4) + noise  # a TIFF file may end with the four zeros after its only directory
    return data + bytes(PADDING), data + noise


def _is_little(share: float, stored: float) -> bool:
    """Return whether a missing part is small: its share of the picture, and the bytes that hold it."""
    return share <= MISSING_SHARE or (stored <= FEW_BYTES and share <= FEW_SHARE)


# --- JPEG ---------------------------------------------------------------------------------------


def _complete_jpeg(data: bytes) -> tuple[bytes, ...]:
    """Append the end mark of a JPEG file whose last scan is nearly complete.

    The decoder fills missing blocks with grey. Which ones they are is found by a second decode, in which other bytes
    stand for the missing ones.
    """
    kept = data.rstrip(b"\0")  # of a file that was allocated, but not filled
    last = _last_scan(kept)
    if last is None:
        return ()
    kept += b"\0" if kept.endswith(b"\xff") else b""
    completed = kept + _EOI
    noise = Random(0).randbytes(4096).replace(b"\xff", b"\x55")
    one, other = _draft(completed), _draft(kept + noise + _EOI)
    first = _first_difference(one, other, BLOCK * one.width // _full_width(completed))
    return (completed,) if _is_little(1 - first, (len(kept) - last) * (1 - first) / max(first, 1e-9)) else ()


def _draft(data: bytes) -> Image.Image:
    image: Any = Image.open(io.BytesIO(data), formats=("JPEG",))
    if not image.info.get("progressive"):  # the last scan of a progressive one is seen at full size only
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    drawn: Image.Image = image
    return drawn


def _full_width(data: bytes) -> int:
    return Image.open(io.BytesIO(data), formats=("JPEG",)).width


def _first_difference(one: Image.Image, other: Image.Image, block: int) -> float:
    """Return the share of a picture before the first difference, in reading order of blocks of `block` pixels."""
    width, height = one.size
    rows = max(1, block)
    for top in range(0, height, rows):
        area = (0, top, width, min(top + rows, height))
        box = ImageChops.difference(one.crop(area).convert("RGB"), other.crop(area).convert("RGB")).getbbox()
        if box is not None:
            return (top * width + box[0] * (area[3] - top)) / (width * height)
    return 1.0


def _last_scan(data: bytes) -> int | None:
    """Return where the coded data of the last scan begins; None if the file ends before a scan that it needs.

    A progressive file needs every coefficient of every component with all its bits.
    """
    place, start, progressive = 2, 0, False
    missing: set[tuple[int, int]] = set()  # (component, coefficient)
    while True:
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] == b"\xff":
            place += 1
        if place + 4 > len(data) or data[place] != 0xFF:
            break
        mark, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + size]
        place += 2 + size
        if 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC) and len(body) > 5:
            progressive = mark in (0xC2, 0xCA)
            coefficients = range(64 if progressive else 1)
            missing = {(body[6 + 3 * n], k) for n in range(body[5]) if 6 + 3 * n < len(body) for k in coefficients}
        elif mark == 0xDA and len(body) > 3:
            count = body[0]
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            if not progressive:
                first, last, bits = 0, 0, 0
            if not bits & 15:
                missing -= {(body[1 + 2 * n], k) for n in range(count) for k in range(first, last + 1)}
            start, place = place, _end_of_scan(data, place)
    return start if start and not missing else None


def _end_of_scan(data: bytes, place: int) -> int:
    """Return where the next marker begins after coded data, in which 0xFF is followed by 0 or is a restart marker."""
    while True:
        place = data.find(b"\xff", place)
        if place < 0 or place + 1 >= len(data):
            return len(data)
        if data[place + 1] and not 0xD0 <= data[place + 1] <= 0xD7 and data[place + 1] != 0xFF:
            return place
        place += 2 if data[place + 1] != 0xFF else 1


# --- JPEG 2000 and TIFF -------------------------------------------------------------------------


def _jp2_end(data: bytes, place: int) -> int:
    """Return where the last tile-part of a JPEG 2000 codestream ends (ISO/IEC 15444-1, A.4.2)."""
    place += 2
    while data[place : place + 2] not in (b"\xff\x90", b""):  # the main header
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    while data[place : place + 2] == b"\xff\x90" and (size := int.from_bytes(data[place + 6 : place + 10], "big")):
        place += size
    return place


def _tiff_directory_end(data: bytes) -> int:
    """Return where the first directory of a TIFF file ends, and the values that it refers to."""
    order = "<" if data.startswith(b"II") else ">"
    place = int(struct.unpack_from(f"{order}I", data, 4)[0])
    end = place + 2 + 12 * struct.unpack_from(f"{order}H", data, place)[0]
    ends = [end]
    for entry in range(place + 2, min(end, len(data) - 11), 12):
        _, kind, count, value = struct.unpack_from(f"{order}HHII", data, entry)
        size = count * _TIFF_TYPES.get(kind, 1)
        ends.append(value + size if size > 4 else 0)
    return int(max(ends))


# --- PNG ----------------------------------------------------------------------------------------


def _complete_png(data: bytes) -> tuple[bytes, ...]:
    """Write a PNG file anew with its missing last rows filled in: as copies of the row above, or black."""
    head, stored, ends = _png_parts(data)
    if not stored or not ends or len(head) < 33:
        return ()
    needed, stride = _png_bytes(head)
    if not needed or needed > PNG_BYTES:
        return ()
    unpack, pack, found = zlib.decompressobj(), zlib.compressobj(1), 0
    packed = []
    for place in range(0, len(stored), _PIECE):
        piece = stored[place : place + _PIECE]
        while piece and found < needed:
            raw = unpack.decompress(piece, min(_PIECE, needed - found))
            found += len(raw)
            packed.append(pack.compress(raw))
            piece = unpack.unconsumed_tail
            if not raw:
                break
    share = 1 - found / needed
    if not _is_little(share, len(stored) * share / max(1 - share, 1e-9)):
        return ()
    packed.append(pack.compress(b"\0" * (-found % stride if stride else needed - found)))
    row = b"\2" + b"\0" * (stride - 1)  # differences to the row above
    packed.extend(pack.compress(row) for _ in range((needed - found) // stride if stride else 0))
    packed.append(pack.flush())
    return (head + _chunk(b"IDAT", b"".join(packed)) + _chunk(b"IEND", b""),)


def _png_parts(data: bytes) -> tuple[bytes, bytes, bool]:
    """Return the chunks before the pixels, the compressed pixels, and whether the file ends within or after these."""
    place, first, stored = 8, 0, []
    while place + 8 <= len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if name == b"IDAT":
            body = data[place + 4 : place + 8 + size]
            if place + 12 + size <= len(data) and data[place + 8 + size : place + 12 + size] != _crc(body):
                return data[:8], b"", False  # damaged before the end
            first = first or place
            stored.append(data[place + 8 : place + 8 + size])
        place += size + 12
    return data[: first or 8], b"".join(stored), place >= len(data) - 11


def _png_bytes(head: bytes) -> tuple[int, int]:
    """Return the bytes of all rows of a PNG, each with its filter, and of one row; 0 for interlaced rows."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", head, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]

    def of(columns: int, rows: int) -> int:
        return rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0

    if not interlaced:
        return of(width, height), of(width, 1)
    return sum(of((width - x + dx - 1) // dx, (height - y + dy - 1) // dy) for x, y, dx, dy in _ADAM7), 0


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + _crc(name + body)


def _crc(content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(content))
