"""Proof that an exported tower gives PyTorch's vectors, on noise, on real pictures and on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.base import Floats
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.errors import CheckpointError
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import INTERCHANGEABLE_COSINE, ImageSpec, preprocess
from gog_edge.types import Pixels, Vectors

MAX_ABS = 1e-4  # largest difference of a component after normalisation, of what is not rounded
SAMPLES = DEFAULT_BUNDLE / "samples"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 8

# What a policy might crop from a picture: halves of its width and height, from nine places.
CORNERS = tuple((x, y) for y in (0.0, 0.25, 0.5) for x in (0.0, 0.25, 0.5))


@dataclass(frozen=True, slots=True)
class Parity:
    """ONNX Runtime against PyTorch, on vectors of unit length: the worst of all that was tried."""

    max_abs: float
    min_cosine: float
    min_centred_cosine: float  # after subtracting PyTorch's mean vector: much of a CLIP's vectors is common to all
    tried: int


def limits(precision: str) -> dict[str, float]:
    """What an export must keep to, as manifests say it."""
    return {"max_abs": MAX_ABS} if precision == "fp32" else {"min_cosine": INTERCHANGEABLE_COSINE}


def measure_parity(path: Path, tower: nn.Module, name: str, batches: Sequence[Tensor], precision: str) -> Parity:
    """Run both on every batch; `name` is the graph's input.

    Raises:
        CheckpointError: a limit of the precision is missed.
    """
    graph = OrtGraph(path)
    given: Vectors = np.concatenate([graph.run({name: batch.numpy()})["embedding"] for batch in batches])
    with torch.inference_mode():
        wanted: Vectors = np.concatenate([tower(batch).numpy() for batch in batches])
    centre = wanted.mean(axis=0)
    parity = Parity(
        max_abs=float(np.abs(given - wanted).max()),
        min_cosine=_least_cosine(given, wanted),
        min_centred_cosine=_least_cosine(given - centre, wanted - centre),
        tried=len(wanted),
    )
    _check(path.name, parity, limits(precision))
    return parity


def _least_cosine(given: Floats, wanted: Floats) -> float:
    lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((given * wanted).sum(axis=1) / np.maximum(lengths, 1e-12)).min())


def _check(name: str, parity: Parity, limit: Mapping[str, float]) -> None:
    # Written so that NaN fails.
    if "max_abs" in limit and not parity.max_abs <= limit["max_abs"]:
        raise CheckpointError(
            f"{name}: ONNX Runtime differs from PyTorch by {parity.max_abs:.2g}, more than {limit['max_abs']:.0e}; "
            "this model cannot be exported faithfully with these versions of torch and onnxruntime"
        )
    if "min_cosine" in limit and not parity.min_cosine >= limit["min_cosine"]:
        raise CheckpointError(
            f"{name}: of {parity.tried} vectors in whole numbers one has a cosine of only {parity.min_cosine:.4f} to "
            f"PyTorch's, less than {limit['min_cosine']}; packs of the two could not be searched with each other: "
            "export this model in fp32"
        )


def as_json(image: Parity, text: Parity, precision: str) -> dict[str, Any]:
    """The manifest's field."""
    return {"image": asdict(image), "text": asdict(text), "limits": limits(precision)}


def noise_batches(spec: ImageSpec) -> list[Tensor]:
    """Preprocessed pictures of noise [n, 3, height, width], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, spec.size.height, spec.size.width)
    return [torch.randn(count, *shape, generator=generator) for count in (2, 1, 3)]


def picture_batches(folder: Path, spec: ImageSpec) -> list[Tensor]:
    """Preprocessed real pictures and crops of them.

    Raises:
        CheckpointError: the folder holds no pictures.
        PictureError: one of them cannot be decoded.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise CheckpointError(f"'{folder}' holds no pictures ({', '.join(SUFFIXES)}) to measure the export with")
    views = [view for path in paths for view in _views(decode_picture(path.read_bytes()).pixels)]
    rows = [torch.from_numpy(preprocess(view, spec)) for view in views]
    return [torch.stack(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def _views(pixels: Pixels) -> list[Pixels]:
    """The whole picture, and crops."""
    height, width = pixels.shape[:2]
    tall, wide = -(-height // 2), -(-width // 2)
    starts = [(int(x * width), int(y * height)) for x, y in CORNERS]
    return [pixels, *(pixels[y : y + tall, x : x + wide] for x, y in starts)]
