"""TIFF files of 16 bits and more for each sample, and BMP files with bit masks.

Pillow reads some of them with 8 bits, without the range of their values, or not at all. Here their samples are read as
they are stored; strips and tiles of TIFF files are decompressed by Pillow, as bytes.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gog_edge.picture.colour import Rows, Samples, eight_bits, flatten, stored_scale
from gog_edge.types import Size

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 16: 8}  # bytes of the field types that are read
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _ORIENTATION, _COUNT, _ROWS, _STRIP_BYTES, _PLANAR,
 _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT, _PROFILE) = (
    256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339, 34675)  # fmt: skip
_COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)  # without loss, of bytes
_GREY, _COLOURS = (0, 1), {0: 1, 1: 1, 2: 3, 5: 4, 8: 3, 9: 3}  # samples of a colour, by photometric interpretation
_CMYK, _CIELAB, _ICCLAB = 5, 8, 9
_MAX_FIELD, _MAX_SAMPLES = 2**20, 8
_BITFIELDS, _ALPHA_BITFIELDS = 3, 6  # BMP


@dataclass(frozen=True, slots=True)
class Raster:
    """An opened file."""

    size: tuple[int, int]  # width and height as stored
    orientation: int  # EXIF
    bytes: int  # that `load` takes
    load: Callable[[], Rows]


def open_samples(data: bytes, frame: int = 0) -> Raster | None:
    """Return what the file stores, or None for one that Pillow reads in full.

    Raises:
        ValueError, struct.error, LookupError: the file is damaged.
    """
    return _open_bmp(data) if data.startswith(b"BM") else _open_tiff(data, frame)


# --- TIFF ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the samples of a TIFF page are stored."""

    width: int
    height: int
    samples: int  # of a pixel
    dtype: np.dtype[Any]  # in the byte order of the file
    photometric: int
    alpha: int  # 0: none, 1: the colours are multiplied by it, 2: they are not
    predictor: int
    tile: int  # width of a tile in pixels; 0 for strips
    separate: bool  # each sample is a plane of its own

    @property
    def planes(self) -> int:
        return self.samples if self.separate else 1

    @property
    def padded(self) -> int:
        """Return the width of all tiles together."""
        return math.ceil(self.width / self.tile) * self.tile if self.tile else self.width


def _open_tiff(data: bytes, frame: int) -> Raster | None:
    order = "<" if data[:2] == b"II" else ">"
    fields = _read_fields(data, order, frame)
    bits = fields.get(_BITS, (1,))
    photometric, samples = fields.get(_PHOTOMETRIC, (1,))[0], fields.get(_COUNT, (1,))[0]
    # Pillow reads CIELAB and CMYK of 8 bits, but not with further samples such as alpha.
    read_by_pillow = samples == {_CMYK: 4, _CIELAB: 3, _ICCLAB: 0}.get(photometric, samples)
    depths = ((8, 16) if photometric in (_CIELAB, _ICCLAB) else (8, 16, 32, 64))[read_by_pillow:]
    if bits[0] not in depths or len(set(bits)) > 1 or fields.get(_COMPRESSION, (1,))[0] not in _COMPRESSIONS:
        return None
    kind = {1: "u", 2: "i", 3: "f"}.get(fields.get(_FORMAT, (1,))[0], "")
    colours = _COLOURS.get(photometric, 0)
    if not kind or not colours or not colours <= samples <= _MAX_SAMPLES:
        return None
    extra = fields.get(_EXTRA, (0,))[0] if samples > colours else 0
    layout = _Layout(fields[_WIDTH][0], fields[_HEIGHT][0], samples, np.dtype(f"{order}{kind}{bits[0] // 8}"),
                     photometric, extra if extra in (1, 2) else 0, fields.get(_PREDICTOR, (1,))[0],
                     fields.get(_TILE_WIDTH, (0,))[0], samples > 1 and fields.get(_PLANAR, (1,))[0] == 2)  # fmt: skip
    orientation = fields.get(_ORIENTATION, (1,))[0]
    profile = bytes(fields[_PROFILE]) if _PROFILE in fields else None
    a_row = layout.padded * samples * layout.dtype.itemsize
    strip = 0 if layout.tile else min(fields.get(_ROWS, (layout.height,))[0], layout.height)  # decompressed as a whole
    held = a_row * (layout.height + strip) + 3 * len(data)  # copies of the file
    return Raster((layout.width, layout.height), orientation if 1 <= orientation <= 8 else 1, held,
                  lambda: _tiff_rows(data, order, fields, layout, profile))  # fmt: skip


