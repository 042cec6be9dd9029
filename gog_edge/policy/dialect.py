"""The dialect: how a policy's text becomes an action, and what came back becomes text. Formats are data (TOML).

One source for training, export and runtime: the teacher writes actions with `render_action`, the loop reads them with
`parse`, and both see observations as `render_observation` makes them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.types import (
    Action,
    Answer,
    Box,
    Evidence,
    GazeSearch,
    ImageSearch,
    Observation,
    Pixels,
    SearchResult,
    Size,
    TextSearch,
)

Segment: TypeAlias = str | Pixels

SCHEMA = 1
FRAMES = ("resized_px", "given_px", "rel1000", "rel1")
NOTICES = ("malformed", "box_refused", "action_refused")
# Whole numbers only: a part of 1e999 or of twenty digits must not pass for a number.
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,7}(?:\.\d{1,20})?(?!\w|\.\d)")
_MAX_ACTION_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Frame:
    """The two sizes that a box may be written in."""

    given: Size  # the picture as the person gave it, upright
    resized: Size  # as the policy sees it


@dataclass(frozen=True, slots=True)
class Tags:
    """Opening and closing marks of each thing a policy can say."""

    reason: tuple[str, str]
    answer: tuple[str, str]
    text_search: tuple[str, str]
    image_search: tuple[str, str]
    whole_picture: str  # between the image_search marks: the whole picture
    box: str  # template with x0, y0, x1, y1
    lead: str  # between an opening mark and words; a space lets a word keep the tokens it has inside a sentence
    skip_until: str  # everything up to the last of these is thinking; empty for none


@dataclass(frozen=True, slots=True)
class ObservationTexts:
    """How search results are put to the policy."""

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


@dataclass(frozen=True, slots=True)
class Dialect:
    """One checkpoint family's way of speaking."""

    name: str
    assumed: bool
    box_frame: str
    system_prompt: str
    question: str
    tags: Tags
    observation: ObservationTexts
    notices: Mapping[str, str]
    not_found: str  # the answer that says it is not in the snapshot

    @property
    def answer_open(self) -> str:
        """What opens a turn that must be an answer."""
        return self.tags.answer[0]

    # --- reading the policy -------------------------------------------------------------------

    def parse(self, text: str, frame: Frame) -> Action:
        """The first action in a turn's text. Boxes come out in pixels of the given picture, not yet bounded.

        Raises:
            MalformedAction: there is none, or it cannot be read; the message says why.
        """
        if self.tags.skip_until:
            text = text.rpartition(self.tags.skip_until)[2]
        text = self._without_reason(text)
        found = self._first_tag(text)
        if found is None:
            raise MalformedAction("there is no action in it")
        kind, body = found
        if len(body) > _MAX_ACTION_CHARS:
            raise MalformedAction(f"the {kind} has {len(body)} characters, more than {_MAX_ACTION_CHARS}")
        if kind == "image_search":
            if body == self.tags.whole_picture:
                return ImageSearch()
            return GazeSearch(self._read_box(body, frame))
        if not body:
            raise MalformedAction(f"the {kind} is empty")
        return Answer(body) if kind == "answer" else TextSearch(body)

    def _without_reason(self, text: str) -> str:
        opening, closing = self.tags.reason
        head, mark, rest = text.partition(opening)
        if mark and closing in rest:
            return head + rest.partition(closing)[2]
        return text

    def _first_tag(self, text: str) -> tuple[str, str] | None:
        """(kind, stripped body) of the tag that opens first; a missing closing mark ends at the text's end."""
        starts = []
        for kind in ("answer", "text_search", "image_search"):
            at = text.find(getattr(self.tags, kind)[0])
            if at >= 0:
                starts.append((at, kind))
        if not starts:
            return None
        at, kind = min(starts)
        opening, closing = getattr(self.tags, kind)
        return kind, text[at + len(opening) :].partition(closing)[0].strip()

    def _read_box(self, body: str, frame: Frame) -> Box:
        numbers = [float(number) for number in _NUMBER.findall(body)]
        if len(numbers) != 4:
            raise MalformedAction(f"a box has four numbers, this has {len(numbers)}: '{body[:60]}'")
        sx, sy = self._unit(frame)
        return Box(numbers[0] * sx, numbers[1] * sy, numbers[2] * sx, numbers[3] * sy)

    def _unit(self, frame: Frame) -> tuple[float, float]:
        """Pixels of the given picture for one unit of the dialect's frame, in x and y."""
        given = frame.given
        match self.box_frame:
            case "resized_px":
                return given.width / frame.resized.width, given.height / frame.resized.height
            case "rel1000":
                return given.width / 1000, given.height / 1000
            case "rel1":
                return float(given.width), float(given.height)
            case _:
                return 1.0, 1.0

    # --- writing as the policy does (the teacher) ---------------------------------------------

    def render_action(self, action: Action, frame: Frame, reason: str = "") -> str:
        """The text that `parse` reads as this action."""
        head = f"{self.tags.reason[0]}{reason}{self.tags.reason[1]}" if reason else ""
        match action:
            case Answer(text):
                return f"{head}{self.tags.answer[0]}{self.tags.lead}{text}{self.tags.answer[1]}"
            case TextSearch(query):
                return f"{head}{self.tags.text_search[0]}{self.tags.lead}{query}{self.tags.text_search[1]}"
            case ImageSearch():
                body = self.tags.whole_picture
            case GazeSearch(box):
                sx, sy = self._unit(frame)
                digits = 3 if self.box_frame == "rel1" else 0
                corners = {"x0": box.x0 / sx, "y0": box.y0 / sy, "x1": box.x1 / sx, "y1": box.y1 / sy}
                body = self.tags.box.format(**{name: f"{value:.{digits}f}" for name, value in corners.items()})
        return f"{head}{self.tags.image_search[0]}{body}{self.tags.image_search[1]}"

    # --- speaking to the policy ---------------------------------------------------------------

    def render_question(self, picture: Pixels, question: str) -> tuple[Segment, ...]:
        """The user turn that opens a dialogue: the picture, then the question."""
        return picture, self.question.replace("{question}", question)

    def render_observation(self, observation: Observation) -> tuple[Segment, ...]:
        """The user turn after an action."""
        texts = self.observation
        if observation.notice is not None:
            return (self.notices[observation.notice].replace("{detail}", observation.detail),)
        result = observation.result
        if result is None:
            raise DialectError("an observation has neither a result nor a notice; the loop must set one")
        lines = [texts.cached] if result.cached else []
        lines += self._result_lines(result)
        body = "".join(line + "\n" for line in lines)
        if observation.crop is not None and texts.show_crop:
            return texts.open, observation.crop, body + texts.close
        return (texts.open + body + texts.close,)

    def _result_lines(self, result: SearchResult) -> list[str]:
        texts = self.observation
        if not result.evidence:
            return [texts.nothing]
        strong = result.found >= texts.strong_from
        lines = [texts.strong if strong else texts.weak]
        # What a weak match says about itself would only mislead: its names are enough to look again.
        left = texts.passages if strong else 0
        for n, evidence in enumerate(result.evidence[: texts.items], start=1):
            shown = evidence.passages[:left]
            left -= len(shown)
            lines.append(self._item_line(n, evidence, [passage.text for passage in shown]))
        return lines

    def _item_line(self, n: int, evidence: Evidence, passages: list[str]) -> str:
        texts = self.observation
        titles = ", ".join(evidence.titles[: texts.titles])
        head = texts.item.replace("{n}", str(n)).replace("{titles}", titles)
        if not passages:
            return head
        return " ".join([head + ":", *(texts.passage.replace("{text}", text) for text in passages)])


