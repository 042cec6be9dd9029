"""The interface of every engine in a comparison, and engines that run in another Python environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from benchmarks.peers.workload import Answer
from gog_edge.errors import BackendError

FOLDER = Path(__file__).parent
LOG_TAIL = 300  # characters of the log in the error message of a worker


@dataclass(frozen=True, slots=True)
class Turn:
    """Timings of one turn, measured by the engine."""

    prefill_s: float  # until the first new token is chosen
    decode_s: float  # for all further tokens
    generated: int  # tokens

    @property
    def seconds(self) -> float:
        """Return the duration of the turn."""
        return self.prefill_s + self.decode_s

    @property
    def decode_tok_s(self) -> float:
        """Return the tokens per second after the first."""
        return (self.generated - 1) / self.decode_s


class Engine(Protocol):
    """One conversation on one engine, ours or a peer."""

    name: str
    about: str  # version and settings

    def reset(self) -> None:
        """Start a new conversation."""

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append token ids and generate as many tokens as `answer` has; these, if the engine can be scripted."""

    def close(self) -> None:
        """End the engine's process."""


class WorkerProcess:
    """A worker script that is run by the Python of its own environment and exchanges JSON lines.

    Args:
        name: of the engine.
        python: the interpreter.
        script: file in this folder, or an absolute path.
        arguments: of the script.
        log: file for its standard error.

    Raises:
        BackendError: the process could not be started, or ended.
    """

    def __init__(self, name: str, python: Path, script: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        command = [str(python), str(FOLDER / script), *arguments]
        # Waiting OpenMP threads must sleep: on a busy machine, spinning ones slow down the threads they wait for.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as errors:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
                )
            except OSError as exc:
                raise BackendError(f"{name}: '{python}' cannot be run ({exc.strerror}); see --peer-env") from exc
        self.opening = self._receive()
        self.about = str(self.opening["about"])

    @property
    def pid(self) -> int:
        """Return the id of the process."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process by closing its input; kill it if it does not end."""
        if self._process.stdin:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply."""
        stdin = self._process.stdin
        if stdin is None or self._process.poll() is not None:
            raise self._ended()
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        # Libraries may print to the standard output, too. Replies are the lines that contain a JSON object.
        for line in self._process.stdout or ():
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise self._ended()

    def _ended(self) -> BackendError:
        code = self._process.wait()
        self.close()
        tail = " ".join(self._log.read_text(errors="replace")[-LOG_TAIL:].split())
        return BackendError(f"{self.name}: its process ended with {code}: {tail or 'no message'} (log: {self._log})")


class WorkerEngine(WorkerProcess):
    """An engine in a worker process. It generates its own tokens."""

    def reset(self) -> None:
        """Start a new conversation."""
        self.ask({"reset": True})

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append token ids and generate as many tokens as `answer` has."""
        return Turn(**self.ask({"tokens": list(tokens), "generate": len(answer.tokens)}))