def _read_fields(data: bytes, order: str, frame: int) -> dict[int, tuple[int, ...]]:
    """Return the whole-number fields of a page by tag."""
    place = struct.unpack_from(f"{order}I", data, 4)[0]
    for _ in range(frame):
        count = struct.unpack_from(f"{order}H", data, place)[0]
        place = struct.unpack_from(f"{order}I", data, place + 2 + 12 * count)[0]
    count = struct.unpack_from(f"{order}H", data, place)[0]
    fields: dict[int, tuple[int, ...]] = {}
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
        size = _SIZES.get(kind, 0) * number
        if kind == 7 and tag == _PROFILE:
            kind = 1
        if kind not in _INTEGERS or not 0 < number <= _MAX_FIELD * (8 if tag == _PROFILE else 1):
            continue
        at = entry + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, entry + 8)[0]
        fields[tag] = struct.unpack_from(f"{order}{number}{_INTEGERS[kind]}", data, at)
    return fields


def _tiff_rows(data: bytes, order: str, fields: dict[int, tuple[int, ...]], layout: _Layout,
               profile: bytes | None) -> Rows:
    planes = [_load_plane(data, order, fields, layout, plane) for plane in range(layout.planes)]
    colours = _COLOURS[layout.photometric]

    def samples(top: int, bottom: int) -> Samples:
        """Return rows [rows, width, samples]."""
        parts = [_decode_rows(np.asarray(plane.crop((0, top, plane.width, bottom))), layout) for plane in planes]
        return np.concatenate(parts, axis=-1)[:, : layout.width] if len(parts) > 1 else parts[0][:, : layout.width]

    parts = Size(layout.width, layout.height).bands()
    is_lab = layout.photometric in (_CIELAB, _ICCLAB)
    is_byte = layout.dtype.itemsize == 1
    scale = 255.0 if is_lab or is_byte else stored_scale(samples(*part)[:, :, :colours] for part in parts)
    opaque = 1.0 if layout.dtype.kind == "f" else float(np.iinfo(layout.dtype).max)

    def rows(top: int, bottom: int) -> Image.Image:
        values = samples(top, bottom)
        colour, alpha = values[:, :, :colours], None
        if layout.alpha:
            cover = np.clip(np.nan_to_num(values[:, :, colours].astype(np.float32) / opaque), 0, 1)
            alpha = Image.fromarray(eight_bits(cover, 1.0))
            if layout.alpha == 1:
                colour = colour / np.maximum(cover, 1 / 65535)[:, :, None]
        if is_lab:
            return flatten(_lab(colour, layout.photometric), None, alpha)
        bytes_ = eight_bits(colour, scale)
        if layout.photometric == 0:
            bytes_ = 255 - bytes_
        shape = bytes_[:, :, 0] if layout.photometric in _GREY else bytes_
        band = _cmyk(bytes_) if layout.photometric == _CMYK else Image.fromarray(np.ascontiguousarray(shape))
        return flatten(band, profile, alpha)

    return rows


def _cmyk(values: Samples) -> Image.Image:
    return Image.frombytes("CMYK", (values.shape[1], values.shape[0]), np.ascontiguousarray(values).tobytes())


def _lab(values: Samples, photometric: int) -> Image.Image:
    """Return CIELAB as Pillow stores it: 255 is a lightness of 100, and 128 stands for 0 in a and b.

    In CIELab the largest number is a lightness of 100, and a and b are signed; ICCLab is that of version 2 profiles.
    """
    step = np.float32(256 ** (values.dtype.itemsize - 1))
    stored = values / step
    if photometric == _CIELAB:
        stored[:, :, 0] = values[:, :, 0] * np.float32(255 / np.iinfo(values.dtype).max)
        stored[:, :, 1:] = values[:, :, 1:].astype(f"i{values.dtype.itemsize}") / step + 128
    lab = np.clip(np.rint(stored), 0, 255).astype(np.uint8)
    signed_bytes = lab ^ np.array([0, 128, 128], np.uint8)  # as `frombytes` expects them
    return Image.frombytes("LAB", (values.shape[1], values.shape[0]), signed_bytes.tobytes())


def _load_plane(data: bytes, order: str, fields: dict[int, tuple[int, ...]], layout: _Layout,
                plane: int) -> Image.Image:
    """Return the bytes of the samples of one plane as a grey image, [height, width * samples * bytes]."""
    a_pixel = layout.dtype.itemsize * (1 if layout.separate else layout.samples)
    offsets, sizes = (_TILES, _TILE_BYTES) if layout.tile else (_STRIPS, _STRIP_BYTES)
    number = len(fields[offsets]) // layout.planes
    part = slice(plane * number, (plane + 1) * number)
    written: dict[int, tuple[int, ...]] = {
        _WIDTH: (layout.padded * a_pixel,), _HEIGHT: (layout.height,), _BITS: (8,), _PHOTOMETRIC: (1,), _COUNT: (1,),
        _COMPRESSION: fields.get(_COMPRESSION, (1,)), offsets: fields[offsets][part],
    }  # fmt: skip
    if sizes in fields:
        written[sizes] = fields[sizes][part]
    if layout.tile:
        written |= {_TILE_WIDTH: (layout.tile * a_pixel,), _TILE_HEIGHT: fields[_TILE_HEIGHT]}
    else:
        written[_ROWS] = (min(fields.get(_ROWS, (layout.height,))[0], layout.height),)
    image = Image.open(io.BytesIO(_with_fields(data, order, written)), formats=("TIFF",))
    image.load()
    return image


