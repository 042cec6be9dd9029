"""What every response carries, and which hosts a request may name."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",  # the page brings its own
}


class Guard:
    """ASGI middleware that refuses foreign hosts and cross-site writes, and adds `HEADERS`.

    A web page elsewhere may not drive a kiosk: not through a name that it points at this machine (the Host header
    gives it away), and not by posting a form (the browser says `Sec-Fetch-Site: cross-site`).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        """`hosts`: the names this server answers to, lower case, without port; None for any."""
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = self.refusal(Headers(scope=scope), scope["method"])
        app = refused(reason) if reason else self.app
        await app(scope, receive, send_guarded)

    def refusal(self, headers: Headers, method: str) -> str:
        """Why a request is refused; empty when it is not."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts is not None and host not in self.hosts:
            return f"this server does not answer to the host '{host}'; start it with --host to serve other machines"
        if method == "POST" and headers.get("sec-fetch-site") == "cross-site":
            return "pages of other sites may not ask this server"
        return ""


def refused(reason: str) -> ASGIApp:
    """A 403 response."""
    return JSONResponse({"error": {"type": "Forbidden", "message": reason}}, status_code=403)


def page_policy(page: str) -> str:
    """The Content-Security-Policy of a self-contained page: its own inline script and style by hash, nothing else."""
    script, style = (" ".join(_hashes(page, tag)) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> list[str]:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks]
