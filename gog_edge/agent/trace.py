"""The trace of an episode: a JSON file with all that a replay needs, complete and valid after every step."""

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
_REQUIRED_KEYS = ("picture", "question", "policy", "workflow", "budget", "steps")


class TraceWriter:
    """Writes the trace of one episode. As a context manager it records the exception that ended the episode.

    Every method raises ArtifactError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
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
        """Record the question, the policy and the limits in force."""
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
        """Append a completed step."""
        self._steps.append(step.to_trace())
        self._write()

    def finish(self, record: AnswerRecord) -> None:
        """Record the answer."""
        self._write(record=record.to_json())

    def _write(self, **changes: Any) -> None:
        self._value.update(changes)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._value)
        except OSError as exc:
            raise ArtifactError(f"trace: '{self.path}' cannot be written ({exc}); choose another path") from exc


class TraceFolder:
    """A folder that keeps the newest traces, so that an unattended box does not fill its disk."""

    def __init__(self, path: Path, keep: int = 1000) -> None:
        """Create the folder. Raises ArtifactError if that fails."""
        self.path, self.keep = path, keep
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ArtifactError(f"traces: the folder '{path}' cannot be created ({exc}); choose another path") from exc

    def new(self) -> TraceWriter:
        """Delete the oldest traces beyond `keep`, and return a writer for a new one. Names begin with the UTC time."""
        for old in sorted(self.path.glob("*.trace.json"))[: -self.keep + 1 or None]:
            old.unlink(missing_ok=True)
        now = datetime.now(UTC)
        return TraceWriter(self.path / f"{now:%Y%m%dT%H%M%S.%f}Z-{uuid4().hex[:8]}.trace.json")


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace, complete or not. Raises ArtifactError if it is missing, damaged or not a trace."""
    value = read_json(path, what="trace", error=ArtifactError)
    if value.get("format") != FORMAT:
        raise ArtifactError(f"trace: '{path}' has format {value.get('format')!r}; this version reads format {FORMAT}")
    missing = [key for key in _REQUIRED_KEYS if key not in value]
    if missing:
        raise ArtifactError(f"trace: '{path}' has no '{missing[0]}'; it is not the trace of an episode")
    return value
