"""Measure what bounds the engines: memory bandwidth, and memory and processor time of a process tree."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil

from gog_edge.engines.cuda import Cuda, DeviceBuffer, Stream

BUFFER_BYTES = 512 << 20  # many times the size of the caches
SAMPLE_S = 0.25  # seconds between two samples of a process


def read_bandwidth(threads: int, *, tries: int = 6, size: int = BUFFER_BYTES) -> float:
    """Return the bytes per second that `threads` threads read from memory together, the best of several tries.

    It limits decoding: every token reads all weights once.
    """
    buffer = np.ones((threads, max(1, size // 4 // threads)), np.float32)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(tries):
            started = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), buffer))
            seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def device_bandwidth(*, tries: int = 6, size: int = 2 * BUFFER_BYTES) -> float:
    """Return the bytes per second that the first GPU reads and writes in a copy, the best of several tries.

    Raises:
        BackendError: there is no GPU.
    """
    cuda = Cuda.open()
    stream, seconds = Stream(cuda), []
    source, target = (DeviceBuffer(cuda, size) for _ in range(2))
    for _ in range(tries):
        started = time.perf_counter()
        stream.copy(target.address, source.address, size)
        stream.synchronize()
        seconds.append(time.perf_counter() - started)
    source.close()
    target.close()
    return 2 * size / min(seconds)


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources of a process and its children at one moment."""

    memory_mib: float  # resident; pages shared by several processes count for each
    cpu_s: float  # processor seconds so far


def process_usage(pid: int) -> Usage:
    """Return the usage of a process and its children; zero if it has ended."""
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
    return Usage(memory, seconds)
