"""What every engine in a race can do, and how an engine in another Python environment is spoken to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gog_edge.errors import BackendError

FOLDER = Path(__file__).parent
LOG_TAIL = 300  # characters of a dead worker's log that its error shows


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, timed by the engine itself."""

    prefill_s: float  # until the first new token is chosen
    decode_s: float  # for all further ones
    said: int  # tokens

    @property
    def seconds(self) -> float:
        """The whole turn."""
        return self.prefill_s + self.decode_s

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first."""
        return (self.said - 1) / self.decode_s


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be said in a turn."""

    tokens: tuple[int, ...]
    forced: frozenset[int] = frozenset()  # places of those that the syntax of a call leaves no choice about


class Peer(Protocol):
    """One conversation on one engine; ours is one, too."""

    name: str
    about: str  # version and settings

    def reset(self) -> None:
        """Forget the conversation."""

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append token ids and say as many tokens as `answer` has: these, where the engine can be told."""

    def close(self) -> None:
        """End its process."""


class WorkerPeer:
    """An engine behind a script of this folder, run by the Python of its own environment: JSON lines both ways."""

    def __init__(self, name: str, python: Path, script: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        command = [str(python), str(FOLDER / script), *arguments]
        # Waiting threads sleep: on a busy machine they would keep others from the work they wait for.
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
        """Of its process."""
        return self._process.pid

    def __enter__(self) -> WorkerPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget the conversation."""
        self._ask({"reset": True})

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append and say; the tokens said are the engine's own."""
        return Turn(**self._ask({"tokens": list(tokens), "say": len(answer.tokens)}))

    def close(self) -> None:
        """End the process: its input ends."""
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

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None or self._process.poll() is not None:
            raise self._dead()
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        # Libraries print to the standard output as they like; answers are the lines that hold an object.
        for line in self._process.stdout or ():
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise self._dead()

    def _dead(self) -> BackendError:
        code = self._process.wait()
        self.close()
        tail = " ".join(self._log.read_text(errors="replace")[-LOG_TAIL:].split())
        return BackendError(f"{self.name}: its process ended with {code}: {tail or 'no message'} (log: {self._log})")
