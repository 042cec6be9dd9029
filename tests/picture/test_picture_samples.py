"""TIFF and BMP files in the layouts of samples that their specifications allow, written byte by byte."""

import numpy as np
import pytest
from picture_files import bmp, encoded, flat_png, srgb_of_lab, tiff
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture
from gog_edge.types import Size

HEIGHT, WIDTH = 20, 30
GREY, RGB, CMYK = 1, 2, 5
LEVELS = np.random.default_rng(5).random((HEIGHT, WIDTH, 3))  # 0 to 1
LEVELS[0, :2] = [[0, 0, 0], [1, 1, 1]]
SHOWN = np.rint(LEVELS * 255)
DTYPES = ["u2", "u4", "f2", "f4", "f8", "i2", "i4"]


def samples(levels, dtype):
    """Samples of which the largest value is white."""
    kind = np.dtype(dtype)
    return levels.astype(kind) if kind.kind == "f" else np.rint(levels * float(np.iinfo(kind).max)).astype(kind)


def assert_pixels(data, expected, tolerance=1):
    pixels = decode_picture(data).pixels.astype(int)
    assert np.abs(pixels - expected).max() <= tolerance


# --- TIFF: layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u2", "f2", "f4", "f8", "u4", "i2", "i4"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_every_type(dtype, order):
    assert_pixels(tiff(samples(LEVELS, dtype), RGB, order=order), SHOWN)


@pytest.mark.parametrize("dtype", ["u2", "f2", "f4", "f8", "i2", "i4"])
def test_grey_of_every_type(dtype):
    data = tiff(samples(LEVELS[:, :, :1], dtype), GREY)
    assert_pixels(data, SHOWN[:, :, :1])
    assert_pixels(tiff(samples(LEVELS[:, :, :1], dtype), 0), 255 - SHOWN[:, :, :1])  # MinIsWhite


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("options", [
    {"tile": (16, 16)}, {"separate": True}, {"predictor": 2}, {"deflate": True}, {"deflate": True, "predictor": 2},
    {"tile": (16, 16), "predictor": 2, "deflate": True}, {"separate": True, "deflate": True, "predictor": 2},
    {"tile": (16, 16), "separate": True}, {"tile": (32, 16), "separate": True, "order": ">", "deflate": True},
], ids=str)  # fmt: skip
def test_layouts(dtype, options):
    if dtype == "f4" and options.get("predictor") == 2:
        options = options | {"predictor": 3}
    if "predictor" in options and not options.get("deflate"):
        options = options | {"deflate": True}
    assert_pixels(tiff(samples(LEVELS, dtype), RGB, **options), SHOWN)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"separate": True}, {"order": ">"}], ids=str)
def test_the_predictor_of_floating_point(dtype, options):
    assert_pixels(tiff(samples(LEVELS, dtype), RGB, predictor=3, deflate=True, **options), SHOWN)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", None])
def test_what_libtiff_writes(compression):
    grey = samples(LEVELS[:, :, 0], "u2")
    assert_pixels(encoded(Image.fromarray(grey), "TIFF", compression=compression), SHOWN[:, :, :1])


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_alpha(dtype):
    """On white: straight (2), and multiplied into the colours (1); unspecified (0) is no alpha."""
    alpha = np.linspace(0.2, 1, HEIGHT)[:, None, None] * np.ones((1, WIDTH, 1))
    on_white = np.rint(255 * (LEVELS * alpha + 1 - alpha))
    assert_pixels(tiff(samples(np.concatenate([LEVELS, alpha], -1), dtype), RGB, extra=2), on_white, 2)
    assert_pixels(tiff(samples(np.concatenate([LEVELS * alpha, alpha], -1), dtype), RGB, extra=1), on_white, 3)
    assert_pixels(tiff(samples(np.concatenate([LEVELS, alpha], -1), dtype), RGB, extra=0), SHOWN)
    grey = samples(np.concatenate([LEVELS[:, :, :1], alpha], -1), dtype)
    assert_pixels(tiff(grey, GREY, extra=2), on_white[:, :, :1], 2)


def test_inks_of_16_bits():
    inks = np.concatenate([LEVELS, LEVELS[:, :, :1] / 2], axis=-1)
    expected = 255 * (1 - inks[:, :, :3]) * (1 - inks[:, :, 3:])
    assert_pixels(tiff(samples(inks, "u2"), CMYK), expected, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_orientation(orientation, dtype):
    stored = samples(LEVELS, "u2") if dtype == "u2" else SHOWN.astype(np.uint8)
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
               6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}[orientation]
    picture = decode_picture(tiff(stored, RGB, fields=[(274, 3, [orientation])]))
    expected = upright(SHOWN)
    assert picture.size == Size(expected.shape[1], expected.shape[0])
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 1


