"""Dialects: how the text of one checkpoint family maps to actions, and how observations are written for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.picture import resize
from gog_edge.policy.dialect.actions import (
    MAX_ACTION_CHARS,
    ActionSpan,
    BoxFrame,
    RawAction,
    ShownImage,
    ShownImages,
    TagSyntax,
)
from gog_edge.policy.dialect.tool_calls import ToolCallSyntax
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

Syntax: TypeAlias = TagSyntax | ToolCallSyntax
TurnPart: TypeAlias = str | Pixels  # a part of a user turn
GIVE_UP = "give_up"  # an optional notice, shown before an answer is forced


# --- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CropRules:
    """How crops are cut and shown: the table [crop]. None: the default of the agent loop."""

    source: Literal["given", "any"] = "given"  # boxes refer to the given picture, or to any image shown
    image_base: Annotated[int, Ge(0)] = 0  # the index of the given picture; crops follow
    min_side: Annotated[int, Ge(1)] | None = None  # pixels; shorter sides are grown about their centre
    pad: Annotated[float, Ge(0)] | None = None  # fraction of each side that is added on all sides
    min_pixels: Annotated[int, Ge(1)] | None = None  # smaller crops are enlarged to this area before they are shown

    def enlarged(self, crop: Pixels) -> Pixels:
        """Return the crop as it is shown, [height, width, 3] uint8."""
        height, width, _ = crop.shape
        grow = math.sqrt((self.min_pixels or 0) / (height * width))
        return resize(crop, Size(math.ceil(width * grow), math.ceil(height * grow))) if grow > 1 else crop


@dataclass(frozen=True, slots=True)
class TurnRules:
    """Which of several actions in one turn counts: the table [turn]."""

    match: Literal["first", "last"] = "first"
    action_at_end: bool = False  # a search must end its turn to count; an answer may be anywhere


@dataclass(frozen=True, slots=True)
class ThinkingRules:
    """Thinking before an action, which ends with the syntax's `skip_until`: the table [thinking]."""

    open: str = ""  # the opening tag; "" for policies that do not think
    prefilled: bool = False  # the chat template writes the opening tag: every turn begins inside thinking
    budget: Annotated[int, Ge(1)] | None = None  # tokens


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """The limits per question that the checkpoint was trained with: the table [budget]. None: no limit."""

    rounds: Annotated[int, Ge(1)] | None = None  # turns of the policy, the answer included
    image_searches: Annotated[int, Ge(0)] | None = None  # with the whole picture or a crop
    text_searches: Annotated[int, Ge(0)] | None = None


@dataclass(frozen=True, slots=True)
class LoopRules:
    """What a policy requires of the agent loop; nothing by default."""

    crop: CropRules = CropRules()
    budget: SearchLimits = SearchLimits()
    final_notice: str = ""  # the notice that is shown before an answer is forced; "" for none


# --- observations ---------------------------------------------------------------------------------

_TAG = re.compile(r"</?\w[\w|-]*>")
_LINE_END = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class ObservationFormat:
    """How search results are written for the policy: the table [observation].

    In `open` and `close`, {question} stands for the question that was asked.
    """

    open: str
    close: str
    item: str  # template with {n} and {titles}
    passage: str  # template with {text}
    strong: str
    weak: str
    cached: str
    nothing: str
    strong_from: float  # calibrated probability from which a match is strong
    items: int
    passages: int
    titles: int
    show_crop: bool
    layout: Literal["image_text", "text_image"] = "image_text"  # order inside `open` and `close`

    @property
    def delimiters(self) -> tuple[str, ...]:
        """Return the tags that open and close an observation."""
        return tuple(_TAG.findall(self.open + self.close))

    def wrap(self, body: str, crop: Pixels | None, question: str) -> tuple[TurnPart, ...]:
        """Return the observation with its crop, if crops are shown."""
        opening, closing = (text.replace("{question}", question) for text in (self.open, self.close))
        if crop is None or not self.show_crop:
            return (opening + body + closing,)
        if self.layout == "text_image":
            return opening + body, crop, closing
        return opening, crop, body + closing

    def body(self, result: SearchResult, delimiters: Iterable[str]) -> str:
        """Return a search result as lines of text; `delimiters` are escaped in titles and passages."""
        lines = [self.cached] if result.cached else []
        lines += self._lines(result, tuple(delimiters))
        return "".join(line + "\n" for line in lines)

    def _lines(self, result: SearchResult, delimiters: tuple[str, ...]) -> list[str]:
        if not result.evidence:
            return [self.nothing]
        strong = result.found >= self.strong_from
        lines = [self.strong if strong else self.weak]
        # The passages of a weak match would be misleading; its titles are enough to search again.
        remaining = self.passages if strong else 0
        for n, evidence in enumerate(result.evidence[: self.items], start=1):
            shown = evidence.passages[:remaining]
            remaining -= len(shown)
            lines.append(self._item(n, evidence, [passage.text for passage in shown], delimiters))
        return lines

    def _item(self, n: int, evidence: Evidence, passages: list[str], delimiters: tuple[str, ...]) -> str:
        titles = escape(", ".join(evidence.titles[: self.titles]), delimiters)
        head = self.item.replace("{n}", str(n)).replace("{titles}", titles)
        if not passages:
            return head
        texts = (self.passage.replace("{text}", escape(text, delimiters)) for text in passages)
        return " ".join([head + ":", *texts])


