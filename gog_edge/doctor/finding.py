"""What was found: one line each, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from gog_edge.engines.manifest import ENGINES, ORT, ORT_CUDA, TENSORRT, TENSORRT_RTX
from gog_edge.engines.registry import CPU_SEARCH

PREFERRED = (TENSORRT_RTX, TENSORRT, ORT_CUDA, ORT)  # of those that work: the first


class State(StrEnum):
    """How it is with a thing."""

    OK = "ok"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    part: str  # "box", "gpu", "software", "bundle" or "engines"
    what: str
    state: State
    said: str
    remedy: str = ""  # a command, or what to do where there is none
    needed_by: tuple[str, ...] = ()  # of ENGINES: those that cannot serve without


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the engine that they are read for."""

    bundle: str
    engine: str
    asked: bool  # for that engine; otherwise it is the best that works here, or the CPU's where none does
    findings: tuple[Finding, ...]
    search: str = CPU_SEARCH  # what the packs are to be searched with

    @classmethod
    def of(cls, bundle: str, findings: Iterable[Finding], asked: str | None, search: str = CPU_SEARCH) -> Report:
        """The findings, read for the engine that was asked for, or for the first of `PREFERRED` that works."""
        found = tuple(findings)
        works = (engine for engine in PREFERRED if not blocking(found, engine))
        return cls(bundle, asked or next(works, ORT), asked is not None, found, search)

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """What keeps the engine from serving the bundle."""
        return blocking(self.findings, self.engine)

    @property
    def serves(self) -> bool:
        """Whether the engine can serve the bundle here."""
        return not self.blocking

    def to_json(self) -> dict[str, Any]:
        """One plain object."""
        works = [engine for engine in ENGINES if not blocking(self.findings, engine)]
        return {"bundle": self.bundle, "engine": self.engine, "asked": self.asked, "search": self.search,
                "serves": self.serves, "engines_that_work": works,
                "findings": [asdict(one) for one in self.findings]}  # fmt: skip


def blocking(findings: Iterable[Finding], engine: str) -> tuple[Finding, ...]:
    """What keeps an engine from serving."""
    return tuple(one for one in findings if one.state is not State.OK and engine in one.needed_by)
