"""A real server on loopback, in a thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import httpx
import pytest
import uvicorn
from played import played_runtime, png, scene

from gog_edge.runtime import Runtime
from gog_edge.serve.app import create_app
from gog_edge.serve.server import bind, url_of


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.listening.set()


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """Serves a runtime and gives its address; further arguments go to `create_app`."""
    with ExitStack() as stack:

        def begin(runtime, **options) -> str:
            listener = stack.enter_context(bind("127.0.0.1", 0))
            server = Server(uvicorn.Config(create_app(runtime, **options), log_level="critical",
                                           timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()

            def end() -> None:
                server.should_exit = True
                thread.join()

            stack.callback(end)
            assert server.listening.wait(60)
            return url_of(listener, "127.0.0.1")

        yield begin


@pytest.fixture
def make_runtime(tmp_path) -> Callable[..., Runtime]:
    """Builds a runtime around a policy that plays a script; keyword arguments go to its Limits."""
    return partial(played_runtime, tmp_path)


@pytest.fixture
def client(start, make_runtime) -> Iterator[httpx.Client]:
    """A client of a server whose policy plays the usual script."""
    with httpx.Client(base_url=start(make_runtime()), timeout=60) as client:
        yield client


@pytest.fixture
def scene_png() -> bytes:
    """A picture with three flags."""
    return png(scene())
