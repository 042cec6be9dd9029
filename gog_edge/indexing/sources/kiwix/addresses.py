"""Finds the entries of a ZIM file that the addresses in its pages lead to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote, urljoin, urlsplit

_HERE = "zim.invalid"  # the host of pages whose addresses are paths of the ZIM file
_EXTERNAL = ("http", "https")
_NOT_PLAIN = re.compile(r"[:?#\\\s]|^/|^$")  # in an address that is not just a relative path
_WEB_FOLDER = "A/"  # before the host in web archives of zimit 1


def is_data_uri(address: str) -> bool:
    """Return whether an address contains the file itself."""
    return address[:5].lower() == "data:"


def candidate_paths(folder: str, base: str, address: str) -> Iterator[str]:
    """Yield the paths that the entry of an address may have, the likely ones first; each may be yielded repeatedly.

    Web archives keep pages and files below the name of their host: `example.org/a.png`, or `A/example.org/a.png`.

    Args:
        folder: path of the page up to its last slash.
        base: address in the <base> element of the page; empty if there is none.
        address: in the page, relative or absolute.
    """
    if not base and not _NOT_PLAIN.search(address):
        yield from _spellings(_join(folder, address), "")
        return
    try:
        here = urljoin(f"https://{_HERE}/{quote(folder)}/", base)
        url = urlsplit(urljoin(here, address.replace("\\", "/")))
    except ValueError:  # such as an unterminated IPv6 address
        return
    if url.scheme not in _EXTERNAL:  # a path such as "File:a.png"
        yield from _spellings(_join(folder, address), "")
    elif url.netloc != _HERE:
        for above in ("", _WEB_FOLDER):
            yield from _spellings(f"{above}{url.netloc}{url.path}", url.query)
    else:
        yield from _spellings(url.path.lstrip("/"), url.query)
        if address.startswith("/"):
            above = _WEB_FOLDER if folder.startswith(_WEB_FOLDER) else ""
            host = folder.removeprefix(above).partition("/")[0]
            yield from _spellings(f"{above}{host}{url.path}", url.query)


def _spellings(path: str, query: str) -> Iterator[str]:
    """Yield a path with its query, which is a part of the name in web archives, and without; and as it is quoted."""
    if query:
        yield unquote(f"{path}?{query}")
    yield unquote(path)
    if "%" in path:
        yield path


def _join(folder: str, address: str) -> str:
    return posixpath.normpath(f"/{folder}/{address}").lstrip("/")
