"""What differs between checkpoint families beside their syntax: crops, turns, thinking, budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.policy.dialect.actions import (
    MAX_CHARS,
    BoxFrame,
    Frame,
    Said,
    Span,
    Syntax,
    Tags,
    View,
)
from gog_edge.policy.vision import resize
from gog_edge.tables import at_least
from gog_edge.types import (
    Action,
    Answer,
    Evidence,
    GazeSearch,
    ImageSearch,
    Observation,
    Pixels,
    SearchResult,
    Size,
    TextSearch,
)


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


_TAG = re.compile(r"</?\w[\w|-]*>")
_LINE_END = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class ObservationTexts:
    """How search results are put to the policy; {question} in `open` and `close` is what the person asked."""

    open: str
    close: str
    item: str  # n, titles
    passage: str  # text
    strong: str
    weak: str
    cached: str
    nothing: str
    strong_from: float
    items: int
    passages: int
    titles: int
    show_crop: bool
    layout: Literal["image_text", "text_image"] = "image_text"  # what stands first inside the marks

    @property
    def marks(self) -> tuple[str, ...]:
        """The tags that open and close an observation."""
        return tuple(_TAG.findall(self.open + self.close))

    def wrap(self, body: str, crop: Pixels | None, question: str) -> tuple[str | Pixels, ...]:
        """An observation's text, and the crop at its place."""
        opening, closing = (text.replace("{question}", question) for text in (self.open, self.close))
        if crop is None or not self.show_crop:
            return (opening + body + closing,)
        if self.layout == "text_image":
            return opening + body, crop, closing
        return opening, crop, body + closing

    def body(self, result: SearchResult, marks: Iterable[str]) -> str:
        """What a search found, line by line; `marks` are the dialect's."""
        lines = [self.cached] if result.cached else []
        lines += self._lines(result, tuple(marks))
        return "".join(line + "\n" for line in lines)

    def _lines(self, result: SearchResult, marks: tuple[str, ...]) -> list[str]:
        if not result.evidence:
            return [self.nothing]
        strong = result.found >= self.strong_from
        lines = [self.strong if strong else self.weak]
        # What a weak match says about itself would only mislead: its names are enough to look again.
        left = self.passages if strong else 0
        for n, evidence in enumerate(result.evidence[: self.items], start=1):
            shown = evidence.passages[:left]
            left -= len(shown)
            lines.append(self._item(n, evidence, [passage.text for passage in shown], marks))
        return lines

    def _item(self, n: int, evidence: Evidence, passages: list[str], marks: tuple[str, ...]) -> str:
        titles = quoted(", ".join(evidence.titles[: self.titles]), marks)
        head = self.item.replace("{n}", str(n)).replace("{titles}", titles)
        if not passages:
            return head
        said = (self.passage.replace("{text}", quoted(text, marks)) for text in passages)
        return " ".join([head + ":", *said])


def quoted(text: str, marks: tuple[str, ...]) -> str:
    """What others wrote, on one line and with every mark broken: an article cannot close an observation, or act."""
    text = _LINE_END.sub(" ", text)
    return _any_mark(marks).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) if marks else text


@lru_cache(maxsize=64)
def _any_mark(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, marks)), re.IGNORECASE)


Segment: TypeAlias = str | Pixels
GIVE_UP = "give_up"  # a notice that a dialect may have: said before a forced answer


