"""Colour profiles: transforms to sRGB by ICC profiles, and profiles for colour spaces that a file describes in numbers.

As in browsers, the perceptual tables of a profile are used, without black point compensation. A profile that cannot be
used is ignored, and its picture is taken as sRGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Floats: TypeAlias = NDArray[np.float64]
Transform: TypeAlias = Callable[[Image.Image], Image.Image]
Curve: TypeAlias = Callable[[Floats], Floats]

MAX_PROFILE = 8 * 2**20  # bytes; profiles of printing presses have up to 3 MB
SAME = 2  # largest difference to sRGB, in steps of 8 bits, of a profile that is taken as sRGB itself
_MODES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # the colour space of a profile for each mode
_CLASSES = ("scnr", "mntr", "prtr", "spac")  # profiles of devices and colour spaces
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError, MemoryError, struct.error)

SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of white, red, green and blue
# Colour primaries of ITU-T H.273 by code; others are taken as those of sRGB.
_PRIMARIES = {
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # BT.601, 625 lines
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # BT.601, 525 lines
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # DCI-P3
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # Display P3
}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])
_WHITE_NITS, _PQ_NITS, _HLG_NITS = 203.0, 10_000.0, 1_000.0  # of diffuse white (BT.2408), and of code 1
_SRGB_GAMMA = (0.45, 0.46)  # exponents of a PNG's gAMA that stand for the curve of sRGB, where there is no cHRM


def channels_of(profile: bytes) -> str:
    """Return the colour space of a profile as ICC writes it, such as "RGB " or "CMYK"; "" if it is not a profile."""
    return profile[16:20].decode("latin-1") if profile[36:40] == b"acsp" else ""


@lru_cache(maxsize=8)
def to_srgb(profile: bytes, mode: str) -> Transform | None:
    """Return the function that converts images of a mode ("RGB", "L" or "CMYK") to RGB images in sRGB.

    None if the profile is damaged, is for another colour space, or describes sRGB itself.
    """
    if len(profile) > MAX_PROFILE or channels_of(profile) != _MODES[mode]:
        return None
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.device_class not in _CLASSES:
            return None
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", ImageCms.Intent.PERCEPTUAL,
                                            ImageCms.Flags.HIGHRESPRECALC)
        return None if _is_identity(transform, mode) else transform.apply
    except _PROFILE_ERRORS:
        return None


@cache
def lab_to_srgb() -> Transform:
    """Return the function that converts CIELAB images (D50) to RGB images in sRGB."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    transform = ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                        ImageCms.Flags.NOOPTIMIZE)  # a table of colours would be 5 steps off
    return transform.apply


def cicp_profile(primaries: int, transfer: int) -> bytes | None:
    """Return a profile for the code points of ITU-T H.273, as in the PNG chunk cICP and in AVIF; None for sRGB's."""
    curve = _TRANSFERS.get(transfer, _from_srgb)
    xy = _PRIMARIES.get(primaries, SRGB_PRIMARIES)
    return None if curve is _from_srgb and xy is SRGB_PRIMARIES else matrix_profile(xy, curve)


def gamma_profile(exponent: float, xy: tuple[float, ...] | None) -> bytes | None:
    """Return a profile for a PNG's gAMA (the exponent of encoding) and cHRM; None for sRGB or impossible values."""
    if not 0.1 <= exponent <= 10 or (xy is None and _SRGB_GAMMA[0] <= exponent <= _SRGB_GAMMA[1]):
        return None
    if xy is not None and not (len(xy) == 8 and all(0 < value < 1 for value in xy[1::2])):
        return None
    return matrix_profile(xy or SRGB_PRIMARIES, _power(1 / exponent))


@lru_cache(maxsize=16)
def matrix_profile(xy: tuple[float, ...], curve: Curve) -> bytes | None:
    """Return an ICC profile (version 2.1, matrix and curves) of an RGB space; None if its primaries have no area.

    Args:
        xy: x and y of the white point, red, green and blue.
        curve: the light of a code, both from 0 to 1.
    """
    white, *primaries = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in zip(xy[::2], xy[1::2], strict=True))
    columns = np.stack(primaries, axis=1)
    if abs(np.linalg.det(columns)) < 1e-6:
        return None
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ (columns * np.linalg.solve(columns, white))
    # One entry for each 8-bit code, so that nothing is interpolated.
    entries = np.rint(np.clip(curve(np.linspace(0, 1, 256)), 0, 1) * 65535).astype(">u2").tobytes()
    tags = {b"wtpt": _xyz(_D50), b"rTRC": b"curv\0\0\0\0" + struct.pack(">I", 256) + entries}
    tags |= {name: _xyz(adapted[:, column]) for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _write_profile(tags | {b"gTRC": tags[b"rTRC"], b"bTRC": tags[b"rTRC"]})


def _write_profile(tags: dict[bytes, bytes]) -> bytes:
    table, body, places = b"", b"", {}
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        if content not in places:
            places[content] = start + len(body)
            body += content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, places[content], len(content))
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"\0" * 4, 0x02100000, b"mntr", b"RGB ", b"XYZ ",
                       struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp")
    head = head.ljust(68, b"\0") + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: Floats) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values.tolist()))


@cache
def _srgb() -> Any:
    """Return sRGB as a profile of version 2: into later ones LittleCMS compensates the black point in any case."""
    profile = matrix_profile(SRGB_PRIMARIES, _from_srgb)
    return ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform changes no colour of a grid by more than SAME steps."""
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    probe = Image.fromarray(np.ascontiguousarray(grid if mode == "L" else grid[:, None]))
    result = transform.apply(probe)
    if result is None:
        return False
    return int(np.abs(np.asarray(result, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()) <= SAME


# --- transfer functions: light by code --------------------------------------------------------


def _from_srgb(code: Floats) -> Floats:
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


@cache
def _power(exponent: float) -> Curve:
    return lambda code: np.power(code, exponent)


def _linear(code: Floats) -> Floats:
    return code


def _from_pq(code: Floats) -> Floats:
    """SMPTE ST 2084."""
    root = code ** (1 / 78.84375)
    light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return _tone_map(light * _PQ_NITS / _WHITE_NITS)


def _from_hlg(code: Floats) -> Floats:
    """BT.2100 hybrid log-gamma, with a system gamma of 1.2."""
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return _tone_map(scene**1.2 * _HLG_NITS / _WHITE_NITS)


def _tone_map(light: Floats) -> Floats:
    """Return light relative to diffuse white for a screen: white at one half, highlights above, as Chromium does."""
    return np.where(light <= 1, light / 2, 1 - np.exp(1 - light) / 2)


_CAMERA = _power(2.4)  # the curves of cameras are shown with that of screens, BT.1886
_TRANSFERS: dict[int, Curve] = {  # by code of H.273; others are taken as that of sRGB
    1: _CAMERA, 4: _power(2.2), 5: _power(2.8), 6: _CAMERA, 8: _linear, 14: _CAMERA, 15: _CAMERA, 16: _from_pq,
    18: _from_hlg,
}  # fmt: skip
