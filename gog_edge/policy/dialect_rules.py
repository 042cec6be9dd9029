"""What differs between checkpoint families beside their syntax: crops, turns, thinking, budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gog_edge.policy.tables import at_least
from gog_edge.policy.vision import resize
from gog_edge.types import Pixels, Size


@dataclass(frozen=True, slots=True)
class CropRules:
    """How crops are cut for this checkpoint; None: as the loop does."""

    source: Literal["given", "any"] = "given"  # boxes lie on the given picture, or on any image shown
    image_base: int = 0  # the index of the given picture; crops follow
    min_side: int | None = None  # pixels; a smaller side is grown about its centre
    pad: float | None = None  # share of each side that is added all around
    min_pixels: int | None = None  # a smaller crop is enlarged to so many before it is shown

    def __post_init__(self) -> None:
        at_least(1, min_side=self.min_side, min_pixels=self.min_pixels)
        at_least(0, image_base=self.image_base, pad=self.pad)

    def enlarged(self, crop: Pixels) -> Pixels:
        """The crop as it is shown, [height, width, 3] uint8."""
        height, width, _ = crop.shape
        grow = math.sqrt((self.min_pixels or 0) / (height * width))
        return resize(crop, Size(math.ceil(width * grow), math.ceil(height * grow))) if grow > 1 else crop


@dataclass(frozen=True, slots=True)
class TurnRules:
    """Which of several actions in one turn counts."""

    match: Literal["first", "last"] = "first"
    action_at_end: bool = False  # a search that does not end its turn is none; an answer may stand anywhere


@dataclass(frozen=True, slots=True)
class Thinking:
    """Thinking ahead of a turn; it ends with the syntax's `skip_until`."""

    open: str = ""  # what opens it; "" when it is never opened
    prefilled: bool = False  # the chat template has opened it: every turn begins inside
    budget: int | None = None  # tokens

    def __post_init__(self) -> None:
        at_least(1, budget=self.budget)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the checkpoint was taught to live with in one question; None: no limit of its own."""

    rounds: int | None = None  # turns of the policy, the answer included
    image_searches: int | None = None  # with the whole picture or a crop
    text_searches: int | None = None

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds)
        at_least(0, image_searches=self.image_searches, text_searches=self.text_searches)


@dataclass(frozen=True, slots=True)
class LoopRules:
    """What a policy asks of the loop around it; nothing by default."""

    crop: CropRules = CropRules()
    budget: Allowance = Allowance()
    last_notice: str = ""  # the notice that it is shown before an answer is forced; "" for none
