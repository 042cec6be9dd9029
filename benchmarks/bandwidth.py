"""How fast this machine, or its GPU, reads memory: the limit of decoding, where each token reads all weights once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gog_edge.engines.cuda import Cuda, DeviceBuffer, Stream

BUFFER_BYTES = 512 << 20  # many times the caches


def read_bandwidth(threads: int, *, tries: int = 6, size: int = BUFFER_BYTES) -> float:
    """Bytes a second that `threads` threads read together, at best of several tries."""
    buffer = np.ones((threads, max(1, size // 4 // threads)), np.float32)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(tries):
            started = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), buffer))
            seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def device_bandwidth(*, tries: int = 6, size: int = 2 * BUFFER_BYTES) -> float:
    """Bytes a second that the first GPU reads and writes together, at best of several copies within its memory.

    BackendError without one.
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
