"""Formats, frames and sizes; those of HEIC and JPEG XL need the packages of the extra `formats`."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from picture_files import encoded, flat_png, photo, png, png_chunk
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.picture import FORMATS, OPTIONAL, SUFFIXES, decode_picture
from gog_edge.picture.headers import jxl_size
from gog_edge.types import Box, Size

RED, BLUE = (255, 0, 0), (0, 0, 255)
CLEAR, WHITE = (0, 0, 0, 0), [255, 255, 255]


def heif(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=95, **options)
    return stream.getvalue()


def jxl(image, **options):
    pytest.importorskip("pillow_jxl")
    return encoded(image, "JXL", **options)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_read(form):
    picture = decode_picture(encoded(photo(), form))
    assert picture.size == Size(96, 64)
    assert np.abs(picture.pixels.astype(int) - np.asarray(photo())).mean() < (40 if form == "GIF" else 6)


@pytest.mark.parametrize("write", [heif, jxl])
def test_formats_of_other_packages(write):
    picture = decode_picture(write(photo()))
    assert np.abs(picture.pixels.astype(int) - np.asarray(photo())).mean() < 6


def test_every_suffix_is_of_a_format():
    known = Image.registered_extensions()
    optional = {suffix for one in OPTIONAL.values() for suffix in one.suffixes}
    for suffix in SUFFIXES:
        assert suffix in optional or known.get(suffix) in (*FORMATS, "MPO", "DIB"), suffix


MISSING = """
import sys
sys.modules["pillow_heif"] = sys.modules["pillow_jxl"] = None  # as if they were not installed
from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture
try:
    decode_picture(bytes.fromhex(sys.argv[1]))
except PictureError as exc:
    print(exc)
"""


@pytest.mark.parametrize("write, name", [(heif, "HEIC"), (jxl, "JPEG XL")])
def test_without_its_package_a_format_is_refused_with_what_to_install(write, name):
    done = subprocess.run([sys.executable, "-c", MISSING, write(Image.new("RGB", (16, 16), RED)).hex()],
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert f"is a {name} file" in done.stdout and "pip install 'gog_edge[formats]'" in done.stdout


LOADED = """
import io, sys
import gog_edge.picture
from PIL import Image
before = set(sys.modules)
assert not {"pillow_heif", "pillow_jxl", "PIL.ImageCms"} & before, before
stream = io.BytesIO()
Image.new("RGB", (9, 9)).save(stream, "JPEG")
gog_edge.picture.decode_picture(stream.getvalue())
assert not {"pillow_heif", "pillow_jxl", "PIL.ImageCms"} & set(sys.modules)
"""


def test_packages_of_other_formats_are_loaded_for_such_a_file_only():
    subprocess.run([sys.executable, "-c", LOADED], timeout=60, check=True)


def test_further_formats_must_be_asked_for():
    data = encoded(photo(), "PPM")
    with pytest.raises(PictureError, match="not a JPEG"):
        decode_picture(data)
    assert np.array_equal(decode_picture(data, formats=(*FORMATS, "PPM")).pixels, np.asarray(photo()))


@pytest.mark.parametrize("data", [
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?>\n<!-- drawn --><svg/>",
])  # fmt: skip
def test_a_drawing_is_named(data):
    with pytest.raises(PictureError, match="but an SVG drawing; send one of these"):
        decode_picture(data)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (300, 256), (1000, 600), (70_000, 3), (16, 12), (264, 200)])
def test_the_size_of_jpeg_xl_is_read_before_it_is_decoded(size):
    for container in (False, True):
        assert jxl_size(jxl(Image.new("RGB", size, RED), use_container=container, effort=1)) == size


def test_a_large_jpeg_xl_is_refused_by_its_header():
    """2^30 x 2^30 pixels: 0, then 3 and 30 bits for the height, no ratio, 3 and 30 bits for the width."""
    bits = sum(value << place for value, place in ((3, 1), (2**30 - 1, 3), (0, 33), (3, 36), (2**30 - 1, 38)))
    with pytest.raises(PictureError, match="the limit is 64000000"):
        decode_picture(b"\xff\x0a" + bits.to_bytes(14, "little"))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "JPEG"])
def test_sides_of_zero_are_refused(form):
    data = bytearray(encoded(Image.new("RGB", (3, 3), RED), form))
    places = {"PNG": 16, "BMP": 18}
    if form in places:
        data[places[form] : places[form] + 4] = bytes(4)
    elif form == "JPEG":
        start = data.index(b"\xff\xc0")
        data[start + 7 : start + 9] = b"\0\0"
    else:
        start = data.index(struct.pack("<HHII", 256, 4, 1, 3) if struct.pack("<HHII", 256, 4, 1, 3) in data
                           else struct.pack("<HHI", 256, 3, 1))
        data[start + 8 : start + 12] = b"\0" * 4
    with pytest.raises(PictureError):
        decode_picture(bytes(data))


@pytest.mark.parametrize("form, options", [
    ("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("PNG", {}), ("JPEG2000", {}),
    ("WEBP", {"lossless": True}), ("TIFF", {}),
])  # fmt: skip
@pytest.mark.parametrize("size", [(1001, 701), (1000, 700)])
def test_large_pictures_are_reduced_with_boxes_of_the_file(form, options, size):
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (600, 300, *size))
    picture = decode_picture(encoded(image, form, **options), decoded_pixels=200_000)
    assert picture.size == Size(*size) and picture.resolution == Size((size[0] + 1) // 2, (size[1] + 1) // 2)
    assert np.abs(picture.crop(Box(610, 310, 900, 600)).astype(int) - BLUE).max() < 8
    assert np.abs(picture.crop(Box(10, 10, 590, 290)).astype(int) - RED).max() < 8
    assert max(picture.crop(Box(600, 300, 602, 302)).shape[:2]) <= 2
    assert picture.crop(Box(0, 0, *size)).shape == picture.pixels.shape


def test_the_reduced_picture_is_the_mean():
    whole = np.asarray(photo(90, 60), float)
    picture = decode_picture(encoded(photo(90, 60)), decoded_pixels=600)
    assert picture.resolution == Size(30, 20)
    assert np.abs(picture.pixels - whole.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_pictures_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_picture(encoded(photo(800, 600), "JPEG", exif=exif), decoded_pixels=120_000)
    expected = (800, 600) if orientation < 5 else (600, 800)
    assert (picture.size.width, picture.size.height) == expected
    assert (picture.resolution.width, picture.resolution.height) == (expected[0] // 2, expected[1] // 2)


@pytest.mark.parametrize("form, write", [("AVIF", None), ("HEIF", heif), ("JXL", jxl)])
def test_orientation_is_applied_once(form, write):
    """AVIF and HEIC have boxes for it; the EXIF data of JPEG XL are for information."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = write(image, exif=exif.tobytes()) if write else encoded(image, form, exif=exif, quality=95)
    pixels = decode_picture(data).pixels.astype(int)
    if form == "JXL":
        assert pixels.shape == (32, 64, 3)
        return
    assert pixels.shape == (64, 32, 3)
    assert np.abs(pixels[8, 16] - RED).max() < 12 and np.abs(pixels[56, 16] - BLUE).max() < 12


