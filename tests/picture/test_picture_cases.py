"""Files on which decoders differ, with the right pixels as their format defines them or browsers show them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_files import srgb_of_lab
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture
from gog_edge.types import Size

FILES = Path(__file__).parent.parent / "data" / "pictures"
RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
PHOTOGRAPHS = {"no_eoi.jpg", "trailing_garbage.jpg"}
REFUSED = {
    "progressive_cut.jpg": "truncated",  # a quarter of the bytes: two thirds of the last scan
    "svg.svg": "SVG",
}
COLOURS = {  # every pixel of the file
    "60000x1.png": RED,
    "8000x8000.png": WHITE,
    # The pixels of IDAT are red, but fcTL comes after them: they are not a frame of the animation, which is blue.
    "apng_default_red_anim_blue.png": BLUE,
    "cmyk_red.jpg": RED,
    "cmyk_red.tif": RED,
    # The first frame is transparent everywhere; the second, 50 ms later, is red.
    "gif_first_frame_blank.gif": RED,
    "one_pixel.png": RED,
    "png_grey16_trns_0.png": WHITE,  # transparent
    "png_grey8_trns_0.png": WHITE,
    "png_la16_transparent.png": WHITE,
    "png_rgb16_trns_0.png": WHITE,
    "png_rgba16.png": (255, 127, 127),  # red, 32768 of 65535 opaque: 127 of the white
    "tiff16_12bit_data_4000of4095.tif": (249, 249, 249),  # 255 * 4000 / 4095
    "tiff16_minisblack_0.tif": BLACK,
    "tiff16_miniswhite_0.tif": WHITE,
    "tiff8_miniswhite_0.tif": WHITE,
    "tiff_float_1.tif": WHITE,
    "tiff_float_half.tif": (128, 128, 128),
    "tiff_int32_200.tif": (200, 200, 200),
    "tiff_lab_red.tif": tuple(srgb_of_lab(138 / 255 * 100, 81, 70)),
}  # fmt: skip
OTHERS = {"tiff_float_hdr_1.2.tif"}


def read(name):
    return (FILES / name).read_bytes()


def test_every_file_has_its_outcome():
    assert {path.name for path in FILES.iterdir()} == {*COLOURS, *PHOTOGRAPHS, *REFUSED, *OTHERS}


@pytest.mark.parametrize("name", COLOURS)
def test_colour(name):
    pixels = decode_picture(read(name)).pixels
    assert np.abs(pixels.astype(int) - COLOURS[name]).max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(PictureError, match=REFUSED[name]):
        decode_picture(read(name))


@pytest.mark.parametrize("name, sample", [
    ("tiff16_minisblack_0.tif", 0), ("tiff16_miniswhite_0.tif", 0), ("tiff16_12bit_data_4000of4095.tif", 4000),
    ("tiff_int32_200.tif", 200), ("tiff_float_half.tif", 0.5), ("tiff_float_1.tif", 1.0),
])  # fmt: skip
def test_the_samples_are_what_the_colours_say(name, sample):
    """Read from the strip of the file by hand."""
    data = read(name)
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = (struct.unpack_from("<HHII", data, start + 2 + 12 * n) for n in range(count))
    fields = {tag: value for tag, _, _, value in entries}
    form = {1: {16: "<u2"}, 2: {32: "<i4"}, 3: {32: "<f4"}}[fields.get(339, 1)][fields[258]]
    strip = np.frombuffer(data[fields[273] : fields[273] + fields[279]], form)
    assert (strip == sample).all() and len(strip) == fields[256] * fields[257]
    assert fields[262] == (0 if "miniswhite" in name else 1)


def test_the_16_bit_red_is_half_opaque():
    data = read("png_rgba16.png")
    place = data.index(b"IDAT")
    size = struct.unpack_from(">I", data, place - 4)[0]
    assert struct.unpack_from(">4H", zlib.decompress(data[place + 4 : place + 4 + size]), 1) == (65535, 0, 0, 32768)


def test_light_above_white_is_white():
    pixels = decode_picture(read("tiff_float_hdr_1.2.tif")).pixels
    assert (pixels[:4] == 128).all() and (pixels[4:] == 255).all()  # 0.5, then 1.2


def test_a_jpeg_without_its_end_mark_has_all_its_pixels():
    whole = read("no_eoi.jpg") + b"\xff\xd9"
    expected = np.asarray(Image.open(io.BytesIO(whole)))
    assert np.array_equal(decode_picture(read("no_eoi.jpg")).pixels, expected)
    assert np.array_equal(decode_picture(read("trailing_garbage.jpg")).pixels, expected)


@pytest.mark.parametrize("name, size, shape", [
    ("8000x8000.png", Size(8000, 8000), (4000, 4000, 3)),  # reduced, with boxes in pixels of the file
    ("60000x1.png", Size(60000, 1), (1, 60000, 3)),
    ("one_pixel.png", Size(1, 1), (1, 1, 3)),
])  # fmt: skip
def test_sizes(name, size, shape):
    picture = decode_picture(read(name))
    assert picture.size == size and picture.pixels.shape == shape
