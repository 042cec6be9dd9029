"""Turn the policy's actions into search queries, and run and cache the searches of one episode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

from gog_edge.config import GazeConfig
from gog_edge.errors import MalformedAction
from gog_edge.picture import Picture
from gog_edge.policy.dialect.dialect import CropRules
from gog_edge.types import (
    Box,
    GazeSearch,
    ImageQuery,
    ImageSearch,
    Pixels,
    Query,
    Region,
    SearchResult,
    Size,
    TextQuery,
    TextSearch,
)

# The search of the whole picture may still run when the first speculative search starts, and a wrong speculative search
# when the next one does.
SEARCH_THREADS = 2


class ActionRefused(MalformedAction):
    """An action that is not carried out; the message is shown to the policy."""

    def __init__(self, notice: str, reason: str) -> None:
        """Set the key of the dialect text that presents the reason, and the reason."""
        super().__init__(reason)
        self.notice = notice


@dataclass(frozen=True, slots=True)
class SearchTarget:
    """What an action searches for."""

    key: Box | str  # searches with the same key are the same search
    query: Query
    crop: Pixels | None = None  # shown to the policy next to the result
    note: str = ""  # how the box was corrected
    crop_box: Box | None = None  # the region of `crop`, in pixels of the given picture


def merge_gaze_config(config: GazeConfig, rules: CropRules) -> GazeConfig:
    """Return the configuration with the values that the policy's dialect sets replaced."""
    pad = config.pad if rules.pad is None else rules.pad
    return replace(config, pad=pad, min_side=rules.min_side or config.min_side)


def resolve_action(action: TextSearch | ImageSearch | GazeSearch, picture: Picture, question: str,
                   config: GazeConfig) -> SearchTarget:
    """Return what an action searches for. Raises ActionRefused if its query is empty or its box cannot be used."""
    if isinstance(action, TextSearch):
        if not action.query.strip():
            raise ActionRefused("malformed", "the query is empty")
        return SearchTarget(action.query, TextQuery(action.query, question))
    if isinstance(action, ImageSearch):
        return SearchTarget(full_box(picture.size), picture_query(picture, question))
    box, note = clamp_box(action.box, picture.size, config.min_side)
    query = gaze_query(picture, box, question, config)
    crop_box = pad_box(box, config.pad, picture.size)
    if box.iou(full_box(picture.size)) >= config.same_iou:  # the same search as ImageSearch
        return SearchTarget(full_box(picture.size), picture_query(picture, question), query.pixels, note, crop_box)
    return SearchTarget(box, query, query.pixels, note, crop_box)


def picture_query(picture: Picture, question: str, box: Box | None = None) -> ImageQuery:
    """Return the query for the pixels of a box, or of the whole picture."""
    pixels = picture.crop(box) if box else picture.pixels
    return ImageQuery(pixels, question, region=Region(picture.sha256, (box or full_box(picture.size),)))


def gaze_query(picture: Picture, box: Box, question: str, config: GazeConfig) -> ImageQuery:
    """Return the query for the padded crop of a box, with the framings of the configuration as further views."""
    center_x, center_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    boxes = [pad_box(box, config.pad, picture.size)]
    for scale, shift_x, shift_y in config.framings:
        x, y = center_x + shift_x * box.width, center_y + shift_y * box.height
        half_width, half_height = scale * box.width / 2, scale * box.height / 2
        shifted = Box(x - half_width, y - half_height, x + half_width, y + half_height)
        framed, _ = clamp_box(shifted, picture.size, config.min_side)
        boxes.append(pad_box(framed, config.pad, picture.size))
    pixels, *views = (picture.crop(each) for each in boxes)
    return ImageQuery(pixels, question, tuple(views), Region(picture.sha256, tuple(boxes)))


