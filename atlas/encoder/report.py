"""The measurements of a finished encoder, through the runtime that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas import scenes
from atlas.encoder.crops import CropMaker
from atlas.encoder.flagset import FIRST_TEST_SEED, FlagSet, invent_flags
from atlas.encoder.measure import SCENE_WIDTH, Ranking, auroc, rank, scene_crops
from atlas.encoder.texts import PLAIN, TEMPLATES, names_of
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import Pixels, Vectors

SEED = 900  # of the test scenes; training and progress use others
SMALL_SCENE_WIDTH = 256  # pixels
UNKNOWN = 300  # invented flags, never trained
BATCH = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    crops: int
    recall1: float | None
    recall5: float | None
    auroc: float | None
    auroc_margin: float | None


def _embed(encoder: Encoder, pictures: Sequence[Pixels]) -> Vectors:
    return np.concatenate([encoder.embed_images(pictures[k : k + BATCH]) for k in range(0, len(pictures), BATCH)])


def whole_scenes(flags: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Pictures with two to six flags each, as searched with when nobody gazes."""
    rng = np.random.default_rng([seed, 51])
    pictures = []
    for _ in range(count):
        chosen = rng.choice(len(flags), size=int(rng.integers(2, scenes.MAX_FLAGS + 1)), replace=False)
        spec = scenes.make_spec(int(rng.integers(2**31)), [str(k) for k in chosen])
        pictures.append(scenes.draw_scene(spec, {str(k): flags[k] for k in chosen}, SCENE_WIDTH))
    return pictures


def strayed_crops(flags: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Pictures of no single flag, made as in training, from a seed of their own."""
    maker = CropMaker(flags, seed=seed, backgrounds=40)
    return [maker.nothing(160) for _ in range(count)]


def evaluate(encoder_folder: Path, flagset: FlagSet, *, per_flag: int = 6, left_out: Sequence[int] = ()) -> list[Row]:
    """Recall by size and occlusion over all stored flags, and how well what is not stored is noticed.

    `left_out` are groups that the encoder was not trained on; they get a row of their own.
    """
    encoder = Encoder.open(encoder_folder, threads=1)
    clean = _embed(encoder, flagset.flags)
    crops = scene_crops(flagset.flags, per_flag=per_flag, seed=SEED)
    # Hardly any flag is narrow at the usual width.
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
    return Row(name, int(part.sum()), float(ranking.right[part].mean()), float(ranking.right5[part].mean()), None, None)


def _unknown_rows(encoder: Encoder, flagset: FlagSet, clean: Vectors, known: Ranking) -> list[Row]:
    invented = invent_flags(range(FIRST_TEST_SEED, FIRST_TEST_SEED + UNKNOWN))
    unknown = scene_crops(invented, per_flag=2, seed=SEED + 1)
    tests = {
        "against invented flags": [crop.pixels for crop in unknown],
        "against real flags of no country": [
            crop.pixels for crop in scene_crops(flagset.others, per_flag=10, seed=SEED + 2)
        ],
        "against whole scenes": whole_scenes([*flagset.flags, *invented], 200, SEED + 3),
        "against no single flag": strayed_crops([*flagset.flags, *invented], 300, SEED + 4),
    }
    rows = []
    for name, pictures in tests.items():
        other = rank(_embed(encoder, pictures), clean, flagset.groups, [-1] * len(pictures))
        scores = auroc(known.best, other.best), auroc(known.margin, other.margin)
        rows.append(Row(name, len(pictures), None, None, *scores))
    # Flags that training never saw, once they are stored.
    groups = [*flagset.groups, *range(max(flagset.groups) + 1, max(flagset.groups) + 1 + UNKNOWN)]
    stored = np.concatenate([clean, _embed(encoder, invented)])
    wanted = [groups[len(flagset.flags) + crop.flag] for crop in unknown]
    found = rank(_embed(encoder, tests["against invented flags"]), stored, groups, wanted)
    rows.append(_recall_row("invented flags, stored for this test only", found, np.ones(len(wanted), dtype=bool)))
    return rows


def _text_row(encoder: Encoder, flagset: FlagSet, clean: Vectors) -> Row:
    captions = [(t.format(names_of(c)[0]), g) for c, g in zip(flagset.countries, flagset.groups, strict=True)
                for t in TEMPLATES[:PLAIN]]  # fmt: skip
    vectors = np.concatenate([encoder.embed_texts([c for c, _ in captions[k : k + 256]])
                              for k in range(0, len(captions), 256)])  # fmt: skip
    found = rank(vectors, clean, flagset.groups, [group for _, group in captions])
    return _recall_row("captions, text to flag", found, np.ones(len(captions), dtype=bool))


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """For the last line of the command."""
    return {
        row.what: {
            key: round(value, 4)
            for key in ("crops", "recall1", "recall5", "auroc", "auroc_margin")
            if (value := getattr(row, key)) is not None
        }
        for row in rows
    }
