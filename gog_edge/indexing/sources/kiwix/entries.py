"""Tells what an entry of a ZIM file is, by its media type and its path."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import unquote

ENTRY = "entry"  # what is counted
UNTYPED = frozenset(("", "application/octet-stream", "binary/octet-stream", "unknown", "unknown/unknown"))
_HTML = frozenset(("text/html", "application/xhtml+xml", "application/xhtml", "application/vnd.wap.xhtml+xml"))
_FILES = {
    "text/css": "file is a style sheet", "text/javascript": "file is a script",
    "application/javascript": "file is a script", "application/x-javascript": "file is a script",
    "application/json": "file is data", "application/xml": "file is data", "text/xml": "file is data",
    "text/csv": "file is data", "application/pdf": "file is a PDF document",
    "application/epub+zip": "file is an EPUB book", "text/plain": "file is plain text", "text/vtt": "file is subtitles",
    "application/warc-headers": "file is headers of a web archive",
}  # fmt: skip
_KINDS = {"image": "image is shown in no article", "video": "file is a video", "audio": "file is a sound",
          "font": "file is a font"}  # fmt: skip
_OTHER = "file is of another type"
_INTERNAL = "entry is metadata or an index of the ZIM file"
# Before 2021 the first letter of a path tells what an entry is; metadata and indexes are among the others.
_INTERNAL_NAMESPACES = frozenset("BMWXYZ")
# Pages of the program that displays the archives of zimit: in those of versions 1, and of 2 and later.
_VIEWER_PAGES = frozenset(("index.html", "404.html", "topFrame.html", "sw_check.html"))
_VIEWER_FOLDER = "_zim_static/"
VIEWER_SCRIPTS = ("A/sw.js", "A/load.js")
WEB_SCRAPERS = ("warc2zim", "zimit")
HTML_HEAD = 1024  # bytes by which a page is recognised
_HTML_STARTS = (b"<!doctype html", b"<html", b"<head", b"<body")


@lru_cache(1024)
def main_type(media_type: str) -> str:
    """Return a media type without its parameters, in lower case."""
    return media_type.partition(";")[0].strip().lower()


def is_html(media_type: str) -> bool:
    """Return whether a media type is that of a page: HTML or XHTML, with any parameters."""
    return main_type(media_type) in _HTML


def is_xhtml(media_type: str) -> bool:
    """Return whether a page is XML."""
    return "xhtml" in main_type(media_type)


def looks_like_html(data: bytes) -> bool:
    """Return whether a file without a media type begins like a page."""
    head = data[:HTML_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(_HTML_STARTS) or (head.startswith((b"<?xml", b"<!--")) and b"<html" in head)


def reason_unused(media_type: str) -> str:
    """Return why a file that is not a page is not in the pack, unless an article shows it."""
    name = main_type(media_type)
    top = name.partition("/")[0]
    if name in _FILES:
        return _FILES[name]
    return _KINDS["font"] if "font" in name else _KINDS.get(top, _OTHER)


def reason_internal(path: str, *, has_namespaces: bool) -> str | None:
    """Return why an entry is not content: it is metadata or an index; None for content."""
    return _INTERNAL if has_namespaces and path[:1] in _INTERNAL_NAMESPACES and path[1:2] == "/" else None


def is_of_viewer(path: str) -> bool:
    """Return whether a page of a web archive belongs to the program that displays it."""
    path = path.removeprefix("A/")
    return path in _VIEWER_PAGES or path.startswith(_VIEWER_FOLDER)


def title_of_path(path: str, *, has_namespaces: bool) -> str:
    """Return a title for an entry without one, as MediaWiki makes it of an address."""
    path = path[2:] if has_namespaces and path[1:2] == "/" else path
    return unquote(path).removesuffix(".html").replace("_", " ").strip() or path
