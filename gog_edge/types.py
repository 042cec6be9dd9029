"""Plain data shared between modules: frozen dataclasses without behaviour beyond geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]  # [height, width, 3] uint8 RGB, 0..255
Vectors: TypeAlias = NDArray[np.float32]  # [n, dim] float32, each row of unit length

BAND_PIXELS = 2**18  # large pictures are worked through in bands of rows


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def bands(self, factor: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the first row and the row after the last of bands of about BAND_PIXELS, multiples of `factor` high."""
        step = max(1, BAND_PIXELS // (self.width * factor)) * factor
        for top in range(0, self.height, step):
            yield top, min(top + step, self.height)


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned rectangle, half-open, in pixels of the given (upright) picture."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Return x1 - x0 in pixels; negative when the corners are swapped."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Return y1 - y0 in pixels; negative when the corners are swapped."""
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Return the area in square pixels, 0 for an empty box."""
        return max(0.0, self.width) * max(0.0, self.height)

    def intersection(self, other: Box) -> Box:
        """Return the intersection; its area is 0 when the boxes do not overlap."""
        return Box(
            max(self.x0, other.x0),
            max(self.y0, other.y0),
            min(self.x1, other.x1),
            min(self.y1, other.y1),
        )

    def iou(self, other: Box) -> float:
        """Return the intersection over union, 0..1."""
        inside = self.intersection(other)
        shared = inside.area if inside.width > 0 and inside.height > 0 else 0.0
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


# --- actions of the policy -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Give the answer and end the episode."""

    text: str


@dataclass(frozen=True, slots=True)
class TextSearch:
    """Search the snapshot with text."""

    query: str


@dataclass(frozen=True, slots=True)
class ImageSearch:
    """Search the snapshot with the whole picture."""


@dataclass(frozen=True, slots=True)
class GazeSearch:
    """Crop one region and search the snapshot with it."""

    box: Box


Action: TypeAlias = Answer | TextSearch | ImageSearch | GazeSearch


# --- queries and search results -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextQuery:
    """A text query; `question` is the user's question, which selects the paragraphs."""

    text: str
    question: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """Where the pixels of a query were cropped from; overlapping crops share one embedding."""

    picture: str  # hash of the full picture
    boxes: tuple[Box, ...]  # in its pixels: of the query's own crop, then of its views


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """An image query (the full picture or a crop); `question` selects the paragraphs of what matches.

    `views` are other framings of the same object; the best match of all views counts, since boxes are rarely exact.
    """

    pixels: Pixels
    question: str = ""
    views: tuple[Pixels, ...] = ()
    region: Region | None = None


Query: TypeAlias = TextQuery | ImageQuery


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph of the snapshot, with the fields of a citation."""

    pack: str
    article: str
    section: str
    paragraph: int  # id within the pack, stable across generations
    text: str
    licence: str
    span: tuple[int, int] = (0, 0)  # character offsets in the article's text, half-open


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of the snapshot, served at /v1/images/{pack}/{image}."""

    pack: str
    image: int  # id within the pack, stable across generations
    caption: str
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True)
class ChannelRank:
    """The rank that one search channel gave to an article; channel names are defined in `retrieval.fusion`."""

    channel: str
    rank: int  # from 1; the best of several queries


@dataclass(frozen=True, slots=True)
class Evidence:
    """One search hit: the articles that share it (several territories may share a flag) and their passages."""

    titles: tuple[str, ...]  # best first; never empty
    passages: tuple[Passage, ...]  # best first; may be empty for lower ranks
    image: ImageRef | None
    score: float  # cosine if only images were compared, else the fused rank score; comparable within one result only
    ranks: tuple[ChannelRank, ...] = ()  # which channels found it


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of one query."""

    evidence: tuple[Evidence, ...]  # best first; empty when nothing matched at all
    found: float  # calibrated probability, 0..1, that the object of the query is in the snapshot
    cached: bool = False  # served from the episode's cache: a near-identical crop was searched before


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that supports an answer, with the image of its article."""

    passage: Passage
    image: ImageRef | None


# --- between the loop and the policy ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """What the loop shows the policy after an action. Exactly one of `result` and `notice` is set."""

    result: SearchResult | None = None
    crop: Pixels | None = None  # the crop, shown to the policy again
    notice: str | None = None  # key of a dialect text: "malformed", "box_refused", "action_refused", "give_up"
    detail: str = ""  # fills the notice: the reason, in words
    crop_box: Box | None = None  # the region of the crop, in pixels of the given picture


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of the policy: its raw text and the action that the dialect parsed from it."""

    text: str
    action: Action | None  # None when malformed
    malformed: str  # reason; empty when there is an action
    prompt_tokens: int  # tokens prefilled for this turn (text and image)
    new_tokens: int  # tokens generated
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class PackState:
    """The serving state of a pack."""

    name: str
    generation: int
    switches: int  # to other generations since the pack was opened
    refusals: int
    refused: str  # why the generation on disk is not served; empty if it is
