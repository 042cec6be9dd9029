"""llama.cpp's server on the loopback interface: Q4_K_M, one slot, prompt cache.

Build it on the machine where it runs: `cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF
-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF`, then `ninja llama-server llama-quantize`.

Its n-gram speculation stays off. With random weights hardly any text repeats (4 of 52 draft tokens were accepted). With
a grammar that forces our script 48 of 80 are accepted, but the grammar takes longer than they save.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.base import LOG_TAIL, Turn
from benchmarks.peers.workload import Answer
from gog_edge.errors import BackendError

START_S = 120  # to load and repack the weights
TURN_S = 600
GREEDY = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "return_tokens": True}


class LlamaServer:
    """A conversation. Every request contains all tokens so far; the server finds the known ones in its cache."""

    name = "llamacpp"

    def __init__(self, binary: Path, model: Path, *, threads: int, context: int, log: Path) -> None:
        self._history: list[int] = []
        self._log = log
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        command = [
            str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--threads", str(threads),
            "--threads-batch", str(threads), "--ctx-size", str(context), "--parallel", "1", "--flash-attn", "on",
            "--cache-ram", "0", "--no-webui",
        ]  # fmt: skip
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        self._wait()
        self.about = f"llama.cpp server, {model.stem.rpartition('.')[2]}, flash attention, prompt cache"
        self.turn(range(64), Answer((0, 0)))  # warm-up
        self.reset()

    def reset(self) -> None:
        """Start a new conversation. Its first token differs, so that nothing of this one is in the cache."""
        self._history = []

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append token ids and generate as many tokens as `answer` has. Times are the server's, without HTTP."""
        known = len(self._history)
        self._history += tokens
        body = GREEDY | {"prompt": self._history, "n_predict": len(answer.tokens), "cache_prompt": True}
        reply = self._request("/completion", body)
        self._history += reply["tokens"]
        timings = reply["timings"]
        if timings["cache_n"] < known - 1:
            raise BackendError(f"llamacpp: only {timings['cache_n']} of {known} known tokens were in its prompt cache")
        return Turn(timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3, timings["predicted_n"])

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                self._request("/health")
            except (OSError, BackendError):
                time.sleep(0.2)
            else:
                return
            if self._process.poll() is not None:
                break
        self.close()
        tail = " ".join(self._log.read_text(errors="replace")[-LOG_TAIL:].split())
        raise BackendError(f"llamacpp: the server did not start: {tail} (log: {self._log})")

    def _request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TURN_S) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as exc:
            text = exc.read(300).decode(errors="replace")
            raise BackendError(f"llamacpp: {path} returned status {exc.code}: {text}") from exc
        return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
