"""Whatever arrives becomes a picture or a PictureError, soon, and without further memory."""

import io
import random
import resource
import time

import numpy as np
import pytest
from picture_files import ADOBE_RGB, bmp, encoded, flat_png, matrix_icc, photo, tiff
from PIL import Image
from test_picture_cases import FILES

from gog_edge.errors import PictureError
from gog_edge.picture import FORMATS, decode_picture

ROUNDS = 120
MOST_SECONDS, MOST_BYTES = 2.0, 400 * 2**20
EXIF = Image.Exif()
EXIF[0x0112] = 6
DEEP = np.random.default_rng(1).random((24, 40, 3)).astype(np.float32)


def optional(form):
    if form == "HEIF":
        pillow_heif = pytest.importorskip("pillow_heif")
        stream = io.BytesIO()
        pillow_heif.from_pillow(photo()).save(stream)
        return stream.getvalue()
    pytest.importorskip("pillow_jxl")
    return encoded(photo(), form)


FRAMES = [photo().convert("RGBA").rotate(angle) for angle in (0, 40, 80)]
MADE = {
    **{form: encoded(photo(), form) for form in FORMATS},
    "jpeg with all": encoded(photo(), "JPEG", exif=EXIF, icc_profile=matrix_icc(ADOBE_RGB, 2.2)),
    "progressive": encoded(photo(), "JPEG", progressive=True), "cmyk": encoded(photo().convert("CMYK"), "JPEG"),
    "png with all": encoded(photo(), exif=EXIF, icc_profile=matrix_icc(ADOBE_RGB, 2.2)),
    "png 16": flat_png(9, 9, 16, 2, b"abcdef", transparent=b"abcdef"),
    "palette": encoded(photo().quantize(16), transparency=3),
    **{f"{form} frames": encoded(FRAMES[0], form, save_all=True, append_images=FRAMES[1:])
       for form in ("PNG", "WEBP", "GIF", "TIFF")},
    "lossless": encoded(photo(), "WEBP", lossless=True), "4444": bmp(b"\x50\x8a", 16, (0xF00, 0xF0, 0xF, 0xF000)),
    **{f"tiff {compression}": encoded(photo(), "TIFF", compression=compression)
       for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")},
    "float": tiff(DEEP, 2), "float tiles": tiff(DEEP, 2, tile=(16, 16), predictor=3, deflate=True),
    "planes": tiff((DEEP * 60_000).astype(np.uint16), 2, separate=True, deflate=True, predictor=2, order=">"),
}  # fmt: skip
SMALL = {path.name: path.read_bytes() for path in FILES.iterdir() if path.stat().st_size < 40_000}


def damaged(data, chance):
    """A copy with changed, missing or additional bytes, most of them near the beginning, where the headers are."""
    data = bytearray(data)
    kind = chance.random()
    if kind < 0.6:
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(min(len(data), chance.choice((64, 400, len(data)))))
            data[place] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
    elif kind < 0.7:
        del data[chance.randrange(len(data)) :]
    elif kind < 0.8:
        place = chance.randrange(len(data))
        del data[place : place + chance.randint(1, 20)]
    elif kind < 0.9:
        place = chance.randrange(len(data))
        data[place:place] = chance.randbytes(chance.randint(1, 20))
    else:
        place = chance.randrange(max(1, len(data) - 4))
        data[place : place + 4] = chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
    return bytes(data)


@pytest.mark.parametrize("name", [*MADE, *SMALL, "HEIF", "JXL"])
def test_damage(name):
    data = MADE.get(name) or SMALL.get(name) or optional(name)
    chance = random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(ROUNDS):
        started = time.process_time()
        try:
            picture = decode_picture(damaged(data, chance))
        except PictureError as exc:
            assert str(exc)
        else:
            assert picture.pixels.shape[2] == 3
        assert time.process_time() - started < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES
