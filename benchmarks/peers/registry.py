"""Prepare and open the peers. A peer that is not available is reported with the reason."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.base import LOG_TAIL, Engine, WorkerEngine
from benchmarks.peers.checkpoints import build_folder, write_gguf, write_text_checkpoint
from benchmarks.peers.llamacpp import LlamaServer
from gog_edge.errors import BackendError, GogEdgeError, InputError

CONVERT_S = 3600  # time limit of a conversion
OPENVINO_INT4 = ("--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128",
                 "--ratio", "1.0")  # fmt: skip
OPENVINO_NEEDS = "a virtual environment with the extra 'peers', without torchvision if its import fails there"
LLAMACPP_NEEDS = "llama-server and llama-quantize, built from the sources in the sdist of llama-cpp-python==0.3.36"


@dataclass(frozen=True, slots=True)
class Workspace:
    """The checkpoint of a shape with its conversions, and how to run the peers."""

    folder: Path  # contains `checkpoint`, then `text`, `openvino`, `q4_k_m.gguf`
    threads: int
    context: int  # tokens
    environments: dict[str, Path] = field(default_factory=dict)  # by peer: virtual environment or folder of programs

    @property
    def checkpoint(self) -> Path:
        """Return the vision-language checkpoint that all conversions start from."""
        return self.folder / "checkpoint"

    def log(self, name: str) -> Path:
        """Return the log file of a peer's process."""
        return self.folder / f"{name}.log"

    def text(self) -> Path:
        """Return the text-only checkpoint; create it if it does not exist."""
        out = self.folder / "text"
        if not out.exists():
            write_text_checkpoint(self.checkpoint, out)
        return out

    def program(self, peer: str, name: str, needs: str) -> Path:
        """Return a program of a peer, from its environment or from PATH. Raises BackendError if it is not found."""
        home = self.environments.get(peer)
        places = [home / "bin" / name, home / name] if home else [Path(shutil.which(name) or name)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise BackendError(
                f"{peer}: '{name}' was not found in '{home or 'PATH'}'; it needs {needs}; see --peer-env"
            )
        return found

    def python(self, peer: str, modules: Sequence[str], needs: str) -> Path:
        """Return the Python of a peer's environment, by default ours. Raises BackendError if a module is missing."""
        if peer in self.environments:
            return self.program(peer, "python", needs)
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            raise BackendError(f"{peer}: {', '.join(missing)} is not installed; it needs {needs}; see --peer-env")
        return Path(sys.executable)

    def convert(self, peer: str, command: Sequence[str | Path]) -> None:
        """Run a conversion. Raises BackendError with the end of its output if it fails."""
        log = self.log(f"{peer}-convert")
        with log.open("wb") as output:
            done = subprocess.run(
                [str(part) for part in command], stdout=output, stderr=output, timeout=CONVERT_S, check=False
            )
        if done.returncode:
            tail = " ".join(log.read_text(errors="replace")[-LOG_TAIL:].split())
            raise BackendError(f"{peer}: {command[0]} ended with {done.returncode}: {tail} (log: {log})")


def _transformers(space: Workspace) -> Engine:
    python = space.python("transformers", ("torch", "transformers"), "the extra 'export'")
    arguments = [str(space.text()), str(space.threads)]
    return WorkerEngine("transformers", python, "transformers_worker.py", arguments, space.log("transformers"))


def _openvino(space: Workspace) -> Engine:
    python = space.python("openvino", ("openvino_genai",), OPENVINO_NEEDS)
    out = space.folder / "openvino"
    if not out.exists():
        exporter = space.program("openvino", "optimum-cli", OPENVINO_NEEDS)
        text = space.text()
        command: list[str | Path] = [exporter, "export", "openvino", "--model", text, *OPENVINO_INT4]
        build_folder(out, lambda part: space.convert("openvino", [*command, part]))
    arguments = [str(out), str(space.threads)]
    return WorkerEngine("openvino", python, "openvino_worker.py", arguments, space.log("openvino"))


def _llamacpp(space: Workspace) -> Engine:
    server = space.program("llamacpp", "llama-server", LLAMACPP_NEEDS)
    model = space.folder / "q4_k_m.gguf"
    if not model.exists():
        quantizer = space.program("llamacpp", "llama-quantize", LLAMACPP_NEEDS)
        whole, part = space.folder / "bf16.gguf", model.with_name(model.name + ".part")
        if not whole.exists():
            write_gguf(space.checkpoint, whole)
        space.convert("llamacpp", [quantizer, whole, part, "Q4_K_M", str(space.threads)])
        part.rename(model)
    return LlamaServer(server, model, threads=space.threads, context=space.context, log=space.log("llamacpp"))


PEERS: dict[str, Callable[[Workspace], Engine]] = {
    "llamacpp": _llamacpp, "openvino": _openvino, "transformers": _transformers
}  # fmt: skip


def parse_names(value: str, known: Sequence[str]) -> list[str]:
    """Parse `all`, `none` or names separated by commas. Raises InputError for an unknown name."""
    if value in ("all", "none"):
        return list(known) if value == "all" else []
    unknown = [name for name in value.split(",") if name not in known]
    if unknown:
        raise InputError(f"--peers must be all, none or of {', '.join(known)}, got '{', '.join(unknown)}'")
    return value.split(",")


def parse_environments(entries: Sequence[str], known: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=PATH options. Raises InputError for another form or an unknown name."""
    found = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not path or name not in known:
            raise InputError(f"--peer-env must be NAME=PATH with a name of {', '.join(known)}, got '{entry}'")
        found[name] = Path(path).expanduser().resolve()
    return found


def open_peers(names: Sequence[str], space: Workspace) -> tuple[list[Engine], dict[str, str]]:
    """Open the peers; return those that are available, and for the others the reason by name."""
    peers, missing = [], {}
    for name in names:
        try:
            peers.append(PEERS[name](space))
        except (GogEdgeError, OSError) as exc:
            missing[name] = str(exc)
    return peers, missing
