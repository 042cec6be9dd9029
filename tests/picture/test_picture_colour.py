"""Colour profiles, colour chunks and transparency, against the formulas of their specifications."""

import struct
import threading

import numpy as np
import pytest
from picture_files import (
    ADOBE_RGB,
    D50,
    DISPLAY_P3,
    PROPHOTO,
    encoded,
    flat_png,
    gamma_tag,
    icc_profile,
    matrix_icc,
    photo,
    png,
    srgb_of_lab,
    srgb_of_linear,
    srgb_of_matrix,
    srgb_of_xyz,
    tiff,
    xyz_tag,
)
from PIL import Image

from gog_edge.picture import decode_picture
from gog_edge.picture.icc import to_srgb

COLOUR = (200, 80, 60)
SPACES = {"Adobe RGB": (ADOBE_RGB, 563 / 256), "ProPhoto RGB": (PROPHOTO, 461 / 256),
          "P3, gamma 2.2": (DISPLAY_P3, 563 / 256)}  # fmt: skip
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
LOSSY = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}


def flat(mode="RGB", colour=COLOUR, size=(16, 16)):
    return Image.new(mode, size, colour)


def first_pixel(data):
    return decode_picture(data).pixels[0, 0].astype(int)


def assert_colour(data, expected, tolerance=2):
    pixels = decode_picture(data).pixels.astype(int)
    assert np.abs(pixels - np.asarray(expected)).max() <= tolerance, (pixels[0, 0], expected)


# --- ICC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY])
def test_profiles_of_matrix_and_gamma(space, form):
    columns, exponent = SPACES[space]
    expected = srgb_of_matrix(columns, exponent, COLOUR)
    data = encoded(flat(), form, icc_profile=matrix_icc(columns, exponent), **(LOSSLESS | LOSSY)[form])
    assert_colour(data, expected, 2 if form in LOSSLESS else 8)
    assert np.abs(expected - COLOUR).max() > 8  # the profile matters


def test_profiles_hold_for_palettes_grey_and_transparent_pictures():
    profile = matrix_icc(ADOBE_RGB, 563 / 256)
    expected = srgb_of_matrix(ADOBE_RGB, 563 / 256, COLOUR)
    assert_colour(encoded(flat().quantize(4), icc_profile=profile), expected)
    half = flat("RGBA", (*COLOUR, 128))
    assert_colour(encoded(half, icc_profile=profile), np.rint(255 - (255 - expected) * 128 / 255))
    steep = matrix_icc(ADOBE_RGB, 1.0)
    grey = srgb_of_linear(np.array([100 / 255] * 3))
    assert_colour(encoded(flat("L", 100), icc_profile=steep), grey)
    assert_colour(encoded(flat("LA", (100, 255)), icc_profile=steep), grey)


def test_profiles_of_grey():
    profile = icc_profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": gamma_tag(1.0)})
    assert_colour(encoded(flat("L", 100), icc_profile=profile), srgb_of_linear(np.array([100 / 255] * 3)))
    assert_colour(encoded(flat(), icc_profile=profile), COLOUR, 0)  # of three channels: not for this profile


def lab_of_inks(cyan, magenta, yellow, black):
    lightness = 100 * (1 - 0.45 * cyan) * (1 - 0.5 * magenta) * (1 - 0.08 * yellow) * (1 - 0.9 * black)
    return lightness, (70 * magenta - 35 * cyan) * (1 - black), (80 * yellow - 45 * cyan) * (1 - black)


def cmyk_icc(steps=9):
    """A profile with a table of 8 bits (lut8Type) that holds `lab_of_inks`."""
    levels = [n / (steps - 1) for n in range(steps)]
    table = bytearray()
    for inks in ((c, m, y, k) for c in levels for m in levels for y in levels for k in levels):
        lightness, a, b = lab_of_inks(*inks)
        table += bytes((round(lightness * 2.55), round(a + 128), round(b + 128)))
    identity = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes((4, 3, steps, 0)) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    return icc_profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": head + identity * 4 + bytes(table) + identity * 3},
                       kind=b"prtr", pcs=b"Lab ")


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_profiles_of_printing_inks(form):
    inks = (40, 160, 140, 30)
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = encoded(flat("CMYK", inks), form, icc_profile=cmyk_icc(), **options)
    assert_colour(data, srgb_of_lab(*lab_of_inks(*(ink / 255 for ink in inks))), 4)


