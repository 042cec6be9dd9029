"""Peak memory of decoding the largest pictures that are accepted, each in a process of its own, against the plan."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from picture_files import flat_png, tiff
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.picture import DECODED_PIXELS, MAX_PIXELS, decode_picture, decoding_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="requires Linux")
SIDE = 8000  # SIDE * SIDE is MAX_PIXELS
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
MEASURE = """
import sys
from pathlib import Path
from PIL import Image, ImageCms
from gog_edge.picture import decode_picture
import gog_edge.picture.samples, gog_edge.picture.icc, gog_edge.picture.tails

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

Image.init()
data = Path(sys.argv[1]).read_bytes()
before = peak()
picture = decode_picture(data)
print(peak() - before, picture.resolution.width, picture.resolution.height)
"""


def of(mode, form, *, side=SIDE, **options):
    def write(path):
        colour = {"L": 90, "CMYK": (10, 200, 180, 20), "RGBA": (200, 50, 50, 128)}.get(mode, (200, 50, 50))
        Image.new(mode, (side, side), colour).save(path, form, **options)

    return write


def png(depth, colour, pixel, **parts):
    return lambda path: path.write_bytes(flat_png(SIDE, SIDE, depth, colour, pixel, **parts))


def one_strip(height):
    """Of a TIFF file: libtiff decompresses it as a whole."""
    return lambda path: path.write_bytes(tiff(np.full((height, SIDE, 3), 90, np.uint8), 2, deflate=True))


def deep(dtype, channels):
    """Samples of 16 or 32 bits, compressed: 24 million pixels."""
    def write(path):
        white = 1 if np.dtype(dtype).kind == "f" else 60_000
        samples = np.full((4000, 6000, channels), white, dtype)
        path.write_bytes(tiff(samples, 2 if channels > 1 else 1, deflate=True, tile=(6000, 400)))

    return write


def side(a_pixel):
    """The side of a square picture that just fits the limit, at so many bytes a pixel and a result of half the side."""
    return int((decoding_bytes(MAX_PIXELS, DECODED_PIXELS) / (a_pixel + 0.75)) ** 0.5)


FILES = {
    "jpeg": of("RGB", "JPEG"), "progressive jpeg": of("RGB", "JPEG", progressive=True), "cmyk jpeg": of("CMYK", "JPEG"),
    "progressive jpeg, 4:4:4": of("RGB", "JPEG", progressive=True, subsampling=0, side=side(7)),
    "progressive cmyk jpeg": of("CMYK", "JPEG", progressive=True, side=side(9)),
    "rotated jpeg": of("RGB", "JPEG", exif=ROTATED),
    "rotated tiff": of("RGB", "TIFF", exif=ROTATED, compression="tiff_deflate", side=6000),
    "png": png(8, 2, b"\xc8\x32\x32"), "png with alpha": png(8, 6, b"\xc8\x32\x32\x80"),
    "16-bit png": png(16, 2, b"\xc8\x32\x32\x80\x12\x34"),
    "16-bit grey png": png(16, 0, b"\xc8\x32"), "tiff": of("RGB", "TIFF", compression="tiff_deflate"),
    "tiff of one strip": one_strip(side(7) ** 2 // SIDE),
    "cmyk tiff": of("CMYK", "TIFF", compression="tiff_deflate"), "gif": of("L", "GIF"),
    "webp": of("RGB", "WEBP", side=side(16.5), quality=20, method=0),
    "webp with alpha": of("RGBA", "WEBP", side=side(16.5), quality=20, method=0),
    "avif": of("RGB", "AVIF", side=side(9.5), speed=10), "jpeg 2000": of("RGB", "JPEG2000", side=6000),
    "16-bit tiff": deep("u2", 3), "floating-point tiff": deep("f4", 3), "floating-point grey tiff": deep("f4", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_decoding_stays_within_the_plan(name, tmp_path):
    path = tmp_path / "picture"
    FILES[name](path)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    used, width, height = map(int, done.stdout.split())
    assert used <= decoding_bytes(MAX_PIXELS, DECODED_PIXELS)
    assert width * height <= DECODED_PIXELS


@pytest.mark.parametrize("form", ["WEBP", "AVIF"])
def test_a_format_that_takes_more_memory_is_refused_with_the_reason(form, tmp_path):
    of("RGB", form, side=3000)(tmp_path / "picture")
    with pytest.raises(PictureError, match=rf"3000 x 3000 pixels in the format {form} takes .* MiB, the limit is"):
        decode_picture((tmp_path / "picture").read_bytes(), max_pixels=9_000_000, decoded_pixels=1_000_000)


def test_a_small_limit_is_a_small_plan():
    assert decoding_bytes(1_000_000, DECODED_PIXELS) == 5_500_000 + 3_000_000 + 16 * 2**20
