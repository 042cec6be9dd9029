"""The engines of the retrieval benchmark, ours included: each runs one of `workers/` in its own process."""

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

from benchmarks.peers.base import LOG_TAIL, WorkerProcess
from gog_edge.errors import BackendError

WORKERS = Path(__file__).parent / "workers"
OURS = "ours"
BUILD_S = 7200  # time limit
MAX_ROWS = 1_000_000  # of peers: eight times as many take hours to build on two cores, or more than the memory


@dataclass(frozen=True, slots=True)
class Kind:
    """How to start an engine."""

    name: str
    script: str
    peer: str  # name in --peers and --peer-env
    module: str  # that its Python must have
    needs: str  # what to install
    arguments: tuple[str, ...] = ()  # of the script
    max_rows: int = MAX_ROWS


KINDS = (
    Kind(OURS, "ours_worker.py", OURS, "faiss", "the extra 'cpu'"),
    Kind("usearch f16", "usearch_worker.py", "usearch", "usearch", "usearch==2.26.6", ("f16",)),
    Kind("usearch i8", "usearch_worker.py", "usearch", "usearch", "usearch==2.26.6", ("i8",)),
    # Of LanceDB's indexes this one: IVF_PQ over 100,000 vectors was not built in four minutes on two cores.
    Kind("lancedb hnsw", "lancedb_worker.py", "lancedb", "lancedb", "lancedb==0.40.0"),
    Kind("clip-retrieval", "clip_retrieval_worker.py", "clip-retrieval", "clip_retrieval",
         "clip-retrieval==2.45.0 and autofaiss==2.18.0 without their dependencies, and what their back end imports"),
    # Qdrant's local mode stores nothing on disk. It is filled at every start, which takes longer than the measurement.
    Kind("qdrant local", "qdrant_worker.py", "qdrant", "qdrant_client", "qdrant-client==1.20.0", max_rows=100_000),
)  # fmt: skip
PEERS = tuple(dict.fromkeys(kind.peer for kind in KINDS if kind.peer != OURS))


@dataclass(frozen=True, slots=True)
class Answers:
    """The results of several searches."""

    ms: NDArray[np.float64]  # [pictures]
    ids: NDArray[np.int64]  # [pictures, crops, k]


@dataclass(frozen=True, slots=True)
class BuildCost:
    """The cost of building an index."""

    build_s: float
    disk_bytes: int  # 0 for an engine that stores nothing on disk


class SearchEngine(WorkerProcess):
    """An open engine over one set of vectors; it is built first, if necessary."""

    def __init__(self, kind: Kind, python: Path, folder: Path, threads: int) -> None:
        self.built = _build(kind, python, folder, threads)
        arguments = ["serve", str(folder), str(threads), *kind.arguments]
        super().__init__(kind.name, python, str(WORKERS / kind.script), arguments, _log(kind, folder))
        self.open_s, self.settings = float(self.opening["open_s"]), list(self.opening["settings"])

    def search(self, setting: Any, pictures: range, crops: int) -> Answers:
        """Search with the first `crops` crops of each of some pictures."""
        request = {"setting": setting, "first": pictures.start, "count": len(pictures), "crops": crops}
        reply = self.ask(request)
        return Answers(np.array(reply["ms"]), np.array(reply["ids"], dtype=np.int64))

    @property
    def fill_s(self) -> float:
        """Return the seconds to build it, which an engine without a file on disk does when it is opened."""
        return self.built.build_s + (0.0 if self.built.disk_bytes else self.open_s)

    @property
    def resident(self) -> int:
        """Return the resident memory of its process in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)


def open_engines(
    folder: Path, rows: int, peers: Sequence[str], environments: dict[str, Path], threads: int
) -> tuple[list[SearchEngine], dict[str, str]]:
    """Build and open ours and the peers; return those available, and for the others the reason by name.

    Raises:
        BackendError: ours cannot be built or opened.
    """
    engines: list[SearchEngine] = []
    missing = {}
    for kind in KINDS:
        if kind.peer not in (OURS, *peers):
            continue
        if kind.peer != OURS and rows > kind.max_rows:
            missing[kind.name] = f"measured with up to {kind.max_rows:,} vectors only"
            continue
        try:
            engines.append(SearchEngine(kind, _python(kind, environments), folder, threads))
        except (BackendError, OSError) as exc:
            if kind.peer == OURS:
                raise
            missing[kind.name] = str(exc)
    return engines, missing


def _python(kind: Kind, environments: dict[str, Path]) -> Path:
    if kind.peer in environments:
        python = environments[kind.peer] / "bin" / "python"
        if not python.is_file():
            raise BackendError(f"{kind.name}: '{python}' does not exist; the environment needs {kind.needs}")
        return python
    if importlib.util.find_spec(kind.module) is None:
        raise BackendError(f"{kind.name}: '{kind.module}' is not installed; it needs {kind.needs}; see --peer-env")
    return Path(sys.executable)


def _build(kind: Kind, python: Path, folder: Path, threads: int) -> BuildCost:
    """Build the index in its own process, which releases its memory at the end."""
    command = [str(python), str(WORKERS / kind.script), "build", str(folder), str(threads), *kind.arguments]
    log = _log(kind, folder)
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=BUILD_S, check=False)
    if done.returncode:
        tail = " ".join(log.read_text(errors="replace")[-LOG_TAIL:].split())
        raise BackendError(f"{kind.name}: building ended with {done.returncode}: {tail} (log: {log})")
    return BuildCost(**json.loads(done.stdout.splitlines()[-1]))


def _log(kind: Kind, folder: Path) -> Path:
    return folder / f"{kind.name.replace(' ', '-')}.log"
