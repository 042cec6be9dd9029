"""List the files of a folder by what they are: pictures, tables, texts, and those that are not read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.folder.tables import CSV_SUFFIXES, JSON_SUFFIXES
from gog_edge.indexing.sources.images import BUILD_FORMATS, TIFF_SIGNATURES
from gog_edge.indexing.sources.svg import is_svg
from gog_edge.picture import SUFFIXES
from gog_edge.picture.optional import AVIF_BRANDS, HEIF_BRANDS, JXL_CONTAINER

FILE, TABLE_ROW = "file", "table row"  # kinds of items
TABLES, SIDECARS = (*CSV_SUFFIXES, *JSON_SUFFIXES), (".txt", ".md")
HIDDEN, LINK, BROKEN_LINK, SPECIAL = ("hidden or system file", "link to a folder, or out of the folder",
                                      "link leads to a missing file", "not a regular file")
EMPTY, NOT_READ, NO_PICTURE_FILE = "file is empty", "file or folder cannot be read", "file is not a picture"
SPREADSHEET = "spreadsheet is not read; save it as CSV"
CAMERA_RAW = "camera raw file is not read; export it as JPEG or TIFF"
OTHER_FORMAT = "picture is in a format that is not read; export it as PNG, JPEG or TIFF"
PICTURE_SUFFIXES = frozenset((*SUFFIXES, *BUILD_FORMATS, ".svg", ".svgz"))
_HEAD_BYTES = 4096  # from which a picture without a known suffix is recognised
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers", ".fods", ".xlsb")
_SYSTEM_NAMES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "iconcache.db", "icon\r", "folder.htt"))
_SYSTEM_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information"))
_RAW_SUFFIXES = (
    ".raw .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .ptx .srw .x3f .3fr .fff .iiq .mef "
    ".mos .mrw .erf .kdc .dcr .rwl .gpr"
)
_RAW = frozenset(_RAW_SUFFIXES.split())
_OTHER_SUFFIXES = (
    ".psb .xcf .kra .ora .ai .eps .ps .indd .cdr .sketch .fig .afphoto .afdesign .djvu .djv .wmf .emf .wdp .jxr "
    ".hdp .exr .hdr .pic .pict .pct .fits .fit .dcm .dicom .ecw .sid .jls .jpm .mj2 .flif .bpg .heics .heifs "
    ".webm .tiff8 .btf .pcd .cin .dpx .iff .lbm .wbmp .mng .jng .svs .ndpi .czi .vsi .scn .clip .cpt .pdn "
    ".procreate .ufo .cgm .dxf .dwg .pspimage .psp"
)
_OTHER = frozenset(_OTHER_SUFFIXES.split())
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", *TIFF_SIGNATURES,
               b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", JXL_CONTAINER, b"8BPS", b"qoif")
_BRANDS = AVIF_BRANDS | HEIF_BRANDS | {b"mif1", b"msf1"}


@dataclass(frozen=True)
class Listing:
    """The files below a folder, by their paths with forward slashes, each in one of the fields, sorted by name."""

    pictures: tuple[str, ...]
    tables: tuple[str, ...]
    texts: tuple[str, ...]  # files that may belong to a picture
    skipped: tuple[Skipped, ...]
    size: int  # number of files, and of folders that cannot be read


def list_files(root: Path) -> Listing:
    """List a folder in the same order on every machine. Links to folders are not followed."""
    pictures, tables, texts = list[str](), list[str](), list[str]()
    skipped: list[Skipped] = []
    names = sorted(_walk(root, skipped))
    size = len(names) + len(skipped)
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if reason := _unusable(root, name):
            skipped.append(Skipped(reason, shown_name(name), FILE))
        elif suffix in TABLES:
            tables.append(name)
        elif suffix in SIDECARS:
            texts.append(name)
        elif suffix in PICTURE_SUFFIXES:
            pictures.append(name)
        elif suffix in _SPREADSHEETS:
            skipped.append(Skipped(SPREADSHEET, shown_name(name), FILE))
        elif not (reason := _unreadable_reason(suffix)) and _begins_like_a_picture(root / name):
            pictures.append(name)
        else:
            skipped.append(Skipped(reason or NO_PICTURE_FILE, shown_name(name), FILE))
    return Listing(tuple(pictures), tuple(tables), tuple(texts), tuple(sorted(skipped, key=lambda one: one.item)), size)


def shown_name(name: str) -> str:
    """Return a path as text: bytes that are not UTF-8, from older systems, are taken as Windows-1252."""
    if name.isascii():
        return name
    return "".join(bytes([ord(char) - 0xDC00]).decode("cp1252", "replace") if "\udc80" <= char <= "\udcff" else char
                   for char in name)


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[str]:
    def failed(error: OSError) -> None:
        skipped.append(Skipped(NOT_READ, shown_name(_below(root, Path(error.filename or root))), FILE))

    for folder, folders, names in os.walk(root, onerror=failed):
        for name in (*names, *(one for one in folders if (Path(folder) / one).is_symlink())):
            yield _below(root, Path(folder) / name)


def _below(root: Path, path: Path) -> str:
    return PurePosixPath(os.path.relpath(path, root)).as_posix()


def _unusable(root: Path, name: str) -> str:
    """Return why a file is not read, whatever it contains; empty if nothing speaks against it."""
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts) or parts[-1].lower() in _SYSTEM_NAMES \
            or any(part.lower() in _SYSTEM_FOLDERS for part in parts[:-1]):
        return HIDDEN
    path = root / name
    try:
        if path.is_symlink():
            if not path.exists():
                return BROKEN_LINK
            if path.is_dir() or not path.resolve().is_relative_to(root.resolve()):
                return LINK
        status = path.stat()
    except (OSError, RuntimeError):  # RuntimeError: links that lead to each other
        return NOT_READ
    if not stat.S_ISREG(status.st_mode):
        return SPECIAL
    is_table = PurePosixPath(name).suffix.lower() in TABLES  # of which an empty one is reported by its reader
    return "" if status.st_size or is_table else EMPTY


def _is_picture(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a picture of a format that has a signature."""
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    is_media = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
    return head.startswith(_SIGNATURES) or is_webp or is_media or is_svg(head)


def _unreadable_reason(suffix: str) -> str:
    """Return why files of a suffix, in lower case, are not read although they are pictures; empty for all others."""
    return CAMERA_RAW if suffix in _RAW else OTHER_FORMAT if suffix in _OTHER else ""


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return _is_picture(stream.read(_HEAD_BYTES))
    except OSError:
        return False
