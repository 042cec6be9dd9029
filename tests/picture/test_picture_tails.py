"""Files that lack bytes at their end: a few are filled in, many are refused."""

import io
import zlib

import numpy as np
import pytest
from picture_files import encoded, flat_png, photo, png_chunk
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture

FORMS = {
    "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}), "gif": ("GIF", {}), "bmp": ("BMP", {}), "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}), "avif": ("AVIF", {}), "jpeg 2000": ("JPEG2000", {}),
}  # fmt: skip
# Bytes at the end of each file that are not of its last pixels, or of them only.
FEW = {"jpeg": (1, 2, 3, 6, 10), "progressive": (1, 2, 3, 6, 10), "png": (1, 4, 12, 16, 20, 30), "webp": (1, 2),
       "lossless webp": (1, 2), "gif": (1, 2), "bmp": (1, 3, 20), "tiff": (1, 3, 20), "jpeg 2000": (1, 2, 6)}
PICTURE = photo(400, 300)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def of(name):
    form, options = FORMS[name]
    return encoded(PICTURE, form, **options)


@pytest.mark.parametrize("name, missing", [(name, missing) for name, counts in FEW.items() for missing in counts])
def test_a_few_missing_bytes_are_filled_in(name, missing):
    whole = decode_picture(of(name)).pixels.astype(int)
    cut = decode_picture(of(name)[:-missing])
    wrong = (np.abs(cut.pixels - whole).max(axis=-1) > 8).mean()
    assert wrong <= 0.02 and (not cut.plain or name == "png")  # Pillow itself reads a PNG with all its rows


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_many_missing_bytes_are_refused(name, share):
    data = of(name)
    with pytest.raises(PictureError, match=r"truncated|not a JPEG"):
        decode_picture(data[: int(len(data) * (1 - share))])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [(8, 8), (64, 64), (33, 70)])
def test_what_is_accepted_is_the_picture(name, size):
    """Of each cut of a small picture: refused, or right in all but a small part."""
    form, options = FORMS[name]
    for picture in (Image.new("RGB", size, (200, 50, 50)), photo(*size)):
        data = encoded(picture, form, **options)
        whole = decode_picture(data).pixels.astype(int)
        for missing in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100):
            try:
                cut = decode_picture(data[:-missing]).pixels
            except PictureError:
                continue
            assert cut.shape == whole.shape
            assert (np.abs(cut - whole).max(axis=-1) > 16).mean() <= 0.25, missing


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_bytes_after_the_end_do_no_harm(name):
    data = of(name)
    assert np.array_equal(decode_picture(data + b"\xff\xd8 anything \0" * 50).pixels, decode_picture(data).pixels)


def test_a_jpeg_filled_up_with_zeros_is_refused():
    """An interrupted copy into a file that was allocated before."""
    data = of("jpeg")
    for kept in (0.5, 0.8):
        with pytest.raises(PictureError, match="truncated"):
            decode_picture(data[: int(len(data) * kept)].ljust(len(data), b"\0"))
    assert np.array_equal(decode_picture(data[:-2] + b"\0" * 200).pixels, decode_picture(data).pixels)


def test_a_progressive_jpeg_needs_all_its_scans():
    """Every scan but the last one is there: the picture is blurred, and nothing in it is missing."""
    data = of("progressive")
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    with pytest.raises(PictureError, match="truncated"):
        decode_picture(data[: scans[-1]])
    Image.open(io.BytesIO(data[: scans[-1]] + b"\xff\xd9")).load()  # a decoder would show it


@pytest.mark.parametrize("colour, pixel", [(0, b"\x40"), (2, b"\xc8\x32\x32"), (6, b"\xc8\x32\x32\xff"), (3, b"\1")])
def test_png_that_ends_in_its_pixels(colour, pixel):
    rows = 100
    palette = bytes((1, 2, 3, 200, 50, 50)) if colour == 3 else b""
    data = flat_png(50, rows, 8, colour, pixel, palette=palette)
    place = data.index(b"IDAT")
    whole = decode_picture(data).pixels
    end = len(data) - 12 - 4  # before IEND and the checksum of IDAT
    assert np.array_equal(decode_picture(data[: end - 4]).pixels, whole)  # before the checksum of zlib
    with pytest.raises(PictureError):
        decode_picture(data[: place + 6])


def test_an_interlaced_png_that_ends_early():
    data = encoded(PICTURE)
    raw = np.asarray(PICTURE)
    passes = b""
    for x, y, dx, dy in ADAM7:
        passes += b"".join(b"\0" + row.tobytes() for row in raw[y::dy, x::dx])
    head = bytearray(data[8:33])
    body = bytes(head[8:20]) + b"\1"
    chunks = (b"IHDR", body), (b"IDAT", zlib.compress(passes)), (b"IEND", b"")
    data = data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)
    assert np.array_equal(decode_picture(data).pixels, raw)
    cut = decode_picture(data[:-40]).pixels
    assert (cut != raw).any(axis=-1).mean() <= 0.02


def test_damage_in_the_middle_is_refused_where_the_decoder_tells():
    """The checksums of PNG are of every byte."""
    whole = of("png")
    start, end = whole.index(b"IDAT") + 4, len(whole) - 16
    for place in np.linspace(start, end - 1, 60).astype(int):
        data = bytearray(whole)
        data[place] ^= 0x55
        with pytest.raises(PictureError, match="truncated or damaged"):
            decode_picture(bytes(data))