# --- frames ---------------------------------------------------------------------------------------


def animation(form, colours, **options):
    frames = [Image.new("RGBA", (8, 8), colour) for colour in colours]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)


@pytest.mark.parametrize("form, options", [("WEBP", {"lossless": True}), ("PNG", {}), ("GIF", {"disposal": 2})])
def test_of_an_animation_the_first_frame_with_anything_in_it_is_taken(form, options):
    data = animation(form, [CLEAR, CLEAR, (*RED, 255), (*BLUE, 255)], **options)
    assert decode_picture(data).pixels[4, 4].tolist() == list(RED)
    assert decode_picture(animation(form, [(*BLUE, 255), (*RED, 255)], **options)).pixels[4, 4].tolist() == list(BLUE)


def test_an_animation_without_anything_in_it_is_white():
    for form, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        frames = [Image.new("RGBA", (8, 8), (n, 0, 0, 0)) for n in range(3)]
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
        assert decode_picture(data).pixels[4, 4].tolist() == WHITE


def test_a_frame_can_be_asked_for():
    data = animation("WEBP", [(*RED, 255), (*BLUE, 255)], lossless=True)
    assert decode_picture(data, frame=1).pixels[0, 0].tolist() == list(BLUE)
    with pytest.raises(PictureError, match="frame 2"):
        decode_picture(data, frame=2)


def test_the_first_frame_of_a_gif_that_covers_a_part():
    """Browsers show the rest of the screen as transparent."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    data = bytearray(encoded(image, "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    place = data.index(b"\x2c\0\0\0\0")
    data[place + 1 : place + 5] = struct.pack("<HH", 2, 3)
    pixels = decode_picture(bytes(data)).pixels
    assert pixels[3:7, 2:6].reshape(-1, 3).tolist() == [list(RED)] * 16
    assert pixels[0, 0].tolist() == pixels[7, 7].tolist() == WHITE


def test_blank_frames_of_a_large_animation_are_not_searched():
    frames = [Image.new("RGBA", (5000, 5000), CLEAR), Image.new("RGBA", (5000, 5000), (*RED, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    assert decode_picture(data).pixels[0, 0].tolist() == WHITE


# --- what is made to exhaust a decoder ------------------------------------------------------------


def test_text_and_profiles_that_unpack_to_much_are_refused_or_left_out():
    bomb = zlib.compress(b"\0" * 2**28, 9)
    for name, body in ((b"zTXt", b"k\0\0" + bomb), (b"iCCP", b"p\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)):
        for place in ("before", "after"):
            try:
                picture = decode_picture(flat_png(8, 8, 8, 2, bytes(RED), **{place: [(name, body)]}))
            except PictureError:
                continue
            assert picture.pixels[0, 0].tolist() == list(RED)


def test_pixels_that_unpack_to_more_than_declared():
    data = png(8, 8, 8, 2, bytes(RED) * 8)
    place = data.index(b"IDAT") - 4
    data = data[:place] + png_chunk(b"IDAT", zlib.compress(b"\0" * 2**28, 9)) + png_chunk(b"IEND", b"")
    assert decode_picture(data).size == Size(8, 8)
