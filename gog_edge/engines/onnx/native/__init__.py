"""Operators of our own for ONNX Runtime on x86-64: attention over a tiled cache and over a picture's patches, products
with packed weights.

ONNX Runtime's own reach about half of what the processor and its memory can do where heads share keys and values and
where few rows are multiplied; the sources beside this file say how these do it. They are compiled when the package is
installed, for several kinds of processors; where there was no compiler, or the processor is another, policies run on
ONNX Runtime's operators.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from gog_edge.engines.onnx.native.flavours import FLAVOURS, processor_flags, runnable

DOMAIN = "gog_edge"
TILE, PAIR = 16, 2  # tokens whose keys stand together, numbers that are multiplied together (attention.h)
KEYS = 64  # a cache's capacity is a multiple of it (attention.h)
PANEL = 64  # columns of weights that stand together (product.h)
WIDTHS, WIDEST = 32, 256  # of heads: a decoder's are multiples of the one, all are up to the other (attention.h)
FOLDER = Path(__file__).parent


@cache
def library() -> Path | None:
    """The best library that was compiled for this processor; None where there is none."""
    built = (FOLDER / flavour.file for flavour in runnable(processor_flags()))
    return next((path for path in built if path.is_file()), None)


def why_none() -> str:
    """Why there is no library, and what to do about it."""
    if platform.system() != "Linux" or not runnable(processor_flags()):
        return (f"they are for Linux on x86-64 with {' '.join(sorted(FLAVOURS[-1].needs))}; for this box, export with "
                "--second prefill")
    return "they were not compiled at installation; get a C++ compiler (apt install g++) and install gog_edge again"