def load_dialect(source: str | Path) -> Dialect:
    """Read a dialect: a path to a TOML file, or the name of one that ships with the package.

    Raises:
        DialectError: there is none of that name, or a field is missing, unknown or of a wrong kind.
    """
    if isinstance(source, Path):
        text, where = _read(source), str(source)
    else:
        folder = resources.files("gog_edge.policy") / "dialects"
        entry = folder / f"{source}.toml"
        if not entry.is_file():
            known = sorted(file.name.removesuffix(".toml") for file in folder.iterdir())
            raise DialectError(f"no dialect is named '{source}'; there are {', '.join(known)}, or give a file's path")
        text, where = entry.read_text(encoding="utf-8"), source
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise DialectError(f"dialect {where}: not TOML ({exc})") from exc
    return _build(raw, where)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise DialectError(f"dialect '{path}' cannot be read: {exc}") from exc


def _build(raw: dict[str, Any], where: str) -> Dialect:
    try:
        if raw["schema"] != SCHEMA:
            raise DialectError(f"dialect {where}: schema {raw['schema']} is not {SCHEMA}; use a newer gog_edge")
        if raw["box_frame"] not in FRAMES:
            raise DialectError(f"dialect {where}: box_frame '{raw['box_frame']}' is none of {', '.join(FRAMES)}")
        tags: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in raw["tags"].items()
        }
        dialect = Dialect(
            name=raw["name"],
            assumed=raw["assumed"],
            box_frame=raw["box_frame"],
            system_prompt=raw["prompt"]["system"].strip(),
            question=raw["prompt"]["question"],
            tags=Tags(**tags),
            observation=ObservationTexts(**raw["observation"]),
            notices={key: raw["notice"][key] for key in NOTICES},
            not_found=raw["answer"]["not_found"],
        )
        dialect.tags.box.format(x0=0, y0=0, x1=0, y1=0)
    except KeyError as exc:
        raise DialectError(f"dialect {where}: the field {exc} is missing") from exc
    except (TypeError, ValueError, IndexError, AttributeError) as exc:
        raise DialectError(f"dialect {where}: {exc}") from exc
    _check_kinds(dialect, where)
    return dialect


def _check_kinds(part: Any, where: str) -> None:
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            _check_kinds(value, where)
        elif not _fits(value, str(field.type)):
            raise DialectError(f"dialect {where}: {field.name} is {value!r}, which is no {field.type}")


def _fits(value: Any, kind: str) -> bool:
    match kind:
        case "tuple[str, str]":
            return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, str) and v for v in value)
        case "Mapping[str, str]":
            return all(isinstance(text, str) for text in value.values())
        case "float":
            return type(value) in (int, float)
        case _:
            return type(value).__name__ == kind
