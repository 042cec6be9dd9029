"""Vectors of crops that were embedded before, over questions and callers: nearly the same crop has the same vector.

The memory of an episode (`agent.memory`) is another thing: it keeps results, so that the policy can be told that it
looked there before. This one keeps vectors and tells nobody: a second question about the same picture, a framing that
another one nearly covers, and overlapping crops of one call run the encoder once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gog_edge.types import Box, ImageQuery, Pixels, Vectors

PER_PICTURE = 64  # crops of one picture that are remembered


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """Pixels, and where they were cut from where that is known."""

    pixels: Pixels
    picture: str = ""  # hash of the whole picture
    box: Box | None = None


def crops_of(query: ImageQuery) -> list[Crop]:
    """A query's pixels and views, with their places."""
    pixels = (query.pixels, *query.views)
    if query.region is None:
        return [Crop(one) for one in pixels]
    return [Crop(one, query.region.picture, box) for one, box in zip(pixels, query.region.boxes, strict=True)]


@dataclass(slots=True, eq=False)
class _Seen:
    """A crop that was embedded, or is about to be."""

    box: Box
    row: int = -1  # in the batch
    vector: NDArray[np.float32] | None = None  # [dim]


class CropCache:
    """The latest crops by picture; may be used from several threads."""

    def __init__(self, capacity: int, same_iou: float) -> None:
        """`capacity` vectors are kept; crops that overlap by `same_iou` (0..1) are one."""
        self._capacity, self._same_iou = capacity, same_iou
        self._pictures: OrderedDict[str, list[_Seen]] = OrderedDict()  # the latest used last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._pictures.values()))

    def embed(self, crops: Sequence[Crop], encode: Callable[[list[Pixels]], Vectors]) -> Vectors:
        """Unit vectors [n, dim] of crops; `encode` gets, in one call, those that are not known."""
        fresh: list[Pixels] = []
        planned: dict[str, list[_Seen]] = {}
        found: list[_Seen] = []
        for crop in crops:
            seen = self._recall(crop, planned)
            if seen is None:
                seen = _Seen(crop.box or Box(0, 0, 0, 0), row=len(fresh))
                fresh.append(crop.pixels)
                if crop.box is not None:
                    planned.setdefault(crop.picture, []).append(seen)
            found.append(seen)
        vectors = encode(fresh)
        for seen in (seen for seen in found if seen.vector is None):
            seen.vector = vectors[seen.row].copy()
        self._keep(planned)
        return np.stack([seen.vector for seen in found if seen.vector is not None]) if found else vectors

    def _recall(self, crop: Crop, planned: dict[str, list[_Seen]]) -> _Seen | None:
        if crop.box is None:
            return None
        with self._lock:
            known = list(self._pictures.get(crop.picture, ()))
            if known:
                self._pictures.move_to_end(crop.picture)
        same = self._overlapping(crop.box, [*known, *planned.get(crop.picture, ())])
        return max(same, default=(0.0, None), key=lambda pair: pair[0])[1]

    def _overlapping(self, box: Box, seen: Sequence[_Seen]) -> Iterator[tuple[float, _Seen | None]]:
        for one in seen:
            iou = one.box.iou(box)
            if iou >= self._same_iou:
                yield iou, one

    def _keep(self, planned: dict[str, list[_Seen]]) -> None:
        with self._lock:
            for picture, seen in planned.items():
                self._pictures[picture] = [*self._pictures.pop(picture, ()), *seen][-PER_PICTURE:]
            while self._pictures and sum(map(len, self._pictures.values())) > self._capacity:
                self._pictures.popitem(last=False)
