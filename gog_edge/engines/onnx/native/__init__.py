"""Native operators for ONNX Runtime on x86-64: attention over a tiled KV cache, attention of image patches, and
matrix multiplication with prepacked int8 or int4 weights.

They are about twice as fast as ONNX Runtime's own operators where query heads share keys and values and where few rows
are multiplied; the C++ sources in this folder describe the layouts and kernels. They are compiled when the package is
installed, in several variants for different processors. Without a compiler, or on another processor, policies run on
ONNX Runtime's operators.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from gog_edge.engines.onnx.native.variants import VARIANTS, processor_flags, supported_variants

DOMAIN = "gog_edge"  # of the operators in ONNX graphs
# Layouts and limits, which the C++ headers define too.
TILE, PAIR = 16, 2  # attention.h: tokens per tile of keys, elements that are multiplied together
CAPACITY_MULTIPLE = 64  # attention.h, KEYS: the capacity of a cache is a multiple of it
HEAD_WIDTH_MULTIPLE, MAX_HEAD_WIDTH = 32, 256  # attention.h: the multiple holds for the decoder's heads only
PANEL = 64  # matmul.h: columns per panel of weights
FOLDER = Path(__file__).parent


@cache
def library() -> Path | None:
    """Return the fastest compiled library that this processor supports; None if there is none."""
    paths = (FOLDER / variant.file for variant in supported_variants(processor_flags()))
    return next((path for path in paths if path.is_file()), None)


def unavailable_reason() -> str:
    """Return why `library` is None and what to do about it."""
    if platform.system() != "Linux" or not supported_variants(processor_flags()):
        return (f"the native operators require Linux on x86-64 with {' '.join(sorted(VARIANTS[-1].needs))}; for this "
                "machine, export with --cpu-layout prefill")  # fmt: skip
    return ("the native operators were not compiled at installation; install a C++ compiler (apt install g++) and "
            "install gog_edge again")  # fmt: skip
