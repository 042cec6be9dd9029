"""Load dialect files (TOML): the ones that ship with the package, and those of a user."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gog_edge.errors import DialectError
from gog_edge.files import write_atomic
from gog_edge.policy.dialect.actions import (
    IN_WORDS,
    BoxFrame,
    Syntax,
    Tags,
    ToolCalls,
)
from gog_edge.policy.dialect.dialect import (
    GIVE_UP,
    Allowance,
    CropRules,
    Dialect,
    ObservationTexts,
    Thinking,
    TurnRules,
)
from gog_edge.policy.manifest import DIALECT
from gog_edge.tables import build

SCHEMA = 1
NOTICES = ("malformed", "box_refused", "action_refused")
MAX_BYTES = 256 * 2**10  # of a dialect, of a prompt
PROMPT_SUFFIXES = (".txt", ".md")


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
    return resources.files("gog_edge.policy.dialect")


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
