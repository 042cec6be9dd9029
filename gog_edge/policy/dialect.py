"""The dialect: how a policy's text becomes an action, and what came back becomes text. Formats are data (TOML).

One source for training, export and runtime: the teacher writes actions with `render_action`, the loop reads them with
`parse`, and both see observations as `render_observation` makes them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeAlias

from gog_edge.errors import DialectError, MalformedAction
from gog_edge.files import write_atomic
from gog_edge.policy.action_syntax import MAX_CHARS, Said, Span, Syntax, Tags, ToolCalls
from gog_edge.policy.dialect_rules import Allowance, CropRules, LoopRules, Thinking, TurnRules
from gog_edge.policy.frames import FRAMES, IN_WORDS, BoxFrame, Frame, View
from gog_edge.policy.manifest import DIALECT
from gog_edge.policy.observation_texts import ObservationTexts, quoted
from gog_edge.policy.tables import build
from gog_edge.types import Action, Answer, GazeSearch, ImageSearch, Observation, Pixels, Size, TextSearch

__all__ = ["FRAMES", "Dialect", "Frame", "Segment", "Tags", "ToolCalls", "copy_dialect", "load_dialect", "shipped"]

Segment: TypeAlias = str | Pixels

SCHEMA = 1
NOTICES = ("malformed", "box_refused", "action_refused")
GIVE_UP = "give_up"  # a notice that a dialect may have: said before a forced answer
MAX_BYTES = 256 * 2**10  # of a dialect, of a prompt
PROMPT_SUFFIXES = (".txt", ".md")


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


# --- dialect files ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands above the first table."""

    schema: int
    name: str
    assumed: bool
    box_frame: BoxFrame


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Our own wording, or files beside the dialect: the authors' wording that a user has."""

    system: str = ""  # {tools}: the tools' schemas, one a line
    question: str = ""
    system_file: str = ""
    question_file: str = ""


@dataclass(frozen=True, slots=True)
class _Answer:
    not_found: str


_PARTS: Mapping[str, type[Any]] = {
    "crop": CropRules,
    "turn": TurnRules,
    "thinking": Thinking,
    "budget": Allowance,
}
_HEAD = tuple(field.name for field in fields(_Head))
_TABLES = ("prompt", "tags", "tool_calls", "observation", "notice", "answer", *_PARTS)


