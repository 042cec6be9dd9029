"""Read dialect files (TOML), both those of the package and those of users, and copy them into policy folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gog_edge.errors import DialectError
from gog_edge.files import parse_toml, read_bounded, write_atomic
from gog_edge.policy.dialect.actions import FRAME_DESCRIPTIONS, BoxFrame, TagSyntax
from gog_edge.policy.dialect.dialect import (
    CropRules,
    Dialect,
    ObservationFormat,
    SearchLimits,
    Syntax,
    ThinkingRules,
    TurnRules,
)
from gog_edge.policy.dialect.tool_calls import ToolCallSyntax
from gog_edge.tables import build, shown

SCHEMA = 1
DIALECT_FILE = "dialect.toml"  # in a policy folder
MAX_BYTES = 256 * 2**10  # of a dialect file or a prompt file
PROMPT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The prompts, or the names of files next to the dialect: users may have the authors' own wording."""

    system: str = ""  # {tools} stands for the schemas of the tools, one per line
    question: str = ""
    system_file: str = ""
    question_file: str = ""


@dataclass(frozen=True, slots=True)
class _Notices:
    malformed: str
    box_refused: str
    action_refused: str
    give_up: str | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    not_found: str


@dataclass(frozen=True, slots=True)
class _DialectFile:
    """The keys and tables of a dialect file; exactly one of `tags` and `tool_calls` is present."""

    schema: int
    name: str
    assumed: bool
    box_frame: BoxFrame
    prompt: _Prompt
    observation: ObservationFormat
    notice: _Notices
    answer: _Answer
    tags: TagSyntax | None = None
    tool_calls: ToolCallSyntax | None = None
    crop: CropRules = CropRules()
    turn: TurnRules = TurnRules()
    thinking: ThinkingRules = ThinkingRules()
    budget: SearchLimits = SearchLimits()


def shipped() -> tuple[str, ...]:
    """Return the names of the dialects in the package, sorted."""
    names = (file.name for file in _package_folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_dialect(source: str | Path) -> Dialect:
    """Read a dialect from the path of a TOML file, or by the name of a dialect in the package.

    Raises:
        DialectError: the name is unknown, or a key is missing, unknown or has a wrong value.
    """
    file = _locate(source)
    try:
        return _to_dialect(_read_toml(file), file)
    except DialectError as exc:
        raise DialectError(f"dialect {source}: {exc}") from exc


def copy_dialect(source: str | Path, folder: Path, box_frame: BoxFrame | None = None
                 ) -> tuple[Dialect, tuple[str, ...]]:
    """Copy a dialect and its prompt files to a folder; return the dialect and the names of the files written.

    `box_frame` replaces that of the file.

    Raises:
        DialectError: the dialect cannot be read, or its box frame cannot be replaced.
    """
    dialect, file = load_dialect(source), _locate(source)
    frame, text = box_frame or dialect.box_frame, _read_text(file)
    text = text.replace(f'box_frame = "{dialect.box_frame}"', f'box_frame = "{frame}"', 1)
    raw = parse_toml(text)
    if raw["box_frame"] != frame:
        raise DialectError(f'dialect {source}: its box frame cannot be replaced; write it as box_frame = "..."')
    prompt = build(_Prompt, raw["prompt"], "prompt", error=DialectError)
    prompts = tuple(name for name in (prompt.system_file, prompt.question_file) if name)
    for name in prompts:
        write_atomic(folder / name, _read_text(_prompt_file(file, name)).encode())
    write_atomic(folder / DIALECT_FILE, text.encode())
    return load_dialect(folder / DIALECT_FILE), (DIALECT_FILE, *prompts)


def _to_dialect(raw: Mapping[str, Any], file: Traversable) -> Dialect:
    if raw.get("schema", SCHEMA) != SCHEMA:
        raise DialectError(f"'schema' must be {SCHEMA}, got {shown(raw['schema'])}; use a newer version of gog_edge")
    tables = build(_DialectFile, raw, "", error=DialectError)
    syntax = _syntax(tables)
    system, question = _prompts(tables.prompt, file)
    if isinstance(syntax, ToolCallSyntax):
        system = system.replace("{tools}", "\n".join(json.dumps(tool.schema()) for tool in syntax.tools))
    if tables.thinking != ThinkingRules() and not syntax.skip_until:
        raise DialectError("[thinking] requires 'skip_until', the tag that ends the thinking")
    return Dialect(
        name=tables.name,
        assumed=tables.assumed,
        box_frame=tables.box_frame,
        system_prompt=system.strip().replace("{frame}", FRAME_DESCRIPTIONS[tables.box_frame]),
        question=question,
        syntax=syntax,
        observation=tables.observation,
        notices={name: text for name, text in asdict(tables.notice).items() if text is not None},
        not_found=tables.answer.not_found,
        crop=tables.crop,
        turn=tables.turn,
        thinking=tables.thinking,
        budget=tables.budget,
    )


def _syntax(tables: _DialectFile) -> Syntax:
    match tables.tags, tables.tool_calls:
        case TagSyntax() as tags, None:
            return tags
        case None, ToolCallSyntax() as calls:
            return calls
    raise DialectError("the file must have either the table [tags] or the table [tool_calls]")


def _prompts(prompt: _Prompt, file: Traversable) -> tuple[str, str]:
    texts = []
    for name, text, text_file in (
        ("system", prompt.system, prompt.system_file),
        ("question", prompt.question, prompt.question_file),
    ):
        if (text == "") == (text_file == ""):
            raise DialectError(f"[prompt] must have exactly one of '{name}' and '{name}_file'")
        texts.append(text or _read_text(_prompt_file(file, text_file)))
    system, question = texts
    if "{question}" not in question:
        raise DialectError(f"[prompt] 'question' must contain {{question}}, got {shown(question)}")
    return system, question


def _package_folder() -> Traversable:
    return resources.files("gog_edge.policy.dialect")


def _locate(source: str | Path) -> Traversable:
    if isinstance(source, Path):
        return source
    if source not in shipped():
        raise DialectError(f"unknown dialect '{source}'; use one of {', '.join(shipped())}, or the path of a TOML file")
    return _package_folder() / f"{source}.toml"


def _prompt_file(file: Traversable, name: str) -> Traversable:
    """Return a prompt file next to the dialect; its suffix keeps it from replacing another file of a policy folder."""
    if Path(name).name != name or not name.endswith(PROMPT_SUFFIXES):
        raise DialectError(
            f"the prompt file '{name}' must be in the folder of the dialect and end in {' or '.join(PROMPT_SUFFIXES)}"
        )
    return file.parent / name if isinstance(file, Path) else _package_folder() / name


def _read_toml(file: Traversable) -> dict[str, Any]:
    try:
        return parse_toml(_read_text(file))
    except ValueError as exc:
        raise DialectError(f"not valid TOML ({exc})") from exc


def _read_text(file: Traversable) -> str:
    try:
        data = read_bounded(file, MAX_BYTES) if isinstance(file, Path) else file.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise DialectError(f"'{file}' cannot be read: {exc}") from exc