def _with_fields(data: bytes, order: str, fields: dict[int, tuple[int, ...]]) -> bytes:
    """Return the file with a directory of these fields as its only one."""
    start = len(data) + len(data) % 2
    place = start + 2 + 12 * len(fields) + 4
    directory, values = struct.pack(f"{order}H", len(fields)), b""
    for tag, numbers in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        value = packed if len(numbers) == 1 else struct.pack(f"{order}I", place + len(values))
        values += packed if len(numbers) > 1 else b""
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + value
    head = data[:4] + struct.pack(f"{order}I", start) + data[8:].ljust(start - 8, b"\0")
    return head + directory + b"\0" * 4 + values


def _decode_rows(stored: Samples, layout: _Layout) -> Samples:
    """Return bytes [rows, bytes] as samples [rows, pixels, samples], the predictor undone tile by tile."""
    samples = 1 if layout.separate else layout.samples
    tile = layout.tile or layout.width
    if layout.predictor == 3:
        tiles = stored.reshape(len(stored), -1, tile * layout.dtype.itemsize, samples)
        summed = np.cumsum(tiles, axis=2, dtype=np.uint8)  # a byte is stored as its difference to the last pixel's
        planes = summed.reshape(len(stored), -1, layout.dtype.itemsize, tile * samples)  # the high bytes come first
        joined = np.ascontiguousarray(planes.swapaxes(2, 3)).view(layout.dtype.newbyteorder(">"))
        return joined.astype(layout.dtype.newbyteorder("=")).reshape(len(stored), -1, samples)
    values = np.ascontiguousarray(stored).view(layout.dtype).astype(layout.dtype.newbyteorder("="))
    values = values.reshape(len(stored), -1, samples)
    if layout.predictor == 2:
        whole = values.view(f"u{layout.dtype.itemsize}").reshape(len(stored), -1, tile, samples)
        values = np.cumsum(whole, axis=2, dtype=whole.dtype).view(values.dtype).reshape(values.shape)
    return values


# --- BMP ----------------------------------------------------------------------------------------


def _open_bmp(data: bytes) -> Raster | None:
    """Return a bitmap of 16 or 32 bits with masks; all other bitmaps are Pillow's."""
    start, header, width, height, _, bits, compression = struct.unpack_from("<4xII ii HHI", data, 6)
    if header < 40 or compression not in (_BITFIELDS, _ALPHA_BITFIELDS) or bits not in (16, 32):
        return None
    count = 4 if header >= 56 or compression == _ALPHA_BITFIELDS else 3
    masks = struct.unpack_from(f"<{count}I", data, 54)
    shape = abs(height), math.ceil(width * bits / 32) * 32 // bits
    if width <= 0 or not height or not any(masks[:3]):
        return None
    size = shape[0] * shape[1] * bits // 8
    if len(data) < start + size:
        raise ValueError(f"the bitmap lacks {start + size - len(data)} of its bytes")
    stored = np.frombuffer(data, f"<u{bits // 8}", shape[0] * shape[1], start).reshape(shape)[:, :width]
    upright = stored if height < 0 else stored[::-1]
    return Raster((width, shape[0]), 1, 0, lambda: _bmp_rows(upright, masks))


def _bmp_rows(stored: Samples, masks: tuple[int, ...]) -> Rows:
    # Programs that fill the alpha bits with zeros mean opaque: browsers show such bitmaps so.
    mask = masks[3] if len(masks) == 4 else 0
    parts = Size(stored.shape[1], stored.shape[0]).bands()
    has_alpha = bool(mask) and any((stored[top:bottom] & mask).any() for top, bottom in parts)

    def rows(top: int, bottom: int) -> Image.Image:
        band = stored[top:bottom]
        colours = Image.fromarray(np.stack([_field(band, each) for each in masks[:3]], axis=-1))
        return flatten(colours, None, Image.fromarray(_field(band, mask)) if has_alpha else None)

    return rows


def _field(stored: Samples, mask: int) -> Samples:
    """Return the bits of a mask, scaled to 0..255."""
    if not mask:
        return np.zeros(stored.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    return eight_bits((stored & mask) >> shift, float(mask >> shift))
