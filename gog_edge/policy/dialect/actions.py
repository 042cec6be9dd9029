"""Boxes in the coordinate frame of a dialect, actions as they are written, and the syntax that writes them as tags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeAlias, get_args

from annotated_types import MinLen

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.types import Box, Size

MAX_ACTION_CHARS = 4096


# --- boxes ----------------------------------------------------------------------------------------

# The coordinate frame of boxes: pixels of the image as the policy sees it, pixels of the given picture, thousandths of
# its sides, or fractions of its sides.
BoxFrame: TypeAlias = Literal["resized_px", "given_px", "rel1000", "rel1"]
BOX_FRAMES: tuple[BoxFrame, ...] = get_args(BoxFrame)
FRAME_DESCRIPTIONS = {  # what {frame} stands for in a prompt; policies were trained on these words
    "resized_px": "in pixels of the picture",
    "given_px": "in pixels of the picture",
    "rel1000": "in thousandths of the picture's width and height",
    "rel1": "in shares of the picture's width and height, from 0 to 1",
}
Corners: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1 in the frame of the dialect


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image that the policy was shown: a region of the given picture, resized."""

    box: Box  # in pixels of the given picture
    resized: Size  # as the policy sees it

    def unit(self, box_frame: BoxFrame) -> tuple[float, float]:
        """Return the pixels of the given picture per unit of `box_frame`, in x and y."""
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
        """Return the largest x and y inside this image, in units of `box_frame`."""
        sx, sy = self.unit(box_frame)
        return self.box.width / sx, self.box.height / sy

    def to_picture(self, corners: Corners, box_frame: BoxFrame) -> Box:
        """Convert corners on this image to pixels of the given picture, without clipping."""
        sx, sy = self.unit(box_frame)
        x0, y0, x1, y1 = corners
        return Box(
            self.box.x0 + x0 * sx,
            self.box.y0 + y0 * sy,
            self.box.x0 + x1 * sx,
            self.box.y0 + y1 * sy,
        )

    def from_picture(self, box: Box, box_frame: BoxFrame) -> Corners:
        """Convert a box in pixels of the given picture to corners on this image; the inverse of `to_picture`."""
        sx, sy = self.unit(box_frame)
        left, top = self.box.x0, self.box.y0
        return (box.x0 - left) / sx, (box.y0 - top) / sy, (box.x1 - left) / sx, (box.y1 - top) / sy


@dataclass(frozen=True, slots=True)
class ShownImages:
    """The images of a conversation that a box may refer to: the given picture, then the crops shown since."""

    given: Size  # of the given picture, upright
    resized: Size  # of the given picture as the policy sees it
    crops: tuple[ShownImage, ...] = ()  # oldest first

    @property
    def picture(self) -> ShownImage:
        """Return the given picture."""
        return ShownImage(Box(0.0, 0.0, float(self.given.width), float(self.given.height)), self.resized)

    @property
    def all(self) -> tuple[ShownImage, ...]:
        """Return all images in the order in which they were shown."""
        return (self.picture, *self.crops)

    def with_crop(self, box: Box, resized: Size) -> ShownImages:
        """Return a copy with a further crop of `box`, in pixels of the given picture, that the policy sees resized."""
        return replace(self, crops=(*self.crops, ShownImage(box, resized)))


# --- actions as text ------------------------------------------------------------------------------

ActionKind: TypeAlias = Literal["answer", "text_search", "image_search", "gaze_search"]
Delimiter: TypeAlias = Annotated[str, MinLen(1)]  # an empty one would match everywhere
Delimiters: TypeAlias = tuple[Delimiter, Delimiter]  # opening, closing

# Complete numbers only: a part of 1e999 or of twenty digits must not pass for a number.
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,7}(?:\.\d{1,20})?(?!\w|\.\d)")


@dataclass(frozen=True, slots=True)
class RawAction:
    """An action as it was written: a box is still four numbers, an image still an index."""

    kind: ActionKind
    text: str = ""  # of an answer or a text search
    corners: Corners | None = None  # of a gaze, in the frame of the dialect
    image: int | None = None  # index in the dialect's numbering; None: the given picture