def test_black_stays_as_light_as_the_profile_says():
    """As in browsers: no black point compensation. 8 of 100 in lightness is 24 of 255."""
    identity = bytes(range(256))
    corners = b"".join(bytes((20 + 235 * (r + g + b) // 3, 128, 128)) for r in (0, 1) for g in (0, 1) for b in (0, 1))
    head = b"mft1\0\0\0\0" + bytes((3, 3, 2, 0)) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = head + identity * 3 + corners + identity * 3
    profile = icc_profile(b"RGB ", {b"wtpt": xyz_tag(D50), b"A2B0": table}, pcs=b"Lab ")
    assert_colour(encoded(flat(colour=(0, 0, 0)), icc_profile=profile), srgb_of_lab(20 / 2.55, 0, 0), 2)


@pytest.mark.parametrize("profile", [
    b"", b"junk" * 60, matrix_icc(ADOBE_RGB, 2.2)[:200], matrix_icc(ADOBE_RGB, 2.2)[:130], cmyk_icc(2),
    icc_profile(b"RGB ", {b"wtpt": xyz_tag(D50)}), b"\0" * 4096,
])  # fmt: skip
def test_profiles_that_cannot_be_used_are_ignored(profile):
    assert_colour(encoded(flat(), icc_profile=profile), COLOUR, 0)
    assert_colour(encoded(flat(), "TIFF", icc_profile=profile), COLOUR, 0)


def test_srgb_profiles_change_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = photo()
    assert to_srgb(profile, "RGB") is None
    assert np.array_equal(decode_picture(encoded(picture, icc_profile=profile)).pixels, np.asarray(picture))


def test_profiles_with_damage_never_raise_anything_else():
    chance = np.random.default_rng(3)
    whole = np.frombuffer(cmyk_icc(3) + matrix_icc(PROPHOTO, 1.8), np.uint8)
    for _ in range(60):
        profile = whole.copy()
        profile[chance.integers(0, 500, 6)] = chance.integers(0, 256, 6)
        decode_picture(encoded(flat("CMYK", (1, 2, 3, 4)), "TIFF", icc_profile=profile.tobytes()))


def test_profiles_in_several_threads():
    """Each picture keeps the colours of its own profile."""
    files = [encoded(photo(), icc_profile=matrix_icc(*SPACES[name])) for name in SPACES]
    expected = [decode_picture(data).pixels for data in files]
    wrong = []

    def work(n):
        for _ in range(10):
            if not np.array_equal(decode_picture(files[n]).pixels, expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n % 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- colour chunks of PNG, colours of AVIF --------------------------------------------------------

WHITE_AND_P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def gama(exponent):
    return b"gAMA", struct.pack(">I", round(exponent * 100_000))


def chrm(xy):
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in xy))


def linear(code):
    code = np.array(code) / 255
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def p3_to_srgb(light):
    return srgb_of_xyz(np.array(DISPLAY_P3).T @ light)


CHUNKS = {
    "gAMA of sRGB": ([gama(0.45455)], COLOUR),
    "gAMA 1": ([gama(1.0)], srgb_of_linear(np.array(COLOUR) / 255)),
    "gAMA 1/1.8": ([gama(1 / 1.8)], srgb_of_linear((np.array(COLOUR) / 255) ** 1.8)),
    "cHRM alone": ([chrm(WHITE_AND_P3)], COLOUR),
    "gAMA and cHRM": ([gama(0.45455), chrm(WHITE_AND_P3)], p3_to_srgb((np.array(COLOUR) / 255) ** 2.2)),
    "sRGB before gAMA": ([gama(1.0), (b"sRGB", b"\0")], COLOUR),
    "cICP linear": ([(b"cICP", bytes((1, 8, 0, 1)))], srgb_of_linear(np.array(COLOUR) / 255)),
    "cICP before sRGB": ([(b"cICP", bytes((12, 13, 0, 1))), (b"sRGB", b"\0")], p3_to_srgb(linear(COLOUR))),
    "cICP before gAMA": ([(b"cICP", bytes((1, 13, 0, 1))), gama(1.0)], COLOUR),
    "gAMA 0": ([gama(0.0)], COLOUR),
    "cHRM 0": ([gama(1.0), chrm((0,) * 8)], COLOUR),
    "short cICP": ([(b"cICP", b"\x0c")], COLOUR),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_colour_chunks_of_png(name):
    chunks, expected = CHUNKS[name]
    assert_colour(flat_png(8, 8, 8, 2, bytes(COLOUR), before=chunks), expected)


def test_gamma_of_grey_png():
    assert_colour(flat_png(8, 8, 8, 0, b"\x64", before=[gama(1.0)]), srgb_of_linear(np.array([100 / 255] * 3)))


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_shown_with_highlights(transfer):
    """PQ and HLG: brighter codes are brighter, up to white, and diffuse white is not clipped."""
    chunk = [(b"cICP", bytes((9, transfer, 0, 1)))]
    files = [flat_png(8, 8, 8, 2, bytes((code,) * 3), before=chunk) for code in (0, 60, 120, 150, 180, 255)]
    levels = [int(first_pixel(data)[1]) for data in files]
    assert levels[0] == 0 and levels == sorted(set(levels)) and levels[-1] >= 253


def test_colours_of_avif_without_a_profile():
    """The box colr of type nclx names Display P3."""
    data = bytearray(encoded(flat(), "AVIF", quality=100, subsampling="4:4:4"))
    place = data.index(b"colrnclx")
    data[place + 8 : place + 12] = struct.pack(">HH", 12, 13)
    assert_colour(bytes(data), p3_to_srgb(linear(COLOUR)), 4)


# --- transparent colours of PNG (tRNS) ------------------------------------------------------------


@pytest.mark.parametrize("depth, row, key, shown", [
    (1, b"\x00", 0, 255), (1, b"\x00", 1, 0), (1, b"\xff", 1, 255), (2, b"\x55\x55", 1, 255), (2, b"\x55\x55", 2, 85),
    (4, b"\x55" * 4, 5, 255), (4, b"\x55" * 4, 6, 85), (8, b"\x55" * 8, 0x55, 255), (8, b"\x55" * 8, 0x54, 85),
    (16, b"\x12\x34" * 8, 0x1234, 255), (16, b"\x12\x35" * 8, 0x1234, 18),
])  # fmt: skip
def test_transparent_grey(depth, row, key, shown):
    assert_colour(png(8, 8, depth, 0, row, transparent=struct.pack(">H", key)), [shown] * 3, 0)


@pytest.mark.parametrize("depth, pixel, key, shown", [
    (8, b"\x01\x02\x03", (1, 2, 3), (255, 255, 255)), (8, b"\x01\x02\x03", (1, 2, 4), (1, 2, 3)),
    (16, b"\x12\x34\x56\x78\x9a\xbc", (0x1234, 0x5678, 0x9ABC), (255, 255, 255)),
    (16, b"\x12\x34\x56\x78\x9a\xbc", (0x1234, 0x5678, 0x9ABD), (0x12, 0x56, 0x9A)),  # differs in a low byte only
    (16, b"\x00\x00\x00\x00\x00\x80", (0, 0, 1), (0, 0, 0)),
])  # fmt: skip
def test_transparent_colour(depth, pixel, key, shown):
    assert_colour(flat_png(8, 8, depth, 2, pixel, transparent=struct.pack(">3H", *key)), shown, 1)


def test_a_palette_with_alpha():
    palette = bytes((10, 20, 30, 200, 100, 50, 1, 2, 3))
    data = png(8, 8, 8, 3, b"\0\1\2\0\1\2\0\1", palette=palette, transparent=b"\0\x80")
    pixels = decode_picture(data).pixels[0, :3].tolist()
    assert pixels == [[255, 255, 255], [227, 177, 152], [1, 2, 3]]


@pytest.mark.parametrize("mode, colour, shown", [
    ("RGBa", (50, 40, 30, 128), (178, 168, 158)), ("LA", (100, 128), (177, 177, 177)),
])  # fmt: skip
def test_associated_and_grey_alpha(mode, colour, shown):
    """In RGBa the colours are multiplied by alpha already: 50 + 255 * (1 - 128 / 255)."""
    image = Image.frombytes(mode, (4, 4), bytes(colour) * 16) if mode == "LA" else None
    data = encoded(image) if image else premultiplied_tiff(colour)
    assert_colour(data, shown, 2)


def premultiplied_tiff(colour):
    return tiff(np.full((4, 4, 4), colour, np.uint8), 2, extra=1)
