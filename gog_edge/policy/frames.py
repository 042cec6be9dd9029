"""What the numbers of a box mean: which image they lie on, and in which unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from gog_edge.types import Box, Size

BoxFrame: TypeAlias = Literal["resized_px", "given_px", "rel1000", "rel1"]
FRAMES: tuple[BoxFrame, ...] = get_args(BoxFrame)

IN_WORDS = {  # for a prompt that asks for a box
    "resized_px": "in pixels of the picture",
    "given_px": "in pixels of the picture",
    "rel1000": "in thousandths of the picture's width and height",
    "rel1": "in shares of the picture's width and height, from 0 to 1",
}

Corners: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1 as the policy writes them


@dataclass(frozen=True, slots=True)
class View:
    """One image that the policy was shown: a part of the given picture, and the size it was seen in."""

    box: Box  # in pixels of the given picture
    resized: Size  # as the policy sees it

    def unit(self, box_frame: BoxFrame) -> tuple[float, float]:
        """Pixels of the given picture for one unit of a frame, in x and y; `given_px` counts the part's own pixels."""
        match box_frame:
            case "resized_px":
                return self.box.width / self.resized.width, self.box.height / self.resized.height
            case "rel1000":
                return self.box.width / 1000, self.box.height / 1000
            case "rel1":
                return self.box.width, self.box.height
            case _:
                return 1.0, 1.0

    def extent(self, box_frame: BoxFrame) -> tuple[float, float]:
        """The largest x and y that lie on this image, in units of a frame."""
        sx, sy = self.unit(box_frame)
        return self.box.width / sx, self.box.height / sy

    def to_given(self, corners: Corners, box_frame: BoxFrame) -> Box:
        """Corners on this image -> pixels of the given picture, not bounded."""
        sx, sy = self.unit(box_frame)
        x0, y0, x1, y1 = corners
        return Box(
            self.box.x0 + x0 * sx,
            self.box.y0 + y0 * sy,
            self.box.x0 + x1 * sx,
            self.box.y0 + y1 * sy,
        )

    def to_corners(self, box: Box, box_frame: BoxFrame) -> Corners:
        """Inverse of `to_given`."""
        sx, sy = self.unit(box_frame)
        left, top = self.box.x0, self.box.y0
        return (box.x0 - left) / sx, (box.y0 - top) / sy, (box.x1 - left) / sx, (box.y1 - top) / sy


@dataclass(frozen=True, slots=True)
class Frame:
    """The images of one dialogue that a box may be written on: the given picture, then the crops shown since."""

    given: Size  # the picture as the person gave it, upright
    resized: Size  # as the policy sees it
    crops: tuple[View, ...] = ()  # oldest first

    @property
    def whole(self) -> View:
        """The given picture."""
        return View(Box(0.0, 0.0, float(self.given.width), float(self.given.height)), self.resized)

    @property
    def views(self) -> tuple[View, ...]:
        """All images in the order in which they were shown."""
        return (self.whole, *self.crops)

    def showing(self, box: Box, resized: Size) -> Frame:
        """The frame once a crop of `box` (pixels of the given picture) was shown in the size `resized`."""
        return replace(self, crops=(*self.crops, View(box, resized)))