@dataclass(frozen=True, slots=True)
class ActionSpan:
    """The position of an action in the text of a turn."""

    kind: str  # an `ActionKind` by its delimiters, or "call"
    start: int
    end: int  # after the closing delimiter, or the end of the text
    body: str
    closed: bool  # True: further text cannot change the action
    value: Any = None  # the JSON value of a call that was parsed


@dataclass(frozen=True, slots=True)
class TagSyntax:
    """Actions between opening and closing tags: the table [tags] of a dialect."""

    reason: Delimiters
    answer: Delimiters
    text_search: Delimiters
    image_search: Delimiters
    whole_picture: str  # the body of an image search with the whole picture
    box: str  # template of a gaze, with {x0}, {y0}, {x1} and {y1}; empty for a policy that cannot gaze
    lead: str  # between an opening tag and the text; a space keeps the text's tokens as they are inside a sentence
    skip_until: str  # all text up to the last occurrence is thinking; empty for none

    def __post_init__(self) -> None:
        try:
            self.box.format(x0=0, y0=0, x1=0, y1=0)
        except (LookupError, ValueError, AttributeError) as exc:
            raise DialectError(
                f"'box' must be a template with {{x0}}, {{y0}}, {{x1}} and {{y1}}, got '{self.box}' ({exc})"
            ) from exc

    @property
    def delimiters(self) -> tuple[str, ...]:
        """Return every string that has a meaning in the syntax."""
        own = (*self.reason, *self.answer, *self.text_search, *self.image_search, self.whole_picture, self.skip_until)
        return tuple(delimiter for delimiter in own if delimiter)

    @property
    def answer_open(self) -> str:
        """Return the text that opens an answer."""
        return self.answer[0]

    def find_actions(self, text: str) -> Iterator[ActionSpan]:
        """Yield the actions in order.

        Tags inside an action are part of its text. An action without a closing tag extends to the end.
        """
        kinds: dict[str, str] = {}
        for kind in ("answer", "text_search", "image_search"):
            kinds.setdefault(getattr(self, kind)[0], kind)
        opening, at = any_of(tuple(kinds)), 0
        while (found := opening.search(text, at)) is not None:
            kind = kinds[found[0]]
            closing = getattr(self, kind)[1]
            end = text.find(closing, found.end())
            closed = end >= 0
            body = text[found.end() : end if closed else len(text)].strip()
            at = end + len(closing) if closed else len(text)
            yield ActionSpan(kind, found.start(), at, body, closed)

    def parse(self, span: ActionSpan) -> RawAction:
        """Return the action of a span.

        Raises:
            MalformedAction: the body of an image search is neither the whole picture nor a box.
        """
        if span.kind == "image_search":
            return self._parse_image_search(span.body)
        return RawAction("answer" if span.kind == "answer" else "text_search", text=span.body)

    def _parse_image_search(self, body: str) -> RawAction:
        if body == self.whole_picture:
            return RawAction("image_search")
        if not self.box:
            raise MalformedAction(f"the image search must be '{self.whole_picture}', got '{body[:60]}'")
        numbers = [float(number) for number in _NUMBER.findall(body)]
        if len(numbers) != 4:
            raise MalformedAction(f"a box must have four numbers, got {len(numbers)}: '{body[:60]}'")
        return RawAction("gaze_search", corners=(numbers[0], numbers[1], numbers[2], numbers[3]))

    def render(self, action: RawAction, digits: int) -> str:
        """Return the text that `parse` reads as `action`; `digits`: decimals of box coordinates.

        Raises:
            DialectError: the dialect has no gaze.
        """
        if action.kind in ("answer", "text_search"):
            opening, closing = self.answer if action.kind == "answer" else self.text_search
            return f"{opening}{self.lead}{action.text}{closing}"
        body = self.whole_picture
        if action.corners is not None:
            if not self.box:
                raise DialectError("tags without a box template cannot express a gaze; search with the whole picture")
            names = ("x0", "y0", "x1", "y1")
            body = self.box.format(
                **{name: f"{value:.{digits}f}" for name, value in zip(names, action.corners, strict=True)}
            )
        return f"{self.image_search[0]}{body}{self.image_search[1]}"


@lru_cache(maxsize=64)
def any_of(openings: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern for the leftmost of several texts, and the longest where several start."""
    return re.compile("|".join(re.escape(text) for text in sorted(openings, key=len, reverse=True)))
