"""Watches a build from outside: how much memory and how many cores its processes take, stage by stage."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY = 0.25  # seconds between two looks
READING, EMBEDDING, INDEXING = "reading", "embedding", "indexing"


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage took."""

    seconds: float
    peak_mib: float  # largest sum over the build's processes; pages that they share count for each
    cores: float  # processor seconds a second


@dataclass(frozen=True, slots=True)
class Watched:
    """A build that ended, or was ended."""

    code: int
    output: str
    stages: dict[str, Stage]


def stage_of(pack: Path) -> str:
    """What a build in this folder is doing, told by its files."""
    if not any((pack / "store").glob("*.sqlite")):
        return READING
    return INDEXING if any((pack / "index").glob("*")) or (pack / "MANIFEST.json").exists() else EMBEDDING


def watch(command: Sequence[str], pack: Path, kill_when: Callable[[float], bool] = lambda seconds: False) -> Watched:
    """Run a command that builds `pack`, and kill it and its children at once when `kill_when`(seconds) says so."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)  # fmt: skip
    looks: list[tuple[str, float, float, float]] = []  # stage, seconds, MiB, processor seconds so far
    while process.poll() is None:
        seconds = time.monotonic() - began
        if kill_when(seconds):
            os.killpg(process.pid, signal.SIGKILL)
            break
        looks.append((stage_of(pack), seconds, *taken(process.pid)))
        time.sleep(EVERY)
    output = process.communicate()[0]
    return Watched(process.returncode, output, _stages(looks))


def taken(pid: int) -> tuple[float, float]:
    """Memory in MiB and processor seconds of a process and its children."""
    memory = seconds = 0.0
    try:
        root = psutil.Process(pid)
        for one in [root, *root.children(recursive=True)]:
            memory += one.memory_info().rss / 2**20
            times = one.cpu_times()
            seconds += times.user + times.system
            if one == root:
                seconds += times.children_user + times.children_system
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        pass
    return memory, seconds


def _stages(looks: Sequence[tuple[str, float, float, float]]) -> dict[str, Stage]:
    found = {}
    for name in (READING, EMBEDDING, INDEXING):
        own = [look for look in looks if look[0] == name]
        if len(own) > 1:
            wall = own[-1][1] - own[0][1]
            used = max(look[3] for look in own) - own[0][3]
            found[name] = Stage(round(wall, 1), round(max(look[2] for look in own), 1), round(used / wall, 2))
    return found
