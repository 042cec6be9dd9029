"""Graphs without state on TensorRT: vision and encoder towers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from threading import Lock
from typing import Generic, TypeAlias, TypeVar

from gog_edge.engines.base import Array
from gog_edge.engines.cuda import Stream
from gog_edge.engines.manifest import EngineManifest
from gog_edge.engines.tensorrt.execution import BufferPool, Execution, Run
from gog_edge.engines.tensorrt.plan import Plan, Shape, choose_profile, open_plan
from gog_edge.errors import BackendError

MAX_CAPTURED = 16  # sets of input shapes whose runs are kept as CUDA graphs
MAX_SEEN = 64  # sets of input shapes that are remembered; a run is captured when its shapes come a second time
ShapeKey: TypeAlias = tuple[tuple[str, Shape], ...]
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def open_graph(folder: Path, built: EngineManifest, name: str, *, device: int = 0) -> TrtGraph:
    """Open a graph without state: VISION, IMAGE or TEXT. See `open_plan` for the errors raised."""
    return TrtGraph(open_plan(folder, built, name, device=device))


class TrtGraph:
    """A graph without state. Runs from several threads are executed one at a time."""

    def __init__(self, plan: Plan, *, captured: int = MAX_CAPTURED) -> None:
        """Wrap an engine. `captured`: how many sets of input shapes to keep CUDA graphs for; 0 captures none."""
        self._plan = plan
        self._lock = Lock()
        self._stream = Stream(plan.cuda)
        self._buffers = BufferPool(plan.cuda)
        self._seen: LruCache[ShapeKey, bool] = LruCache(MAX_SEEN)
        self._captured: LruCache[ShapeKey, Run] = LruCache(captured)
        self._capturing = captured > 0
        self._executions = [Execution(plan, self._stream, index) for index in range(len(plan.profiles))]
        self._compiled: set[int] = set()  # profiles that have run, so that their kernels are compiled and saved
        plan.save_kernels()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; see `GraphEngine`.

        Raises:
            BackendError: an input is missing or has another type, or no profile accepts the shapes;
                OutOfDeviceMemory, DeviceLost.
        """
        check_feeds(self._plan, feeds)
        key = shape_key(feeds)
        with self._lock:
            self._plan.cuda.use()
            run = self._captured.get(key)
            capture = run is None and self._capturing and self._seen.get(key) is not None
            profile = None
            if run is None:
                profile = choose_profile(self._plan.profiles, {name: tuple(feed.shape) for name, feed in feeds.items()})
                run = self._prepare(feeds, profile, own_context=capture)
            run.set_inputs(feeds)
            run.launch()
            self._stream.synchronize()
            outputs = {name: run.output(name).copy() for name in run.outputs}
            if capture:
                self._capture(key, run)
            if profile is not None:
                self._save_kernels(profile)
            self._seen.put(key, True)
            return outputs

    def _prepare(self, feeds: Mapping[str, Array], profile: int, *, own_context: bool) -> Run:
        execution = Execution(self._plan, self._stream, profile) if own_context else self._executions[profile]
        shapes = execution.set_shapes({name: tuple(feed.shape) for name, feed in feeds.items()})
        before = self._buffers.reallocations
        try:
            inputs = {
                name: self._buffers.get(name, feed.shape, self._plan.inputs[name].dtype) for name, feed in feeds.items()
            }
            outputs = {
                name: self._buffers.get(name, shape, self._plan.outputs[name].dtype) for name, shape in shapes.items()
            }
        finally:
            if self._buffers.reallocations != before:  # also if an allocation failed: captured addresses are invalid
                self._captured.clear()
        execution.bind({name: buffer.address for name, buffer in (inputs | outputs).items()})
        return Run(self._stream, execution, inputs, outputs)

    def _capture(self, key: ShapeKey, run: Run) -> None:
        self._capturing = run.capture(self._plan)
        self._plan.save_kernels()
        if self._capturing:
            self._captured.put(key, run)

    def _save_kernels(self, profile: int) -> None:
        """Save the kernels that the first run with a profile compiled."""
        if profile not in self._compiled:
            self._compiled.add(profile)
            self._plan.save_kernels()


def shape_key(feeds: Mapping[str, Array]) -> ShapeKey:
    """Return the shapes of all inputs, which identify a captured run.

    The number of patches would not do: pictures with equally many patches may have different windows.
    """
    return tuple((name, tuple(feed.shape)) for name, feed in sorted(feeds.items()))


def check_feeds(plan: Plan, feeds: Mapping[str, Array]) -> None:
    """Raise BackendError if the names, types or fixed dimensions of the inputs are not the engine's."""
    if feeds.keys() != plan.inputs.keys():
        raise BackendError(f"'{plan.path}' expects the inputs {', '.join(plan.inputs)}, got {', '.join(feeds)}")
    for name, feed in feeds.items():
        expected = plan.inputs[name]
        fits = len(feed.shape) == len(expected.shape) and all(
            size in (-1, given) for size, given in zip(expected.shape, feed.shape, strict=True)
        )
        if feed.dtype != expected.dtype or not fits:
            raise BackendError(
                f"'{plan.path}' expects '{name}' as {expected.dtype} {expected.shape}, got {feed.dtype} {feed.shape}"
            )


class LruCache(Generic[Key, Value]):
    """A mapping of limited size that evicts the least recently used entry."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        """Return the value of a key and mark it as most recently used; None if absent."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Key, value: Value) -> None:
        """Add or replace a value."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
