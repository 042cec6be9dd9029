"""Evaluation of an encoder: recall of flags in scenes, and separation of stored flags from everything else (AUROC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas import scenes
from atlas.encoder.crops import CropMaker, crop_padded
from atlas.encoder.flagset import FIRST_TEST_SEED, FLAG_TEMPLATES, TEMPLATES, FlagSet, invent_flags, names_of
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import Box, Pixels, Size, Vectors

SCENE_WIDTH = 640  # pixels
SMALL_SCENE_WIDTH = 256  # pixels
BOX_ERROR = 4.0  # largest error of each side of a box, in pixels of a scene of SCENE_WIDTH
SEED = 900  # of the evaluation scenes; training and progress reports use others
UNKNOWN = 300  # invented flags, never trained on
BATCH = 32  # images embedded at a time


@dataclass(frozen=True, slots=True)
class SceneCrop:
    """A flag cropped from a drawn scene."""

    pixels: Pixels
    flag: int  # index of the flag
    width: float  # of the flag in the scene, in pixels
    occluded: bool


def scene_crops(flags: Sequence[Pixels], *, per_flag: int, seed: int, width: int = SCENE_WIDTH) -> list[SceneCrop]:
    """Crop every flag about `per_flag` times from scenes of one to six flags, with inexact boxes."""
    rng = np.random.default_rng([seed, 31])
    order = np.concatenate([rng.permutation(len(flags)) for _ in range(per_flag)]).tolist()
    keyed = {str(index): flag for index, flag in enumerate(flags)}
    error = BOX_ERROR * width / SCENE_WIDTH
    crops, at = [], 0
    while at < len(order):
        chosen = list(dict.fromkeys(order[at : at + int(rng.integers(1, scenes.MAX_FLAGS + 1))]))
        at += len(chosen)
        spec = scenes.make_spec(int(rng.integers(2**31)), [str(index) for index in chosen])
        picture = scenes.draw_scene(spec, keyed, width)
        size = Size(picture.shape[1], picture.shape[0])
        for place, index in enumerate(chosen):
            box = spec.box(place, size)
            near = Box(*(np.array([box.x0, box.y0, box.x1, box.y1]) + rng.uniform(-1, 1, 4) * error).tolist())
            occluded = spec.placed[place].occluder is not None
            crops.append(SceneCrop(crop_padded(picture, near), index, box.width, occluded))
    return crops


def auroc(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> float:
    """Return the area under the ROC curve: the probability that a positive scores above a negative.

    Ties count half; computed from the rank sum (Mann-Whitney U).
    """
    both = np.concatenate([positive, negative])
    order = both.argsort(kind="stable")
    ranks = np.empty(len(both))
    ranks[order] = np.arange(1, len(both) + 1)
    for value in np.unique(both[np.isin(both, negative)]):
        equal = both == value
        ranks[equal] = ranks[equal].mean()
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True, slots=True)
class Ranking:
    """The result of searching the stored flags with each crop. Flags of one group count as one hit."""

    correct: NDArray[np.bool_]  # [n] whether the first hit is the crop's flag
    correct5: NDArray[np.bool_]  # [n] whether one of the first five is
    best: NDArray[np.float32]  # [n] cosine of the first hit
    margin: NDArray[np.float32]  # [n] difference to the cosine of the second hit
    first: NDArray[np.int64]  # [n] group of the first hit


def rank(crops: Vectors, stored: Vectors, groups: Sequence[int], wanted: Sequence[int]) -> Ranking:
    """Search the stored flags with crops, exactly.

    Args:
        crops: embeddings [n, dim].
        stored: embeddings of the stored flags [m, dim].
        groups: the group of each stored flag [m].
        wanted: the group of each crop [n]; -1 if it is not stored.
    """
    cosines = crops @ stored.T
    count = max(groups) + 1
    by_group = np.full((len(crops), count), -1.0, dtype=np.float32)
    for column, group in enumerate(groups):
        by_group[:, group] = np.maximum(by_group[:, group], cosines[:, column])
    order = np.argsort(-by_group, axis=1)[:, :5]
    top = np.take_along_axis(by_group, order, axis=1)
    hit = order == np.asarray(wanted)[:, None]
    return Ranking(hit[:, 0], hit.any(1), top[:, 0], top[:, 0] - top[:, 1], order[:, 0])


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the results; a metric that does not apply is None."""

    what: str
    crops: int
    recall1: float | None
    recall5: float | None
    auroc: float | None
    auroc_margin: float | None


def _embed(encoder: Encoder, pictures: Sequence[Pixels]) -> Vectors:
    return np.concatenate([encoder.embed_images(pictures[k : k + BATCH]) for k in range(0, len(pictures), BATCH)])


