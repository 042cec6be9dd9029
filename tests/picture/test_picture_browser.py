"""Pictures as a browser shows them: every pixel, with Chromium as the reference."""

import base64
import shutil

import numpy as np
import pytest
from picture_files import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    bmp,
    encoded,
    flat_png,
    matrix_icc,
    photo,
    png,
)
from PIL import Image
from test_picture_cases import FILES

from gog_edge.picture import decode_picture

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = ["--no-sandbox", "--force-color-profile=srgb"]
DRAW = """async ([data, type]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), image = new Image();
  image.src = URL.createObjectURL(new Blob([bytes], { type }));
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { colorSpace: "srgb" });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  const values = context.getImageData(0, 0, canvas.width, canvas.height).data, parts = [];
  for (let n = 0; n < values.length; n += 4096) parts.push(String.fromCharCode(...values.subarray(n, n + 4096)));
  return [canvas.width, canvas.height, btoa(parts.join(""))];
}"""
EXIF = Image.Exif()
EXIF[0x0112] = 6
PHOTO = photo(48, 32)
PROFILES = {"adobe": matrix_icc(ADOBE_RGB, 2.2), "prophoto": matrix_icc(PROPHOTO, 1.8),
            "p3": matrix_icc(DISPLAY_P3, 2.2)}  # fmt: skip
BEST = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"}}  # fmt: skip
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "AVIF": "image/avif", "GIF": "image/gif",
         "BMP": "image/bmp"}  # fmt: skip
SUFFIX = {".png": "PNG", ".jpg": "JPEG"}
# Not as in the browser, for these reasons.
OTHER = {
    "8000x8000.png": "too large for a canvas", "60000x1.png": "too large for a canvas",
    "no_eoi.jpg": "the last rows of blocks are left out", "progressive_cut.jpg": "shown with a part of its last scan",
}  # fmt: skip
PICTURES = {
    **{f"{name} {form}": (form, encoded(PHOTO, form, icc_profile=profile, **options))
       for name, profile in PROFILES.items() for form, options in BEST.items()},
    **{f"grey {name}": ("PNG", encoded(PHOTO.convert("L"), icc_profile=profile)) for name, profile in PROFILES.items()},
    "alpha": ("PNG", encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.getchannel("R"))), icc_profile=PROFILES["p3"])),
    "cmyk": ("JPEG", encoded(PHOTO.convert("CMYK"), "JPEG", quality=100, subsampling=0)),
    "rotated jpeg": ("JPEG", encoded(PHOTO, "JPEG", exif=EXIF, **BEST["JPEG"])),
    "rotated png": ("PNG", encoded(PHOTO, exif=EXIF)), "rotated avif": ("AVIF", encoded(PHOTO, "AVIF", exif=EXIF)),
    "4 bits, transparent": ("PNG", png(8, 8, 4, 0, b"\x55\x66" * 2, transparent=b"\0\5")),
    "16 bits": ("PNG", flat_png(8, 8, 16, 2, b"\x80\xff\x12\x34\x00\xff")),
    "16 bits, transparent": ("PNG", flat_png(8, 8, 16, 2, b"\0\0\0\0\0\x80", transparent=b"\0\0\0\0\0\1")),
    "4444": ("BMP", bmp(b"\x50\x8a", 16, (0xF00, 0xF0, 0xF, 0xF000))),
    "8888, alpha 0": ("BMP", bmp(b"\x0a\x14\xc8\x00", 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000))),
    "palette": ("GIF", encoded(PHOTO.quantize(64), "GIF")),
    **{path.name: (SUFFIX[path.suffix], path.read_bytes()) for path in FILES.iterdir()
       if path.suffix in SUFFIX and path.name not in OTHER},
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page()
        browser.close()


@pytest.mark.parametrize("name", PICTURES)
def test_as_in_a_browser(page, name):
    form, data = PICTURES[name]
    width, height, values = page.evaluate(DRAW, [base64.b64encode(data).decode(), TYPES[form]])
    shown = np.frombuffer(base64.b64decode(values), np.uint8).reshape(height, width, 4)[:, :, :3].astype(int)
    pixels = decode_picture(data).pixels.astype(int)
    assert pixels.shape == shown.shape
    assert np.abs(pixels - shown).max() <= 3, (pixels[0, 0], shown[0, 0])