def clamp_box(box: Box, size: Size, min_side: int) -> tuple[Box, str]:
    """Return a box inside the picture and a note of the corrections ("" for none).

    Corners are put in order, the box is clipped to the picture, and a side below `min_side` pixels is enlarged about
    its centre (at most to the side of the picture).

    Raises:
        ActionRefused: the coordinates are not finite, or the box is empty or outside the picture.
    """
    if not all(map(math.isfinite, (box.x0, box.y0, box.x1, box.y1))):
        raise ActionRefused("box_refused", "its corners are not finite numbers")
    notes = []
    ordered = Box(min(box.x0, box.x1), min(box.y0, box.y1), max(box.x0, box.x1), max(box.y0, box.y1))
    if ordered != box:
        notes.append("corners swapped")
    if ordered.width == 0 or ordered.height == 0:
        raise ActionRefused("box_refused", "it is empty")
    inside = ordered.intersection(full_box(size))
    if inside.width <= 0 or inside.height <= 0:
        raise ActionRefused("box_refused", f"it is outside the picture of {size.width} x {size.height} pixels")
    if inside != ordered:
        notes.append("clipped to the picture")
    x0, x1 = _enlarge(inside.x0, inside.x1, min_side, size.width)
    y0, y1 = _enlarge(inside.y0, inside.y1, min_side, size.height)
    enlarged = Box(x0, y0, x1, y1)
    if enlarged != inside:
        notes.append(f"grown to {min_side} pixels")
    return enlarged, ", ".join(notes)


def full_box(size: Size) -> Box:
    """Return the box of the whole picture."""
    return Box(0.0, 0.0, float(size.width), float(size.height))


def pad_box(box: Box, fraction: float, size: Size) -> Box:
    """Return the box extended on each side by a fraction of its width and height, clipped to the picture."""
    dx, dy = box.width * fraction, box.height * fraction
    return Box(box.x0 - dx, box.y0 - dy, box.x1 + dx, box.y1 + dy).intersection(full_box(size))


def _enlarge(low: float, high: float, min_length: float, limit: float) -> tuple[float, float]:
    """Widen an interval about its centre to `min_length`, shifted to stay within [0, limit]."""
    min_length = min(min_length, limit)
    if high - low >= min_length:
        return low, high
    start = min(max((low + high - min_length) / 2, 0.0), limit - min_length)
    return start, start + min_length


@dataclass(frozen=True, slots=True)
class TimedResult:
    """The result of a search and its duration."""

    result: SearchResult
    ms: float


class SpeculativeSearch:
    """Searches that run in the background before the policy has finished its turn, by key.

    An error of a search is raised by `result`; errors of searches whose result is not requested are dropped. Leaving
    the context waits for running searches: their pack may be closed afterwards.
    """

    def __init__(self, search: Callable[[Query], SearchResult]) -> None:
        """Create the threads; `search` must be thread-safe."""
        self._search = search
        self._started: dict[Box | str, Future[TimedResult]] = {}
        self._pool = ThreadPoolExecutor(SEARCH_THREADS, thread_name_prefix="search")

    def __enter__(self) -> SpeculativeSearch:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, target: SearchTarget) -> None:
        """Start a search in the background, unless one with the same key was started."""
        if target.key not in self._started:
            self._started[target.key] = self._pool.submit(self.run, target.query)

    def result(self, target: SearchTarget) -> TimedResult:
        """Wait for the search that was started for this target, or search now."""
        started = self._started.pop(target.key, None)
        return started.result() if started else self.run(target.query)

    def run(self, query: Query) -> TimedResult:
        """Search in this thread."""
        started = time.monotonic()
        result = self._search(query)
        return TimedResult(result, (time.monotonic() - started) * 1000)


class SearchCache:
    """The results of one episode, by box (also for the whole picture) or by query text.

    Boxes with an IoU of at least `same_iou` and texts that differ only in case and white space are the same key.
    """

    def __init__(self, same_iou: float) -> None:
        self._same_iou = same_iou
        self._by_box: list[tuple[Box, SearchResult]] = []
        self._by_text: dict[str, SearchResult] = {}

    def get(self, key: Box | str) -> SearchResult | None:
        """Return the result of an earlier search with the same key, marked as cached, or None."""
        if isinstance(key, str):
            known = self._by_text.get(_fold(key))
        else:
            same = (result for box, result in self._by_box if box.iou(key) >= self._same_iou)
            known = next(same, None)
        return replace(known, cached=True) if known else None

    def put(self, key: Box | str, result: SearchResult) -> None:
        """Store the result of a search."""
        if isinstance(key, str):
            self._by_text[_fold(key)] = result
        else:
            self._by_box.append((key, result))


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
