"""The trace of an episode: one JSON file, whole after every step, holding all that a replay needs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from gog_edge.agent.budget import EpisodeBudget
from gog_edge.agent.events import AnswerRecord, Step, Workflow
from gog_edge.config import GazeConfig
from gog_edge.errors import ArtifactError
from gog_edge.files import read_json, write_json
from gog_edge.picture import Picture

FORMAT = 1
_KEYS = ("picture", "question", "policy", "workflow", "budget", "steps")


class TraceWriter:
    """Writes one episode's trace; used as a context manager, it records the error that ended an episode.

    With `path` None nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._steps: list[dict[str, Any]] = []
        self._value: dict[str, Any] = {"format": FORMAT}

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._write(error={"type": kind.__name__, "message": str(exc)})

    def begin(self, picture: Picture, question: str, policy: str, workflow: Workflow, budget: EpisodeBudget,
              gaze: GazeConfig) -> None:
        """Say what was asked, of whom, and the limits in force."""
        self._write(
            picture={"sha256": picture.sha256, "width": picture.size.width, "height": picture.size.height},
            question=question,
            policy=policy,
            workflow=workflow.value,
            budget=asdict(budget),
            gaze=asdict(gaze),
            steps=self._steps,
            record=None,
            error=None,
        )

    def add(self, step: Step) -> None:
        """Append a finished step."""
        self._steps.append(step.to_trace())
        self._write()

    def finish(self, record: AnswerRecord) -> None:
        """Close the trace with the answer."""
        self._write(record=record.to_json())

    def _write(self, **changes: Any) -> None:
        self._value.update(changes)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._value)
        except OSError as exc:
            raise ArtifactError(f"trace: '{self.path}' cannot be written ({exc}); choose another place") from exc


class TraceFolder:
    """A folder of traces that keeps the newest: a box that nobody tends must not fill its disk.

    Raises ArtifactError when the folder cannot be made.
    """

    def __init__(self, path: Path, keep: int = 1000) -> None:
        self.path, self.keep = path, keep
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ArtifactError(f"traces: '{path}' is no folder to write to ({exc}); choose another place") from exc

    def new(self) -> TraceWriter:
        """A writer for one more episode; the oldest traces beyond `keep` go. Names begin with the time in UTC."""
        for old in sorted(self.path.glob("*.trace.json"))[: -self.keep + 1 or None]:
            old.unlink(missing_ok=True)
        now = datetime.now(UTC)
        return TraceWriter(self.path / f"{now:%Y%m%dT%H%M%S.%f}Z-{uuid4().hex[:8]}.trace.json")


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace, finished or not; ArtifactError says what is wrong with it."""
    value = read_json(path, what="trace", error=ArtifactError)
    if value.get("format") != FORMAT:
        raise ArtifactError(f"trace: '{path}' has format {value.get('format')!r}; this version reads format {FORMAT}")
    missing = [key for key in _KEYS if key not in value]
    if missing:
        raise ArtifactError(f"trace: '{path}' has no '{missing[0]}'; it is no trace of an episode")
    return value
