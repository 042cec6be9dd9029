"""Images of a snapshot: found in a folder by address, checked, and converted to small files that can be served."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import struct
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image

from gog_edge.errors import PictureError, SourceError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.files import PickleFieldsMixin
from gog_edge.indexing.sources.svg import is_svg, render_svg
from gog_edge.picture import FORMATS, MAX_BYTES, OPTIONAL, decode_picture
from gog_edge.picture.optional import optional_format
from gog_edge.types import Pixels

NO_IMAGE_FOLDER, IMAGE_MISSING = "no folder of images was given", "image is not in the folder"
UNDECODABLE, TOO_SMALL, TOO_LARGE = ("image does not decode", "image is smaller than an icon",
                                     f"image is larger than {MAX_BYTES // 2**20} MiB")
REDUCED_FACTOR = 4  # larger images are decoded to this multiple of the thumbnail's side, at least
BEYOND_LIMITS = "image exceeds the limits of size"
MORE_PAGES = "page of a picture with too many pages"
MAX_PAGES = 50  # of a TIFF file that are stored
MAX_FRAMES = 1000  # of a TIFF file that are counted
CACHED_THUMBNAILS = 1024  # a flag or a map appears in many articles
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".svg", ".tif", ".tiff", ".avif", "")  # of files named by a hash

# Pillow's decoders for the pictures of a collection, which the server does not accept from strangers. They are tried
# for these suffixes only, because some of these formats have no signature.
BUILD_FORMATS = {
    ".psd": "PSD", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".pfm": "PPM", ".tga": "TGA",
    ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".pcx": "PCX", ".ico": "ICO", ".icns": "ICNS", ".qoi": "QOI",
    ".sgi": "SGI", ".rgb": "SGI", ".rgba": "SGI", ".bw": "SGI", ".ras": "SUN", ".xbm": "XBM", ".xpm": "XPM",
    ".dds": "DDS", ".cur": "CUR", ".dib": "DIB",
}  # fmt: skip

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SUBFILE_TYPE, _REDUCED_OR_MASK = 254, 0b101  # NewSubfileType of TIFF


@dataclass(frozen=True, slots=True)
class ThumbnailOptions:
    """Limits within which an image is stored as it is, and the conversion of all others."""

    max_side: int = 320  # pixels, as in Kiwix snapshots
    min_side: int = 48  # pixels; smaller images are icons, rules or signatures
    quality: int = 80  # WebP


DEFAULT_THUMBNAILS = ThumbnailOptions()


# --- images in a folder -------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder(PickleFieldsMixin):
    """Thumbnails by image address. Without a folder every image is `Skipped`.

    A file may be named like the last part of the address, quoted or not, also in the subfolders of Wikimedia Commons
    (the first one and two hex digits of the name's MD5), or like the MD5, SHA-1 or SHA-256 of the address.
    """

    folder: Path | None
    options: ThumbnailOptions = DEFAULT_THUMBNAILS

    def check(self) -> None:
        """Raise SourceError if the folder does not exist."""
        if self.folder is not None and not self.folder.is_dir():
            raise SourceError(f"the folder of images '{self.folder}' does not exist; give the folder that the images "
                              "were downloaded to")

    def thumbnail(self, address: str) -> bytes | Skipped:
        """Return the file to serve, or why the image is skipped."""
        return self._cached(address)

    @cached_property
    def _cached(self) -> Callable[[str], bytes | Skipped]:
        return lru_cache(CACHED_THUMBNAILS)(self._load)

    def _load(self, address: str) -> bytes | Skipped:
        if self.folder is None:
            return Skipped(NO_IMAGE_FOLDER, address)
        return next((load_thumbnail(path, address, self.options) for name in candidate_names(address)
                     if _is_file(path := self.folder / name)), Skipped(IMAGE_MISSING, address))


def load_thumbnail(path: Path, item: str, options: ThumbnailOptions) -> bytes | Skipped:
    """Return the thumbnail of an image file, of its first page if it has several; `item` names it in the report."""
    data = _read(path, item)
    return data if isinstance(data, Skipped) else make_thumbnail(data, item, options)


def load_thumbnails(path: Path, item: str, options: ThumbnailOptions) -> list[bytes | Skipped]:
    """Return the thumbnails of all pages of an image file, in order; `item` names it in the report."""
    data = _read(path, item)
    if isinstance(data, Skipped):
        return [data]
    first = make_thumbnail(data, item, options)
    if isinstance(first, Skipped):
        return [first]
    return [first, *(make_thumbnail(data, f"{item}, page {page + 1}", options, page=page) if page < MAX_PAGES else
                     Skipped(MORE_PAGES, f"{item}, page {page + 1}") for page in further_pages(data))]


def _read(path: Path, item: str) -> bytes | Skipped:
    try:
        return Skipped(TOO_LARGE, item) if path.stat().st_size > MAX_BYTES else path.read_bytes()
    except OSError:
        return Skipped("image cannot be read", item)


def candidate_names(address: str) -> Iterator[str]:
    """Yield the file names, relative to the folder, that the image of an address may have, likely ones first."""
    last = address.partition("#")[0].partition("?")[0].rpartition("/")[2]
    plain = PurePosixPath(unquote(last)).name
    # Files that were copied by a Mac have decomposed names.
    for name in dict.fromkeys((plain, last, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain))):
        if name and name != "..":
            yield name
            digits = hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
            yield f"{digits[0]}/{digits[:2]}/{name}"
    for algorithm in ("md5", "sha1", "sha256"):
        digest = hashlib.new(algorithm, address.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
        yield from (digest + suffix for suffix in SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # the name is too long, or contains bytes that file names cannot have


# --- thumbnails ---------------------------------------------------------------------------------


def make_thumbnail(data: bytes, item: str, options: ThumbnailOptions = DEFAULT_THUMBNAILS,
                   page: int = 0) -> bytes | Skipped:
    """Return the file to serve, or why the image is skipped; `item` names it in the report.

    WebP, JPEG and PNG files within the limits are returned unchanged if every browser shows them with the same pixels.
    All other images become WebP. The result is deterministic. `page`, from 0, is of a TIFF file.
    """
    formats = _formats_of(PurePosixPath(item).suffix.lower())
    pixels = (REDUCED_FACTOR * options.max_side) ** 2
    try:
        if is_svg(data):
            data = render_svg(data, options.max_side)
        picture = decode_picture(data, decoded_pixels=pixels, formats=formats, frame=page)
    except PictureError as exc:
        return Skipped(BEYOND_LIMITS if exc.beyond_limits else _undecodable(data), item)
    sides = picture.size.width, picture.size.height
    if min(sides) < options.min_side:
        return Skipped(TOO_SMALL, item)
    if max(sides) <= options.max_side and picture.plain and not page:
        return data
    return _encode_webp(picture.pixels, options)


def _formats_of(suffix: str) -> tuple[str, ...]:
    """Return Pillow's names of the formats that a file of this suffix, in lower case, may have."""
    return (*FORMATS, BUILD_FORMATS[suffix]) if suffix in BUILD_FORMATS else FORMATS


def _undecodable(data: bytes) -> str:
    """Return the reason for a file that does not decode: perhaps its decoder is not installed."""
    optional = optional_format(data)
    if optional is not None and importlib.util.find_spec(OPTIONAL[optional].module.partition(".")[0]) is None:
        return f"{OPTIONAL[optional].name} is not read; pip install 'gog_edge[formats]'"
    return UNDECODABLE


def further_pages(data: bytes) -> list[int]:
    """Return the numbers, from 1, of the pages of a TIFF file after the first one, without previews and masks."""
    if not data.startswith(TIFF_SIGNATURES):
        return []
    pages: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=["TIFF"])
            for page in range(1, min(getattr(image, "n_frames", 1), MAX_FRAMES)):
                image.seek(page)
                if not image.tag_v2.get(_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK:  # type: ignore[attr-defined]
                    pages.append(page)
        except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error):
            return pages  # the directory of the pages is damaged from here on
    return pages


def _encode_webp(pixels: Pixels, options: ThumbnailOptions) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=options.quality)
    return out.getvalue()
