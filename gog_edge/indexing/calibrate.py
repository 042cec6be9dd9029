"""Fits the chance that a thing is in the snapshot, from held-out queries that are in it and that are not."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.indexing.calibration_queries import HeldOut, held_out_looks, held_out_texts
from gog_edge.indexing.commit import changing, put_in_force
from gog_edge.retrieval.calibration import IMAGE_FEATURES, TEXT_FEATURES, Calibration
from gog_edge.retrieval.channels import IMAGE_TO_CAPTION, Look
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import Key, Ranking, fuse
from gog_edge.retrieval.manifest import Manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.ranking import rank_words

RIDGE = 1e-3  # on standardised features: keeps separable data finite
STEPS = 50
LEAST = 20  # queries of each kind that a calibration needs; half of them are fitted to
TARGET_FALSE_ACCEPT = 0.05
QUERIES = 512  # pictures, and texts, that a pack is calibrated with
CAPTION_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
LEAST_GAIN = 0.02  # of recall or of accepted things, for which captions are worth a search of their own

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Line:
    """logit = x @ weights + bias."""

    weights: Matrix  # [d]
    bias: float

    def logits(self, x: Matrix) -> Matrix:
        return x @ self.weights + self.bias


def calibrate_pack(folder: Path, encoder: Encoder | None, *, target_false_accept: float = TARGET_FALSE_ACCEPT,
                   queries: int = QUERIES, seed: int = 0) -> Manifest:
    """Calibrate a pack with looks at its own pictures and with its own words, and put the result in force.

    Where there are too few pictures or articles for a calibration, the manifest says that there is none.

    Args:
        folder: a pack; who has it open goes on with what it read.
        encoder: the pack's own; None for a pack of texts alone.
        target_false_accept: share, 0..1, of things that are not there that may count as found.
        queries: pictures, and texts, at most.
        seed: of what is drawn.

    Raises:
        PackError: no pack, another encoder, or another process writes it.
    """
    if not 0 <= target_false_accept < 1:
        raise PackError(f"a target of {target_false_accept} for false accepts; give a share from 0 to below 1")
    with changing(folder):
        pack = Pack.open(folder, encoder)
        try:
            image = _calibrate_looks_of(pack, encoder, target_false_accept, queries, seed)
            known, unknown = held_out_texts(pack.store, pack.manifest, queries, seed)
            text = calibrate_texts(pack, known, unknown, target_false_accept=target_false_accept) \
                if _enough(known, unknown) else None
        finally:
            pack.close()
        manifest = pack.manifest.calibrated(image, text)
        put_in_force(folder, manifest)
    return manifest


def _calibrate_looks_of(pack: Pack, encoder: Encoder | None, target: float, queries: int,
                        seed: int) -> Calibration | None:
    if encoder is None:
        return None
    looks = held_out_looks(pack, encoder, queries, seed)
    return calibrate_looks(looks, target) if _enough(looks.present, looks.absent) else None


def _enough(present: Sized, absent: Sized) -> bool:
    return min(len(present), len(absent)) >= LEAST


def calibrate_looks(looks: HeldOut, target_false_accept: float = TARGET_FALSE_ACCEPT) -> Calibration:
    """Fit to looks at things that a pack holds and that it does not, and weigh its captions by how they help."""
    features = [look.features for look in (*looks.present, *looks.absent)]
    labels = [1] * len(looks.present) + [0] * len(looks.absent)
    fit = fit_calibration(features, labels, names=IMAGE_FEATURES, target_false_accept=target_false_accept,
                          must_earn=("agreement",))
    half = len(looks.present) // 2
    return replace(fit, caption_weight=caption_weight(looks.present[:half], looks.shows[:half]))


def caption_weight(looks: Sequence[Look], shows: Sequence[frozenset[Key]]) -> float:
    """How much captions should count: the least of `CAPTION_WEIGHTS` that puts most of the right articles first."""
    recalls = [float(np.mean([first_of(look, weight) in right for look, right in zip(looks, shows, strict=True)]))
               for weight in CAPTION_WEIGHTS]
    best = int(np.argmax(recalls))
    return CAPTION_WEIGHTS[best] if recalls[best] >= recalls[0] + LEAST_GAIN else 0.0


def first_of(look: Look, weight: float) -> Key | None:
    """The article that comes first when captions have that weight; None where nothing was found."""
    captions = [Ranking(IMAGE_TO_CAPTION, ranks, weight) for ranks in look.captions.values() if weight]
    return next(iter(fuse([look.ranking, *captions])), None)


def calibrate_texts(pack: Pack, present: Sequence[str], absent: Sequence[str], *,
                    target_false_accept: float = TARGET_FALSE_ACCEPT) -> Calibration:
    """Fit to text queries that the pack can answer and that it cannot."""
    features = [rank_words(pack, text).features for text in (*present, *absent)]
    labels = [1] * len(present) + [0] * len(absent)
    return fit_calibration(features, labels, names=TEXT_FEATURES, target_false_accept=target_false_accept)


def fit_calibration(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    names: tuple[str, ...],
    target_false_accept: float = TARGET_FALSE_ACCEPT,
    must_earn: Sequence[str] = (),
) -> Calibration:
    """Fit a logistic model to the first half of each kind and measure it on the second; both kinds weigh alike.

    Args:
        features: [n, len(names)], one row a query, what belongs together (the same picture) side by side.
        labels: [n], 1 where the thing is in the pack, else 0.
        names: names of the columns.
        target_false_accept: share of absent things that may pass, 0..1.
        must_earn: columns that are left out unless they let more things be found.

    Raises:
        PackError: too few queries of a kind, or shapes that do not fit.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or x.shape != (len(y), len(names)) or not np.isfinite(x).all():
        raise PackError(f"calibration: features {x.shape} for {len(y)} labels; wanted finite [n, {len(names)}]")
    present, absent = x[y > 0.5], x[y < 0.5]
    if not _enough(present, absent):
        raise PackError(f"calibration: {len(present)} present and {len(absent)} absent queries; give at least {LEAST} "
                        "of each")
    (fit_present, held_present), (fit_absent, held_absent) = (np.array_split(one, 2) for one in (present, absent))
    line = _fit(fit_present, fit_absent, target_false_accept)
    for name in must_earn:
        kept = (np.array(names) != name).astype(np.float64)
        without = _fit(fit_present * kept, fit_absent * kept, target_false_accept)
        gain = np.mean(line.logits(fit_present) >= 0) - np.mean(without.logits(fit_present * kept) >= 0)
        line = line if gain >= LEAST_GAIN else without
    return Calibration(
        features=names,
        weights=tuple(float(weight) for weight in line.weights),
        bias=line.bias,
        target_false_accept=target_false_accept,
        false_accept=float(np.mean(line.logits(held_absent) >= 0)),
        true_accept=float(np.mean(line.logits(held_present) >= 0)),
        present=len(present),
        absent=len(absent),
    )