def test_pages():
    data = tiff(samples(LEVELS, "u2"), RGB, pages=2)
    assert np.array_equal(decode_picture(data, frame=1).pixels, decode_picture(data).pixels)
    with pytest.raises(PictureError, match="no page or frame 2"):
        decode_picture(data, frame=2)


# --- TIFF: ranges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("channels, photometric", [(1, GREY), (3, RGB)])
def test_fewer_bits_in_16(bits, channels, photometric):
    stored = np.rint(LEVELS[:, :, :channels] * (2**bits - 1)).astype(np.uint16)
    assert_pixels(tiff(stored, photometric), SHOWN[:, :, :channels])


@pytest.mark.parametrize("top, shown", [(1, 255), (200, 200), (4095, 255), (65535, 255)])
def test_whole_numbers_of_32_bits(top, shown):
    stored = np.zeros((8, 8, 1), np.int32)
    stored[4:] = top
    pixels = decode_picture(tiff(stored, GREY)).pixels
    assert (pixels[:4] == 0).all() and (pixels[4:] == shown).all()


@pytest.mark.parametrize("values, shown", [
    ((0.0, 0.25, 1.0), (0, 64, 255)), ((0.0, 0.5, 1.2), (0, 128, 255)), ((0.1, 0.5, 9.0), (26, 128, 255)),
    ((0.0, 100.0, 255.0), (0, 100, 255)), ((2.0, 90.0, 200.0), (2, 90, 200)), ((0.0, 32768.0, 65535.0), (0, 128, 255)),
    ((-3.0, 0.5, 1.0), (0, 128, 255)), ((float("nan"), 0.5, float("inf")), (0, 128, 255)),
    ((float("-inf"), 0.0, 0.0), (0, 0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("channels, photometric", [(1, GREY), (3, RGB)])
def test_ranges_of_floating_point(values, shown, channels, photometric):
    stored = np.repeat(np.array(values, np.float32), 4)[None, :, None] * np.ones((6, 1, channels), np.float32)
    expected = np.repeat(np.array(shown), 4)[None, :, None]
    assert_pixels(tiff(stored, photometric), expected)


def test_many_highlights_in_the_dark():
    """Half of the light is above white: less than HDR pictures have below it."""
    stored = np.full((10, 10, 3), 0.3, np.float32)
    stored[:4] = 40.0
    pixels = decode_picture(tiff(stored, RGB)).pixels
    assert (pixels[:4] == 255).all() and (pixels[4:] == 76).all()


def test_lab_of_8_bits():
    stored = np.full((4, 4, 3), (150, 30, 256 - 40), np.uint8)  # a and b are signed
    expected = srgb_of_lab(150 / 255 * 100, 30, -40)
    assert_pixels(tiff(stored, 8), expected, 2)


LAB_8, LAB_16, ICC_16 = (150, 30, 256 - 40), (150 * 257, 30 * 256, 65536 - 40 * 256), (150 * 256, 158 * 256, 88 * 256)


@pytest.mark.parametrize(("photometric", "stored", "dtype"), [
    (8, LAB_16, "u2"), (9, (150, 158, 88), "u1"), (9, ICC_16, "u2"), (8, (*LAB_8, 255), "u1"),
    (8, (*LAB_16, 65535), "u2"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"order": ">"}, {"separate": True, "deflate": True}], ids=str)
def test_lab_of_16_bits_in_the_encoding_of_icc_and_with_alpha(photometric, stored, dtype, options):
    values = np.full((4, 4, len(stored)), stored, dtype)
    data = tiff(values, photometric, extra=2 if len(stored) > 3 else None, **options)
    assert_pixels(data, srgb_of_lab(150 / 255 * 100, 30, -40), 3)


def test_cmyk_of_8_bits_with_alpha():
    assert_pixels(tiff(np.full((4, 4, 5), (0, 255, 255, 0, 255), np.uint8), CMYK, extra=2), (255, 0, 0), 0)
    assert_pixels(tiff(np.full((4, 4, 5), (0, 255, 255, 0, 0), np.uint8), CMYK, extra=2), (255, 255, 255), 0)


@pytest.mark.parametrize(("data", "name"), [
    (tiff(np.full((4, 4, 3), 1.0, np.float32), 8), "TIFF"), (tiff(LEVELS.astype("u1"), RGB)[:-9], "TIFF"),
    (encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True)[:24], "WebP"),
], ids=["lab of floating point", "directory that is cut off", "header only"])  # fmt: skip
def test_a_known_format_that_is_not_read_is_named(data, name):
    with pytest.raises(PictureError, match=f"the {name} picture is truncated or damaged, or of a kind that is not"):
        decode_picture(data)


@pytest.mark.parametrize("photometric, shown", [(0, 255), (1, 0)])
def test_one_bit_and_eight_bits(photometric, shown):
    assert_pixels(tiff(np.zeros((8, 8, 1), np.uint8), photometric), shown, 0)
    image = Image.new("1", (16, 8), 0 if photometric == 1 else 1)
    assert_pixels(encoded(image, "TIFF"), 0 if photometric == 1 else 255, 0)


@pytest.mark.parametrize("damage", [
    {256: 0}, {256: 2**31}, {257: 2**31}, {258: 48}, {259: 7}, {277: 9}, {273: 10**6}, {279: 0}, {339: 9}, {284: 7},
], ids=str)  # fmt: skip
def test_fields_that_cannot_be(damage):
    [(tag, value)] = damage.items()
    fields = [(tag, 4, [value])]
    for stored in (samples(LEVELS, "u2"), samples(LEVELS, "f4")):
        try:
            decode_picture(tiff(stored, RGB, fields=fields))
        except PictureError:
            continue


# --- BMP ------------------------------------------------------------------------------------------

MASKS_4444, MASKS_5551 = (0xF00, 0xF0, 0xF, 0xF000), (0x7C00, 0x3E0, 0x1F, 0x8000)
MASKS_8888 = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)


def word(value, size=2):
    return value.to_bytes(size, "little")


@pytest.mark.parametrize("data, shown", [
    (bmp(word(0xFA50), 16, MASKS_4444), (170, 85, 0)),
    (bmp(word(0x8A50), 16, MASKS_4444), (210, 164, 119)),  # 8 of 15 opaque: 170 * 8 / 15 + 255 * 7 / 15
    (bmp(word(0x0A50), 16, MASKS_4444), (170, 85, 0)),  # alpha is zero everywhere: not used
    (bmp(word(0xFA50), 16, MASKS_4444[:3], header=40), (170, 85, 0)),
    (bmp(word(0x8A50), 16, MASKS_4444, header=40, compression=6), (210, 164, 119)),
    (bmp(word(0x8A50), 16, MASKS_4444, header=56), (210, 164, 119)),
    (bmp(word(0xFC10), 16, MASKS_5551), (255, 0, 132)),
    (bmp(word(0x7C10), 16, MASKS_5551), (255, 0, 132)),
    (bmp(word(0xF810), 16, (0xF800, 0x7E0, 0x1F), header=40), (255, 0, 132)),
    (bmp(bytes((10, 20, 200, 128)), 32, MASKS_8888), (227, 137, 132)),
    (bmp(bytes((10, 20, 200, 0)), 32, MASKS_8888), (200, 20, 10)),
    (bmp(word(1023 << 20 | 512 << 10 | 100, 4), 32, (0x3FF00000, 0xFFC00, 0x3FF, 0)), (255, 128, 25)),
    (bmp(word(0x7C10), 16, (), header=40, compression=0), (255, 0, 132)),
    (bmp(bytes((10, 20, 200, 0)), 32, (), header=40, compression=0), (200, 20, 10)),
    (bmp(bytes((10, 20, 200)), 24, (), header=40, compression=0), (200, 20, 10)),
])  # fmt: skip
def test_bitmaps_with_masks(data, shown):
    """The colours are also what Chromium shows."""
    assert_pixels(data, shown)


def test_rows_of_bitmaps_begin_at_the_foot_or_the_head():
    red, blue = word(0xFF00) * 2, word(0xF00F) * 2
    for height in (2, -2):
        data = bmp(word(0), 16, MASKS_4444, width=2, height=height)[:-8] + red + blue
        top = decode_picture(data).pixels[0, 0].tolist()
        assert top == ([0, 0, 255] if height > 0 else [255, 0, 0])


def test_bitmaps_with_masks_that_cannot_be():
    for masks in ((0, 0, 0, 0), (0xFF, 0xFF, 0xFF, 0xFF), (0xF0F, 0x1, 0x80000000, 0)):
        for bits, pixel in ((16, b"ab"), (32, b"abcd")):
            try:
                decode_picture(bmp(pixel, bits, masks))
            except PictureError:
                continue


# --- PNG of 16 bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("colour, pixel, shown", [
    (0, b"\x80\xff", (128, 128, 128)), (2, b"\x12\x34\x80\x00\xff\xff", (18, 128, 255)),
    (4, b"\x80\x00\xff\xff", (128, 128, 128)), (4, b"\x80\x00\x00\x00", (255, 255, 255)),
    (6, b"\xff\xff\x00\x00\x00\x00\x80\x00", (255, 127, 127)),
])  # fmt: skip
def test_png_of_16_bits(colour, pixel, shown):
    assert_pixels(flat_png(8, 8, 16, colour, pixel), shown)
