"""The engines of the retrieval race: each in a process of its own, ours too, behind one of `workers/`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.peers.base import LOG_TAIL, WorkerPeer
from gog_edge.errors import ArtifactError, BackendError

WORKERS = Path(__file__).parent / "workers"
OURS = "ours"
BUILD_S = 7200
MOST_ROWS = 1_000_000  # of peers: eight times as many are hours of building on two cores, or more than the memory


@dataclass(frozen=True, slots=True)
class Kind:
    """How an engine is started."""

    name: str
    script: str
    peer: str  # as --peers and --peer-env name it
    module: str  # what its Python must have
    needs: str  # what to install there
    most_rows: int = MOST_ROWS


KINDS = (
    Kind(OURS, "ours_worker.py", OURS, "faiss", "the extra 'cpu'"),
    Kind("usearch f16", "usearch_worker.py", "usearch", "usearch", "usearch==2.26.6"),
    Kind("usearch i8", "usearch_i8_worker.py", "usearch", "usearch", "usearch==2.26.6"),
    # Of LanceDB's indexes this one: its IVF_PQ was not built over 100,000 vectors in four minutes of two cores.
    Kind("lancedb hnsw", "lancedb_worker.py", "lancedb", "lancedb", "lancedb==0.40.0"),
    Kind("clip-retrieval", "clip_retrieval_worker.py", "clip-retrieval", "clip_retrieval",
         "clip-retrieval==2.45.0 and autofaiss==2.18.0 without their dependencies, and what their back end imports"),
    # It keeps nothing on the disk: at every start it is filled again, which takes longer than the rest of the race.
    Kind("qdrant local", "qdrant_worker.py", "qdrant", "qdrant_client", "qdrant-client==1.20.0", 100_000),
)  # fmt: skip
PEERS = tuple(dict.fromkeys(kind.peer for kind in KINDS if kind.peer != OURS))


@dataclass(frozen=True, slots=True)
class Answers:
    """What a turn of searches gave."""

    ms: NDArray[np.float64]  # [pictures]
    ids: NDArray[np.int64]  # [pictures, crops, k]


@dataclass(frozen=True, slots=True)
class Built:
    """What building cost."""

    build_s: float
    disk_bytes: int


class Engine(WorkerPeer):
    """One engine over one set of vectors, open."""

    def __init__(self, kind: Kind, python: Path, folder: Path, threads: int) -> None:
        self.built = _build(kind, python, folder, threads)
        arguments = ["serve", str(folder), str(threads)]
        super().__init__(kind.name, python, str(WORKERS / kind.script), arguments, _log(kind, folder))
        self.open_s, self.points = float(self.opening["open_s"]), list(self.opening["points"])
        self.peer = kind.peer

    def search(self, point: Any, pictures: range, crops: int) -> Answers:
        """Search with the first `crops` crops of some pictures."""
        request = {"point": point, "first": pictures.start, "count": len(pictures), "crops": crops}
        reply = self._ask(request)
        return Answers(np.array(reply["ms"]), np.array(reply["ids"], dtype=np.int64))

    @property
    def fill_s(self) -> float:
        """Seconds to build it; what keeps nothing on the disk is built when it is opened."""
        return self.built.build_s + (0.0 if self.built.disk_bytes else self.open_s)

    @property
    def resident(self) -> int:
        """Bytes of its process that are in memory now."""
        return int(psutil.Process(self.pid).memory_info().rss)


def peer_names(value: str) -> list[str]:
    """`all`, `none` or names with commas between. ArtifactError naming those there are."""
    if value in ("all", "none"):
        return list(PEERS) if value == "all" else []
    unknown = [name for name in value.split(",") if name not in PEERS]
    if unknown:
        raise ArtifactError(f"there is no peer {', '.join(unknown)}; there are {', '.join(PEERS)}, all and none")
    return value.split(",")


def environments(entries: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH of virtual environments. ArtifactError where one is not of this form."""
    found = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not path or name not in PEERS:
            raise ArtifactError(f"--peer-env '{entry}' is not NAME=PATH with a name of {', '.join(PEERS)}")
        found[name] = Path(path).expanduser().resolve()
    return found


def open_engines(
    folder: Path, rows: int, peers: Sequence[str], homes: dict[str, Path], threads: int
) -> tuple[list[Engine], dict[str, str]]:
    """Ours and the peers that could be built and opened, and for the others why not; BackendError when ours cannot."""
    engines: list[Engine] = []
    missing = {}
    for kind in KINDS:
        if kind.peer not in (OURS, *peers):
            continue
        if kind.peer != OURS and rows > kind.most_rows:
            missing[kind.name] = f"not filled with more than {kind.most_rows:,}"
            continue
        try:
            engines.append(Engine(kind, _python(kind, homes), folder, threads))
        except (BackendError, OSError) as exc:
            if kind.peer == OURS:
                raise
            missing[kind.name] = str(exc)
    return engines, missing


def _python(kind: Kind, homes: dict[str, Path]) -> Path:
    if kind.peer in homes:
        python = homes[kind.peer] / "bin" / "python"
        if not python.is_file():
            raise BackendError(f"{kind.name}: no Python in '{homes[kind.peer]}'; it needs {kind.needs}")
        return python
    if importlib.util.find_spec(kind.module) is None:
        raise BackendError(f"{kind.name}: '{kind.module}' is not installed here; it needs {kind.needs}; see --peer-env")
    return Path(sys.executable)


def _build(kind: Kind, python: Path, folder: Path, threads: int) -> Built:
    """In a process of its own, which gives its memory back."""
    command = [str(python), str(WORKERS / kind.script), "build", str(folder), str(threads)]
    log = _log(kind, folder)
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=BUILD_S, check=False)
    if done.returncode:
        tail = " ".join(log.read_text(errors="replace")[-LOG_TAIL:].split())
        raise BackendError(f"{kind.name}: building ended with {done.returncode}: {tail} (log: {log})")
    return Built(**json.loads(done.stdout.splitlines()[-1]))


def _log(kind: Kind, folder: Path) -> Path:
    return folder / f"{kind.name.replace(' ', '-')}.log"
