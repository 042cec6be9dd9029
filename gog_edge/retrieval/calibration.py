"""From what a search looked like to the chance that the thing is in the snapshot at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gog_edge.errors import PackError

# score: the best cosine. margin: how far the next thing is behind it. contrast: how far the candidates' mean is.
# agreement: one over the place that the captions' search gives the best thing, 0 where it does not find it.
IMAGE_FEATURES = ("score", "margin", "contrast", "agreement")
TEXT_FEATURES = ("coverage", "unknown", "rarity", "named")
FOUND = 0.5  # chance from which a thing counts as found


@dataclass(frozen=True, slots=True)
class Calibration:
    """A logistic model and what it was measured to do on queries that it was not fitted to.

    Its bias is such that `FOUND` stands where the stated share of absent things passes.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]  # one per feature; 0 where it did not earn its place
    bias: float
    target_false_accept: float  # share of absent things that may count as found
    false_accept: float  # measured at FOUND
    true_accept: float
    present: int  # queries; the model was fitted to one half of them and measured on the other
    absent: int
    caption_weight: float = 0.0  # how much captions count beside pictures when things are ranked

    @property
    def asks_captions(self) -> bool:
        """Whether captions must be searched for a picture."""
        return self.caption_weight > 0 or any(
            weight for name, weight in zip(self.features, self.weights, strict=True) if name == "agreement"
        )

    def chance(self, features: ArrayLike) -> float:
        """Chance, 0..1, that what was searched for is in the snapshot; `features` as named."""
        logit = float(np.dot(np.asarray(self.weights), np.asarray(features, dtype=np.float64))) + self.bias
        return float(1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0))))

    def to_json(self) -> dict[str, Any]:
        """For a pack's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], names: tuple[str, ...]) -> Calibration:
        """Read what `to_json` gave.

        Raises:
            PackError: other features than `names`, or not of this form.
        """
        try:
            read = cls(**{**raw, "features": tuple(raw["features"]), "weights": tuple(map(float, raw["weights"]))})
        except (KeyError, TypeError, ValueError) as exc:
            raise PackError(f"pack: its calibration is not usable ({exc!r}); calibrate the pack again") from exc
        if read.features != names or len(read.weights) != len(names):
            raise PackError(f"pack: its calibration is for {read.features}, wanted {names}; calibrate it again")
        return read
