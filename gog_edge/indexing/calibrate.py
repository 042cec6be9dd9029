"""Fits the chance that a thing is in the snapshot, from held-out queries that are in it and that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.files import write_json
from gog_edge.retrieval.calibration import IMAGE_FEATURES, TEXT_FEATURES, Calibration
from gog_edge.retrieval.pack import MANIFEST, read_manifest
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

RIDGE = 1e-3  # on standardised features: keeps separable data finite
STEPS = 50
LEAST = 10  # queries of each kind that a fit needs
TARGET_FALSE_ACCEPT = 0.05
BATCH = 64

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Line:
    """logit = x @ weights + bias."""

    weights: Matrix  # [d]
    bias: float


def fit_calibration(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    names: tuple[str, ...],
    target_false_accept: float = TARGET_FALSE_ACCEPT,
) -> Calibration:
    """Fit a logistic model; both kinds weigh alike, so 0.5 stands between them whatever their numbers.

    Args:
        features: [n, len(names)], one row a query.
        labels: [n], 1 where the thing is in the pack, else 0.
        names: names of the columns.
        target_false_accept: share of absent things that may pass the threshold, 0..1.

    Raises:
        PackError: too few queries of a kind, or shapes that do not fit.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or x.shape != (len(y), len(names)) or not np.isfinite(x).all():
        raise PackError(f"calibration: features {x.shape} for {len(y)} labels; wanted finite [n, {len(names)}]")
    present, absent = int(y.sum()), int(len(y) - y.sum())
    if min(present, absent) < LEAST:
        raise PackError(f"calibration: {present} present and {absent} absent queries; give at least {LEAST} of each")
    line = _fit_line(x, y, np.where(y > 0.5, 0.5 / present, 0.5 / absent) * len(y))
    chances = 1.0 / (1.0 + np.exp(-np.clip(x @ line.weights + line.bias, -60, 60)))
    threshold = _threshold(chances[y < 0.5], target_false_accept)
    return Calibration(
        features=names,
        weights=tuple(float(weight) for weight in line.weights),
        bias=line.bias,
        threshold=threshold,
        target_false_accept=target_false_accept,
        false_accept=float(np.mean(chances[y < 0.5] >= threshold)),
        true_accept=float(np.mean(chances[y > 0.5] >= threshold)),
        present=present,
        absent=absent,
    )


def calibrate_images(
    retriever: Retriever,
    present: Sequence[ImageQuery],
    absent: Sequence[ImageQuery],
    *,
    target_false_accept: float = TARGET_FALSE_ACCEPT,
) -> Calibration:
    """Fit to pictures of things that the pack holds and of things that it does not, framed as they will be asked."""
    queries = [*present, *absent]
    batches = [retriever.image_features(queries[at : at + BATCH]) for at in range(0, len(queries), BATCH)]
    features = np.concatenate(batches) if batches else np.empty((0, len(IMAGE_FEATURES)))
    labels = [1] * len(present) + [0] * len(absent)
    return fit_calibration(features, labels, names=IMAGE_FEATURES, target_false_accept=target_false_accept)


def calibrate_texts(
    retriever: Retriever,
    present: Sequence[str],
    absent: Sequence[str],
    *,
    target_false_accept: float = TARGET_FALSE_ACCEPT,
) -> Calibration:
    """Fit to text queries that the pack can answer and that it cannot."""
    features = retriever.text_features([TextQuery(text) for text in (*present, *absent)])
    labels = [1] * len(present) + [0] * len(absent)
    return fit_calibration(features, labels, names=TEXT_FEATURES, target_false_accept=target_false_accept)


def write_calibration(folder: Path, *, image: Calibration | None, text: Calibration | None) -> None:
    """Store calibrations in a pack's manifest; who has the pack open keeps the old ones. PackError when no pack."""
    write_json(folder / MANIFEST, read_manifest(folder).calibrated(image, text).to_json())


def _fit_line(x: Matrix, y: Matrix, cost: Matrix) -> _Line:
    """Weighted ridge logistic regression by Newton's method, on standardised columns."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])  # [n, d + 1]
    ridge = np.full(z.shape[1], RIDGE * len(x))
    ridge[-1] = 0.0
    w = np.zeros(z.shape[1])
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -60, 60)))
        gradient = z.T @ (cost * (p - y)) + ridge * w
        hessian = (z * (cost * p * (1 - p))[:, None]).T @ z + np.diag(ridge + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    weights = w[:-1] / scale
    return _Line(weights, float(w[-1] - mean @ weights))


def _threshold(absent: Matrix, target: float) -> float:
    """The lowest chance that at most `target` of the absent things reach."""
    allowed = int(np.floor(target * len(absent)))
    highest = np.sort(absent)[::-1]
    return float(min(1.0, np.nextafter(highest[allowed], 2.0))) if allowed < len(absent) else 0.0
