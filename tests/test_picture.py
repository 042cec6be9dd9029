"""Whatever arrives becomes a right picture or a clear PictureError."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture
from gog_edge.types import Box, Size

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def two_halves(width=40, height=20):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def assert_halves(picture, tolerance=40):
    height, width, _ = picture.pixels.shape
    left, right = picture.pixels[height // 2, width // 4], picture.pixels[height // 2, 3 * width // 4]
    assert np.abs(left.astype(int) - RED).max() <= tolerance
    assert np.abs(right.astype(int) - BLUE).max() <= tolerance


def hollow_png(width, height):
    """A PNG that says how large it is and holds hardly anything."""

    def chunk(body):
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"\0")) + chunk(b"IEND")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read(fmt):
    picture = decode_picture(encoded(two_halves(), fmt))
    assert picture.size == Size(40, 20)
    assert picture.pixels.dtype == np.uint8
    assert_halves(picture)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
        (b"%PDF-1.7 not a picture", "not a JPEG"),
        (b"\x89PNG\r\n\x1a\n", "not a JPEG"),
        (b"\xff\xd8\xff", "not a JPEG"),
        (encoded(two_halves(), "PPM"), "not a JPEG"),
        (encoded(two_halves(), "ICO"), "not a JPEG"),
        (hollow_png(20, 20), "damaged"),
    ],
)
def test_what_is_no_picture_is_refused(data, words):
    with pytest.raises(PictureError, match=words):
        decode_picture(data)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(fmt):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, fmt)
    with pytest.raises(PictureError):
        decode_picture(data[: len(data) // 2])


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(PictureError, match="60000 x 60000.*limit is 64000000"):
        decode_picture(hollow_png(60_000, 60_000))


def test_limits_are_the_callers():
    data = encoded(two_halves())
    with pytest.raises(PictureError, match="limit is 799"):
        decode_picture(data, max_pixels=799)
    with pytest.raises(PictureError, match=f"{len(data)} bytes"):
        decode_picture(data, max_bytes=len(data) - 1)
    with pytest.raises(PictureError, match="each side must have at least 21"):
        decode_picture(data, min_side=21)
    assert decode_picture(data, max_bytes=len(data), max_pixels=800, min_side=20).size == Size(40, 20)


def test_pillows_own_settings_are_as_before():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode_picture(encoded(two_halves()))
    with pytest.raises(PictureError):
        decode_picture(hollow_png(60_000, 60_000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_truncated_pictures_are_refused_even_where_pillow_was_told_to_load_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(PictureError):
        decode_picture(hollow_png(20, 20))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_cmyk_keeps_its_colours():
    assert_halves(decode_picture(encoded(two_halves().convert("CMYK"), "JPEG", quality=95)))
    assert_halves(decode_picture(encoded(two_halves().convert("CMYK"), "TIFF")))


def test_sixteen_bit_grey_keeps_its_brightness():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(1, 64).repeat(8, axis=0)
    pixels = decode_picture(encoded(Image.fromarray(ramp))).pixels
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, -1].tolist() == [255, 255, 255]
    assert abs(int(pixels[0, 32, 0]) - 129) <= 2


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 65535), (np.int32, 255), (np.float32, 1.0), (np.float32, 255)])
def test_wide_grey_of_tiff_keeps_its_brightness(dtype, top):
    ramp = np.linspace(0, top, 64).astype(dtype).reshape(1, 64).repeat(8, axis=0)
    pixels = decode_picture(encoded(Image.fromarray(ramp), "TIFF")).pixels
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] >= 254
    assert abs(int(pixels[0, 32, 0]) - 129) <= 2


def test_palette_grey_and_bits_become_rgb():
    assert_halves(decode_picture(encoded(two_halves().convert("P"))))
    assert decode_picture(encoded(Image.new("L", (3, 3), 77))).pixels[0, 0].tolist() == [77] * 3
    assert decode_picture(encoded(Image.new("1", (3, 3), 1))).pixels[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 0, 4, 4))
    pixels = decode_picture(encoded(image.convert(mode))).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 3].tolist() == [0, 0, 0]


def test_half_transparent_is_laid_on_white():
    pixels = decode_picture(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))).pixels
    assert np.abs(pixels[0, 0].astype(int) - (255, 127, 127)).max() <= 1


# What stands in the file, for each EXIF orientation, so that the upright picture has red left and blue right.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied_once(fmt, orientation):
    image = two_halves()
    image.paste((0, 255, 0), (0, 15, 40, 20))  # green at the foot: tells flips from turns
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_picture(encoded(stored, fmt, exif=exif))
    assert picture.size == Size(40, 20)
    assert np.argmax(picture.pixels[5, 5]) == 0
    assert np.argmax(picture.pixels[5, 35]) == 2
    assert np.argmax(picture.pixels[18, 20]) == 1


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(two_halves(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff junk")
    assert decode_picture(data).size == Size(40, 20)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(fmt):
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    pixels = decode_picture(encoded(frames[0], fmt, save_all=True, append_images=frames[1:])).pixels
    assert np.abs(pixels[4, 4].astype(int) - RED).max() < 10


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (20_000, 30)])
def test_extreme_shapes_are_pictures(size):
    assert decode_picture(encoded(Image.new("RGB", size, RED))).size == Size(*size)


def test_hash_is_of_the_pixels():
    plain = decode_picture(encoded(two_halves()))
    assert plain.sha256 == decode_picture(encoded(two_halves(), "BMP")).sha256
    assert plain.sha256 != decode_picture(encoded(two_halves(20, 40))).sha256
    flat = [decode_picture(encoded(Image.new("RGB", size))).sha256 for size in [(4, 2), (2, 4)]]
    assert flat[0] != flat[1]


def test_pixels_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        decode_picture(encoded(two_halves())).pixels[0, 0] = 0


def test_crop_takes_every_pixel_it_touches_and_clips():
    picture = decode_picture(encoded(two_halves()))
    assert picture.crop(Box(1.2, 2.9, 3.1, 4.0)).shape == (2, 3, 3)
    assert picture.crop(Box(-5, -5, 500, 500)).shape == (20, 40, 3)
    with pytest.raises(PictureError, match="no pixel"):
        picture.crop(Box(40, 0, 50, 10))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_never_raise_anything_else(fmt):
    chance = random.Random(7)
    whole = encoded(two_halves(), fmt)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            picture = decode_picture(bytes(data), max_pixels=1_000_000)
        except PictureError:
            continue
        assert picture.pixels.ndim == 3
