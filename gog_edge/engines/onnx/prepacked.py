"""Prepacked weights: computed once per processor, stored next to the model, and mapped at every later start.

When ONNX Runtime loads a graph, it rearranges the weights for the processor's instructions, in memory of its own. For
models of gigabytes this takes seconds and holds all weights twice meanwhile. It can write the prepacked weights to a
file (`session.save_external_prepacked_constant_initializers`), which is then mapped instead.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from gog_edge.engines.onnx.native.variants import describe_processor
from gog_edge.engines.onnx.session import CPU_PROVIDERS, LOAD_ERRORS, session_options
from gog_edge.files import FileEntry

MIN_CACHED_BYTES = 64 * 2**20  # of weights; smaller graphs load fast without
MIN_EXTERNAL_BYTES = 2**16  # smaller tensors stay in the graph's file
SPACE_FACTOR = 2.2  # free space required, by the size of the weights: the prepacked ones and their originals

# Offsets of prepacked weights in the written graph. Kernels index them from an aligned address, so a file in which one
# is misaligned would be read wrongly.
_OFFSET = re.compile(rb"prepacked_\d+[^|]{1,80}\|(\d+);\d+;\d+")
ALIGNMENT = 64
_log = logging.getLogger(__name__)


def cache_key(entries: Sequence[FileEntry]) -> str:
    """Return a key that changes with the files, the version of ONNX Runtime, and the processor."""
    facts = [ort.__version__, describe_processor(), *(f"{entry.path} {entry.sha256}" for entry in entries)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def prepacked_graph(graph: Path, cache: Path, size: int) -> Path:
    """Return the file to load for `graph`: its prepacked copy in the folder `cache`, which is written if missing.

    If it cannot be written, for lack of permission or space, this logs a warning and returns `graph` itself, which
    loads more slowly. `size` is the size of the graph's weights in bytes.
    """
    prepacked = cache / graph.name
    if prepacked.is_file():
        return prepacked
    part = cache.with_name(f"{cache.name}.{graph.stem}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        _write_prepacked(graph, part / graph.name, size)
        cache.mkdir(exist_ok=True)
        for path in sorted(part.iterdir(), reverse=True):  # the weights before the graph that refers to them
            path.replace(cache / path.name)
        remove_stale_caches(cache)
    except (OSError, *LOAD_ERRORS) as exc:
        _log.warning("the prepacked weights of '%s' cannot be stored (%s): every start takes longer", graph, exc)
        return graph
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return prepacked


def _write_prepacked(graph: Path, prepacked: Path, size: int) -> None:
    free, required = shutil.disk_usage(prepacked.parent).free, SPACE_FACTOR * size
    if required > free:
        raise OSError(f"{free / 1e9:.1f} GB free, {required / 1e9:.1f} GB required")
    options = session_options()
    options.optimized_model_filepath = str(prepacked)
    data = f"{prepacked.name}.data"
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", data),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(MIN_EXTERNAL_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(graph), options, providers=list(CPU_PROVIDERS))
    offsets = [int(offset) for offset in _OFFSET.findall(prepacked.read_bytes())]
    if any(offset % ALIGNMENT for offset in offsets):
        raise OSError(f"ONNX Runtime wrote them at offsets that are not multiples of {ALIGNMENT} bytes")


def remove_stale_caches(cache: Path) -> None:
    """Remove the folders next to `cache`: they were computed for other files, versions or processors."""
    for other in cache.parent.iterdir():
        if other.is_dir() and other != cache and not other.name.endswith(".part"):
            shutil.rmtree(other, ignore_errors=True)
