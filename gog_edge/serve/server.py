"""Open a bundle and serve it until the process is stopped, also while its engines are not available."""

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
from gog_edge.serve.app import LOOPBACK, create_app
from gog_edge.serve.supervisor import Supervisor

GRACE = 5  # seconds for running questions when the server stops


def serve(bundle: Path, config: ServeConfig, choice: EngineChoice = CPU) -> None:
    """Serve a bundle until the process is stopped. Prints the memory plan, and the address once it accepts requests.

    If the GPU that engines or search need is not available or is lost, the server stays up, reports the reason and
    keeps retrying.

    Raises:
        BackendError: the port is in use or invalid.
        ArtifactError: a part of the bundle is missing or damaged.
    """
    with bind(config.host, config.port) as listener:
        run(supervise(bundle, config.cores, choice), listener, config)


def run(supervisor: Supervisor, listener: socket.socket, config: ServeConfig) -> None:
    """Serve the runtime of a supervisor until the process is stopped; replace the process if its GPU is lost."""
    again = () if config.port else ("--port", str(listener.getsockname()[1]))  # a port that was chosen freely is kept
    traces = TraceFolder(config.traces) if config.traces else None
    hosts = LOOPBACK if config.host in {*LOOPBACK, "::1"} else None
    app = create_app(supervisor, hosts=hosts, traces=traces)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                              timeout_graceful_shutdown=GRACE)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: supervisor.wake())
    with contextlib.closing(supervisor), contextlib.suppress(KeyboardInterrupt):
        _Server(settings, supervisor, url_of(listener, config.host)).run([listener])
    if supervisor.device_lost:  # only a new process can use the GPU
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])


def supervise(folder: Path, threads: int, choice: EngineChoice) -> Supervisor:
    """Open a bundle; if it needs a GPU, as much of it as is available. Raises as `serve` does."""
    if not choice.on_gpu:
        runtime = open_runtime(folder, threads=threads, on_plan=_print_plan)
        runtime.warm_up()
        return Supervisor(runtime)
    bundle = open_bundle(folder)
    repair = partial(open_missing, bundle=bundle, threads=threads, choice=choice)
    runtime = Runtime(bundle.name, None, None, bundle.limits, bundle.samples)
    try:
        runtime = repair(runtime, on_plan=_print_plan)
    except GogEdgeError:
        raise
    except Exception as exc:  # as in later attempts: the server stays up
        runtime = replace(runtime, failure=repr(exc))
    with contextlib.ExitStack() as opened:
        opened.callback(runtime.close)
        if runtime.failure:
            bundle.verify(full=False)  # also the parts that were not opened: damaged files are permanent
        opened.pop_all()
    return Supervisor(runtime, repair)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to a port, or to a free one for port 0. Raises BackendError if it is not available."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as exc:
        listener.close()
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise BackendError(
            f"port {port} on {host} is not available ({reason}); choose another with --port; 0 takes any free one"
        ) from exc
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """Return the URL of the server for a browser on this machine."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _print_plan(plan: MemoryPlan) -> None:
    sys.stderr.write(f"gog_edge takes up to {plan}\n")


class _Server(uvicorn.Server):
    """Prints its address when it listens, and stops when the GPU is lost."""

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor, url: str) -> None:
        super().__init__(config)
        self._supervisor, self._url = supervisor, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(f"gog_edge serves '{self._supervisor.runtime.name}' at {self._url} (Ctrl+C stops it)\n")
        sys.stdout.flush()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._supervisor.device_lost
