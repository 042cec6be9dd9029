"""Comparison of an exported tower's vectors with PyTorch's, on noise, real pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.errors import CheckpointError
from gog_edge.exporting.recording import min_cosine_similarity
from gog_edge.picture import SUFFIXES, decode_picture
from gog_edge.retrieval.encoder import MIN_COMPATIBLE_COSINE, ImageSpec, preprocess
from gog_edge.types import Pixels, Vectors

MAX_ABS = 1e-4  # fp32: largest difference of a component of a unit vector
SAMPLES = DEFAULT_BUNDLE / "samples"
BATCH = 8

# Top-left corners of nine crops of half the width and height, as a policy might choose them.
CORNERS = tuple((x, y) for y in (0.0, 0.25, 0.5) for x in (0.0, 0.25, 0.5))


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest differences between ONNX Runtime and PyTorch; the fields are keys of the manifest."""

    max_abs: float
    min_cosine: float
    min_centred_cosine: float  # after subtracting PyTorch's mean vector, a large part of every CLIP vector
    tried: int  # number of vectors


def limits(precision: str) -> dict[str, float]:
    """Return the limits of a precision, as the manifest states them."""
    return {"max_abs": MAX_ABS} if precision == "fp32" else {"min_cosine": MIN_COMPATIBLE_COSINE}


def measure_parity(path: Path, tower: nn.Module, name: str, batches: Sequence[Tensor], precision: str) -> Parity:
    """Run a graph, whose input is `name`, and a tower of PyTorch on every batch, and compare them.

    Raises:
        CheckpointError: a limit of the precision is exceeded.
    """
    graph = OrtGraph(path)
    own: Vectors = np.concatenate([graph.run({name: batch.numpy()})["embedding"] for batch in batches])
    with torch.inference_mode():
        expected: Vectors = np.concatenate([tower(batch).numpy() for batch in batches])
    mean = expected.mean(axis=0)
    parity = Parity(
        max_abs=float(np.abs(own - expected).max()),
        min_cosine=min_cosine_similarity(own, expected),
        min_centred_cosine=min_cosine_similarity(own - mean, expected - mean),
        tried=len(expected),
    )
    _check(path.name, parity, limits(precision))
    return parity


def _check(name: str, parity: Parity, limit: Mapping[str, float]) -> None:
    # The comparisons are negated so that NaN fails.
    if "max_abs" in limit and not parity.max_abs <= limit["max_abs"]:
        raise CheckpointError(
            f"{name}: ONNX Runtime differs from PyTorch by {parity.max_abs:.2g}, more than {limit['max_abs']:.0e}; "
            "this model cannot be exported with these versions of torch and onnxruntime"
        )
    if "min_cosine" in limit and not parity.min_cosine >= limit["min_cosine"]:
        raise CheckpointError(
            f"{name}: the smallest cosine of {parity.tried} quantized vectors to PyTorch's is {parity.min_cosine:.4f}, "
            f"less than {limit['min_cosine']}, so packs built in fp32 could not be searched with this encoder; export "
            "this model in fp32"
        )


def parity_json(image: Parity, text: Parity, precision: str) -> dict[str, Any]:
    """Return the object "parity" of the manifest."""
    return {"image": asdict(image), "text": asdict(text), "limits": limits(precision)}


def noise_batches(spec: ImageSpec) -> list[Tensor]:
    """Return preprocessed noise pictures [n, 3, height, width], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, spec.size.height, spec.size.width)
    return [torch.randn(count, *shape, generator=generator) for count in (2, 1, 3)]


def picture_batches(folder: Path, spec: ImageSpec) -> list[Tensor]:
    """Return preprocessed pictures of a folder, and crops of them, in batches.

    Raises:
        CheckpointError: the folder has no pictures.
        PictureError: one of them cannot be decoded.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise CheckpointError(
            f"'{folder}' has no pictures ({', '.join(SUFFIXES)}) for the parity check; choose another folder with "
            "--pictures"
        )
    views = [view for path in paths for view in _views(decode_picture(path.read_bytes()).pixels)]
    rows = [torch.from_numpy(preprocess(view, spec)) for view in views]
    return [torch.stack(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def _views(pixels: Pixels) -> list[Pixels]:
    """Return the whole picture and nine crops."""
    height, width = pixels.shape[:2]
    crop_height, crop_width = -(-height // 2), -(-width // 2)
    starts = [(int(x * width), int(y * height)) for x, y in CORNERS]
    return [pixels, *(pixels[y : y + crop_height, x : x + crop_width] for x, y in starts)]
