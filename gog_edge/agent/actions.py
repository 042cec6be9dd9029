"""What the policy wants searched -> what can be searched: boxes are mended, crops are cut."""

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


class Refusal(MalformedAction):
    """An action that is not carried out; the message is for the policy to read."""

    def __init__(self, notice: str, reason: str) -> None:
        super().__init__(reason)
        self.notice = notice  # key of a dialect text


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to search for."""

    key: Box | str  # what makes it the same search as another
    query: Query
    crop: Pixels | None = None  # shown to the policy beside the result
    note: str = ""  # what was mended
    crop_box: Box | None = None  # what the crop shows, in pixels of the given picture


def gaze_of(config: GazeConfig, rules: CropRules) -> GazeConfig:
    """How crops are cut for a policy: as it asks where it asks for something."""
    pad = config.pad if rules.pad is None else rules.pad
    return replace(config, pad=pad, min_side=rules.min_side or config.min_side)


def aim(action: TextSearch | ImageSearch | GazeSearch, picture: Picture, question: str, config: GazeConfig) -> Target:
    """What to search for; Refusal when there is nothing to search for."""
    if isinstance(action, TextSearch):
        if not action.query.strip():
            raise Refusal("malformed", "the query is empty")
        return Target(action.query, TextQuery(action.query, question))
    if isinstance(action, ImageSearch):
        return Target(whole(picture.size), picture_query(picture, question))
    box, note = mend_box(action.box, picture.size, config.min_side)
    query = gaze_query(picture, box, question, config)
    shown = padded(box, config.pad, picture.size)
    if box.iou(whole(picture.size)) >= config.same_iou:  # one search, whichever way it is asked for
        return Target(whole(picture.size), picture_query(picture, question), query.pixels, note, shown)
    return Target(box, query, query.pixels, note, shown)


def picture_query(picture: Picture, question: str, box: Box | None = None) -> ImageQuery:
    """The pixels of a box, or of the whole picture."""
    pixels = picture.crop(box) if box else picture.pixels
    return ImageQuery(pixels, question, region=Region(picture.sha256, (box or whole(picture.size),)))


def gaze_query(picture: Picture, box: Box, question: str, config: GazeConfig) -> ImageQuery:
    """The crop of a box, and its other framings."""
    center_x, center_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    boxes = [padded(box, config.pad, picture.size)]
    for scale, shift_x, shift_y in config.framings:
        x, y = center_x + shift_x * box.width, center_y + shift_y * box.height
        half_w, half_h = scale * box.width / 2, scale * box.height / 2
        framed, _ = mend_box(Box(x - half_w, y - half_h, x + half_w, y + half_h), picture.size, config.min_side)
        boxes.append(padded(framed, config.pad, picture.size))
    pixels, *views = (picture.crop(each) for each in boxes)
    return ImageQuery(pixels, question, tuple(views), Region(picture.sha256, tuple(boxes)))


def mend_box(box: Box, size: Size, min_side: int) -> tuple[Box, str]:
    """A box inside the picture, and what was mended ("" when nothing was).

    Corners are put in order, what lies outside is clipped, and a side below `min_side` pixels is grown about its
    centre (to the picture's side where that is smaller). Raises Refusal when nothing of the picture is inside.
    """
    if not all(map(math.isfinite, (box.x0, box.y0, box.x1, box.y1))):
        raise Refusal("box_refused", "its corners are no finite numbers")
    notes = []
    ordered = Box(min(box.x0, box.x1), min(box.y0, box.y1), max(box.x0, box.x1), max(box.y0, box.y1))
    if ordered != box:
        notes.append("corners swapped")
    if ordered.width == 0 or ordered.height == 0:
        raise Refusal("box_refused", "it is empty")
    inside = ordered.intersection(whole(size))
    if inside.width <= 0 or inside.height <= 0:
        raise Refusal("box_refused", f"it lies outside the picture of {size.width} x {size.height} pixels")
    if inside != ordered:
        notes.append("clipped to the picture")
    x0, x1 = _grow(inside.x0, inside.x1, min_side, size.width)
    y0, y1 = _grow(inside.y0, inside.y1, min_side, size.height)
    grown = Box(x0, y0, x1, y1)
    if grown != inside:
        notes.append(f"grown to {min_side} pixels")
    return grown, ", ".join(notes)


def whole(size: Size) -> Box:
    """The box of a whole picture."""
    return Box(0.0, 0.0, float(size.width), float(size.height))


def padded(box: Box, share: float, size: Size) -> Box:
    """The box with `share` of each side added all around, clipped to the picture."""
    dx, dy = box.width * share, box.height * share
    return Box(box.x0 - dx, box.y0 - dy, box.x1 + dx, box.y1 + dy).intersection(whole(size))


def _grow(low: float, high: float, least: float, limit: float) -> tuple[float, float]:
    """Widen a span about its centre to `least`, moved to stay within 0..limit."""
    least = min(least, limit)
    if high - low >= least:
        return low, high
    start = min(max((low + high - least) / 2, 0.0), limit - least)
    return start, start + least



# The whole picture may still be searched when the first guess comes, or a guess that was wrong when the next one does.
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """What a search brought back, and how long it took."""

    result: SearchResult
    ms: float


class Ahead:
    """Begun searches by what they search for. A failure is raised to who takes the result, and to nobody else."""

    def __init__(self, search: Callable[[Query], SearchResult]) -> None:
        self._search = search
        self._begun: dict[Box | str, Future[Timed]] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="search")

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)  # waits for one that runs: a pack may be closed after us

    def begin(self, target: Target) -> None:
        """Search in the background, once for each key."""
        if target.key not in self._begun:
            self._begun[target.key] = self._pool.submit(self.now, target.query)

    def take(self, target: Target) -> Timed:
        """The result of a begun search, waited for; else of one made now."""
        begun = self._begun.pop(target.key, None)
        return begun.result() if begun else self.now(target.query)

    def now(self, query: Query) -> Timed:
        """Search in this thread."""
        started = time.monotonic()
        result = self._search(query)
        return Timed(result, (time.monotonic() - started) * 1000)


class Memory:
    """Results by box (the whole picture is a box too) and by words."""

    def __init__(self, same_iou: float) -> None:
        self._same_iou = same_iou
        self._looks: list[tuple[Box, SearchResult]] = []
        self._words: dict[str, SearchResult] = {}

    def recall(self, key: Box | str) -> SearchResult | None:
        """The earlier result of (nearly) the same search, marked as cached; None when there is none."""
        if isinstance(key, str):
            known = self._words.get(_plain(key))
        else:
            same = (result for box, result in self._looks if box.iou(key) >= self._same_iou)
            known = next(same, None)
        return replace(known, cached=True) if known else None

    def keep(self, key: Box | str, result: SearchResult) -> None:
        """Remember what a search brought back."""
        if isinstance(key, str):
            self._words[_plain(key)] = result
        else:
            self._looks.append((key, result))


def _plain(words: str) -> str:
    return " ".join(words.casefold().split())
