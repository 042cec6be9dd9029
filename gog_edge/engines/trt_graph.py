"""Graphs without state on TensorRT: vision and encoder towers, and searches among vectors that stay on the GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import DeviceBuffer, Stream, pinned
from gog_edge.engines.trt_plan import Plan
from gog_edge.engines.trt_run import Execution, Run, Staged, Staging
from gog_edge.engines.trt_shapes import Recent, Shape, choose_profile
from gog_edge.errors import BackendError

CAPTURED = 16  # sets of shapes whose runs are kept as CUDA graphs: pictures of a box have few sizes
SEEN = 64  # sets of shapes that are known again: the second time they are captured
UPLOAD_BYTES = 2**24  # of page-locked memory that what is to stay on the device goes through


@dataclass(frozen=True, slots=True)
class Resident:
    """An array that lies on the device, to be fed as often as wanted."""

    buffer: DeviceBuffer
    shape: Shape
    dtype: np.dtype[Any]


Feed: TypeAlias = Array | Resident
Key: TypeAlias = tuple[tuple[str, Shape, int], ...]  # name, shape, and address where it is resident


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

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        """Run once; every input by name, every output by name.

        Raises:
            BackendError: an input is missing or of another type, or shapes are beyond those the engine was built for;
                or OutOfDeviceMemory, DeviceLost.
        """
        arrays = checked_feeds(self._plan, feeds)
        key = key_of(feeds)
        with self._lock:
            self._plan.cuda.use()
            run = self._captured.get(key)
            again = run is None and self._capturing and self._seen.get(key) is not None
            profile = None
            if run is None:
                profile = choose_profile(self._plan.profiles, {name: tuple(feed.shape) for name, feed in feeds.items()})
                run = self._prepare(feeds, profile, lasting=again)
            run.fill(arrays)
            run.go()
            self._stream.synchronize()
            outputs = {name: run.output(name).copy() for name in run.outputs}
            if again:
                self._capture(key, run)
            if profile is not None:
                self._keep_kernels(profile)
            self._seen.put(key, True)
            return outputs

    def reserve(self, shape: Shape, dtype: np.dtype[Any]) -> Resident:
        """Memory of the device for an array, as yet zeros; given back when the answer is dropped. OutOfDeviceMemory."""
        cuda = self._plan.cuda
        cuda.use()
        buffer, stream = DeviceBuffer(cuda, math.prod(shape) * dtype.itemsize), Stream(cuda)
        stream.clear(buffer.address, buffer.nbytes)
        stream.synchronize()
        return Resident(buffer, shape, dtype)

    def fill(self, target: Resident, first: int, rows: Array) -> None:
        """Copy rows to a reserved array, from its row `first` on. Nothing may run that reads them."""
        flat = np.ascontiguousarray(rows, target.dtype).reshape(-1).view(np.uint8)
        at = first * math.prod(target.shape[1:]) * target.dtype.itemsize
        cuda = self._plan.cuda
        cuda.use()
        stream, through = Stream(cuda), pinned(cuda, (min(UPLOAD_BYTES, flat.nbytes),), np.uint8)
        for start in range(0, flat.nbytes, UPLOAD_BYTES):
            piece = flat[start : start + UPLOAD_BYTES]
            through[: len(piece)] = piece
            stream.copy(target.buffer.at(at + start, len(piece)), through.ctypes.data, len(piece))
            stream.synchronize()

    def _prepare(self, feeds: Mapping[str, Feed], profile: int, *, lasting: bool) -> Run:
        execution = Execution(self._plan, self._stream, profile) if lasting else self._executions[profile]
        given = execution.reshape({name: tuple(feed.shape) for name, feed in feeds.items()})
        before = self._staging.moves
        try:
            inputs = {name: self._place(name, feed) for name, feed in feeds.items()}
            outputs = {
                name: self._staging.place(name, shape, self._plan.outputs[name].dtype) for name, shape in given.items()
            }
        finally:
            if self._staging.moves != before:  # even when memory ran out on the way
                self._captured.clear()
        execution.bind({name: staged.address for name, staged in (inputs | outputs).items()})
        return Run(self._stream, execution, inputs, outputs)

    def _place(self, name: str, feed: Feed) -> Staged:
        if isinstance(feed, Resident):
            return Staged(feed.buffer.address, feed.buffer.nbytes)
        return self._staging.place(name, feed.shape, self._plan.inputs[name].dtype)

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


def key_of(feeds: Mapping[str, Feed]) -> Key:
    """What a captured run is good for: every input's shape, and the address of those that lie on the device.

    Not one size alone: pictures of as many patches have other windows where their sides are others.
    """
    return tuple(
        (name, tuple(feed.shape), feed.buffer.address if isinstance(feed, Resident) else 0)
        for name, feed in sorted(feeds.items())
    )


def checked_feeds(plan: Plan, feeds: Mapping[str, Feed]) -> dict[str, Array]:
    """The feeds that come from the host. BackendError where they are not what the engine takes."""
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
    return {name: feed for name, feed in feeds.items() if not isinstance(feed, Resident)}