@dataclass(frozen=True, slots=True)
class Dialect:
    """One checkpoint family's way of speaking."""

    name: str
    assumed: bool
    box_frame: BoxFrame
    system_prompt: str
    question: str
    syntax: Syntax
    observation: ObservationTexts
    notices: Mapping[str, str]
    not_found: str  # the answer that says it is not in the snapshot
    crop: CropRules = CropRules()
    turn: TurnRules = TurnRules()
    thinking: Thinking = Thinking()
    budget: Allowance = Allowance()

    @property
    def tags(self) -> Tags:
        """The tags; DialectError for a dialect of tool calls."""
        if not isinstance(self.syntax, Tags):
            raise DialectError(f"dialect {self.name} speaks in tool calls and has no tags; look at its syntax")
        return self.syntax

    @property
    def answer_open(self) -> str:
        """What opens a turn that must be an answer."""
        return self._think_close + self.syntax.answer_open

    @property
    def _think_close(self) -> str:
        return f"{self.syntax.skip_until}\n\n" if self.thinking.prefilled else ""

    @property
    def loop_rules(self) -> LoopRules:
        """What the loop is to keep to."""
        return LoopRules(self.crop, self.budget, GIVE_UP if GIVE_UP in self.notices else "")

    def after(self, assistant_open: str) -> Dialect:
        """The dialect behind a chat template's opening of a turn: some open the thinking there."""
        opened = self.thinking.open != "" and assistant_open.rstrip().endswith(self.thinking.open)
        return replace(self, thinking=replace(self.thinking, prefilled=True)) if opened else self

    # --- reading the policy -------------------------------------------------------------------

    def parse(self, text: str, frame: Frame) -> Action:
        """The action of a turn's text. Boxes come out in pixels of the given picture, not yet bounded.

        Raises:
            MalformedAction: there is none, or it cannot be read; the message says why.
        """
        return self._action(self.read(text), frame)

    def closed_action(self, text: str, frame: Frame) -> Action | None:
        """The action of a turn that is still being written, as soon as more text cannot change it; else None.

        Only thinking that is closed without having been opened could still take it back: `parse` has the last word.
        """
        if self.turn.match == "last" or self.turn.action_at_end:
            return None  # more may follow
        spoken, _ = self._spoken(text)
        span = next(self.syntax.spans(spoken), None)
        if span is None or not span.closed or self.syntax.reason[0] in spoken[: span.start]:
            return None
        try:
            return self._action(self._read(span), frame)
        except MalformedAction:
            return None

    def read(self, text: str) -> Said:
        """The action of a turn's text as it was written. Raises MalformedAction."""
        spoken, thinking = self._spoken(text)
        span = self._counting(spoken)
        if span is None:
            raise MalformedAction("it stopped while thinking" if thinking else "there is no action in it")
        return self._read(span)

    def _spoken(self, text: str) -> tuple[str, bool]:
        """(what is said outside of thinking, whether thinking was left open)."""
        closing, opening = self.syntax.skip_until, self.thinking.open
        _, closed, spoken = text.rpartition(closing) if closing else ("", "", text)
        if self.thinking.prefilled and not closed:
            return "", True
        opened = ""
        if opening:
            spoken, opened, _ = spoken.partition(opening)
        return self._without_reason(spoken), opened != ""

    def _without_reason(self, text: str) -> str:
        opening, closing = self.syntax.reason
        head, mark, rest = text.partition(opening)
        if mark and closing in rest:
            return head + rest.partition(closing)[2]
        return text

    def _counting(self, text: str) -> Span | None:
        """The span that counts, of all in a turn."""
        spans = self.syntax.spans(text)
        if self.turn == TurnRules():
            return next(spans, None)
        found, end = list(spans), len(text.rstrip())
        last = [span for span in found if not self.turn.action_at_end or span.kind == "answer" or _ends(span, end)]
        if found and not last:
            raise MalformedAction(f"the {found[-1].kind} does not end the turn")
        return None if not last else last[0] if self.turn.match == "first" else last[-1]

    def _read(self, span: Span) -> Said:
        if len(span.body) > MAX_CHARS:
            raise MalformedAction(f"the {span.kind} has {len(span.body)} characters, more than {MAX_CHARS}")
        said = self.syntax.read(span)
        if said.kind in ("answer", "text_search") and not said.words:
            raise MalformedAction(f"the {said.kind} is empty")
        return said

    def _action(self, said: Said, frame: Frame) -> Action:
        if said.kind == "answer":
            return Answer(said.words)
        if said.kind == "text_search":
            return TextSearch(said.words)
        view = self._view(said.image, frame)
        if said.corners is not None:
            return GazeSearch(view.to_given(said.corners, self.box_frame))
        return ImageSearch() if view == frame.whole else GazeSearch(view.box)

    def _view(self, image: int | None, frame: Frame) -> View:
        """The image that was named; the given picture where none was, or where only that is ever cut."""
        if image is None or self.crop.source == "given":
            return frame.whole
        views, first = frame.views, self.crop.image_base
        if not first <= image < first + len(views):
            raise MalformedAction(f"there is no image {image}; shown are {first} to {first + len(views) - 1}")
        return views[image - first]

    # --- writing as the policy does (the teacher) ---------------------------------------------

    def render_action(self, action: Action, frame: Frame, reason: str = "") -> str:
        """The text that `parse` reads as this action. DialectError for one that the dialect cannot say."""
        opening, closing = self.syntax.reason
        if self.thinking.prefilled:
            head = reason + self._think_close
        else:
            head = f"{opening}{reason}{closing}" if reason else ""
        return head + self.syntax.write(self._said(action, frame), digits=3 if self.box_frame == "rel1" else 0)

    def _said(self, action: Action, frame: Frame) -> Said:
        first = self.crop.image_base
        match action:
            case Answer(text):
                return Said("answer", words=text)
            case TextSearch(query):
                return Said("text_search", words=query)
            case ImageSearch():
                return Said("image_search", image=first)
            case GazeSearch(box):
                return Said("gaze_search", corners=frame.whole.to_corners(box, self.box_frame), image=first)

    # --- speaking to the policy ---------------------------------------------------------------

    def render_question(self, picture: Pixels, question: str) -> tuple[Segment, ...]:
        """The user turn that opens a dialogue: the picture, then the question."""
        return picture, self.question.replace("{question}", question)

    def frame_after(self, frame: Frame, observation: Observation, resized: Callable[[Size], Size]) -> Frame:
        """The frame once an observation was shown; `resized`: the size in which the policy sees a crop."""
        crop, box = observation.crop, observation.crop_box
        if self.crop.source == "given" or crop is None or box is None or not self.observation.show_crop:
            return frame
        height, width, _ = self.crop.enlarged(crop).shape
        return frame.showing(box, resized(Size(width, height)))

    def render_observation(self, observation: Observation, question: str = "") -> tuple[Segment, ...]:
        """The turn after an action; `question` is what the person asked, which some dialects say again."""
        marks = (*self.syntax.marks, *self.observation.marks, *filter(None, [self.thinking.open]))
        if observation.notice is not None:
            if observation.notice not in self.notices:
                raise DialectError(f"dialect {self.name} has no notice '{observation.notice}'; write it into [notice]")
            return (self.notices[observation.notice].replace("{detail}", quoted(observation.detail, marks)),)
        if observation.result is None:
            raise DialectError("an observation has neither a result nor a notice; the loop must set one")
        crop = None if observation.crop is None else self.crop.enlarged(observation.crop)
        return self.observation.wrap(self.observation.body(observation.result, marks), crop, quoted(question, marks))


def _ends(span: Span, end: int) -> bool:
    return span.closed and span.end >= end
