"""Which files are pictures, by suffix and by their first bytes, and why some are not read."""

from __future__ import annotations

from gog_edge.indexing.sources.svg import is_svg
from gog_edge.picture import FORMATS, SUFFIXES

HEAD_BYTES = 4096  # from which `is_picture` recognises a picture
CAMERA_RAW = "camera raw file is not read; export it as JPEG or TIFF"
OTHER_FORMAT = "picture is in a format that is not read; export it as PNG, JPEG or TIFF"

# Pillow's decoders for the pictures of a collection, which the server does not accept from strangers. They are tried
# for these suffixes only, because some of these formats have no signature.
BUILD_FORMATS = {
    ".psd": "PSD", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".pfm": "PPM", ".tga": "TGA",
    ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".pcx": "PCX", ".ico": "ICO", ".icns": "ICNS", ".qoi": "QOI",
    ".sgi": "SGI", ".rgb": "SGI", ".rgba": "SGI", ".bw": "SGI", ".ras": "SUN", ".xbm": "XBM", ".xpm": "XPM",
    ".dds": "DDS", ".cur": "CUR", ".dib": "DIB",
}  # fmt: skip
DRAWINGS = (".svg", ".svgz")
PICTURE_SUFFIXES = frozenset((*SUFFIXES, *BUILD_FORMATS, *DRAWINGS))
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
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
               b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL \r\n\x87\n", b"8BPS", b"qoif")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_picture(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a picture of a format that has a signature."""
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    is_media = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
    return head.startswith(_SIGNATURES) or is_webp or is_media or is_svg(head)


def unreadable_reason(suffix: str) -> str:
    """Return why files of a suffix, in lower case, are not read although they are pictures; empty for all others."""
    return CAMERA_RAW if suffix in _RAW else OTHER_FORMAT if suffix in _OTHER else ""


def formats_of(suffix: str) -> tuple[str, ...]:
    """Return Pillow's names of the formats that a file of this suffix, in lower case, may have."""
    return (*FORMATS, BUILD_FORMATS[suffix]) if suffix in BUILD_FORMATS else FORMATS
