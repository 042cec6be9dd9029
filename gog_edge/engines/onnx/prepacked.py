"""Weights laid out for this processor: made once beside a model, mapped at every later start.

ONNX Runtime rearranges weights for the processor's instructions when it loads a graph, into memory of its own. For a
model of gigabytes that costs seconds and holds everything twice while it lasts. It can write the arranged weights to
a file instead (`session.save_external_prepacked_constant_initializers`); that file is mapped, not read.
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

from gog_edge.engines.onnx.native.flavours import describe_processor
from gog_edge.engines.onnx.session import LOAD_ERRORS, session_options
from gog_edge.files import FileEntry

CACHE = "cache"  # folder within a model's own
WORTH_BYTES = 64 * 2**20  # smaller graphs load in no time
ALIGNED_BYTES = 2**16  # smaller tensors stay in the graph

# Where arranged weights stand in the file. The kernels' layout counts from an aligned address: at another one the same
# bytes are other numbers.
_PLACE = re.compile(rb"prepacked_\d+[^|]{1,80}\|(\d+);\d+;\d+")
ALIGNMENT = 64
_log = logging.getLogger(__name__)


def cache_key(entries: Sequence[FileEntry]) -> str:
    """Changes with the files, with ONNX Runtime's version and with the processor: what is kept is for these alone."""
    facts = [ort.__version__, describe_processor(), *(f"{entry.path} {entry.sha256}" for entry in entries)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def packed_graph(graph: Path, cache: Path, size: int) -> Path:
    """The form of `graph` to load: in `cache` laid out for this processor, made if it is not there yet.

    `size`: bytes of its weights.

    A folder that cannot be written, or a disk without the room, leaves the graph as it is, slower to load, and is
    logged as a warning.
    """
    packed = cache / graph.name
    if packed.is_file():
        return packed
    part = cache.with_name(f"{cache.name}.{graph.stem}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        _pack(graph, part / graph.name, size)
        cache.mkdir(exist_ok=True)
        for path in sorted(part.iterdir(), reverse=True):  # the weights before the graph that names them
            path.replace(cache / path.name)
        forget_others(cache)
    except (OSError, *LOAD_ERRORS) as exc:
        _log.warning("the weights of '%s' cannot be kept for this processor (%s): every start takes longer", graph, exc)
        return graph
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return packed


def _pack(graph: Path, packed: Path, size: int) -> None:
    free = shutil.disk_usage(packed.parent).free
    if 2.2 * size > free:  # the arranged weights, and those they were made from
        raise OSError(f"{free / 1e9:.1f} GB free, {2.2 * size / 1e9:.1f} GB needed")
    options = session_options()
    options.optimized_model_filepath = str(packed)
    data = f"{packed.name}.data"
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", data),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(ALIGNED_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    places = [int(place) for place in _PLACE.findall(packed.read_bytes())]
    if any(place % ALIGNMENT for place in places):
        raise OSError("ONNX Runtime wrote them where they cannot be mapped")


def forget_others(cache: Path) -> None:
    """What was kept for another version or processor is of no use here."""
    for other in cache.parent.iterdir():
        if other.is_dir() and other != cache and not other.name.endswith(".part"):
            shutil.rmtree(other, ignore_errors=True)