def escape(text: str, delimiters: tuple[str, ...]) -> str:
    """Return untrusted text on one line, with a space inside every delimiter, so that it cannot act as one."""
    text = _LINE_END.sub(" ", text)
    return _any_delimiter(delimiters).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) if delimiters else text


@lru_cache(maxsize=64)
def _any_delimiter(delimiters: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, delimiters)), re.IGNORECASE)


# --- the dialect ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialect:
    """The prompt, syntax and rules of one checkpoint family."""

    name: str
    assumed: bool  # True: inferred, as the authors have not published the format
    box_frame: BoxFrame
    system_prompt: str
    question: str  # template with {question}
    syntax: Syntax
    observation: ObservationFormat
    notices: Mapping[str, str]
    not_found: str  # the answer for what is not in the snapshot
    crop: CropRules = CropRules()
    turn: TurnRules = TurnRules()
    thinking: ThinkingRules = ThinkingRules()
    budget: SearchLimits = SearchLimits()

    @property
    def tags(self) -> TagSyntax:
        """Return the tags.

        Raises:
            DialectError: the dialect has tool calls instead.
        """
        if not isinstance(self.syntax, TagSyntax):
            raise DialectError(f"dialect {self.name} has tool calls instead of tags; use its 'syntax'")
        return self.syntax

    @property
    def answer_open(self) -> str:
        """Return the text that opens a turn which must be an answer."""
        return self._thinking_close + self.syntax.answer_open

    @property
    def _thinking_close(self) -> str:
        return f"{self.syntax.skip_until}\n\n" if self.thinking.prefilled else ""

    @property
    def loop_rules(self) -> LoopRules:
        """Return what the policy requires of the agent loop."""
        return LoopRules(self.crop, self.budget, GIVE_UP if GIVE_UP in self.notices else "")

    def for_template(self, assistant_open: str) -> Dialect:
        """Return the dialect for a chat template that opens a turn with `assistant_open`, which may open thinking."""
        opened = self.thinking.open != "" and assistant_open.rstrip().endswith(self.thinking.open)
        return replace(self, thinking=replace(self.thinking, prefilled=True)) if opened else self

    # --- parsing turns ---

    def parse(self, text: str, images: ShownImages) -> Action:
        """Return the action of a turn; boxes are converted to pixels of the given picture and not clipped.

        Raises:
            MalformedAction: the turn has no action, or one that is not valid; the message gives the reason.
        """
        return self._action(self.parse_raw(text), images)

    def parse_partial(self, text: str, images: ShownImages) -> Action | None:
        """Return the action of an incomplete turn once further text cannot change it, else None.

        One exception: a closing tag of thinking that was never opened would turn the action into thinking. The result
        of `parse` for the complete turn is authoritative.
        """
        if self.turn.match == "last" or self.turn.action_at_end:
            return None
        visible, _ = self._without_thinking(text)
        span = next(self.syntax.find_actions(visible), None)
        if span is None or not span.closed or self.syntax.reason[0] in visible[: span.start]:
            return None
        try:
            return self._action(self._parse_span(span), images)
        except MalformedAction:
            return None

    def parse_raw(self, text: str) -> RawAction:
        """Return the action of a turn as it was written.

        Raises:
            MalformedAction: the turn has no action, or one that is not valid.
        """
        visible, thinking = self._without_thinking(text)
        span = self._select(visible)
        if span is None:
            raise MalformedAction("it ended inside the thinking" if thinking else "it contains no action")
        return self._parse_span(span)

    def _without_thinking(self, text: str) -> tuple[str, bool]:
        """Return the text outside of thinking, and whether the text ends inside of it."""
        closing, opening = self.syntax.skip_until, self.thinking.open
        _, closed, visible = text.rpartition(closing) if closing else ("", "", text)
        if self.thinking.prefilled and not closed:
            return "", True
        opened = ""
        if opening:
            visible, opened, _ = visible.partition(opening)
        return self._without_reason(visible), opened != ""

    def _without_reason(self, text: str) -> str:
        opening, closing = self.syntax.reason
        head, found, rest = text.partition(opening)
        if found and closing in rest:
            return head + rest.partition(closing)[2]
        return text

    def _select(self, text: str) -> ActionSpan | None:
        """Return the action that counts, by the rules of [turn]."""
        spans = self.syntax.find_actions(text)
        if self.turn == TurnRules():
            return next(spans, None)
        found, end = list(spans), len(text.rstrip())
        valid = [
            span for span in found
            if not self.turn.action_at_end or span.kind == "answer" or (span.closed and span.end >= end)
        ]  # fmt: skip
        if found and not valid:
            raise MalformedAction(f"the {found[-1].kind} does not end the turn")
        return None if not valid else valid[0] if self.turn.match == "first" else valid[-1]

    def _parse_span(self, span: ActionSpan) -> RawAction:
        if len(span.body) > MAX_ACTION_CHARS:
            raise MalformedAction(f"the {span.kind} has {len(span.body)} characters, more than {MAX_ACTION_CHARS}")
        action = self.syntax.parse(span)
        if action.kind in ("answer", "text_search") and not action.text:
            raise MalformedAction(f"the {action.kind} is empty")
        return action

    def _action(self, raw: RawAction, images: ShownImages) -> Action:
        if raw.kind == "answer":
            return Answer(raw.text)
        if raw.kind == "text_search":
            return TextSearch(raw.text)
        image = self._referenced(raw.image, images)
        if raw.corners is not None:
            return GazeSearch(image.to_picture(raw.corners, self.box_frame))
        return ImageSearch() if image == images.picture else GazeSearch(image.box)

    def _referenced(self, index: int | None, images: ShownImages) -> ShownImage:
        """Return the image with an index; the given picture without one, or when boxes only refer to that."""
        if index is None or self.crop.source == "given":
            return images.picture
        shown, first = images.all, self.crop.image_base
        if not first <= index < first + len(shown):
            last = first + len(shown) - 1
            raise MalformedAction(f"image {index} does not exist; images {first} to {last} were shown")
        return shown[index - first]

    # --- rendering turns ---

    def render_action(self, action: Action, images: ShownImages, reason: str = "") -> str:
        """Return the text that `parse` reads as this action, as a policy would write it.

        Raises:
            DialectError: the dialect cannot express the action.
        """
        opening, closing = self.syntax.reason
        if self.thinking.prefilled:
            head = reason + self._thinking_close
        else:
            head = f"{opening}{reason}{closing}" if reason else ""
        return head + self.syntax.render(self._raw(action, images), digits=3 if self.box_frame == "rel1" else 0)

    def _raw(self, action: Action, images: ShownImages) -> RawAction:
        first = self.crop.image_base
        match action:
            case Answer(text):
                return RawAction("answer", text=text)
            case TextSearch(query):
                return RawAction("text_search", text=query)
            case ImageSearch():
                return RawAction("image_search", image=first)
            case GazeSearch(box):
                corners = images.picture.from_picture(box, self.box_frame)
                return RawAction("gaze_search", corners=corners, image=first)

    def render_question(self, picture: Pixels, question: str) -> tuple[TurnPart, ...]:
        """Return the user turn that opens a conversation: the picture, then the question."""
        return picture, self.question.replace("{question}", question)

    def images_after(
        self, images: ShownImages, observation: Observation, resized: Callable[[Size], Size]
    ) -> ShownImages:
        """Return the images after an observation was shown; `resized` maps a crop's size to that the policy sees."""
        crop, box = observation.crop, observation.crop_box
        if self.crop.source == "given" or crop is None or box is None or not self.observation.show_crop:
            return images
        height, width, _ = self.crop.enlarged(crop).shape
        return images.with_crop(box, resized(Size(width, height)))

    def render_observation(self, observation: Observation, question: str = "") -> tuple[TurnPart, ...]:
        """Return the user turn after an action; some dialects repeat the `question` in it.

        Raises:
            DialectError: the dialect lacks the notice, or the observation has neither a result nor a notice.
        """
        delimiters = (*self.syntax.delimiters, *self.observation.delimiters, *filter(None, [self.thinking.open]))
        if observation.notice is not None:
            if observation.notice not in self.notices:
                raise DialectError(f"dialect {self.name} has no notice '{observation.notice}'; add it to [notice]")
            return (self.notices[observation.notice].replace("{detail}", escape(observation.detail, delimiters)),)
        if observation.result is None:
            raise DialectError("the observation has neither a result nor a notice; set one of them")
        crop = None if observation.crop is None else self.crop.enlarged(observation.crop)
        body = self.observation.body(observation.result, delimiters)
        return self.observation.wrap(body, crop, escape(question, delimiters))


class TurnParser:
    """Parses one turn while it is generated: passes on its text, and its action as soon as that is certain."""

    def __init__(self, dialect: Dialect, images: ShownImages, on_text: Callable[[str], None] | None,
                 on_action: Callable[[Action], None] | None) -> None:
        """`on_text` is called with each piece of text; `on_action` at most once."""
        self._dialect, self._images = dialect, images
        self._on_text, self._on_action = on_text, on_action
        self.text = ""

    def feed(self, piece: str) -> None:
        """Add the next piece of text."""
        if not piece:
            return
        self.text += piece
        if self._on_text is not None:
            self._on_text(piece)
        if self._on_action is not None:
            action = self._dialect.parse_partial(self.text, self._images)
            if action is not None:
                on_action, self._on_action = self._on_action, None
                on_action(action)

    def result(self) -> tuple[Action | None, str]:
        """Return the action of the complete turn, or None and the reason why it is malformed."""
        try:
            return self._dialect.parse(self.text, self._images), ""
        except MalformedAction as exc:
            return None, str(exc)