def whole_scenes(flags: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Draw pictures of two to six flags each, the queries of a policy that does not gaze."""
    rng = np.random.default_rng([seed, 51])
    pictures = []
    for _ in range(count):
        chosen = rng.choice(len(flags), size=int(rng.integers(2, scenes.MAX_FLAGS + 1)), replace=False)
        spec = scenes.make_spec(int(rng.integers(2**31)), [str(k) for k in chosen])
        pictures.append(scenes.draw_scene(spec, {str(k): flags[k] for k in chosen}, SCENE_WIDTH))
    return pictures


def negative_crops(flags: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Draw crops that show no single flag, as in training."""
    maker = CropMaker(flags, seed=seed, backgrounds=40)
    return [maker.negative(160) for _ in range(count)]


def evaluate(encoder_folder: Path, flagset: FlagSet, *, per_flag: int = 6, left_out: Sequence[int] = ()) -> list[Row]:
    """Measure an exported encoder with the runtime that serves it.

    Returns recall by size and occlusion over all stored flags, then AUROC against several kinds of other pictures.

    Args:
        encoder_folder: the export.
        flagset: the stored flags.
        per_flag: crops per flag.
        left_out: groups that the encoder was not trained on; they get an additional row.
    """
    encoder = Encoder.open(encoder_folder, threads=1)
    clean = _embed(encoder, flagset.flags)
    crops = scene_crops(flagset.flags, per_flag=per_flag, seed=SEED)
    # Scenes of the usual width have hardly any narrow flags.
    crops += scene_crops(flagset.flags, per_flag=2, seed=SEED + 5, width=SMALL_SCENE_WIDTH)
    wanted = np.array([flagset.groups[crop.flag] for crop in crops])
    known = rank(_embed(encoder, [crop.pixels for crop in crops]), clean, flagset.groups, wanted.tolist())
    width = np.array([crop.width for crop in crops])
    hidden = np.array([crop.occluded for crop in crops])
    usual = np.arange(len(crops)) < per_flag * len(flagset.flags)
    parts = {
        "all stored flags, scenes of 640 px": usual,
        "narrower than 80 px (scenes of 256 px too)": width < 80,
        "80 to 150 px": (width >= 80) & (width <= 150),
        "wider than 150 px": width > 150,
        "occluded by up to a quarter": hidden,
    }
    if left_out:
        parts["flags left out of training"] = np.isin(wanted, list(left_out))
    rows = [_recall_row(name, known, part) for name, part in parts.items()]
    return rows + _unknown_rows(encoder, flagset, clean, known) + [_text_row(encoder, flagset, clean)]


def _recall_row(name: str, ranking: Ranking, part: NDArray[np.bool_]) -> Row:
    if not part.any():
        return Row(name, 0, None, None, None, None)
    recalls = float(ranking.correct[part].mean()), float(ranking.correct5[part].mean())
    return Row(name, int(part.sum()), *recalls, None, None)


def _unknown_rows(encoder: Encoder, flagset: FlagSet, clean: Vectors, known: Ranking) -> list[Row]:
    invented = invent_flags(range(FIRST_TEST_SEED, FIRST_TEST_SEED + UNKNOWN))
    unknown = scene_crops(invented, per_flag=2, seed=SEED + 1)
    tests = {
        "against invented flags": [crop.pixels for crop in unknown],
        "against real flags of no country": [
            crop.pixels for crop in scene_crops(flagset.others, per_flag=10, seed=SEED + 2)
        ],
        "against whole scenes": whole_scenes([*flagset.flags, *invented], 200, SEED + 3),
        "against no single flag": negative_crops([*flagset.flags, *invented], 300, SEED + 4),
    }
    rows = []
    for name, pictures in tests.items():
        other = rank(_embed(encoder, pictures), clean, flagset.groups, [-1] * len(pictures))
        scores = auroc(known.best, other.best), auroc(known.margin, other.margin)
        rows.append(Row(name, len(pictures), None, None, *scores))
    # Recall of flags that training never saw, after adding them to the index.
    groups = [*flagset.groups, *range(max(flagset.groups) + 1, max(flagset.groups) + 1 + UNKNOWN)]
    stored = np.concatenate([clean, _embed(encoder, invented)])
    wanted = [groups[len(flagset.flags) + crop.flag] for crop in unknown]
    found = rank(_embed(encoder, tests["against invented flags"]), stored, groups, wanted)
    rows.append(_recall_row("invented flags, stored for this test only", found, np.ones(len(wanted), dtype=bool)))
    return rows


def _text_row(encoder: Encoder, flagset: FlagSet, clean: Vectors) -> Row:
    captions = [(t.format(names_of(c)[0]), g) for c, g in zip(flagset.countries, flagset.groups, strict=True)
                for t in TEMPLATES[:FLAG_TEMPLATES]]  # fmt: skip
    vectors = np.concatenate([encoder.embed_texts([c for c, _ in captions[k : k + 256]])
                              for k in range(0, len(captions), 256)])  # fmt: skip
    found = rank(vectors, clean, flagset.groups, [group for _, group in captions])
    return _recall_row("captions, text to flag", found, np.ones(len(captions), dtype=bool))


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the metrics by row name, rounded to four places, without those that do not apply."""
    return {
        row.what: {
            key: round(value, 4)
            for key in ("crops", "recall1", "recall5", "auroc", "auroc_margin")
            if (value := getattr(row, key)) is not None
        }
        for row in rows
    }
