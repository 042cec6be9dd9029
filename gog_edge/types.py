"""Plain data that crosses module borders: frozen, typed, without behaviour beyond geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]  # [height, width, 3] uint8 RGB, 0..255
Vectors: TypeAlias = NDArray[np.float32]  # [n, dim] float32, each row of unit length


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned rectangle, half-open, in pixels of the given (upright) picture."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Pixels; negative when the corners are swapped."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Pixels; negative when the corners are swapped."""
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Square pixels, 0 where there is nothing inside."""
        return max(0.0, self.width) * max(0.0, self.height)

    def intersection(self, other: Box) -> Box:
        """The common part; its area is 0 where there is none."""
        return Box(
            max(self.x0, other.x0),
            max(self.y0, other.y0),
            min(self.x1, other.x1),
            min(self.y1, other.y1),
        )

    def iou(self, other: Box) -> float:
        """Intersection over union, 0..1."""
        inside = self.intersection(other)
        shared = inside.area if inside.width > 0 and inside.height > 0 else 0.0
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


# --- what the policy can do -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Say this and stop."""

    text: str


@dataclass(frozen=True, slots=True)
class TextSearch:
    """Search the snapshot with words."""

    query: str


@dataclass(frozen=True, slots=True)
class ImageSearch:
    """Search the snapshot with the whole picture."""


@dataclass(frozen=True, slots=True)
class GazeSearch:
    """Crop one region and search the snapshot with it."""

    box: Box


Action: TypeAlias = Answer | TextSearch | ImageSearch | GazeSearch


# --- what the snapshot gives back -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextQuery:
    """Words to search for; `question` is what the person asked, for choosing paragraphs."""

    text: str
    question: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """Where the pixels of a query were cut from: what lies nearly there was embedded already, or will be once."""

    picture: str  # hash of the whole picture
    boxes: tuple[Box, ...]  # in its pixels: of the query's own pixels, then of its views


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """Pixels to search for (whole picture or crop); `question` chooses paragraphs of what matches.

    `views` are other framings of the same thing: the one that matches best counts, since boxes are seldom exact.
    """

    pixels: Pixels
    question: str = ""
    views: tuple[Pixels, ...] = ()
    region: Region | None = None


Query: TypeAlias = TextQuery | ImageQuery


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph of the snapshot, with what a citation needs."""

    pack: str
    article: str
    section: str
    paragraph: int  # id within the pack, stable over generations
    text: str
    licence: str
    span: tuple[int, int] = (0, 0)  # where it stands in the article's text, in characters, half-open


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of the snapshot; its pixels are at /v1/images/{pack}/{image}."""

    pack: str
    image: int  # id within the pack, stable over generations
    caption: str
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True)
class ChannelRank:
    """How high one way of searching put a thing; channels are named in `retrieval.channels`."""

    channel: str
    rank: int  # from 1; the best of several queries


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing found: the articles that share it (several territories may share a flag) and what they say."""

    titles: tuple[str, ...]  # best first; never empty
    passages: tuple[Passage, ...]  # best first; may be empty for lower ranks
    image: ImageRef | None
    score: float  # cosine where only pictures were compared, else fused rank score; comparable within one result only
    ranks: tuple[ChannelRank, ...] = ()  # which channels found it


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What one query brought back."""

    evidence: tuple[Evidence, ...]  # best first; empty when nothing matched at all
    found: float  # calibrated chance, 0..1, that what was searched for is in the snapshot
    cached: bool = False  # answered from the episode's cache: a near-identical crop was searched before


@dataclass(frozen=True, slots=True)
class Citation:
    """Where an answer comes from."""

    passage: Passage
    image: ImageRef | None


# --- between loop and policy ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """What the loop tells the policy after an action. Exactly one of `result` and `notice` is set."""

    result: SearchResult | None = None
    crop: Pixels | None = None  # what was cut out, so that the policy can look at it again
    notice: str | None = None  # key of a dialect text: "malformed", "box_refused", "action_refused", "give_up"
    detail: str = ""  # fills the notice: the reason, in words
    crop_box: Box | None = None  # what the crop shows, in pixels of the given picture


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of the policy: its raw text and what the dialect made of it."""

    text: str
    action: Action | None  # None when malformed
    malformed: str  # reason; empty when there is an action
    prompt_tokens: int  # tokens newly prefilled for this turn (text and image)
    new_tokens: int  # tokens generated
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class PackState:
    """What is served of a pack."""

    name: str
    generation: int
    switches: int  # to other generations since it was opened
    refusals: int
    refused: str  # why what lies there now is not served; empty where it is
