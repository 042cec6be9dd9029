"""A real server on loopback, in a thread."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import httpx
import pytest
from loopback import serving
from playback import playback_runtime, png, scene

from gog_edge.runtime import Runtime
from gog_edge.serve.app import create_app


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """Serves a runtime and gives its address; further arguments go to `create_app`."""
    with ExitStack() as stack:
        yield lambda runtime, **options: stack.enter_context(serving(create_app(runtime, **options)))


@pytest.fixture
def make_runtime(tmp_path) -> Callable[..., Runtime]:
    """Builds a runtime around a policy that plays a script; keyword arguments go to its Limits."""
    return partial(playback_runtime, tmp_path)


@pytest.fixture
def client(start, make_runtime) -> Iterator[httpx.Client]:
    """A client of a server whose policy plays the usual script."""
    with httpx.Client(base_url=start(make_runtime()), timeout=60) as client:
        yield client


@pytest.fixture
def scene_png() -> bytes:
    """A picture with three flags."""
    return png(scene())
