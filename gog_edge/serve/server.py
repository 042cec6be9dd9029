"""Open a bundle and serve it until told to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from gog_edge.agent.trace import TraceFolder
from gog_edge.config import ServeConfig
from gog_edge.errors import BackendError
from gog_edge.planner import MemoryPlan
from gog_edge.runtime import open_runtime
from gog_edge.serve.app import create_app
from gog_edge.serve.guard import LOOPBACK

GRACE = 5  # seconds that running questions get when the server is stopped


def serve(bundle: Path, config: ServeConfig) -> None:
    """Serve a bundle; says in one line what it takes, and in one where it is, once it answers. Returns when stopped.

    Raises BackendError when the port is not to be had, ArtifactError when a part of the bundle is not.
    """
    with bind(config.host, config.port) as listener:
        traces = TraceFolder(config.traces) if config.traces else None
        runtime = open_runtime(bundle, threads=config.cores, on_plan=_say_plan)
        runtime.warm_up()
        url = url_of(listener, config.host)
        hosts = LOOPBACK if config.host in {*LOOPBACK, "::1"} else None
        app = create_app(runtime, hosts=hosts, traces=traces)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                  timeout_graceful_shutdown=GRACE)
        if hasattr(signal, "SIGHUP"):  # not on Windows
            signal.signal(signal.SIGHUP, lambda *_: runtime.packs.wake())
        with contextlib.closing(runtime.packs), contextlib.suppress(KeyboardInterrupt):
            _Server(settings, f"gog_edge serves '{runtime.name}' at {url} (Ctrl+C stops it)\n").run([listener])


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, made before anything is loaded so that a clash shows at once; port 0 takes a free one."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as exc:
        listener.close()
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise BackendError(
            f"port {port} on {host} is not to be had ({reason}); choose another with --port, 0 takes any free one"
        ) from exc
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """Where a browser on this machine finds the page."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _say_plan(plan: MemoryPlan) -> None:
    sys.stderr.write(f"gog_edge takes up to {plan}\n")


class _Server(uvicorn.Server):
    """Speaks only when it listens."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(self._greeting)
        sys.stdout.flush()
