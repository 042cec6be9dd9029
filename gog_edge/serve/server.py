"""Open a bundle and serve it until told to stop, also while its engines cannot be had."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn

from gog_edge.agent.trace import TraceFolder
from gog_edge.bundle import open_bundle
from gog_edge.config import ServeConfig
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import BackendError, GogEdgeError
from gog_edge.planner import MemoryPlan
from gog_edge.runtime import CPU, Runtime, open_missing, open_runtime
from gog_edge.serve.app import create_app
from gog_edge.serve.security import LOOPBACK
from gog_edge.serve.supervisor import Supervisor

GRACE = 5  # seconds that running questions get when the server is stopped


def serve(bundle: Path, config: ServeConfig, choice: EngineChoice = CPU) -> None:
    """Serve a bundle; says in one line what it takes, and in one where it is, once it answers. Returns when stopped.

    A GPU that is chosen for engines or search, and cannot be had or is lost, leaves it up and not ready, saying why; it
    goes on trying.

    Raises BackendError when the port is not to be had, ArtifactError when a part of the bundle is not.
    """
    with bind(config.host, config.port) as listener:
        run(supervise(bundle, config.cores, choice), listener, config)


def run(supervisor: Supervisor, listener: socket.socket, config: ServeConfig) -> None:
    """Serve what a supervisor opens until told to stop. Where a GPU is lost, the process begins anew."""
    again = () if config.port else ("--port", str(listener.getsockname()[1]))  # who asked for any port keeps this one
    traces = TraceFolder(config.traces) if config.traces else None
    hosts = LOOPBACK if config.host in {*LOOPBACK, "::1"} else None
    app = create_app(supervisor, hosts=hosts, traces=traces)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                              timeout_graceful_shutdown=GRACE)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: supervisor.wake())
    with contextlib.closing(supervisor), contextlib.suppress(KeyboardInterrupt):
        _Server(settings, supervisor, url_of(listener, config.host)).run([listener])
    if supervisor.device_lost:  # CUDA answers this process no more, but it may answer another one
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])


def supervise(folder: Path, threads: int, choice: EngineChoice) -> Supervisor:
    """Open a bundle, or where a GPU is needed as much of it as can be had. Raises as `serve` does."""
    if not choice.on_gpu:
        runtime = open_runtime(folder, threads=threads, on_plan=_say_plan)
        runtime.warm_up()
        return Supervisor(runtime)
    bundle = open_bundle(folder)
    mend = partial(open_missing, bundle=bundle, threads=threads, choice=choice)
    runtime = Runtime(bundle.name, None, None, bundle.limits, bundle.samples)
    try:
        runtime = mend(runtime, on_plan=_say_plan)
    except GogEdgeError:
        raise
    except Exception as exc:  # as at later tries: the server is up, and says it
        runtime = replace(runtime, failure=repr(exc))
    with contextlib.ExitStack() as opened:
        opened.callback(runtime.close)
        if runtime.failure:
            bundle.verify(full=False)  # parts that were not reached yet: what is wrong with them does not pass
        opened.pop_all()
    return Supervisor(runtime, mend)


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
    """Speaks only when it listens; ends where a device is lost."""

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor, url: str) -> None:
        super().__init__(config)
        self._supervisor, self._url = supervisor, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(f"gog_edge serves '{self._supervisor.runtime.name}' at {self._url} (Ctrl+C stops it)\n")
        sys.stdout.flush()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._supervisor.device_lost
