"""Render SVG drawings, after checks without which the renderer would read local files and recurse without limit.

Sizes may be in any unit, and files in any encoding that their declaration or byte order mark names, also compressed
(.svgz).
"""

from __future__ import annotations

import base64
import codecs
import re
import zlib
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from xml.parsers import expat

from gog_edge.errors import PictureError
from gog_edge.picture import decode_picture

MAX_SVG_BYTES = 4 * 2**20  # after decompression
MAX_SVG_DEPTH = 200  # nested elements; real drawings stay below 50
MAX_SVG_PIXELS = 16_000_000  # of all embedded pictures, which the renderer decodes at full size
# What an <image> may reference: nested drawings would bypass the check.
SVG_REFERENCES = ("data:image/png", "data:image/jpeg", "data:image/webp", "data:image/gif", "#")
PIXELS_PER_INCH = 96  # CSS: without it the renderer refuses sizes in mm, cm, in, pt and pc
MAX_ENTITIES, MAX_ENTITY = 64, 1024  # declared entities, and characters of each: namespaces, in practice

_GZIP = b"\x1f\x8b"
_HEAD = 4096  # bytes in which the root element begins
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_WIDE = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))  # UTF-16 without a byte order mark
_ROOT = re.compile(  # after comments, declarations and a document type; a page that contains a drawing is not one
    r"(?:\s|<\?(?>.*?\?>)|<!--(?>.*?-->)|<!DOCTYPE(?>[^\[>]*(?:\[[^\]]*\])?\s*>))*+<(?:[\w.-]+:)?svg\b",
    re.DOTALL | re.IGNORECASE,
)
_DECLARATION = re.compile(r"""\A\s*<\?xml\b[^>]*?(?:\bencoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["'][^>]*)?\?>""")
# Text encodings of Python that no XML file has, some of which take quadratic time.
_NOT_XML = frozenset(("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined", "utf-7", "mbcs", "oem"))
_ENTITY = re.compile(r"""<!ENTITY\s+([\w.:-]+)\s+(?:"([^"]*)"|'([^']*)')\s*>""")
_INTERNAL_SUBSET = re.compile(r"<!DOCTYPE[^\[>]*\[([^\]]*)\]\s*>")
_REFERENCE = re.compile(r"&([\w.:-]{1,80});")


def is_svg(data: bytes) -> bool:
    """Return whether the bytes begin like an SVG file, in any encoding, plain or compressed."""
    head = data[:_HEAD]
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(data[: 4 * _HEAD], _HEAD)
        except zlib.error:
            return False
    encoding = _sniffed_encoding(head)
    text = head.decode(encoding or "latin-1", "replace").lstrip("\ufeff\xef\xbb\xbf \t\r\n")
    return _ROOT.match(text) is not None


def render_svg(data: bytes, longest: int) -> bytes:
    """Render an SVG file as PNG on white, with a longest side of `longest` pixels. Needs the extra `index`.

    Text is not rendered: system fonts differ between machines, and so would the pictures.

    Raises:
        PictureError: the file is not a drawing that can be rendered safely.
    """
    import resvg_py

    text = _expand_entities(decode_svg(data))
    _check(text)
    try:
        # With both sides given the drawing is fitted in. With one, an extreme aspect ratio would exhaust the memory.
        rendered: bytes = resvg_py.svg_to_bytes(svg_string=text, width=longest, height=longest, background="#ffffff",
                                                skip_system_fonts=True, dpi=PIXELS_PER_INCH)
    except ValueError as exc:
        raise PictureError(f"the SVG cannot be rendered ({exc}); use another picture") from exc
    return rendered


def decode_svg(data: bytes) -> str:
    """Return the text of an SVG file, without its XML declaration.

    Raises:
        PictureError: it is too large, damaged, or in an unknown encoding.
    """
    if data.startswith(_GZIP):
        data = _decompress(data)
    if len(data) > MAX_SVG_BYTES:
        raise PictureError(f"the SVG has {len(data)} bytes, the limit is {MAX_SVG_BYTES}; use a smaller one",
                           beyond_limits=True)
    encoding = _sniffed_encoding(data)
    declared = None if encoding else _DECLARATION.match(data[:_HEAD].decode("latin-1"))
    encoding = encoding or (declared[1] if declared else None) or "utf-8"
    try:
        name = codecs.lookup(encoding).name.replace("_", "-")
        if name in _NOT_XML:
            raise LookupError(f"unknown encoding: {encoding}")
        # A file that declares UTF-16 in one-byte characters was converted, and kept its declaration.
        text = data.decode("utf-8" if name.startswith(("utf-16", "utf-32")) and declared else name)
    except (LookupError, UnicodeError, ValueError) as exc:
        raise PictureError(f"the SVG cannot be decoded as {encoding} ({exc}); save it as UTF-8") from exc
    text = text.lstrip("\ufeff")
    return _DECLARATION.sub("", text[:_HEAD], count=1) + text[_HEAD:]


