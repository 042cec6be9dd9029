"""Responses that browsers cache: the pages, whose scripts and styles are allowed by hash, and pictures."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from gog_edge.picture import media_type

KIOSK_PAGE = Path(__file__).parent / "kiosk" / "index.html"
API_PAGE = Path(__file__).parent / "kiosk" / "api.html"
PICTURE_CACHE = "private, max-age=3600"


async def page_response(request: Request, path: Path) -> Response:
    """Return a self-contained page with its content security policy."""
    page = await run_in_threadpool(path.read_text, encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(page), "Cache-Control": "no-cache"}
    return _cacheable(request, page.encode(), "text/html; charset=utf-8", headers)


def picture_response(request: Request, data: bytes, kind: str | None = None) -> Response:
    """Return a picture file of a media type, which is recognised by its first bytes if it is not given."""
    kind = kind or media_type(data) or "application/octet-stream"
    return _cacheable(request, data, kind, {"Cache-Control": PICTURE_CACHE})


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy of a self-contained page: only its own inline script and style, by hash."""
    script, style = (" ".join(_hashes(page, tag)) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> list[str]:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks]


def _cacheable(request: Request, data: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**headers, "ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)
