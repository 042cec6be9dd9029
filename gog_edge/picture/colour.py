"""Conversion of what Pillow decodes to RGB in sRGB: sample depths, transparency, colour profiles.

Pictures are converted in bands of rows, so that a large one is never held twice.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gog_edge.picture.headers import png_chunk
from gog_edge.types import Pixels, Size

Samples: TypeAlias = NDArray[Any]
Rows: TypeAlias = Callable[[int, int], Image.Image]  # the RGB image of the rows from y0 to y1
DEPTHS = (10, 12, 14)  # bits of samples that are often stored in 16 bits without saying so
HDR = 16.0  # floating-point samples up to this are light relative to white at 1
_GREY_MODES = ("1", "L", "LA", "La")
_TIFF_MIN_IS_WHITE, _PHOTOMETRIC, _BITS = 0, 262, 258


def rgb_rows(image: Image.Image, data: bytes) -> Rows:
    """Return the function that converts rows of a loaded image to RGB in sRGB on white; `data` is its file."""
    from_mode = _depth(image)
    _scale_transparent_grey(image, data)
    key = image.info.get("transparency") if image.mode.startswith("I;16") else None
    mask = _sixteen_bit_mask(image, data)
    drawn = _drawn_area(image)

    def rows(top: int, bottom: int) -> Image.Image:
        area = (0, top, image.width, bottom)
        band = image if area == (0, 0, *image.size) else image.crop(area)
        alpha = mask(area) if mask else None
        if isinstance(key, int):
            alpha = Image.fromarray(np.where(np.asarray(band) == key, 0, 255).astype(np.uint8))
        band = flatten(from_mode(band) if from_mode else band, profile, alpha)
        if drawn is not None:
            white = Image.new("RGB", band.size, "white")
            box = (drawn[0], max(0, drawn[1] - top), drawn[2], max(0, min(drawn[3], bottom) - top))
            white.paste(band.crop(box), box[:2])
            band = white
        return band

    profile = _profile(image, data)
    return rows


def flatten(band: Image.Image, profile: bytes | None, alpha: Image.Image | None = None) -> Image.Image:
    """Return 8-bit samples as RGB in sRGB, on white where they are transparent.

    Args:
        band: in any mode of 8 bits.
        profile: of its colours; None for sRGB.
        alpha: replaces the transparency of the band.
    """
    if band.has_transparency_data and alpha is None:
        band = band.convert("LA" if band.mode in _GREY_MODES else "RGBA")
        alpha = band.getchannel("A")
    if band.mode == "LAB":
        from gog_edge.picture.icc import lab_to_srgb

        band = lab_to_srgb()(band)
    if band.mode in ("1", "LA"):
        band = band.convert("L")
    elif band.mode not in ("L", "CMYK", "RGB"):
        band = band.convert("RGB")
    rgb = band.convert("RGB") if profile is None else _to_srgb(band, profile)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def eight_bits(samples: Samples, top: float) -> Pixels:
    """Scale samples to 0..255, so that `top` becomes 255; negative and undefined ones become 0."""
    clean = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=top, neginf=0.0)
    return np.asarray(np.rint(np.clip(clean * np.float32(255 / top), 0, 255)), np.uint8)


def full_scale(parts: Iterator[Samples]) -> float:
    """Return the value that stands for white in samples of unknown range, read once part by part.

    Whole numbers: the largest value of 8, 10, 12, 14 or 16 bits that holds them, or of their type; 1 for masks of 0
    and 1. Floating point: 1, also where less than half of the light is above it; else as whole numbers.
    """
    top, dim, bright, floating, largest = 0.0, 0, 0, False, math.inf
    for part in parts:
        floating = part.dtype.kind == "f"
        largest = math.inf if floating else float(np.iinfo(part.dtype).max)
        finite = part[np.isfinite(part)] if floating else part
        if finite.size:
            top = max(top, float(finite.max()))
        if floating:
            dim += int(np.count_nonzero((finite > 0) & (finite <= 1)))
            bright += int(np.count_nonzero(finite > 1))
    if top <= 1 or (floating and (top <= HDR or dim > bright)):
        return 1.0
    limits = [2.0**bits - 1 for bits in (8, *DEPTHS, 16)]
    return min(largest, next((limit for limit in limits if top <= limit), top if floating else largest))


def _depth(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """Return the function that makes bands 8-bit; None if they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    top = 65535.0
    if image.format == "TIFF":
        top = 4095.0 if _tag(image, _BITS) == 12 else stored_scale(_arrays(image))
    elif image.mode in ("I", "F"):
        top = full_scale(_arrays(image))
    inverted = image.format == "TIFF" and _tag(image, _PHOTOMETRIC) == _TIFF_MIN_IS_WHITE

    def convert(band: Image.Image) -> Image.Image:
        grey = eight_bits(np.asarray(band), top)
        return Image.fromarray(255 - grey if inverted else grey)

    return convert