def _decompress(data: bytes) -> bytes:
    try:
        text = zlib.decompressobj(wbits=31).decompress(data, MAX_SVG_BYTES + 1)
    except zlib.error as exc:
        raise PictureError(f"the compressed SVG is damaged ({exc}); copy the file again") from exc
    if text.startswith(_GZIP):
        raise PictureError("the SVG is compressed twice; decompress it once")
    return text


def _sniffed_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark or the first character shows, or None."""
    return next((name for mark, name in (*_BOMS, *_WIDE) if data.startswith(mark)), None)


def decode_data_uri(uri: str) -> bytes:
    """Return the content of a `data:` URI (RFC 2397).

    Raises:
        ValueError: its base64 is invalid.
    """
    header, _, text = uri.partition(",")
    return base64.b64decode(unquote(text)) if header.lower().endswith(";base64") else unquote_to_bytes(text)


def _expand_entities(text: str) -> str:
    """Replace the entities that a drawing declares, such as the namespaces in files of Adobe Illustrator.

    Only plain values are replaced, each once; the parser refuses all others.
    """
    subset = _INTERNAL_SUBSET.search(text[: 4 * _HEAD], max(0, text.find("<!DOCTYPE", 0, _HEAD)))
    if subset is None:
        return text
    found = _ENTITY.findall(subset[1])
    entities = {name: double or single for name, double, single in found}
    plain = all(len(value) <= MAX_ENTITY and not set(value) & set("&<%") for value in entities.values())
    if len(found) > MAX_ENTITIES or not plain or _ENTITY.sub("", subset[1]).strip():
        return text  # with other declarations, or values that contain markup
    body = text[: subset.start()] + text[subset.end() :]
    size = len(body) + sum(len(entities.get(name, "")) for name in _REFERENCE.findall(body))
    if size > MAX_SVG_BYTES:
        raise PictureError(f"the SVG has {size} characters with its entities, the limit is {MAX_SVG_BYTES}; use a "
                           "smaller one", beyond_limits=True)
    return _REFERENCE.sub(lambda match: entities.get(match[1], match[0]), body)


def _check(text: str) -> None:
    parser = expat.ParserCreate("utf-8")
    check = _SvgCheck()
    parser.StartElementHandler, parser.EndElementHandler = check.start, check.end
    parser.EntityDeclHandler = check.entity
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as exc:
        raise PictureError(f"the SVG is not well-formed XML ({exc}); use another picture") from exc
    except UnicodeError as exc:
        raise PictureError(f"the SVG contains characters that XML does not allow ({exc}); use another picture") from exc


class _SvgCheck:
    """Handlers of an XML parser that raise PictureError for content that must not reach the renderer."""

    def __init__(self) -> None:
        self._depth, self._pixels = 0, 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_SVG_DEPTH:
            raise PictureError(f"the SVG nests more than {MAX_SVG_DEPTH} elements; use another picture")
        if name.rpartition(":")[2] in ("image", "feImage"):
            for key, value in attributes.items():
                if key.rpartition(":")[2] == "href":
                    self._check_reference(value.strip())

    def _check_reference(self, address: str) -> None:
        if not address.lower().startswith(SVG_REFERENCES):
            raise PictureError(f"the SVG refers to '{address[:80]}'; use one that embeds its pictures as PNG, JPEG, "
                               "WebP or GIF")
        if address.startswith("#"):
            return
        try:
            data = decode_data_uri(address)
        except ValueError as exc:
            raise PictureError(f"the SVG embeds '{address[:80]}', which is not valid base64 ({exc}); use another "
                               "picture") from exc
        size = decode_picture(data, max_pixels=MAX_SVG_PIXELS - self._pixels).size
        self._pixels += size.width * size.height

    def end(self, name: str) -> None:
        self._depth -= 1

    def entity(self, *_: Any) -> None:
        raise PictureError("the SVG declares entities, which are not supported; use another picture")
