"""Finds, prepares and opens the peers; one that is not here is named with the reason."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.base import Peer, WorkerPeer
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.llamacpp import LlamaServer
from benchmarks.peers.text_only import build_folder, write_text_checkpoint
from gog_edge.errors import ArtifactError, BackendError, GogEdgeError

CONVERT_S = 3600
OPENVINO_INT4 = ("--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128",
                 "--ratio", "1.0")  # fmt: skip
OPENVINO_NEEDS = "a virtual environment with the extra 'peers', less torchvision where its import fails there"
LLAMACPP_NEEDS = "llama-server and llama-quantize, built from the sources in the sdist of llama-cpp-python==0.3.36"


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where a shape's checkpoint and its conversions lie, and how peers are to be run."""

    folder: Path  # holds `checkpoint`, then `text`, `openvino`, `q4_k_m.gguf`
    threads: int
    context: int  # tokens
    environments: dict[str, Path] = field(default_factory=dict)  # peer -> virtual environment or folder of programs

    @property
    def checkpoint(self) -> Path:
        """The vision-language checkpoint that all is made from."""
        return self.folder / "checkpoint"

    def log(self, name: str) -> Path:
        """What a peer's process prints."""
        return self.folder / f"{name}.log"

    def text(self) -> Path:
        """The text-only checkpoint, made when it is not there."""
        out = self.folder / "text"
        if not out.exists():
            write_text_checkpoint(self.checkpoint, out)
        return out

    def program(self, peer: str, name: str, needs: str) -> Path:
        """A peer's program, from its environment or from the path. BackendError when there is none."""
        home = self.environments.get(peer)
        places = [home / "bin" / name, home / name] if home else [Path(shutil.which(name) or name)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise BackendError(f"{peer}: no '{name}' in '{home or 'PATH'}'; it needs {needs}; see --peer-env")
        return found

    def python(self, peer: str, modules: Sequence[str], needs: str) -> Path:
        """The Python of a peer's environment, this one's by default. BackendError when a module is not there."""
        if peer in self.environments:
            return self.program(peer, "python", needs)
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            raise BackendError(f"{peer}: {', '.join(absent)} not installed here; it needs {needs}; see --peer-env")
        return Path(sys.executable)

    def convert(self, peer: str, command: Sequence[str | Path]) -> None:
        """Run a conversion. BackendError with the end of what it printed."""
        log = self.log(f"{peer}-convert")
        with log.open("wb") as output:
            done = subprocess.run(
                [str(part) for part in command], stdout=output, stderr=output, timeout=CONVERT_S, check=False
            )
        if done.returncode:
            tail = " ".join(log.read_text(errors="replace")[-300:].split())
            raise BackendError(f"{peer}: {command[0]} ended with {done.returncode}: {tail} (log: {log})")


def _transformers(shop: Workshop) -> Peer:
    python = shop.python("transformers", ("torch", "transformers"), "the extra 'export'")
    arguments = [str(shop.text()), str(shop.threads)]
    return WorkerPeer("transformers", python, "transformers_worker.py", arguments, shop.log("transformers"))


def _openvino(shop: Workshop) -> Peer:
    python = shop.python("openvino", ("openvino_genai",), OPENVINO_NEEDS)
    out = shop.folder / "openvino"
    if not out.exists():
        exporter = shop.program("openvino", "optimum-cli", OPENVINO_NEEDS)
        text = shop.text()
        command: list[str | Path] = [exporter, "export", "openvino", "--model", text, *OPENVINO_INT4]
        build_folder(out, lambda part: shop.convert("openvino", [*command, part]))
    return WorkerPeer(
        "openvino", python, "openvino_worker.py", [str(out), str(shop.threads)], shop.log("openvino")
    )


def _llamacpp(shop: Workshop) -> Peer:
    server = shop.program("llamacpp", "llama-server", LLAMACPP_NEEDS)
    model = shop.folder / "q4_k_m.gguf"
    if not model.exists():
        quantiser = shop.program("llamacpp", "llama-quantize", LLAMACPP_NEEDS)
        whole, part = shop.folder / "bf16.gguf", model.with_name(model.name + ".part")
        if not whole.exists():
            write_gguf(shop.checkpoint, whole)
        shop.convert("llamacpp", [quantiser, whole, part, "Q4_K_M", str(shop.threads)])
        part.rename(model)
    return LlamaServer(server, model, threads=shop.threads, context=shop.context, log=shop.log("llamacpp"))


PEERS: dict[str, Callable[[Workshop], Peer]] = {
    "llamacpp": _llamacpp, "openvino": _openvino, "transformers": _transformers
}  # fmt: skip


def peer_names(value: str) -> list[str]:
    """`all`, `none` or names with commas between. ArtifactError naming those there are."""
    if value in ("all", "none"):
        return list(PEERS) if value == "all" else []
    unknown = [name for name in value.split(",") if name not in PEERS]
    if unknown:
        raise ArtifactError(f"there is no peer {', '.join(unknown)}; there are {', '.join(PEERS)}, all and none")
    return value.split(",")


def open_peers(names: Sequence[str], shop: Workshop) -> tuple[list[Peer], dict[str, str]]:
    """The peers that could be opened, and for the others why not."""
    peers, missing = [], {}
    for name in names:
        try:
            peers.append(PEERS[name](shop))
        except (GogEdgeError, OSError) as exc:
            missing[name] = str(exc)
    return peers, missing