def stored_scale(parts: Iterator[Samples]) -> float:
    """Return what stands for white in the samples of a TIFF file.

    Cameras and microscopes store 10, 12 or 14 bits in 16 without saying so, but hardly 8.
    """
    first = next(parts)

    def all_parts() -> Iterator[Samples]:
        yield first
        yield from parts

    top = full_scale(all_parts())
    return max(top, 2.0 ** DEPTHS[0] - 1) if first.dtype == np.uint16 else top


def _arrays(image: Image.Image) -> Iterator[Samples]:
    for top, bottom in Size(*image.size).bands():
        yield np.asarray(image.crop((0, top, image.width, bottom)))


def _tag(image: Image.Image, number: int) -> Any:
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _drawn_area(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return what the first frame of a GIF covers, if not the whole picture: browsers show the rest as transparent."""
    extent = getattr(image, "dispose_extent", None)
    if image.format != "GIF" or image.tell() or extent is None or tuple(extent) == (0, 0, *image.size):
        return None
    return (extent[0], extent[1], extent[2], extent[3])


# --- transparent colours of PNG ---------------------------------------------------------------


def _scale_transparent_grey(image: Image.Image, data: bytes) -> None:
    """Scale the transparent value of a PNG of 2 or 4 bits, which Pillow leaves as stored, like its pixels."""
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(key, int) and data[24] < 8:
        image.info["transparency"] = key * 255 // (2 ** data[24] - 1)


def _sixteen_bit_mask(image: Image.Image, data: bytes) -> Callable[[tuple[int, int, int, int]], Image.Image] | None:
    """Return what is opaque in a 16-bit RGB PNG that names one colour as transparent; None for other pictures.

    Pillow keeps the high bytes only: the low ones are decoded as if the file were little-endian.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode != "RGB" or not isinstance(key, tuple) or data[24] != 16:
        return None
    del image.info["transparency"]
    low: Any = Image.open(io.BytesIO(data), formats=("PNG",))
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    low.load()

    def mask(area: tuple[int, int, int, int]) -> Image.Image:
        high_bytes, low_bytes = (np.asarray(part.crop(area), np.uint16) for part in (image, low))
        same = (high_bytes << 8 | low_bytes) == np.array(key, np.uint16)
        return Image.fromarray(np.where(same.all(axis=-1), 0, 255).astype(np.uint8))

    return mask


# --- colour spaces ----------------------------------------------------------------------------


def _profile(image: Image.Image, data: bytes) -> bytes | None:
    """Return the profile of the colours of an image, or None for sRGB.

    A profile of three channels also holds for grey. In a PNG file cICP comes before iCCP, sRGB, and gAMA with cHRM.
    """
    if image.mode == "LAB":
        return None  # the values are those of TIFF, whatever the profile
    info = image.info
    profile = info.get("icc_profile")
    if image.format == "PNG" and (code_points := png_chunk(data, b"cICP")) and len(code_points) >= 2:
        return _cicp(code_points[0], code_points[1])
    if isinstance(profile, bytes) and profile:
        return profile
    if image.format == "PNG" and "srgb" not in info and info.get("gamma"):
        from gog_edge.picture.icc import gamma_profile

        return gamma_profile(info["gamma"], info.get("chromaticity"))
    if image.format in ("AVIF", "HEIF") and (place := data.find(b"colrnclx", 0, 2**16)) >= 0:
        return _cicp(*struct.unpack_from(">HH", data, place + 8))
    return None


def _cicp(primaries: int, transfer: int) -> bytes | None:
    from gog_edge.picture.icc import cicp_profile

    return cicp_profile(primaries, transfer)


def _to_srgb(band: Image.Image, profile: bytes) -> Image.Image:
    from gog_edge.picture.icc import channels_of, to_srgb

    if band.mode == "L" and channels_of(profile) == "RGB ":
        band = band.convert("RGB")
    transform = to_srgb(profile, band.mode)
    return band.convert("RGB") if transform is None else transform(band)
