"""Findings of the doctor: one line each, and a report with the engine that they are judged for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gog_edge.engines.manifest import ENGINES, ORT, ORT_CUDA, TENSORRT, TENSORRT_RTX
from gog_edge.engines.registry import CPU_SEARCH

PREFERENCE = (TENSORRT_RTX, TENSORRT, ORT_CUDA, ORT)  # without --engine, the first of these that works is reported


class State(StrEnum):
    """Whether something is present and usable."""

    OK = "ok"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of one component."""

    part: str  # "box", "gpu", "software", "bundle" or "engines"
    name: str
    state: State
    detail: str
    remedy: str = ""  # a command, or an instruction if there is none
    needed_by: tuple[str, ...] = ()  # engines that cannot serve the bundle unless the state is OK

    def to_json(self) -> dict[str, Any]:
        """Return the object in the output of `gog-edge doctor --json`."""
        return {"part": self.part, "what": self.name, "state": self.state, "said": self.detail, "remedy": self.remedy,
                "needed_by": list(self.needed_by)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, judged for one engine."""

    bundle: str
    engine: str
    requested: bool  # the user named the engine; otherwise it is the best that works, or ORT if none does
    findings: tuple[Finding, ...]
    search: str = CPU_SEARCH

    @classmethod
    def of(cls, bundle: str, findings: Iterable[Finding], requested: str | None, search: str = CPU_SEARCH) -> Report:
        """Build the report for the requested engine, or for the first of PREFERENCE that works."""
        found = tuple(findings)
        working = (engine for engine in PREFERENCE if not _blocking(found, engine))
        return cls(bundle, requested or next(working, ORT), requested is not None, found, search)

    @property
    def blocking(self) -> tuple[Finding, ...]:
        """Return the findings that keep the engine from serving the bundle."""
        return _blocking(self.findings, self.engine)

    @property
    def serves(self) -> bool:
        """Return whether the engine can serve the bundle on this machine."""
        return not self.blocking

    def to_json(self) -> dict[str, Any]:
        """Return the output of `gog-edge doctor --json`."""
        working = [engine for engine in ENGINES if not _blocking(self.findings, engine)]
        return {"bundle": self.bundle, "engine": self.engine, "asked": self.requested, "search": self.search,
                "serves": self.serves, "engines_that_work": working,
                "findings": [finding.to_json() for finding in self.findings]}  # fmt: skip


def _blocking(findings: Iterable[Finding], engine: str) -> tuple[Finding, ...]:
    return tuple(one for one in findings if one.state is not State.OK and engine in one.needed_by)