def write_calibration(folder: Path, *, image: Calibration | None, text: Calibration | None) -> Manifest:
    """Put calibrations in force that were fitted elsewhere; who has the pack open keeps the old ones.

    Raises:
        PackError: no pack, or another process writes it.
    """
    with changing(folder) as manifest:
        calibrated = manifest.calibrated(image, text)
        put_in_force(folder, calibrated)
    return calibrated


def _fit(present: Matrix, absent: Matrix, target: float) -> _Line:
    """The line whose zero stands where at most `target` of the absent things pass."""
    x, y = np.concatenate([present, absent]), np.repeat([1.0, 0.0], [len(present), len(absent)])
    line = _fit_line(x, y, np.where(y > 0.5, 0.5 / len(present), 0.5 / len(absent)) * len(y))
    return _Line(line.weights, line.bias - _threshold(line.logits(present), line.logits(absent), target))


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


def _threshold(present: Matrix, absent: Matrix, target: float) -> float:
    """A logit that one more absent thing reaches with a chance of at most `target`: split conformal prediction.

    Of n + 1 exchangeable things each is as likely as any other among the highest, so that the k-th highest of n, with
    k = target * (n + 1), is passed by the next one with a chance of k / (n + 1). With too few things, above them all.
    The logit lies halfway to the next one above, of either kind: rounding must not let equal things pass.
    """
    rank = max(1, int(np.floor(target * (len(absent) + 1))))
    lowest = float(np.sort(absent)[-rank])
    higher = np.concatenate([present, absent])
    higher = higher[higher > lowest]
    return 0.5 * (lowest + float(higher.min())) if len(higher) else lowest + 1.0
