"""Builds a plan in a process of its own: its memory comes back, and its end is an error, not ours."""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection

from gog_edge.errors import CheckpointError, GogEdgeError
from gog_edge.exporting.engine_plan import BuiltPlan, PlanRequest, build_plan
from gog_edge.exporting.engine_tensorrt import OnStep

GRACE = 5.0  # seconds that a process has to end once it said its last


def build_apart(request: PlanRequest, on_step: OnStep) -> BuiltPlan:
    """`build_plan`, elsewhere. Raises what it raises, and CheckpointError where its process dies."""
    context = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(request, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said: BuiltPlan | BaseException | tuple[int, int] = ours.recv()
        while isinstance(said, tuple):
            on_step(*said)
            said = ours.recv()
    except EOFError:
        process.join()
        raise CheckpointError(_died(request, process.exitcode)) from None
    finally:
        ours.close()
        process.join(GRACE)
        process.kill()
    if isinstance(said, BaseException):
        raise said
    return said


def _work(request: PlanRequest, pipe: Connection) -> None:
    """The other process: steps as they come, then the plan or what went wrong."""
    said: BuiltPlan | BaseException
    try:
        said = build_plan(request, lambda done, of: pipe.send((done, of)))
    except (GogEdgeError, OSError, MemoryError) as exc:
        said = exc
    with suppress(BrokenPipeError):  # nobody listens any more
        pipe.send(said)


def _died(request: PlanRequest, code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            f"building '{request.graph.name}' was killed, as it is where memory runs out; close other programs or "
            "build on a larger machine"
        )
    return f"TensorRT's compiler ended while it built '{request.graph.name}' (exit code {code}); report its version"
