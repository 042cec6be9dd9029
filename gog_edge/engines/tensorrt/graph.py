"""Graphs without state on TensorRT: vision and encoder towers."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import TypeAlias

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import Stream
from gog_edge.engines.tensorrt.execution import Execution, Run, Staging
from gog_edge.engines.tensorrt.plan import Plan
from gog_edge.engines.tensorrt.shapes import Recent, Shape, choose_profile
from gog_edge.errors import BackendError

CAPTURED = 16  # sets of shapes whose runs are kept as CUDA graphs: pictures of a box have few sizes
SEEN = 64  # sets of shapes that are known again: the second time they are captured
Key: TypeAlias = tuple[tuple[str, Shape], ...]


class TrtGraph:
    """A graph without state. Several threads may run it: they take turns."""

    def __init__(self, plan: Plan, *, captured: int = CAPTURED) -> None:
        """`captured`: sets of shapes whose runs are kept as CUDA graphs; 0 keeps none."""
        self._plan = plan
        self._lock = Lock()
        self._stream = Stream(plan.cuda)
        self._staging = Staging(plan.cuda)
        self._seen: Recent[Key, bool] = Recent(SEEN)
        self._captured: Recent[Key, Run] = Recent(captured)
        self._capturing = captured > 0
        self._executions = [Execution(plan, self._stream, number) for number in range(len(plan.profiles))]
        self._ran: set[int] = set()  # profiles whose kernels were all kept
        plan.keep_kernels()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every input by name, every output by name.

        Raises:
            BackendError: an input is missing or of another type, or shapes are beyond those the engine was built for;
                or OutOfDeviceMemory, DeviceLost.
        """
        check_feeds(self._plan, feeds)
        key = key_of(feeds)
        with self._lock:
            self._plan.cuda.use()
            run = self._captured.get(key)
            again = run is None and self._capturing and self._seen.get(key) is not None
            profile = None
            if run is None:
                profile = choose_profile(self._plan.profiles, {name: tuple(feed.shape) for name, feed in feeds.items()})
                run = self._prepare(feeds, profile, lasting=again)
            run.fill(feeds)
            run.go()
            self._stream.synchronize()
            outputs = {name: run.output(name).copy() for name in run.outputs}
            if again:
                self._capture(key, run)
            if profile is not None:
                self._keep_kernels(profile)
            self._seen.put(key, True)
            return outputs

    def _prepare(self, feeds: Mapping[str, Array], profile: int, *, lasting: bool) -> Run:
        execution = Execution(self._plan, self._stream, profile) if lasting else self._executions[profile]
        given = execution.reshape({name: tuple(feed.shape) for name, feed in feeds.items()})
        before = self._staging.moves
        try:
            inputs = {
                name: self._staging.place(name, feed.shape, self._plan.inputs[name].dtype)
                for name, feed in feeds.items()
            }
            outputs = {
                name: self._staging.place(name, shape, self._plan.outputs[name].dtype) for name, shape in given.items()
            }
        finally:
            if self._staging.moves != before:  # even when memory ran out on the way
                self._captured.clear()
        execution.bind({name: staged.address for name, staged in (inputs | outputs).items()})
        return Run(self._stream, execution, inputs, outputs)

    def _capture(self, key: Key, run: Run) -> None:
        self._capturing = run.capture(self._plan)
        self._plan.keep_kernels()
        if self._capturing:
            self._captured.put(key, run)

    def _keep_kernels(self, profile: int) -> None:
        """Once for each profile: what its first run compiled, beyond what opening its context did."""
        if profile not in self._ran:
            self._ran.add(profile)
            self._plan.keep_kernels()


def key_of(feeds: Mapping[str, Array]) -> Key:
    """What a captured run is good for: every input's shape.

    Not one size alone: pictures of as many patches have other windows where their sides are others.
    """
    return tuple((name, tuple(feed.shape)) for name, feed in sorted(feeds.items()))


def check_feeds(plan: Plan, feeds: Mapping[str, Array]) -> None:
    """BackendError where feeds are not what the engine takes."""
    if feeds.keys() != plan.inputs.keys():
        raise BackendError(f"'{plan.path}' takes {', '.join(plan.inputs)}, given were {', '.join(feeds)}")
    for name, feed in feeds.items():
        wanted = plan.inputs[name]
        fixed = len(feed.shape) == len(wanted.shape) and all(
            size in (-1, given) for size, given in zip(wanted.shape, feed.shape, strict=True)
        )
        if feed.dtype != wanted.dtype or not fixed:
            raise BackendError(
                f"'{plan.path}' takes '{name}' as {wanted.dtype} {wanted.shape}, given was {feed.dtype} {feed.shape}"
            )