def shipped() -> tuple[str, ...]:
    """The names of the dialects that come with the package."""
    names = (file.name for file in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_dialect(source: str | Path) -> Dialect:
    """Read a dialect: a path to a TOML file, or the name of one that ships with the package.

    Raises:
        DialectError: there is none of that name, or a field is missing, unknown or of a wrong kind.
    """
    file = _file(source)
    try:
        raw = tomllib.loads(_text(file))
        return _build(raw, file)
    except tomllib.TOMLDecodeError as exc:
        raise DialectError(f"dialect {source}: not TOML ({exc})") from exc
    except DialectError as exc:
        raise DialectError(f"dialect {source}: {exc}") from exc


def copy_dialect(source: str | Path, folder: Path, box_frame: BoxFrame | None = None
                 ) -> tuple[Dialect, tuple[str, ...]]:
    """Write a dialect, and the prompt files it names, into a folder; returns it and the names of what was written.

    `box_frame` replaces the file's own. Raises DialectError.
    """
    dialect, file = load_dialect(source), _file(source)
    frame, text = box_frame or dialect.box_frame, _text(file)
    text = text.replace(f'box_frame = "{dialect.box_frame}"', f'box_frame = "{frame}"', 1)
    raw = tomllib.loads(text)
    if raw["box_frame"] != frame:
        raise DialectError(f'dialect {source}: write its frame as box_frame = "..." to have it replaced')
    prompt = build(_Prompt, raw["prompt"], "prompt")
    prompts = tuple(name for name in (prompt.system_file, prompt.question_file) if name)
    for name in prompts:
        write_atomic(folder / name, _text(_beside(file, name)).encode())
    write_atomic(folder / DIALECT, text.encode())
    return load_dialect(folder / DIALECT), (DIALECT, *prompts)


def _build(raw: Mapping[str, Any], file: Traversable) -> Dialect:
    unknown = [key for key in raw if key not in _TABLES and key not in _HEAD]
    if unknown:
        raise DialectError(f"unknown key '{unknown[0]}'; known are {', '.join((*_HEAD, *_TABLES))}")
    head = build(_Head, {key: value for key, value in raw.items() if key in _HEAD}, "the head")
    if head.schema != SCHEMA:
        raise DialectError(f"schema {head.schema} is not {SCHEMA}; use a newer gog_edge")
    syntax = _syntax(raw)
    system, question = _prompts(build(_Prompt, raw.get("prompt"), "prompt"), file)
    if isinstance(syntax, ToolCalls):
        system = system.replace("{tools}", "\n".join(json.dumps(tool.schema()) for tool in syntax.tools))
    parts = {name: build(kind, raw.get(name, {}), name) for name, kind in _PARTS.items()}
    if parts["thinking"] != Thinking() and not syntax.skip_until:
        raise DialectError("[thinking] is given and skip_until is empty, so that no thought would ever end")
    return Dialect(
        name=head.name,
        assumed=head.assumed,
        box_frame=head.box_frame,
        system_prompt=system.strip().replace("{frame}", IN_WORDS[head.box_frame]),
        question=question,
        syntax=syntax,
        observation=build(ObservationTexts, raw.get("observation"), "observation"),
        notices=_notices(raw.get("notice")),
        not_found=build(_Answer, raw.get("answer"), "answer").not_found,
        **parts,
    )


def _syntax(raw: Mapping[str, Any]) -> Syntax:
    if ("tags" in raw) == ("tool_calls" in raw):
        raise DialectError("it has both [tags] and [tool_calls], or neither; a policy speaks in one of them")
    return build(Tags, raw["tags"], "tags") if "tags" in raw else build(ToolCalls, raw["tool_calls"], "tool_calls")


def _prompts(prompt: _Prompt, file: Traversable) -> tuple[str, str]:
    texts = []
    for name, own, named in (
        ("system", prompt.system, prompt.system_file),
        ("question", prompt.question, prompt.question_file),
    ):
        if (own == "") == (named == ""):
            raise DialectError(f"[prompt] needs one of '{name}' and '{name}_file'")
        texts.append(own or _text(_beside(file, named)))
    system, question = texts
    if "{question}" not in question:
        raise DialectError("[prompt] question does not hold {question}, so that nothing would be asked")
    return system, question


def _notices(table: Any) -> Mapping[str, str]:
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise DialectError(f"notices is {table!r}, which is no table of texts")
    missing = [key for key in NOTICES if key not in table]
    unknown = [key for key in table if key not in (*NOTICES, GIVE_UP)]
    if missing or unknown:
        raise DialectError(f"[notice] lacks {missing} and has {unknown}; it takes {', '.join((*NOTICES, GIVE_UP))}")
    return dict(table)


def _folder() -> Traversable:
    return resources.files("gog_edge.policy") / "dialects"


def _file(source: str | Path) -> Traversable:
    if isinstance(source, Path):
        return source
    if source not in shipped():
        raise DialectError(f"no dialect is named '{source}'; there are {', '.join(shipped())}, or give a file's path")
    return _folder() / f"{source}.toml"


def _beside(file: Traversable, name: str) -> Traversable:
    """A prompt file: it lies in the dialect's own folder, and its name can be no other part's of a policy."""
    if Path(name).name != name or not name.endswith(PROMPT_SUFFIXES):
        raise DialectError(f"the prompt file '{name}' must lie beside the dialect and end in {PROMPT_SUFFIXES}")
    return file.parent / name if isinstance(file, Path) else _folder() / name


def _text(file: Traversable) -> str:
    try:
        data = file.read_bytes()
        if len(data) > MAX_BYTES:
            raise DialectError(f"'{file}' has {len(data)} bytes, more than {MAX_BYTES}; no prompt is that long")
        return data.decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise DialectError(f"'{file}' cannot be read: {exc}") from exc
